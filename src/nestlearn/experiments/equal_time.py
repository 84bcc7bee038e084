"""Equal tokens and equal time: losses of language models along both, on books.

Test books give the figures, validation books choose the learning rates. The Transformer has a
second row, with twice the steps: about the time that Hope takes. Seconds are those of training
steps alone on their card, without evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.evals import grouped
from nestlearn.experiments import books
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.figures import curves
from nestlearn.experiments.models import families
from nestlearn.experiments.tables import detail, mean, words
from nestlearn.models.hope import HopeConfig
from nestlearn.options import Attention

FAMILIES = families(
    "Hope", "Hope-Attention", "DeltaNet with levels", "Transformer", "Transformer, twice the steps",
    "Static projections with levels", "Hope, streams of 8 windows", "Hope, static MLP",
    "DeltaNet with levels, streams of 8 windows",
)  # fmt: skip
MODELS = tuple(FAMILIES)[:7]
SIZES = {"6M": (256, 6, 4), "25M": (512, 8, 8)}
STEPS, BATCH, LENGTH = 300, 64, 512
NEAR, FAR = "nats at the trained length", "at four times it"


def grid(asked: Options) -> list[Cell]:
    text = books.text_of(asked.data)
    names = chosen(asked.models or MODELS, FAMILIES, "model")
    return [
        {
            "task": size, "model": name,
            "steps": asked.pick(3, STEPS) * (2 if "twice" in name else 1),
            "batch": asked.pick(2, BATCH),
            "length": asked.pick(512 if "streams" in name else 128, LENGTH), **text,
        }
        for size in chosen(asked.only or asked.pick(("6M",), ()), SIZES, "size")
        for name in names
    ]  # fmt: skip


def config_of(model: str, size: str) -> HopeConfig:
    """The family's configuration, with the parameters of Hope of that size."""
    return books.sized(FAMILIES[model], SIZES[size])


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and measure one cell; "value" is minus the validation loss at the trained length."""
    config = config_of(cell["model"], cell["task"])
    model, result = books.trained(cell, config, tell, books.windows(cell["model"]))
    result["scores"] = dict(zip((NEAR, FAR), result["test"]))
    result["headline"] = "{:.3f} {:.3f}, {:,.0f} tokens/s".format(
        *result["test"], result["tokens_per_second"]
    )
    grows = isinstance(config.mixer, Attention)
    if not grows and cell["seed"] == 1 and cell["steps"] >= STEPS:  # of seeds 1 one rate is trained
        text = books.read(Path(cell["folder"]))
        result["stream"] = books.stream(model, text.test, cell["length"])
    return result


def figure(records: Sequence[Record], path: Path) -> None:
    """Validation loss against tokens and seconds, at both lengths; a file for each size."""
    there = [r for r in records if r.detail.get("curve")]
    there.sort(key=lambda r: list(FAMILIES).index(r.model))
    for size, own in grouped(there, lambda r: r.task).items():
        panels = [
            books.panel(
                own, f"{size}, {where}", (x, "Validation loss (nats per byte)"), axis, column
            )
            for axis, x in enumerate(("Tokens", "Seconds on one card"))
            for column, where in ((2, "trained length"), (3, "four times it"))
        ]
        curves(panels, path.with_stem(f"{path.stem}-{size}"), marker=True)


def columns(records: Sequence[Record]) -> list[Column]:
    return [
        words("size", lambda r: r.task), *books.columns(records, NEAR, FAR),
        mean("gradient norm", detail("grad_norm", "median"), digits=2),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="equal-time", shows="losses on books along tokens and along seconds",
    price=("–", "~2 hours"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=(3e-3, 6e-3, 1.2e-2),
    columns=columns, by=lambda r: (r.task, r.model), figure=figure,
    sources=("experiments/books.py",),
)  # fmt: skip
