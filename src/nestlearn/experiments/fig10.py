"""Figure 10: how the loss goes on falling with the text before, up to a million tokens.

    nestlearn reproduce fig10 --data FOLDER

FOLDER as in `nestlearn.experiments.books`. Models train on windows of LENGTH, or on streams of 8 of
them with the memory carried. They read the test books twice: as streams with the state carried, and
"in windows" of the trained length, of which half is read again each time. On a stream attention
sees a window and four sinks, with the bytes of Hope's state. A token's place is that in its stream;
the loss is the mean between each power of two and the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.experiments import books
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.models import families
from nestlearn.experiments.tables import RATE, SEEDS, mean, metric, model
from nestlearn.models.hope import HopeLM

ROWS = families(
    "Hope", "Hope, streams of 8 windows", "DeltaNet with levels, streams of 8 windows",
    "Hope-Attention", "Transformer",
)  # fmt: skip
SIZE, STEPS, BATCH, LENGTH = (320, 7, 5), 600, 16, 2048
LENGTHS = {"131,072": (131_072, 8), "1,000,000": (1_000_000, 1)}  # tokens, and texts of so many
FIRST = 64  # tokens of the first place
ANEW = ", in windows"  # ends the name of a reading without a carried state


def grid(asked: Options) -> list[Cell]:
    own = {
        "size": asked.pick((32, 1, 2), SIZE), "streams": asked.pick({"1,100": (1100, 2)}, LENGTHS)
    }  # fmt: skip
    return books.cells(asked, {"books": own}, ROWS, (STEPS, BATCH, LENGTH), (3, 1, 512))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    config = books.sized(ROWS[cell["model"]], cell["size"])
    text = books.read(Path(cell["folder"]))
    lm, result = books.trained(cell, config, tell, books.windows(cell["model"]))
    reader = HopeLM(books.bounded(config, books.sized({}, cell["size"]))).to(cell["device"])
    reader.load_state_dict(lm.state_dict())
    ways = {"": partial(books.surprise, reader.eval()), ANEW: partial(books.anew, lm.eval())}
    found = {cell["model"] + way: measured(read, text, cell) for way, read in ways.items()}
    return result | {"models": found}


def measured(read: Callable[[Tensor, int], Tensor], text: books.Text, cell: Cell) -> dict[str, Any]:
    """The loss by place in every kind of stream, and at its end."""
    found = {}
    for name, (total, count) in cell["streams"].items():
        starts = [i * (len(text.test) - total - 1) // max(1, count - 1) for i in range(count)]
        rows = torch.stack([text.test[a : a + total + 1] for a in starts])
        bits = read(rows, cell["length"]).mean(0) / math.log(2)
        edges = [0, *(FIRST * 2**i for i in range(math.ceil(math.log2(total / FIRST)))), total]
        found[name] = [[float(b), float(bits[a:b].mean())] for a, b in pairwise(edges)]
    return {"places": found, "scores": {name: rows[-1][1] for name, rows in found.items()}}


def columns(records: Sequence[Record]) -> list[Column]:
    lengths = dict.fromkeys(r.metric for r in records)
    ends = (mean(f"bits a byte at the end of {name}", metric(name)) for name in lengths)
    return [model(), RATE, SEEDS, *ends]


def figure(records: Sequence[Record], path: Path) -> None:
    """Loss along the place, less that of the same model in windows: a text's own part falls out."""
    own = [r for r in records if r.detail]  # the first record of a reading has all its places
    there = {(r.model, r.seed): r.detail["places"] for r in own}

    def panel(name: str) -> Panel:
        def along(r: Record) -> Along:
            carried, anew = (there[model, r.seed][name] for model in (r.model, r.model + ANEW))
            return [x for x, _ in carried], [a - b for (_, a), (_, b) in zip(carried, anew)]

        carried = (r for r in own if not r.model.endswith(ANEW))
        label = "bits a byte, less those in windows"
        return Panel(f"streams of {name} bytes", "place", label, lines(carried, along))

    panels = [panel(name) for name in dict.fromkeys(r.metric for r in records)]
    curves(panels, path, marker=True, log="x")


EXPERIMENT = Experiment(
    name="fig10", shows="loss along the place in streams of up to a million bytes",
    price=("–", "~1 hour"),
    takes=("seeds", "steps", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=(6e-3, 1.2e-2), seeds=1,
    columns=columns, figure=figure,
    sources=("experiments/books.py",),
)  # fmt: skip
