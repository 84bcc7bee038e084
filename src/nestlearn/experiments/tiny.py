"""The weights in the package, of 0.8 million parameters, and larger ones: Hope beside attention.

    nestlearn reproduce tiny --data FOLDER [--only 10M]

FOLDER as in `nestlearn.experiments.books`. All models of a size read as many bytes of the same
books. Hope reads streams of 4 windows, in the last third of its steps or in all; attention carries
no memory, and each of its windows begins anew. The weights are written into models/ beside the
results, in bfloat16, as they were after training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nestlearn.experiments import books
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.models import FAMILIES, families
from nestlearn.experiments.tables import detail, mean, words
from nestlearn.options import Attention


class Size(NamedTuple):
    """shape: width, layers, heads."""

    shape: tuple[int, int, int]
    rates: tuple[float, ...]
    models: tuple[str, ...]


STREAMS = "Hope, streams in all steps"
SIZES = {
    "0.8M": Size((128, 3, 2), (12e-3, 24e-3), ("Hope", STREAMS, "Transformer")),
    # the rate that validation books chose for all three in table 2
    "10M": Size((320, 7, 5), (6e-3,), ("Hope", "Hope-Attention", "Transformer++")),
}
ROWS = families("Hope", STREAMS, "Hope-Attention", "Transformer")
ROWS["Transformer++"] = FAMILIES["Transformer"]
STEPS, BATCH, LENGTH, WINDOWS = 1500, 64, 1024, 4
ALONE = {"Hope": 2 / 3}  # the share of the steps before streams are carried
STREAM = 100_000  # bytes


def grid(asked: Options) -> list[Cell]:
    """A cell for each model of each size; of the smaller one unless others are asked for."""
    sizes = chosen(asked.only or ("0.8M",), SIZES, "size")
    models = chosen(asked.models, [n for size in sizes for n in SIZES[size].models], "model")
    found = []
    for size in sizes:
        own = {"size": asked.pick((32, 1, 2), SIZES[size].shape), "out": str(asked.out.resolve())}
        there = tuple(name for name in SIZES[size].models if name in models)
        part = replace(asked, only=(), models=there)
        found += books.cells(part, {size: own}, there, (STEPS, BATCH, LENGTH), (3, 1, 512))
    return found


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train one, measure it and write its weights."""
    config = books.sized(ROWS[cell["model"]], cell["size"])
    text = books.read(Path(cell["folder"]))
    carries = not isinstance(config.mixer, Attention)
    streams = WINDOWS if carries else 1
    lm, result = books.trained(cell, config, tell, streams, ALONE.get(cell["model"], 0))
    lm.eval()
    # attention has half of its window before each byte; a memory is carried through all of them
    read, T = text.test[None, : STREAM + 1], cell["length"]
    nats = books.surprise(lm, read, 16 * T)[0] if carries else books.anew(lm, read, T)[0]
    result["tenths"] = [round(float(part.mean()) / math.log(2), 4) for part in nats.chunk(10)]
    name = f"{cell['task']}-{cell['model']}-{cell['lr']}-seed{cell['seed']}".lower()
    place = Path(cell["out"], "models", name)
    told = f"{result['tokens']:,} bytes of books of Project Gutenberg, `nestlearn reproduce tiny`"
    lm.to(torch.bfloat16).save_pretrained(place, trained=told)
    return books.in_bits(text, result)


def columns(records: Sequence[Record]) -> list[Column]:
    """Bits a byte at both lengths, in a stream, and in its first and last tenth."""

    def stream(record: Record) -> float | None:
        return statistics.fmean(record.detail["tenths"]) if record.detail else None

    return [
        words("size", lambda r: r.task), *books.columns(records),
        mean("100,000 bytes as a stream", stream), mean("first tenth", detail("tenths", 0)),
        mean("last tenth", detail("tenths", -1)),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="tiny",
    shows="the weights in the package, and larger ones: Hope on books, beside a Transformer",
    price=("~40 hours", "~10 minutes"),
    takes=("seeds", "steps", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: SIZES[cell["task"]].rates, quick_rates=(0, None), seeds=1,
    columns=columns, by=lambda r: (r.task, r.model),
    sources=("experiments/books.py",),
)  # fmt: skip
