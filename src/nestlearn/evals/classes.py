"""Class-incremental classification (figure 6): texts with a class, the classes in groups, in turn.

CLINC150 (150 intents), Banking77 (77) and DBpedia (14 classes here, 70 in the paper), read from a
folder that holds `clinc150/`, `banking77/` and `dbpedia14/` as their publishers ship them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from .files import text_of
from .records import grouped
from .tasks import stream

Pairs = Iterable[tuple[str, str]]  # text, class


class Text(NamedTuple):
    """A text and the words that name its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Group:
    """Classes that arrive together: their names and texts."""

    labels: tuple[str, ...]
    train: tuple[Text, ...]
    validation: tuple[Text, ...]
    test: tuple[Text, ...]


def _clinc(folder: Path) -> tuple[Pairs, Pairs]:
    found = json.loads(text_of(folder / "clinc150" / "data_full.json.gz"))
    return found["train"], found["test"]


def _banking(folder: Path) -> tuple[Pairs, Pairs]:
    def read(name: str) -> Pairs:
        rows = csv.DictReader(io.StringIO(text_of(folder / "banking77" / name), newline=""))
        return [(row["text"].strip(), row["category"]) for row in rows]

    return read("train.csv"), read("test.csv")


def _dbpedia(folder: Path) -> tuple[Pairs, Pairs]:
    names = text_of(folder / "dbpedia14" / "classes.txt").split()
    lines = text_of(folder / "dbpedia14" / "train14k.csv.gz").rstrip("\n").split("\n")
    rows = [line.split(",", 1) for line in lines]  # the text has commas, unquoted
    pairs = [(" ".join(text.split()[:40]), names[int(label)]) for label, text in rows]
    return pairs[::2], pairs[1::2]


SETS: dict[str, tuple[Callable[[Path], tuple[Pairs, Pairs]], int]] = {
    "CLINC150": (_clinc, 15), "Banking77": (_banking, 7), "DBpedia": (_dbpedia, 7),
}  # fmt: skip


def groups(
    folder: Path, name: str, order: int, *, train: int = 40, validation: int = 5, test: int = 8,
    most: int | None = None,
) -> list[Group]:  # fmt: skip
    """The classes of a set in an order of that seed, dealt to its groups; so many texts of each to
    validate and to test with, and at most so many to learn from.

    most: groups, at most. Raises FileNotFoundError without the set, ValueError for a class with
    too few texts.
    """
    read, count = SETS[name]
    learned, asked = (grouped(pairs, itemgetter(1)) for pairs in read(folder))
    rng = stream(order, "classes", name)
    names = [str(label) for label in rng.permutation(sorted(learned))]
    dealt = [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    found = []
    for labels in dealt[:most]:
        parts: list[list[Text]] = [[], [], []]
        for label in labels:
            drawn = [learned[label][i] for i in rng.permutation(len(learned[label]))]
            last = [asked[label][i] for i in rng.permutation(len(asked[label]))]
            for part, texts, size in zip(
                parts,
                (drawn[validation:], drawn[:validation], last),
                (min(train, len(drawn) - validation), validation, test),
            ):
                if size < 1 or len(texts) < size:
                    raise ValueError(f"{name}: {label} has {len(texts)} texts: ask for fewer")
                part += [Text(text, _words(label)) for text, _ in texts[:size]]
        found.append(Group(tuple(map(_words, labels)), *map(tuple, parts)))
    return found


def _words(label: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").strip("?").lower()
