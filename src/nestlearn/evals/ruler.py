"""RULER's needles for models that read bytes: rows to train on, and questions of any length.

The tasks, the sentences and the score are those of `needles`. A text has exactly the length asked
for; its question follows. Keys to train on and keys to test on have no word in common
(`parted`). A model from scratch sees few answers in a row with one needle, so rows to train on
are dense: several needles, and short questions about each of them as soon as it has stood there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from .haystack import Asked, Bytes, Piece, Row, cut, hide, repeated
from .needles import NOISE, TASKS, Task, Words, draw_keys, draw_value, score, sentence, wording
from .tasks import stream

NAMES = ("S-NIAH-1", "S-NIAH-2", "S-NIAH-3", "MK-NIAH-1", "MQ-NIAH", "MV-NIAH")  # of table 1
HELD = 5  # one word in so many is for tests
GAP = 24  # newlines, at most, before a question
SAID = 56  # bytes, at most, of an answer
DIGITS = 7  # of a number
ROOM = 192  # bytes, about, of a needle and a question


def parted(words: Words) -> tuple[Words, Words]:
    """Words to train on, and words to test on."""

    def part(own: tuple[str, ...], test: bool) -> tuple[str, ...]:
        return tuple(word for i, word in enumerate(own) if (i % HELD == 0) is test)

    one, two = (Words(*(part(own, test) for own in words)) for test in (False, True))
    return one, two


def said(values: Sequence[str]) -> str:
    """An answer as it is written."""
    few = ", ".join(values[:-1])
    return f" {few}, and {values[-1]}." if few else f" {values[0]}."


def sample(
    name: str, length: int, words: Words, text: Bytes, seed: int, *, depth: float | None = None,
    ahead: bool = False,
) -> Asked:  # fmt: skip
    """A question about a text of exactly `length` bytes.

    text: the haystack of tasks that hide needles in one. depth: where the only needle that is asked
    for stands (None: anywhere). ahead: the question is told before the text, too. ValueError for an
    unknown task and for a length without room.
    """
    if name not in NAMES:
        raise ValueError(f"task {name!r} is unknown: use one of {', '.join(NAMES)}")
    rng = stream(seed, "ruler", name, length)
    return _made(TASKS[name], length, words, text, rng, depth=depth, ahead=ahead)


def _made(
    task: Task, length: int, words: Words, text: Bytes, rng: np.random.Generator, *,
    depth: float | None = None, ahead: bool = False, gap: int | None = None,
) -> Asked:  # fmt: skip
    """gap: newlines before the question, which then counts, with its answer, in the length; a row
    to train on, with decoys.
    """
    keys = draw_keys(rng, words, task.keys)
    values = [[draw_value(rng, task.value) for _ in range(task.values)] for _ in keys]
    asked = sorted(int(i) for i in rng.permutation(len(keys))[: task.queries])
    before, question = wording(task, [keys[i] for i in asked])
    told = f"{question.split('?')[0]}?\n" if ahead else ""
    head = f"{told}{before}\n".encode()
    facts = [(i, v) for i in range(len(keys)) for v in values[i]]
    places = rng.uniform(size=len(facts))
    if depth is not None and len(asked) * task.values == 1:
        places[asked[0]] = depth
    mark = "\n" if task.haystack == "noise" else " "
    pieces = [
        Piece(f"{sentence(task.value, keys[i], v)}{mark}".encode(), float(at))
        for (i, v), at in zip(facts, places)
    ]
    order = [facts[i] for i in sorted(range(len(facts)), key=lambda i: pieces[i].at)]
    answers = tuple(v for i in asked for j, v in order if j == i)
    ending = f"{chr(10) * (gap or 1)}{question}".encode()
    rest = 0 if gap is None else len(ending) + len(said(answers))
    size = length - len(head) - _size(pieces) - rest
    found, depths = hide(_hay(task.haystack == "noise", size, text, rng, gap is not None), pieces)
    return Asked(head + found.ids.tobytes(), ending, answers, depths)


def _hay(noise: bool, size: int, text: Bytes, rng: np.random.Generator, decoys: bool) -> Bytes:
    if size < 0:
        raise ValueError(f"no room for the needles and the question: give {-size} bytes more")
    hay = repeated(NOISE, size) if noise else cut(text, size, rng)
    return numbered(hay, rng) if decoys else hay


def numbered(hay: Bytes, rng: np.random.Generator) -> Bytes:
    """The haystack with numbers over some of its bytes, each after a space, up to one in 64 bytes.

    A book has few, so a memory would learn late that a number alone is no needle.
    """
    found, spaces = hay.copy(), np.flatnonzero(hay[:-DIGITS] == 32)
    count = int(rng.random() ** 2 * len(hay) / 64)
    for at in rng.permutation(spaces)[:count]:
        size = int(rng.integers(1, DIGITS + 1))
        found[at + 1 : at + 1 + size] = rng.integers(48, 58, size)
    return found


def _size(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.text) for piece in pieces)


# -------------------------------------------------------------------------------- to train on


def row(
    length: int, words: Words, text: Bytes, rng: np.random.Generator, dense: float,
    names: Sequence[str] = NAMES,
) -> Row:  # fmt: skip
    """A sequence of exactly `length` bytes: with probability `dense` many needles and questions,
    else one of the named tasks as it is tested; where that has no room, the former.
    """
    if rng.random() >= dense:
        task = TASKS[names[int(rng.integers(len(names)))]]
        gap, ahead = int(rng.integers(1, GAP)), bool(rng.integers(2))
        with suppress(ValueError):
            found = _made(task, length, words, text, rng, ahead=ahead, gap=gap)
            answer = said(found.answers).encode()
            ids = np.frombuffer(found.text + found.question + answer, np.uint8)
            return Row(ids, np.arange(length) > length - len(answer), np.zeros(length, bool))
    return _dense(length, words, text, rng)


def _dense(length: int, words: Words, text: Bytes, rng: np.random.Generator) -> Row:
    """Needles about one to five keys, and questions about them as soon as they have stood there, or
    all at the end; as many as fill a part of the length.
    """
    fill, late = max(ROOM, rng.uniform(0.3, 0.95) * length), bool(rng.integers(2))
    pieces: list[Piece] = []
    told: list[tuple[str, str, str, float]] = []
    for key in draw_keys(rng, words, int(rng.integers(1, 6))):
        kind, value = _drawn(rng, length)
        at = float(rng.uniform(0, 0.6 if late else 1))
        piece = Piece(f"{sentence(kind, key, value)} ".encode(), at)
        if pieces and _size(pieces) + len(piece.text) > min(0.6 * fill, length - ROOM):
            break
        pieces.append(piece)
        told.append((kind[:-1], key, value, at))
    while True:
        kind, key, value, at = told[int(rng.integers(len(told)))]
        end = f"The special magic {kind} for {key} mentioned in the provided text is"
        if length - _size(pieces) > 2 * ROOM and rng.random() < 0.2:
            asked = f"What is the special magic {kind} for {key} mentioned in the provided text?"
            end = f"{asked} {end}"
        asked, answer = "\n" * int(rng.integers(1, 4)) + end, said((value,))
        place = 1.0 if late else float(rng.uniform(at, 1))
        span = (len(asked) + 1, len(asked) + len(answer))
        piece = Piece(f"{asked}{answer} ".encode(), place, span)
        if _size(pieces) + len(piece.text) > fill and any(p.answer for p in pieces):
            break
        pieces.append(piece)
        if _size(pieces) > length:
            raise ValueError(f"length={length}: no room for a needle and a question")
    noise = rng.random() < 0.3
    return hide(_hay(noise, length - _size(pieces), text, rng, True), pieces)[0]


def _drawn(rng: np.random.Generator, length: int) -> tuple[str, str]:
    """A kind and a value: short numbers, too, which say as much of keys in less room."""
    if length >= 2 * ROOM and rng.random() < 0.15:
        return "uuids", draw_value(rng, "uuids")
    digits = 7 if rng.random() < 0.5 else int(rng.integers(1, 7))
    return "numbers", draw_value(rng, "numbers")[:digits]


def drill(length: int, words: Words, rng: np.random.Generator) -> Row:
    """Exactly `length` bytes of "KEY is: VALUE. " about up to five keys, again and again: what a
    needle and its question have in common, as often as there is room. Whatever stands there for the
    second time is asked for.
    """
    keys = draw_keys(rng, words, int(rng.integers(1, 6)))
    values = [_drawn(rng, length)[1] for _ in keys]
    seen: set[int] = set()
    parts: list[bytes] = []
    asked: list[NDArray[np.bool_]] = []
    while sum(len(part) for part in parts) < length:
        i = int(rng.integers(len(keys)))
        head, answer = f"{keys[i]} is: ".encode(), f"{values[i]}.".encode()
        parts += [head + answer + b" "]
        at = np.arange(len(parts[-1]))
        asked.append((at >= len(head)) & (at < len(head) + len(answer)) & (i in seen))
        seen.add(i)
    ids = np.frombuffer(b"".join(parts), np.uint8)[:length]
    return Row(ids, np.concatenate(asked)[:length], np.zeros(length, bool))


__all__ = ["NAMES", "SAID", "drill", "parted", "row", "sample", "score"]
