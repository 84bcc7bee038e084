"""A conversation as token ids: the prompt as the tokenizer's template shows it, and what is new.

The rendering of a longer conversation need not begin with that of the shorter one: templates drop
the reasoning of earlier turns, add to the newest one, or print the date. So what is new is found
by its place, behind the last turn's words, and never by comparing two renderings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict


class Tokenizer(Protocol):
    """What a session needs of a tokenizer; transformers' have it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class ChatTurn(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


def encode(tokenizer: Tokenizer, text: str, *, first: bool = True) -> list[int]:
    """Token ids of a text, and with `first` the marks that begin one; never those that end it,
    because a stream goes on and a prompt is to be continued.
    """
    plain = tokenizer.encode(text, add_special_tokens=False)
    if not first:
        return plain
    letter = tokenizer.encode("a", add_special_tokens=False)
    marked = tokenizer.encode("a", add_special_tokens=True)
    for k in range(len(marked) - len(letter) + 1):
        if marked[k : k + len(letter)] == letter:
            return [*marked[:k], *plain]
    return tokenizer.encode(text, add_special_tokens=True)


def prompt(tokenizer: Tokenizer, turns: Sequence[ChatTurn]) -> list[int]:
    """The ids that ask for a reply to the last turn."""
    text = _render(tokenizer, turns, ask=True)
    return encode(tokenizer, text, first=not _templated(tokenizer))


def heard(
    tokenizer: Tokenizer, turns: Sequence[ChatTurn], said: Sequence[int] | None
) -> tuple[list[int], int]:
    """What the last turn adds to a stream, up to where the reply begins, and how many of these
    ids only close the turn before.

    said: the ids of the turn before as the stream ends with them, in which its closing mark may
    stand already; None where the stream ends with something else: then nothing is closed.
    """
    if len(turns) == 1:
        return prompt(tokenizer, turns), 0
    new = encode(tokenizer, _behind(tokenizer, turns, len(turns) - 2, ask=True), first=False)
    closing: list[int] = []
    if turns[-2]["role"] == "assistant":
        end = _behind(tokenizer, turns[:-1], len(turns) - 2, ask=False)
        closing = encode(tokenizer, end, first=False)
    closed = _common(closing, new)
    if said is None:
        return new[closed:], 0
    there = next(n for n in range(closed, -1, -1) if list(said[len(said) - n :]) == new[:n])
    return new[there:], closed - there


def shorter(turns: Sequence[ChatTurn]) -> list[ChatTurn]:
    """The conversation without its oldest exchange; system turns at its head, and the newest
    turn, stay.
    """
    head = next(i for i, turn in enumerate(turns) if turn["role"] != "system")
    rest = range(head + 1, len(turns))
    cut = next((i for i in rest if turns[i]["role"] == "user"), len(turns) - 1)
    return [*turns[:head], *turns[cut:]]


def _templated(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _render(tokenizer: Any, turns: Sequence[ChatTurn], *, ask: bool) -> str:
    if _templated(tokenizer):
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
    lines = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns)
    return lines + ("Assistant:" if ask else "")


def _behind(tokenizer: Any, turns: Sequence[ChatTurn], i: int, *, ask: bool) -> str:
    """The rendering behind the words of turn i; all of it where the template leaves them out."""
    mark = "turn0mark"
    while any(mark in turn["content"] for turn in turns):
        mark += "0"
    marked: list[ChatTurn] = [*turns[:i], {**turns[i], "content": mark}, *turns[i + 1 :]]
    return _render(tokenizer, marked, ask=ask).rpartition(mark)[2]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
