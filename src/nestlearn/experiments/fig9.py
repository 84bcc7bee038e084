"""Figure 9: BABILong, facts of bAbI stories in books, read as bytes, by the length of the text.

    nestlearn reproduce fig9 --data FOLDER [--only 1,048,576 ...]

FOLDER holds gutenberg/ (see `nestlearn.experiments.books`) and babi/. One training of a model does
qa1 to qa5, on the stories to train on in the training books; it is tested on the test stories in
the test books, in the two ways of `nestlearn.experiments.table1`. --only names the lengths, in
bytes; what was trained is not trained again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nestlearn.evals import babilong
from nestlearn.evals.haystack import Asked, Row, cut
from nestlearn.experiments import recall
from nestlearn.experiments.experiment import Cell, Options, Tell
from nestlearn.experiments.lessons import Lesson
from nestlearn.experiments.provenance import fingerprint

LESSONS = (  # 32,768 bytes a step; drills are stories without a book
    Lesson(512, 64, 1.0, 0.3), Lesson(1024, 32, 0.6, 0.45, 16),
    Lesson(2048, 16, 0.4, 0.65, 64), Lesson(4096, 8, 0.2, 1.0, 256),
)  # fmt: skip
QUICK_LESSONS = (Lesson(256, 2, 1.0, 0.4), Lesson(512, 2, 0.5, 1.0))
MILLION = 1_048_576
PLAIN, TRIES = 0.1, 20
LENGTHS = (4096, 16_384, 65_536, 262_144, MILLION, 10_485_760)  # the last one if it is named
SAMPLES, FEW, FEWER = 40, 10, 4  # texts of a task and length, of long ones, of those over a million


def grid(asked: Options) -> list[Cell]:
    files = [Path(asked.data or "") / "babi" / name for name in babilong.FILES]
    if asked.data is None or not files[-1].is_file():
        raise ValueError(
            f"--data {asked.data}: give a folder with gutenberg/ and babi/{files[-1].name}"
        )
    return recall.cells(
        asked, "stories", (QUICK_LESSONS, LESSONS), LENGTHS, usual=5, short=2048,
        samples=asked.pick(1, SAMPLES), said=asked.pick(4, babilong.SAID),
        stories=fingerprint(f for f in files if f.is_file()),
    )  # fmt: skip


def make(folder: str, lesson: Lesson, rng: np.random.Generator) -> Row:
    """One sequence to train on: stories alone, stories in a book, or the plain text of a book."""
    text, size = recall.haystacks(Path(folder))["train"], lesson.length + 1
    draw = rng.random()
    if draw >= lesson.drill and draw < lesson.drill + PLAIN:
        return Row.plain(cut(text, size, rng))
    for _ in range(TRIES):  # a story may be longer than all of it
        name = babilong.NAMES[int(rng.integers(len(babilong.NAMES)))]
        told = babilong.stories(Path(folder) / "babi", name, "train")
        hay = 0.02 if draw < lesson.drill else float(rng.uniform(0.2, 0.95))
        row = babilong.row(size, told, text, rng, hay)
        if row.asked.any():
            break
    return row


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train one, and ask it; "value" is what it answers in validation books."""
    return recall.measured(cell, tell, make, babilong.NAMES, _asked, _score)


def _asked(cell: Cell, name: str, length: int, split: str, ahead: bool) -> list[Asked]:
    text = recall.haystacks(Path(cell["folder"]))[split]
    # nothing is held out of the stories to train on: the books are what validation differs by
    part = "test" if split == "test" else "train"
    told = babilong.stories(Path(cell["folder"]) / "babi", name, part)
    most = SAMPLES if length <= recall.LONG else FEW if length <= MILLION else FEWER
    count = min(most, cell["samples"])
    return [babilong.sample(name, length, told, text, seed, ahead=ahead) for seed in range(count)]


def _score(asked: Asked, said: str) -> float:
    name = next(n for n, labels in babilong.LABELS.items() if asked.answers[0] in labels)
    return babilong.score(asked, said, name)


EXPERIMENT = recall.experiment(
    "fig9", "BABILong: questions about facts in books, by length to 10 million bytes",
    ("–", "~2 hours"), grid, work,
    {"qa1 to qa5": babilong.NAMES} | {name: (name,) for name in babilong.NAMES},
)  # fmt: skip
