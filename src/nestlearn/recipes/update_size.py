"""How large an update of M3 is over 10,000 steps, practical and literal, beside Muon's.

    nestlearn reproduce update-size

A layer of 64 × 64: of a small network that learns another one from noisy batches, and alone under
normal gradients of variance 1. The size is the root mean square of the values of an update of that
layer, divided by the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nestlearn import optim
from nestlearn.recipes.cells import commit
from nestlearn.recipes.tuned import write
from nestlearn.train.plots import COLOURS, new_figure, write_figure

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


def reproduce(out: Path, *, quick: bool = False, steps: int = 10_000) -> str:
    """Run them all and return the table, also in out/table.md, with a figure. quick: 500 steps."""
    out.mkdir(parents=True, exist_ok=True)
    steps = 500 if quick else steps
    curves = {s: {name: sizes(name, steps, s) for name in OPTIMIZERS} for s in STREAMS}
    at = [n for n in (1, 10, 100, 1000, 10_000) if n <= steps]
    lines = [
        "| | " + " | ".join(f"step {n:,}" for n in at) + " | ÷ Muon's, least – most |",
        "|---" * (len(at) + 2) + "|",
    ]
    for stream, of in curves.items():
        for name, curve in of.items():
            ratio = torch.tensor(curve) / torch.tensor(of["Muon"])
            cells = " | ".join(f"{curve[n - 1]:.4f}" for n in at)
            span = f"{ratio.min():.4f} – {ratio.max():.4f}"
            lines.append(f"| {name}, {stream} | {cells} | {span} |")
    kept = {
        s: {n: [c[i] for i in _spaced(steps)] for n, c in of.items()} for s, of in curves.items()
    }
    results = {"steps": steps, "at": _spaced(steps), "rms": kept, "commit": commit()}
    draw(curves, out / "update-size.png")
    return write(out, results, "\n".join(lines))


def _spaced(steps: int) -> list[int]:
    """About 100 step numbers from 0, evenly on a logarithmic scale."""
    return sorted({int(steps ** (i / 100)) - 1 for i in range(101)})


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The sizes by step, both logarithmic, a panel for each stream."""
    figure, panels = new_figure(*("Optimizer step", "rms of the update ÷ learning rate") * 2)
    for axes, (stream, of) in zip(panels, curves.items()):
        for colour, (name, curve) in zip(COLOURS, of.items()):
            at = _spaced(len(curve))
            axes.loglog([i + 1 for i in at], [curve[i] for i in at], color=colour, label=name)
        axes.set_title(stream.capitalize(), loc="left", fontsize=12)
    panels[0].legend(frameon=False, fontsize=10)
    write_figure(figure, path)
