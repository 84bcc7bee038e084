"""Figure 12: the time and memory of a step under Muon, AdaMuon, M3 and AdamW.

    nestlearn reproduce fig12 --only 50 --device cuda        # of 5, 50 and 140 million parameters

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
from nestlearn import state as tree
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.tables import model, words
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


def grid(asked: Options) -> list[Cell]:
    """A cell for each size: all optimizers take turns in it. steps: of each, at least 2."""
    rounds = asked.pick(3, 10) if asked.steps is None else max(2, asked.steps)
    sizes = chosen(asked.only or asked.pick(("5",), ()), SIZES, "size")
    return [{"task": size, "model": "all", "rounds": rounds} for size in sizes]


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """For each optimizer: seconds of each round, ratios to the reference, bytes."""
    device = cell["device"]
    cuda = device.startswith("cuda")
    params = matrices(*SIZES[cell["task"]], device)
    running = {name: build(params) for name, build in CONTESTANTS.items()}
    for optimizer in running.values():  # makes the state; the first step does not count
        step_seconds(optimizer, cuda)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for i in range(cell["rounds"]):
        turned = names[i % len(names) :] + names[: i % len(names)]
        for name in turned if i % 2 == 0 else turned[::-1]:
            seconds[name].append(step_seconds(running[name], cuda))
    count = sum(p.numel() for p in params)
    found = {
        name: {
            "scores": {"seconds of a step": statistics.median(seconds[name])},
            "each": seconds[name],
            "ratios": [a / b for a, b in zip(seconds[name], seconds[REFERENCE])],
            "state_bytes_per_parameter": tree.nbytes(list(running[name].state.values())) / count,
            "peak_bytes": _peak(running[name]) if cuda else None,
        }
        for name in names
    }
    machine = torch.cuda.get_device_name() if cuda else platform.machine()
    return {
        "models": found, "parameters": count, "machine": machine, "device": device,
        "threads": torch.get_num_threads(), "steps": cell["rounds"],
    }  # fmt: skip


def _peak(optimizer: torch.optim.Optimizer) -> int:
    """What a step allocates at most beyond what stands before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step_seconds(optimizer, True)
    return torch.cuda.max_memory_allocated() - before


def quartiles(record: Record) -> list[float]:
    """Of the ratios: lower quartile, median, upper quartile."""
    return statistics.quantiles(record.detail["ratios"], n=4, method="inclusive")


def _ratio(record: Record) -> str:
    low, middle, high = quartiles(record)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def figure(records: Sequence[Record], path: Path) -> None:
    picture, (axes,) = new_figure("Parameters (millions)", "Step time ÷ torch.optim.Muon")
    sizes = list(dict.fromkeys(r.task for r in records))
    for i, name in enumerate(CONTESTANTS):
        mine = [r for r in records if r.model == name]
        at = [sizes.index(r.task) + 0.06 * (i - 2) for r in mine]
        low, middle, high = zip(*map(quartiles, mine))
        error = ([m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)])
        axes.errorbar(at, middle, error, fmt="o-", color=COLOURS[i], ms=5, lw=1.3, label=name)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=10, ncols=3, loc="upper center")
    write_figure(picture, path)


COLUMNS = [
    words("parameters", lambda r: f"{r.parameters / 1e6:.0f} M"), model("optimizer"),
    words("ms a step", lambda r: f"{1e3 * r.value:.1f}"),
    words("× torch's Muon (quartiles)", _ratio),
    words("state, B/parameter", lambda r: f"{r.detail['state_bytes_per_parameter']:.1f}"),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="fig12", shows="time of a step under Muon, AdaMuon, M3 and AdamW",
    price=("~5 minutes", "1 minute"),
    takes=("only", "steps", "device"), device="cpu",  # in this process: alone, with all its threads
    grid=grid, work=work,
    seeds=1,
    columns=COLUMNS, by=lambda r: (r.task, r.model), figure=figure,
)  # fmt: skip
