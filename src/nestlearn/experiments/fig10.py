"""Figure 10: how the loss goes on falling with the text before, up to a million tokens.

    nestlearn reproduce fig10 --data FOLDER

FOLDER as in `nestlearn.experiments.books`. Models train on windows of LENGTH, or on streams of 8 of
them with the memory carried, and read the test books as streams. A Transformer reads windows of its
trained length, of which half is read again each time. A token's place is that in its stream; the
figure has the mean loss between each power of two and the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.experiments import books
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.models import families
from nestlearn.experiments.tables import RATE, SEEDS, detail, mean, metric, model
from nestlearn.models.hope import HopeLM
from nestlearn.options import Attention

ROWS = families(
    "Hope", "Hope, streams of 8 windows", "DeltaNet with levels",
    "DeltaNet with levels, streams of 8 windows", "Transformer",
)  # fmt: skip
SIZE, STEPS, BATCH, LENGTH = (320, 7, 5), 600, 16, 2048
LENGTHS = {"131,072": (131_072, 8), "1,000,000": (1_000_000, 1)}  # tokens, and texts of so many
FIRST = 64  # tokens of the first place


def grid(asked: Options) -> list[Cell]:
    text = books.text_of(asked.data)
    return [
        {
            "task": "books", "model": name, "steps": asked.steps or asked.pick(3, STEPS),
            "batch": asked.pick(1, BATCH), "length": asked.pick(512, LENGTH),
            "size": asked.pick((32, 1, 2), SIZE),
            "streams": asked.pick({"1,100": (1100, 2)}, LENGTHS), **text,
        }
        for name in chosen(asked.models, tuple(ROWS), "model")
    ]  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    config = books.sized(ROWS[cell["model"]], cell["size"])
    text = books.read(Path(cell["folder"]))
    lm, result = books.trained(cell, config, tell, books.windows(cell["model"]))
    found = {
        name: places(lm, text.test, total, count, cell["length"])
        for name, (total, count) in cell["streams"].items()
    }
    last = {name: per_place[-1][1] for name, per_place in found.items()}
    return result | {
        "places": found, "scores": last,
        "headline": ", ".join(f"{value:.3f} at {name}" for name, value in last.items()),
    }  # fmt: skip


def places(lm: HopeLM, ids: Tensor, total: int, count: int, length: int) -> list[list[float]]:
    """[place, nats a token] for each doubling of the place in `count` texts of `total` tokens."""
    lm.eval()
    starts = [i * (len(ids) - total - 1) // max(1, count - 1) for i in range(count)]
    rows = torch.stack([ids[a : a + total + 1] for a in starts])
    carried = not isinstance(lm.config.mixer, Attention)
    nats = books.surprise(lm, rows, length, carried=carried).mean(0)
    edges = [0, *(FIRST * 2**i for i in range(math.ceil(math.log2(total / FIRST)))), total]
    return [[float(b), float(nats[a:b].mean())] for a, b in pairwise(edges)]


def columns(records: Sequence[Record]) -> list[Column]:
    return [
        model(), RATE, SEEDS, mean("nats at the trained length", detail("test", 0)),
        *(mean(f"at the end of {name}", metric(name)) for name in dict.fromkeys(
            r.metric for r in records)),
    ]  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    """Loss along the place in the stream, a panel for each length."""

    def panel(name: str) -> Panel:
        def along(r: Record) -> Along:
            place, nats = zip(*r.detail["places"][name])
            return place, nats

        own = (r for r in records if r.detail)  # the first record of a cell has all its places
        return Panel(f"streams of {name} bytes", "place", "nats a byte", lines(own, along))

    panels = [panel(name) for name in dict.fromkeys(r.metric for r in records)]
    curves(panels, path, marker=True, log="x")


EXPERIMENT = Experiment(
    name="fig10", shows="loss along the place in streams of up to a million bytes",
    price=("–", "~1 hour"),
    takes=("seeds", "steps", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=(3e-3, 6e-3),
    columns=columns, figure=figure,
    sources=("experiments/books.py",),
)  # fmt: skip
