"""Table 2: language models on books, by bytes and by pieces, at two sizes.

    nestlearn reproduce table2 --data FOLDER

FOLDER as in `nestlearn.experiments.books`. All models of a size have Hope's parameters and the same
tokens. Bits a byte compare bytes with pieces. Test books give the figures, validation books choose
the learning rates; the curves are of validation books, along tokens and along seconds of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.evals import grouped
from nestlearn.experiments import books
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell
from nestlearn.experiments.figures import curves
from nestlearn.experiments.models import FAMILIES, families
from nestlearn.experiments.tables import words

ROWS = families("Hope", "Hope-Attention", "DeltaNet with levels", "DeltaNet", "Titans")
ROWS["Transformer++"] = FAMILIES["Transformer"]
# Parameters are those of the blocks with bytes: pieces have an embedding and a head beside them.
SIZES = {"10M": (320, 7, 5), "50M": (640, 10, 10)}  # width, layers, heads
VOCABULARIES = {"bytes": books.BYTES, "pieces": 8192}
STEPS, BATCH, LENGTH = 600, 32, 1024


def grid(asked: Options) -> list[Cell]:
    tasks = {
        f"{size}, {tokens}": {"size": asked.pick((32, 1, 2), shape), "vocabulary": count}
        for size, shape in SIZES.items()
        for tokens, count in (VOCABULARIES | asked.pick({"pieces": 300}, {})).items()
    }
    return books.cells(asked, tasks, ROWS, (STEPS, BATCH, LENGTH), what=("setting", "model"))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    config = books.sized(ROWS[cell["model"]], cell["size"], cell["vocabulary"])
    text = books.read(Path(cell["folder"]), cell["vocabulary"])
    _, result = books.trained(cell, config, tell)
    result["curve"] = [
        [tokens, seconds, *(text.bits(nats, "val") for nats in nats)]
        for tokens, seconds, *nats in result["curve"]
    ]
    return books.in_bits(text, result)


def figure(records: Sequence[Record], path: Path) -> None:
    """Bits a byte of validation books at the trained length, along tokens and along seconds."""
    there = [r for r in records if r.metric == books.NEAR]
    there.sort(key=lambda r: list(ROWS).index(r.model))
    panels = [
        books.panel(own, setting, (label, "validation (bits a byte)"), axis, 2)
        for setting, own in grouped(there, lambda r: r.task).items()
        for axis, label in enumerate(("tokens", "seconds on one card"))
    ]
    curves(panels, path, marker=True)


EXPERIMENT = Experiment(
    name="table2", shows="language models on books, by bytes and by pieces, at two sizes",
    price=("–", "~6 hours"),
    takes=("seeds", "steps", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=(3e-3, 6e-3, 1.2e-2), seeds=1,
    columns=lambda records: [words("setting", lambda r: r.task), *books.columns(records)],
    by=lambda r: (r.task, r.model), figure=figure,
    sources=("experiments/books.py",),
)  # fmt: skip
