"""Section 4.3: what momentum forgets when gradients turn orthogonal, and what M3's memory keeps.

    nestlearn reproduce orthogonal-tasks

*Trace.* 300 noisy gradients of one direction A, then as many of an orthogonal B: how much of each
optimizer's update still points along A, by the steps since then.
*Learning.* A network learns task A, then B on inputs that share no coordinate with A's, then A
again: its loss on A before and after B, and the steps to relearn A. Every optimizer takes the best
of five learning rates, by its mean loss over the first two parts on two seeds, and then runs five
others.
A trace is a memory of gradients, not yet of a task: whether it helps is what the second part shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn import optim
from nestlearn.recipes.cells import Cell, Tell, commit
from nestlearn.recipes.tuned import compare, settings, table, write
from nestlearn.train.plots import COLOURS, new_figure, write_figure

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
GRIDS = {
    name: tuple(start * 10 ** (i / 2) for i in range(5))
    for name, start in zip(OPTIMIZERS, (0.01, 0.03, 3e-4, 1e-3, 1e-3, 1e-3))
}
COLUMNS = {
    "loss of A, learnt": ("a_learnt", 4),
    "of A after B": ("a_after_b", 4),
    "of B after B": ("b_learnt", 4),
    "steps to relearn A": ("relearn", 0),
}


# -------------------------------------------------------------------------------------- the trace


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
        "online": sum(online) / len(online),
        "a_learnt": after[0][0],
        "a_after_b": after[1][0],
        "b_learnt": after[1][1],
        "relearn": relearn,
        "headline": f"A {after[0][0]:.4f}, after B {after[1][0]:.4f}",
    }


def reproduce(out: Path, *, quick: bool = False, seeds: int = 5, workers: int | None = None) -> str:
    """Both parts: the tables, also in out/table.md; results.json, picture and cells beside it.

    quick: two learning rates, one seed, short parts. seeds: trainings after the tuning.
    """
    out.mkdir(parents=True, exist_ok=True)
    curves = {name: trace(name, 100 if quick else 300) for name in OPTIMIZERS}
    grids = {name: lrs[1:3] if quick else lrs for name, lrs in GRIDS.items()}
    steps = 50 if quick else 300

    def cell(model: str, lr: float, seed: int) -> Cell:
        used = settings(OPTIMIZERS[model]([nn.Parameter(torch.zeros(2, 2))], lr))
        return {
            "task": "orthogonal", "model": model, "lr": lr, "seed": seed, "steps": steps,
            "optimizer": used,
        }  # fmt: skip

    tune, chosen = ((100,), range(1)) if quick else ((100, 101), range(seeds))
    records = compare(
        grids, cell, work, out, score="online", tune_seeds=tune, seeds=chosen, workers=workers
    )
    results = {
        "section": "4.3", "quick": quick, "trace": curves, "records": records, "commit": commit(),
    }  # fmt: skip
    lines = [
        "| optimizer | update along A at the change | steps until a tenth of it |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {c[0]:.3f} | {steps_to(c)} |" for n, c in curves.items()]
    draw(curves, out / "orthogonal-tasks.png")
    return write(out, results, "\n".join([*lines, "", table(records, COLUMNS)]))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The traces."""
    figure, (axes,) = new_figure("Steps since the gradients turned", "Share of the update along A")
    for colour, (name, curve) in zip(COLOURS, curves.items()):
        axes.plot(curve, color=colour, lw=1.5, label=name)
    axes.legend(frameon=False, fontsize=10)
    write_figure(figure, path)
