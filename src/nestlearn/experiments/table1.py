"""Table 1: RULER's needles in books and noise, read as bytes, at and far beyond trained lengths.

    nestlearn reproduce table1 --data FOLDER [--only 65,536 ...]

FOLDER holds gutenberg/ (see `nestlearn.experiments.books`) and ruler_words/. One training of a
model does all six tasks, on the training books and four fifths of the words; it is tested on the
test books and the other words. Each question is asked twice: strictly (the text is read once, the
state saved to a file, and another process that has that file is asked), and with the question told
before the text, too. --only names the lengths, in bytes; what was trained is not trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nestlearn.evals import needles, ruler
from nestlearn.evals.haystack import Asked, Row, cut
from nestlearn.experiments import recall
from nestlearn.experiments.experiment import Cell, Options, Tell
from nestlearn.experiments.lessons import Lesson
from nestlearn.experiments.provenance import fingerprint

LESSONS = (  # 32,768 bytes a step
    Lesson(128, 256, 1.0, 0.2), Lesson(256, 128, 0.3, 0.32, 1), Lesson(512, 64, 0.15, 0.45, 4),
    Lesson(1024, 32, 0.1, 0.6, 16), Lesson(2048, 16, 0.05, 0.8, 64),
    Lesson(4096, 8, 0.05, 1.0, 256),
)  # fmt: skip
QUICK_LESSONS = (Lesson(128, 2, 1.0, 0.4), Lesson(512, 2, 0.2, 1.0))
DENSE, PLAIN = 0.6, 0.1
LENGTHS = (4096, 8192, 16_384, 65_536, 262_144, 1_048_576)
DEPTHS, SAMPLES, FEW = 5, 8, 2  # places of a needle, texts for each, and of validation or long ones


def grid(asked: Options) -> list[Cell]:
    return recall.cells(
        asked, "needles", (QUICK_LESSONS, LESSONS), LENGTHS, usual=3, short=600, **own(asked)
    )


def own(asked: Options) -> Cell:
    """What cells of needles hold beside those of others; ValueError without their words."""
    folder = Path(asked.data or "", "ruler_words")
    lists = [folder / "adjectivelist.txt", folder / "nounlist.txt"]
    if asked.data is None or not lists[-1].is_file():
        raise ValueError(f"--data {asked.data}: give a folder with gutenberg/ and ruler_words/")
    return {
        "depths": asked.pick(1, DEPTHS), "samples": asked.pick(1, SAMPLES),
        "said": asked.pick(4, ruler.SAID), "words": fingerprint(lists),
    }  # fmt: skip


@cache
def words_of(folder: str) -> tuple[needles.Words, needles.Words]:
    """Words to train on, and words to test on."""
    return ruler.parted(needles.Words.read(Path(folder) / "ruler_words"))


def make(
    folder: str, lesson: Lesson, rng: np.random.Generator, names: Sequence[str] = ruler.NAMES,
    dense: float = DENSE,
) -> Row:  # fmt: skip
    """One sequence to train on: a drill, needles with questions (of dense rows or of the named
    tasks), or the plain text of a book.
    """
    text, size = recall.haystacks(Path(folder))["train"], lesson.length + 1
    draw = rng.random()
    if draw < lesson.drill:
        return ruler.drill(size, words_of(folder)[0], rng)
    if draw < lesson.drill + PLAIN:
        hay = cut(text, size, rng)
        return Row.plain(ruler.numbered(hay, rng) if rng.integers(2) else hay)
    return ruler.row(size, words_of(folder)[0], text, rng, dense, names)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train one, and ask it; "value" is what it answers on validation books."""
    return recall.measured(cell, tell, make, ruler.NAMES, ask, ruler.score)


def ask(cell: Cell, name: str, length: int, split: str, ahead: bool) -> list[Asked]:
    """Questions of a task about texts of a length: as many as the cell has depths and samples."""
    text, depths = recall.haystacks(Path(cell["folder"]))[split], cell["depths"]
    first = 10_000 if split == "valid" else 0
    few = split == "valid" or length > recall.LONG
    count = depths * (min(FEW, cell["samples"]) if few else cell["samples"])
    return [
        ruler.sample(
            name, length, words_of(cell["folder"])[1], text, first + i,
            depth=(i % depths + 0.5) / depths, ahead=ahead,
        )
        for i in range(count)
    ]  # fmt: skip


EXPERIMENT = recall.experiment(
    "table1", "RULER's needles by length, asked of a saved state in another process",
    ("–", "~1.5 hours"), grid, work, {name: (name,) for name in ruler.NAMES},
)  # fmt: skip
