"""Figure 12: the time and memory of a step under Muon, AdaMuon, M3 and AdamW.

    nestlearn reproduce fig12                           # 5, 50 and 140 million parameters
    nestlearn reproduce fig12 --only 50 --device cuda

The matrices of a transformer with random gradients, no model around them; five Newton–Schulz steps
in bfloat16 for all that have any. In every round each optimizer makes its step, the order turning
from round to round, and is divided by torch.optim.Muon of the same round: what else the machine
does falls on all alike. M3's step is the mean over a window of its slow memory: 19 of 20 steps
without, one with the second Newton–Schulz.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn import optim
from nestlearn.recipes.cells import commit
from nestlearn.recipes.tuned import write
from nestlearn.train.plots import COLOURS, new_figure, write_figure

SIZES = {"5": (256, 6), "50": (640, 10), "140": (1024, 11)}  # millions: width, layers
PERIOD, REFERENCE = 20, "torch.optim.Muon"
CONTESTANTS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    REFERENCE: lambda p: torch.optim.Muon(p, lr=1e-6),
    "Muon": lambda p: optim.Muon(p, lr=1e-6, precision="bfloat16"),
    "AdaMuon": lambda p: optim.AdaMuon(p, lr=1e-6, precision="bfloat16"),
    "M3": lambda p: optim.M3(p, lr=1e-6, precision="bfloat16", period=PERIOD),
    "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, lr=1e-6),
}


def matrices(width: int, layers: int, device: str) -> list[nn.Parameter]:
    """Query, key, value, output and two MLP matrices of each layer, with gradients."""
    torch.manual_seed(0)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    found = []
    for shape in shapes * layers:
        p = nn.Parameter(0.02 * torch.randn(shape, device=device))
        p.grad = torch.randn(shape, device=device)
        found.append(p)
    return found


def step_seconds(optimizer: torch.optim.Optimizer, cuda: bool) -> float:
    """The mean time of a step; of M3 over a window of its slow memory."""
    if not isinstance(optimizer, optim.M3):
        return _timed(optimizer, cuda)
    times = []
    for phase in (PERIOD, PERIOD + 1):  # the step that turns the slow memory, and another
        for state in optimizer.state.values():
            state["step"].fill_(phase)
        times.append(_timed(optimizer, cuda))
    return (times[0] + (PERIOD - 1) * times[1]) / PERIOD


def _timed(optimizer: torch.optim.Optimizer, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(size: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """A record for each optimizer: seconds of each round, ratios to the reference, bytes."""
    cuda = device.startswith("cuda")
    params = matrices(*SIZES[size], device)
    running = {name: build(params) for name, build in CONTESTANTS.items()}
    for optimizer in running.values():  # makes the state; the first step does not count
        step_seconds(optimizer, cuda)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for i in range(rounds):
        turned = names[i % len(names) :] + names[: i % len(names)]
        for name in turned if i % 2 == 0 else turned[::-1]:
            seconds[name].append(step_seconds(running[name], cuda))
    count = sum(p.numel() for p in params)
    return [
        {
            "size": size,
            "parameters": count,
            "optimizer": name,
            "seconds": seconds[name],
            "ratios": [a / b for a, b in zip(seconds[name], seconds[REFERENCE])],
            "state_bytes_per_parameter": _state_bytes(running[name]) / count,
            "peak_bytes": _peak(running[name]) if cuda else None,
        }
        for name in names
    ]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def _peak(optimizer: torch.optim.Optimizer) -> int:
    """What a step allocates at most beyond what stands before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step_seconds(optimizer, True)
    return torch.cuda.max_memory_allocated() - before


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    steps: int | None = None,
    device: str = "cpu",
) -> str:
    """Measure and return the table, also in out/table.md; results.json and the figure beside it.

    quick: 5 million parameters, 3 rounds. only: names in SIZES. steps: of each (default: 10).
    ValueError for another size.
    """
    sizes = ("5",) if quick else tuple(only or SIZES)
    rounds = (3 if quick else 10) if steps is None else max(2, steps)
    if unknown := set(sizes) - SIZES.keys():
        raise ValueError(f"size {sorted(unknown)}: use {sorted(SIZES, key=int)}, in millions")
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for size in sizes for row in measure(size, rounds, device)]
    cuda = device.startswith("cuda")
    results = {
        "figure": 12, "quick": quick, "device": device, "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__, "rows": rows, "commit": commit(),
    }  # fmt: skip
    draw(rows, out / "fig12.png")
    return write(out, results, table(rows))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over rounds, with the quartiles of the ratio."""
    lines = [
        "| parameters | optimizer | ms a step | × torch's Muon (quartiles) | state, B/parameter |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        low, middle, high = quartiles(r["ratios"])
        lines.append(
            f"| {r['parameters'] / 1e6:.0f} M | {r['optimizer']} | "
            f"{1e3 * statistics.median(r['seconds']):.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) | "
            f"{r['state_bytes_per_parameter']:.1f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Step time by size, as a ratio to torch's Muon."""
    figure, (axes,) = new_figure("Parameters (millions)", "Step time ÷ torch.optim.Muon")
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    for i, name in enumerate(CONTESTANTS):
        mine = [r for r in rows if r["optimizer"] == name]
        spread = [quartiles(r["ratios"]) for r in mine]
        at = [sizes.index(r["size"]) + 0.06 * (i - 2) for r in mine]
        low, middle, high = zip(*spread)
        error = ([m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)])
        axes.errorbar(at, middle, error, fmt="o-", color=COLOURS[i], ms=5, lw=1.3, label=name)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=10, ncols=3, loc="upper center")
    write_figure(figure, path)
