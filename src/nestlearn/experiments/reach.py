"""How far one needle is found again: up to a million bytes, by a small model.

    nestlearn reproduce reach --data FOLDER [--only 65,536 ...]

FOLDER, texts and questions are those of `nestlearn.experiments.table1`, of its single needles of
digits alone. Models have half a million parameters, and read no more than 4,096 bytes at a time
while they are trained. Some leave their memory alone where a gate is nearly shut.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nestlearn.evals import ruler
from nestlearn.experiments import recall, table1
from nestlearn.experiments.experiment import Cell, Options, Tell

NAMES = ("S-NIAH-1", "S-NIAH-2")
MODELS = ("DeltaNet", *(name for name in recall.ROWS if "shut" in name))
SIZE, STEPS, RATE = (96, 3, 2), 1000, 6e-3  # width, layers, heads; steps of 8,192 bytes
DENSE, SAMPLES = 0.3, 4  # fewer needles and more of a haystack than in table 1; fewer texts
LESSONS = tuple(lesson._replace(batch=lesson.batch // 4) for lesson in table1.LESSONS)


def grid(asked: Options) -> list[Cell]:
    size = asked.pick(recall.QUICK_SIZE, SIZE)
    return recall.cells(
        replace(asked, models=asked.models or MODELS, steps=asked.steps or asked.pick(4, STEPS)),
        "reach", (table1.QUICK_LESSONS, LESSONS), table1.LENGTHS, usual=len(table1.LENGTHS),
        short=600, size=size, **{**table1.own(asked), "samples": asked.pick(1, SAMPLES)},
    )  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train one, and ask it; "value" is what it answers on validation books."""
    make = partial(table1.make, names=NAMES, dense=DENSE)
    return recall.measured(cell, tell, make, NAMES, table1.ask, ruler.score)


EXPERIMENT = replace(  # all rows at one rate
    recall.experiment(
        "reach", "one needle in up to a million bytes, found by a small model",
        ("~7 hours", "~10 minutes"), grid, work, {name: (name,) for name in NAMES},
    ),
    rates=(RATE,),
    quick_rates=(0, 1),
    device="cpu",
    sources=tuple(
        f"experiments/{name}.py" for name in ("recall", "lessons", "asked", "books", "table1")
    ),
)  # fmt: skip
