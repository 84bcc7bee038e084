"""How large an update of M3 is over 10,000 steps, practical and literal, beside Muon's.

A layer of 64 × 64: of a small network that learns another one from noisy batches, and alone under
normal gradients of variance 1. The size is the root mean square of the values of an update of that
layer, divided by the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nestlearn import optim
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.figures import Panel, curves, lines
from nestlearn.experiments.tables import words

LR = 1e-3
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Muon": lambda p: optim.Muon(p, LR, weight_decay=0.0),
    "M3": lambda p: optim.M3(p, LR, weight_decay=0.0),
    "M3, second moment": lambda p: optim.M3(p, LR, weight_decay=0.0, second_moment=True),
    "M3, literal": lambda p: optim.M3(p, LR, mode="literal", weight_decay=0.0),
}
WIDTH = 64
STREAMS = ("a network's gradients", "normal gradients")


def sizes(name: str, steps: int, stream: str) -> list[float]:
    """The size of every update."""
    torch.manual_seed(0)
    shapes = (WIDTH, WIDTH)
    teacher, model = (
        nn.Sequential(nn.Linear(*shapes), nn.Tanh(), nn.Linear(*shapes)) for _ in range(2)
    )
    layer = model[0].weight
    assert isinstance(layer, nn.Parameter)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        if stream == "normal gradients":
            layer.grad = torch.randn(shapes)
        else:
            x = torch.randn(32, WIDTH)
            with torch.no_grad():
                y = teacher(x) + 0.1 * torch.randn(32, WIDTH)
            F.mse_loss(model(x), y).backward()
        before = layer.detach().clone()
        optimizer.step()
        found.append(float((layer.detach() - before).square().mean().sqrt()) / LR)
    return found


def grid(asked: Options) -> list[Cell]:
    steps = asked.steps or asked.pick(500, 10_000)
    return cells(asked, STREAMS, ["all"], steps=steps)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """The sizes, at about 100 steps evenly spaced on a logarithmic scale, and as ratios."""
    steps = cell["steps"]
    every = {name: sizes(name, steps, cell["task"]) for name in OPTIMIZERS}
    at = sorted({int(steps ** (i / 100)) - 1 for i in range(101)})
    found = {}
    for name, curve in every.items():
        ratio = torch.tensor(curve) / torch.tensor(every["Muon"])
        found[name] = {
            "scores": {"rms of the last update ÷ lr": curve[-1]}, "at": at,
            "rms": [curve[i] for i in at], "ratio": [float(ratio.min()), float(ratio.max())],
            "shown": {str(n): curve[n - 1] for n in (1, 10, 100, 1000, 10_000) if n <= steps},
        }  # fmt: skip
    return {"models": found}


def columns(records: Sequence[Record]) -> list[Column]:
    def size(n: str) -> Column:
        return words(f"step {int(n):,}", lambda r: f"{r.detail['shown'][n]:.4f}")

    return [
        words("", lambda r: f"{r.model}, {r.task}"),
        *map(size, records[0].detail["shown"]),
        words("÷ Muon's, least – most", lambda r: "{:.4f} – {:.4f}".format(*r.detail["ratio"])),
    ]


def figure(records: Sequence[Record], path: Path) -> None:
    """The sizes by step, both logarithmic, a panel for each stream."""
    labels = ("Optimizer step", "rms of the update ÷ learning rate")
    panels = []
    for stream in STREAMS:
        own = (r for r in records if r.task == stream)
        drawn = lines(own, lambda r: ([i + 1 for i in r.detail["at"]], r.detail["rms"]))
        panels.append(Panel(stream.capitalize(), *labels, drawn))
    curves(panels, path, log="xy")


EXPERIMENT = Experiment(
    name="update-size", shows="the size of M3's updates over 10,000 steps",
    price=("~20 minutes", "–"),
    takes=("steps", "workers"), device="cpu",
    grid=grid, work=work,
    seeds=1,
    columns=columns, by=lambda r: (r.task, r.model), figure=figure,
)  # fmt: skip
