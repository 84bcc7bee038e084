"""Section 4.3: what momentum forgets when gradients turn orthogonal, and what M3's memory keeps.

*Trace.* 300 noisy gradients of one direction A, then as many of an orthogonal B: how much of each
optimizer's update still points along A, by the steps since then.
*Learning.* A network learns task A, then B on inputs that share no coordinate with A's, then A
again: its loss on A before and after B, and the steps to relearn A. Every optimizer takes the best
of five learning rates, by its mean loss over the first two parts on two seeds, and then runs five
others.
A trace is a memory of gradients, not yet of a task: whether it helps is what the second part shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn import optim
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.figures import Panel, curves
from nestlearn.experiments.tables import RATE, SEEDS, detail, markdown, mean, metric, model

Build = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
PLAIN: dict[str, Any] = {"weight_decay": 0.0}
OPTIMIZERS: dict[str, Build] = {
    "Momentum 0.9": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "Delta momentum": lambda p, lr: optim.DeltaMomentum(p, lr),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.9, 0.95), **PLAIN),
    "Muon": lambda p, lr: optim.Muon(p, lr, **PLAIN),
    "M3": lambda p, lr: optim.M3(p, lr, **PLAIN),
    "M3, α = 1": lambda p, lr: optim.M3(p, lr, alpha=1.0, **PLAIN),
}
LOSSES = ("loss of A, learnt", "of A after B", "of B after B")
GRIDS = {
    name: tuple(start * 10 ** (i / 2) for i in range(5))
    for name, start in zip(OPTIMIZERS, (0.01, 0.03, 3e-4, 1e-3, 1e-3, 1e-3))
}


# -------------------------------------------------------------------------------------- the trace


@cache
def trace(name: str, steps: int = 300, noise: float = 0.05) -> list[float]:
    """⟨u, A⟩ / ‖u‖ of every update u after the change to B, A of norm 1."""
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(32, 16))
    V, _ = torch.linalg.qr(torch.randn(32, 16))
    A, B = (U[:, s] @ V[:, s].mT / 8**0.5 for s in (slice(0, 8), slice(8, 16)))
    p = nn.Parameter(torch.zeros(32, 32))
    optimizer = OPTIMIZERS[name]([p], 1.0)
    found = []
    for t in range(2 * steps):
        before = p.detach().clone()
        p.grad = (A if t < steps else B) + noise * torch.randn(32, 32)
        optimizer.step()
        u = before - p.detach()
        if t >= steps:
            found.append(float((u * A).sum() / u.norm()))
    return found


def steps_to(curve: list[float], share: float = 0.1) -> int:
    """Steps until the curve has fallen to that share of its start, for good."""
    above = [i for i, value in enumerate(curve) if value > share * curve[0]]
    return above[-1] + 1 if above else 0


# ----------------------------------------------------------------------------------- the learning


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """A, B, then A again, `steps` each."""
    torch.manual_seed(cell["seed"])
    teachers = [nn.Linear(16, 8) for _ in range(2)]
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    optimizer = OPTIMIZERS[cell["model"]](list(model.parameters()), cell["lr"])
    held = torch.randn(512, 16)

    def pairs(task: int, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = torch.tanh(2 * teachers[task](x))
        return F.pad(x, (0, 16) if task == 0 else (16, 0)), y

    def loss_on(task: int) -> float:
        with torch.no_grad():
            x, y = pairs(task, held)
            return float(F.mse_loss(model(x), y))

    steps, online, relearn = cell["steps"], [], cell["steps"]
    after: list[tuple[float, float]] = []
    for part, task in enumerate((0, 1, 0)):
        for step in range(steps):
            x, y = pairs(task, torch.randn(32, 16))
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if part < 2:
                online.append(float(loss.detach()))
            elif loss_on(0) <= 1.1 * after[0][0]:
                relearn = step + 1
                break
        after.append((loss_on(0), loss_on(1)))
        tell((part + 1) / 3, f"loss {after[-1][task]:.4f}")
    return {
        "value": -sum(online) / len(online),
        "scores": dict(zip(LOSSES, (after[0][0], after[1][0], after[1][1]))),
        "relearn": relearn,
        "headline": f"A {after[0][0]:.4f}, after B {after[1][0]:.4f}",
    }


def grid(asked: Options) -> list[Cell]:
    steps, traced = asked.pick((50, 100), (300, 300))
    return cells(asked, ["orthogonal"], OPTIMIZERS, steps=steps, traced=traced)


def traces(records: Sequence[Record]) -> dict[str, list[float]]:
    """The trace of every optimizer: it depends on no seed and no rate."""
    steps = {r.model: r.config["traced"] for r in records}
    return {name: trace(name, n) for name, n in steps.items()}


def notes(records: Sequence[Record]) -> str:
    head = ("optimizer", "update along A at the change", "steps until a tenth of it")
    found = traces(records).items()
    rows = [(name, f"{curve[0]:.3f}", str(steps_to(curve))) for name, curve in found]
    return markdown([head, *rows])


def figure(records: Sequence[Record], path: Path) -> None:
    lines = {name: (range(len(c)), [c]) for name, c in traces(records).items()}
    labels = ("Steps since the gradients turned", "Share of the update along A")
    curves([Panel("", *labels, lines)], path)


COLUMNS = [
    model("optimizer"), RATE, SEEDS, *(mean(key, metric(key), digits=4) for key in LOSSES),
    mean("steps to relearn A", detail("relearn"), digits=0),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="orthogonal-tasks", shows="what momentum forgets and M3's slow memory keeps",
    price=("~20 minutes", "–"),
    takes=("seeds", "workers"), device="cpu",
    grid=grid, work=work,
    rates=lambda cell: GRIDS[cell["model"]], quick_rates=(1, 3),
    chooses="the mean loss over the first two parts", search=(100, 101), seeds=5,
    columns=COLUMNS, notes=notes, figure=figure,
)  # fmt: skip
