"""BABILong (figure 9): the facts of bAbI stories in the text of books, read as bytes.

A story is sentences with questions between them. For a question all sentences before it are hidden,
in their order, each where a sentence of the book has ended; the text has exactly the length asked
for. Rows to train on keep a story's other questions, too, each where it stands in the story.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .haystack import Asked, Bytes, Piece, Row, cut, hide
from .tasks import stream

NAMES = ("qa1", "qa2", "qa3", "qa4", "qa5")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = dict.fromkeys(NAMES[:4], _PLACES) | {
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")
}
SAID = 12  # bytes, at most, of an answer
TELLING = 2  # letters by which any two answers differ: whoever has them right knows the rest
FILES = ("babi_en_10k_qa1-5.tar.gz", "babi_en_1k.tar.gz")  # the larger one first


class Line(NamedTuple):
    """A sentence of a story; of a question the answer, else None."""

    text: str
    answer: str | None = None


Story = tuple[Line, ...]
Part = tuple[bytes, tuple[int, int] | None]  # of a row: its text, and what of it is asked for


@cache
def stories(folder: Path, name: str, split: str) -> tuple[Story, ...]:
    """Those of a task's file, "train" or "test"; FileNotFoundError where there is none."""
    for file in FILES:
        if not (folder / file).is_file():
            continue
        with tarfile.open(folder / file) as archive:
            for member in archive.getmembers():
                if re.search(rf"(^|/){name}_.*_{split}\.txt$", member.name):
                    opened = archive.extractfile(member)
                    assert opened is not None
                    return parsed(opened.read().decode())
    raise FileNotFoundError(f"no {name}, {split}, in {folder}: put {' or '.join(FILES)} there")


def parsed(text: str) -> tuple[Story, ...]:
    """The stories of a bAbI file: each begins with line 1."""
    found: list[list[Line]] = []
    for line in text.splitlines():
        number, _, said = line.partition(" ")
        if number == "1":
            found.append([])
        question, *rest = said.split("\t")
        found[-1].append(Line(question.strip(), rest[0].strip() if rest else None))
    return tuple(map(tuple, found))


def sample(
    name: str, length: int, told: Sequence[Story], text: Bytes, seed: int, *, ahead: bool = False
) -> Asked:
    """A question of one of the stories about a text of exactly `length` bytes.

    ahead: the question is told before the text, too. ValueError where no story fits.
    """
    rng = stream(seed, "babilong", name, length)
    for _ in range(100):
        story = told[int(rng.integers(len(told)))]
        at = [i for i, line in enumerate(story) if line.answer is not None]
        last = at[int(rng.integers(len(at)))]
        facts = [line.text for line in story[:last] if line.answer is None]
        head = f"{story[last].text}\n".encode() if ahead else b""
        size = length - len(head) - sum(len(fact.encode()) + 1 for fact in facts)
        if size >= 0:
            break
    else:
        raise ValueError(f"length={length}: no story of {name} fits; give more bytes")
    places = np.sort(rng.uniform(size=len(facts)))
    pieces = [Piece(f"{fact} ".encode(), float(p)) for fact, p in zip(facts, places)]
    row, depths = hide(cut(text, size, rng), pieces)
    answer = story[last].answer
    assert answer is not None
    return Asked(head + row.ids.tobytes(), question(story[last].text), (answer,), depths)


def question(text: str) -> bytes:
    """As it is asked, up to where the answer begins."""
    return f"\n{text} Answer:".encode()


def row(
    length: int, told: Sequence[Story], text: Bytes, rng: np.random.Generator, hay: float
) -> Row:
    """A sequence of exactly `length` bytes: sentences of stories, with all their questions, in
    `hay` times the length of a book's text.
    """
    spare = int(length * (1 - hay))
    pieces: list[Part] = []
    while (story := _pieces(told[int(rng.integers(len(told)))])) and (not pieces or spare > 0):
        own = _fitting(story, spare if pieces else max(spare, length // 2))
        if not own:
            break
        pieces += own
        spare -= sum(len(part) for part, _ in own)
    size = length - sum(len(part) for part, _ in pieces)
    places = np.sort(rng.uniform(size=len(pieces)))
    placed = [Piece(part, float(at), span) for (part, span), at in zip(pieces, places)]
    return hide(cut(text, size, rng), placed)[0]


def _pieces(story: Story) -> list[Part]:
    found: list[Part] = []
    for line in story:
        if line.answer is None:
            found.append((f"{line.text} ".encode(), None))
        else:
            asked = question(line.text)
            begin = len(asked) + 1
            found.append((asked + f" {line.answer}.\n".encode(), (begin, begin + TELLING)))
    return found


def _fitting(story: list[Part], size: int) -> list[Part]:
    """Its beginning, up to the last question that fits into so many bytes."""
    reached = accumulate(len(part) for part, _ in story)
    asked = [i for i, (end, (_, span)) in enumerate(zip(reached, story)) if span and end <= size]
    return story[: asked[-1] + 1 if asked else 0]


def score(asked: Asked, said: str, name: str) -> float:
    """1 where the first sentence has the answer and no other label of the task, but for those that
    the question names.
    """
    first = re.split(r"[.\n]", said.strip().lower())[0]
    known = {label for label in map(str.lower, LABELS[name]) if label in first}
    named = {label.lower() for label in LABELS[name] if label.encode() in asked.question}
    return float(known - named == {asked.answers[0].lower()})
