"""Figure 4: momentum and delta momentum in the toy landscape of eq. 53.

ψ(r, θ) = r² + k (r − θ + α sin(ω r))² from (−3.5, 2); its one minimum is ψ(0, 0) = 0. The paper
gives no k, α, ω, momentum or step: those of LANDSCAPES, the first of which is drawn, are our
choice, and which method is ahead depends on it. Every method gets its best learning rate of the
same grid, once at momentum 0.9 and once with the momentum chosen too; best is the fewest steps
until ψ stays below 1e-3. The literal delta momentum blows up where ‖g‖² > 1 + α, so it may also
choose to see the loss times 0.03, one dial more than the others have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestlearn import optim
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.tables import model, words
from nestlearn.train.plots import COLOURS, new_figure, write_figure

LANDSCAPES = ((1.0, 1.0, 2.0), (0.1, 1.0, 2.0), (1.0, 1.0, 1.0), (10.0, 0.5, 1.0))  # k, α, ω
START, REACHED = (-3.5, 2.0), 1e-3
LRS = tuple(round(10 ** (e / 4), 8) for e in range(-14, 3))  # 3e-4 to 3, four for each power of ten
USUAL = 0.9
MOMENTA = (0.0, 0.5, 0.7, 0.8, USUAL, 0.95)
STAYED = 30  # steps below the threshold that count as having arrived

Build = Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]


class Setting(NamedTuple):
    """What is chosen from the grid."""

    lr: float
    momentum: float
    scale: float


METHODS: dict[str, Build] = {
    "Momentum": lambda p, lr, m: torch.optim.SGD(p, lr=lr, momentum=m),
    "Delta momentum": lambda p, lr, m: optim.DeltaMomentum(p, lr, m),
    "Delta momentum, implicit": lambda p, lr, m: optim.GM(p, lr, m, objective="l2"),
    "Delta momentum, literal": lambda p, lr, m: optim.DeltaMomentum(p, lr, m, mode="literal"),
}


def psi(w: Tensor, landscape: Sequence[float]) -> Tensor:
    """Eq. 53 at w [..., 2] = (r, θ), for (k, α, ω)."""
    k, alpha, omega = landscape
    r, theta = w[..., 0], w[..., 1]
    return r**2 + k * (r - theta + alpha * torch.sin(omega * r)) ** 2


def trajectory(
    optimizer: Build, setting: Setting, landscape: Sequence[float], steps: int
) -> Tensor:
    """The points [n + 1, 2] that a method passes, float64, until it has stayed or has left."""
    w = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    run = optimizer([w], setting.lr, setting.momentum)
    path, inside = [w.detach().clone()], 0
    while len(path) <= steps and inside < STAYED and float(path[-1].abs().max()) < 1e3:
        run.zero_grad()
        loss = psi(w, landscape)
        (setting.scale * loss).backward()
        run.step()
        path.append(w.detach().clone())
        inside = inside + 1 if psi(path[-1], landscape) < REACHED else 0
    return torch.stack(path)


def arrival(path: Tensor, landscape: Sequence[float]) -> int | None:
    """The first step from which ψ stays below the threshold; None if it does not."""
    outside = ~(psi(path, landscape) < REACHED)
    first = int(outside.nonzero().max()) + 1
    return first if len(path) - first >= STAYED else None


def grid(asked: Options) -> list[Cell]:
    steps, lrs, where = asked.pick((100, LRS[2::3], LANDSCAPES[:1]), (400, LRS, LANDSCAPES))
    tasks = {", ".join(f"{x:g}" for x in place): {"landscape": list(place)} for place in where}
    return cells(asked, tasks, METHODS, steps=steps, lrs=list(lrs))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """A method at its best settings, with the momentum fixed and with it chosen."""
    name, landscape = cell["model"], cell["landscape"]
    scales = (1.0, 0.03) if "literal" in name else (1.0,)
    found: list[tuple[int, Setting, Tensor]] = []
    tried = list(itertools.product(cell["lrs"], MOMENTA, scales))
    for lr, momentum, scale in tried:
        setting = Setting(lr / scale, momentum, scale)
        path = trajectory(METHODS[name], setting, landscape, cell["steps"])
        if (n := arrival(path, landscape)) is not None:
            found.append((n, setting, path))
    result: dict[str, Any] = {"scores": {"settings that arrive": len(found)}, "tried": len(tried)}
    for key, some in (("usual", [f for f in found if f[1].momentum == USUAL]), ("chosen", found)):
        best = min(some, key=lambda f: f[0], default=None)
        result[key] = {"steps": best[0] if best else None}
        if best:
            result[key] |= {**best[1]._asdict(), "path": best[2].tolist()}
    return result


def _steps(record: Record, key: str, names: Sequence[str]) -> str:
    best = record.detail[key]
    if best["steps"] is None:
        return "never"
    return f"{best['steps']} ({', '.join(f'{best[name]:.2g}' for name in names)})"


def figure(records: Sequence[Record], path: Path) -> None:
    """The paths at momentum 0.9 over the first landscape's contours, and ψ along them."""
    rows = [r for r in records if r.task == records[0].task]
    picture, (left, right) = new_figure("r", "θ", "Step", "ψ")
    landscape = rows[0].config["landscape"]
    best = [(r.model, r.detail["usual"]) for r in rows]
    shown = [(name, found) for name, found in best if found["steps"] is not None]
    points = torch.tensor([p for _, found in shown for p in found["path"]] or [START])
    (r0, t0), (r1, t1) = (points.amin(0) - 0.7).tolist(), (points.amax(0) + 0.7).tolist()
    r, t = torch.linspace(r0, r1, 200), torch.linspace(t0, t1, 200)
    points = torch.stack(torch.meshgrid(r, t, indexing="xy"), -1)
    levels = [0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
    left.contour(r, t, psi(points, landscape), levels=levels, colors="#bbbbbb", linewidths=0.7)
    for colour, (name, found) in zip(COLOURS, shown):
        left.plot(*zip(*found["path"]), "o-", color=colour, ms=2.5, lw=1.2, label=name)
        losses = psi(torch.tensor(found["path"]), landscape)
        right.semilogy(losses, color=colour, lw=1.5, label=f"{name}, {found['steps']} steps")
    left.plot(*START, "k*", ms=9)
    left.plot(0, 0, "kx", ms=8)
    right.axhline(REACHED, color="#555555", lw=1, ls="--")
    right.set_ylim(1e-6, 200)
    if shown:
        right.legend(frameon=False, fontsize=9)
    write_figure(picture, path)


COLUMNS = [
    words("k, α, ω", lambda r: r.task), model("method"),
    words(
        f"steps to ψ < {REACHED:g} at momentum {USUAL} (lr)", lambda r: _steps(r, "usual", ("lr",))
    ),
    words("momentum chosen (lr, momentum)", lambda r: _steps(r, "chosen", ("lr", "momentum"))),
    words("settings that arrive", lambda r: f"{r.value:.0f} of {r.detail['tried']}"),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="fig4", shows="momentum and delta momentum in the landscape of eq. 53",
    price=("2 minutes", "–"),
    takes=("workers",), device="cpu",
    grid=grid, work=work,
    seeds=1,
    columns=COLUMNS, by=lambda r: (r.task, r.model), figure=figure,
)  # fmt: skip
