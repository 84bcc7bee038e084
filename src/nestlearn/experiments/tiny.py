"""The weights in the package: a Hope of 800,000 parameters on books, beside a Transformer.

    nestlearn reproduce tiny --data FOLDER

FOLDER as in `nestlearn.experiments.books`. Both models read as many bytes of the same books: Hope
in streams of 4 windows, attention, which carries no memory, in windows that begin anew. The weights
are written into models/ beside the results, in bfloat16, as they were after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.evals import Record
from nestlearn.experiments import books
from nestlearn.experiments.cells import Cell, Tell
from nestlearn.experiments.experiment import Experiment, Options, chosen
from nestlearn.experiments.tables import Column, mean
from nestlearn.options import Attention, SwiGLU

ROWS: dict[str, dict[str, Any]] = {
    "Hope": {},
    "Transformer": {"mixer": Attention(), "channel": SwiGLU()},
}
SIZE, STEPS, BATCH, LENGTH, WINDOWS = (128, 3, 4), 1500, 64, 1024, 4
STREAM = 100_000  # bytes


def grid(asked: Options) -> list[Cell]:
    """A cell for each model."""
    text = books.text_of(asked.data)
    return [
        {
            "task": "books", "model": name, "steps": asked.steps or asked.pick(3, STEPS),
            "batch": asked.pick(1, BATCH), "length": asked.pick(512, LENGTH),
            "size": asked.pick((32, 1, 2), SIZE), "out": str(asked.out.resolve()), **text,
        }
        for name in chosen(asked.models, tuple(ROWS), "model")
    ]  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train one, measure it and write its weights."""
    config = books.sized(ROWS[cell["model"]], cell["size"])
    text = books.read(Path(cell["folder"]))
    carries = not isinstance(config.mixer, Attention)
    lm, result = books.trained(cell, config, tell, WINDOWS if carries else 1)
    lm.eval()
    # attention has half of its window before each byte; a memory is carried through all of them
    read = text.test[None, : STREAM + 1]
    nats = books.surprise(lm, read, (16 if carries else 1) * cell["length"], carried=carries)[0]
    result["tenths"] = [round(float(part.mean()) / math.log(2), 4) for part in nats.chunk(10)]
    place = Path(cell["out"], "models", f"{cell['model']}-{cell['lr']}-seed{cell['seed']}".lower())
    told = f"{result['tokens']:,} bytes of books of Project Gutenberg, `nestlearn reproduce tiny`"
    lm.to(torch.bfloat16).save_pretrained(place, trained=told)
    return books.in_bits(text, result)


def columns(records: Sequence[Record]) -> list[Column]:
    """Bits a byte at both lengths, and in the first and last tenth of a stream."""

    def tenth(which: int) -> Any:
        return lambda record: record.detail.get("tenths", [None] * 10)[which]

    return [
        *books.columns(records),
        mean("first tenth of 100,000 bytes", tenth(0)), mean("last tenth", tenth(-1)),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="tiny",
    shows="the weights in the package: a small Hope on books, beside a Transformer",
    price=("~20 hours", "~6 minutes"),
    takes=("seeds", "steps", "models", "data", "workers", "device"),
    grid=grid,
    work=work,
    rates=(6e-3, 12e-3),
    quick_rates=(0, None),
    seeds=1,
    columns=columns,
    sources=("experiments/books.py",),
)
