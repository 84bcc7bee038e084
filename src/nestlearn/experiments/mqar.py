"""Associative recall by number of pairs, at equal bytes of recurrent state.

A model with a larger state remembers more, whatever its rule. So every model gets, by its width, a
state of the same size, counted as what a stream carries from token to token (`init_state`): fast
weights, held twice inside a chunk, momentum, convolution inputs. Parameters and computation then
differ, and are in the table.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn import state
from nestlearn.evals import grouped, mqar
from nestlearn.experiments.accuracy import TITLE
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.figures import Panel, curves, points
from nestlearn.experiments.fit import settings, train_cell
from nestlearn.experiments.models import CONTENDERS, build, contender
from nestlearn.experiments.tables import PARAMETERS, at, mean, words
from nestlearn.options import Attention

PAIRS = (4, 8, 16, 32)
STATES = (128, 512)  # KiB
DATA = {"length": 128, "vocab": 512, "train": 20_000, "test": 1000}
QUICK = {"length": 32, "vocab": 64, "train": 64, "test": 16}
MODELS = ("hope", "titans", "deltanet")
STEPS, QUICK_STEPS = 2000, 3
TOLERANCE = 0.1
_UNSIZED = (Attention, None)  # None: an LSTM
SKELETON: dict[str, Any] = {"layers": 2, "heads": 2, "conv": 4, "chunk": 32}


def state_bytes(model: str, skeleton: Mapping[str, Any]) -> int:
    """Bytes of one stream's state; ValueError for a model whose state is none or grows."""
    if contender(model).mixer in _UNSIZED:
        fit = [name for name, c in CONTENDERS.items() if c.mixer not in _UNSIZED]
        raise ValueError(f"{model} has no memory of a size to choose: use {', '.join(fit)}")
    with torch.device("meta"):
        return state.nbytes(build(model, 2, skeleton, match=False).init_state(1))


def sized(model: str, kib: float, skeleton: Mapping[str, Any] = SKELETON) -> dict[str, Any]:
    """The skeleton with the width at which the model's state is nearest to `kib` KiB.

    ValueError if no width comes within TOLERANCE.
    """
    heads, target = skeleton["heads"], 1024 * kib

    def at(units: int) -> int:
        return state_bytes(model, {**skeleton, "dim": units * heads})

    above = bisect_right(range(2049), target, 2, 2048, key=at)  # the state grows with the width
    best = min((above - 1, above), key=lambda units: abs(at(units) - target))
    if abs(at(best) / target - 1) > TOLERANCE:
        nearest = f"the nearest state has {at(best) / 1024:.1f} KiB"
        raise ValueError(f"{model} at {kib} KiB: {nearest}; give another size, or fewer heads")
    return {**skeleton, "dim": best * heads}


def grid(asked: Options) -> list[Cell]:
    known = [f"K={pairs}" for pairs in asked.pick(PAIRS[:2], PAIRS)]
    steps = asked.steps or asked.pick(QUICK_STEPS, STEPS)
    return [
        {
            "benchmark": "mqar", "task": name, "setting": f"{kib:g} KiB", "model": model,
            "skeleton": (skeleton := sized(model, kib)), "match": False,
            "state": state_bytes(model, skeleton),
            "data": DATA | asked.pick(QUICK, {}) | {"pairs": _count(name)},
            "fit": settings(steps, asked.quick, batch=asked.pick(8, 64)),
        }
        for name in chosen(asked.only, known, "task")
        for kib in asked.pick(STATES[:1], STATES)
        for model in chosen(asked.models or MODELS, CONTENDERS, "model")
    ]  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    return train_cell(cell, mqar.task(**cell["data"]), tell)


def columns(records: Sequence[Record]) -> list[Column]:
    tasks = sorted({r.task for r in records}, key=_count)
    return [
        TITLE, words("state", lambda r: f"{r.config['state'] / 1024:.1f} KiB"),
        words("width", lambda r: r.config["skeleton"]["dim"]), PARAMETERS,
        *(mean(f"{task[2:]} pairs", at(task), digits=1) for task in tasks),
    ]  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    panels = []
    for kib, own in sorted(grouped(records, lambda r: _kib(r.setting)).items()):
        drawn = points(own, lambda r: _count(r.task), lambda r: contender(r.model).title)
        panels.append(Panel(f"State of {kib:g} KiB", "Pairs to remember", "Accuracy (%)", drawn))
    curves(panels, path, log="2", marker=True, ylim=(-2, 104))


def _kib(setting: str) -> float:
    return float(setting.removesuffix(" KiB"))


def _count(task: str) -> int:
    return int(task.removeprefix("K="))


def _place(record: Record) -> tuple[float, int]:
    return _kib(record.setting), list(CONTENDERS).index(record.model)


EXPERIMENT = Experiment(
    name="mqar", shows="associative recall by number of pairs and size of state",
    price=("–", "~3 hours"),
    grid=grid, work=work,
    rates=(3e-3, 1e-2), quick_rates=(0, 1),
    columns=columns, by=lambda r: (_kib(r.setting), r.model),
    order=lambda records: sorted(records, key=_place), figure=figure,
)  # fmt: skip
