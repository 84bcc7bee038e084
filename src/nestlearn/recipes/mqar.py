"""Associative recall by number of pairs, at equal bytes of recurrent state.

A model with a larger state remembers more, whatever its rule. So every model gets, by its width, a
state of the same size, counted as what a stream carries from token to token (`init_state`): fast
weights, held twice inside a chunk, momentum, convolution inputs. Parameters and computation then
differ, and are in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn import state
from nestlearn.evals import Record, mqar
from nestlearn.recipes import suite
from nestlearn.recipes.cells import Cell, Tell
from nestlearn.recipes.contenders import CONTENDERS, build, contender, levels
from nestlearn.recipes.figures import lines
from nestlearn.train.run import resolve_device

PAIRS = (4, 8, 16, 32)
STATES = (128, 512)  # KiB
DATA = {"length": 128, "vocab": 512, "train": 20_000, "test": 1000}
QUICK = {"length": 32, "vocab": 64, "train": 64, "test": 16}
MODELS = ("hope", "titans", "deltanet")
LRS = (3e-3, 1e-2)
STEPS, QUICK_STEPS = 2000, 3
TOLERANCE = 0.1
_UNSIZED = ("attention", "lstm")

SKELETON: dict[str, Any] = {
    "layers": 2,
    "heads": 2,
    "conv": 4,
    "chunk": 32,
    "levels": levels(8, None),
}


def state_bytes(model: str, skeleton: Mapping[str, Any]) -> int:
    """Bytes of one stream's state; ValueError for a model whose state is none or grows."""
    if contender(model).changes.get("mixer") in _UNSIZED:
        fit = [name for name, c in CONTENDERS.items() if c.changes.get("mixer") not in _UNSIZED]
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

    low, high = 1, 2048  # the state grows with the width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    best = min((low, high), key=lambda units: abs(at(units) - target))
    if abs(at(best) / target - 1) > TOLERANCE:
        raise ValueError(
            f"{model} at {kib} KiB: the nearest state has {at(best) / 1024:.1f} KiB; give another "
            "size, or fewer heads"
        )
    return {**skeleton, "dim": best * heads}


def entry(
    pairs: int,
    model: str,
    kib: float,
    *,
    steps: int = STEPS,
    data: Mapping[str, int] | None = None,
    device: str = "auto",
    quick: bool = False,
    **fit: Any,
) -> Cell:
    """One (pairs, model, KiB of state) of the plan; data: changes of DATA; fit: of FitConfig."""
    skeleton = sized(model, kib)
    config = {
        "steps": steps,
        "batch": 8 if quick else 64,
        "warmup": min(100, steps // 10),
        "schedule": "cosine",
        "weight_decay": 0.1,
        "eval_every": max(1, steps // 10),
        "stop": 99.9,
        **fit,
    }
    return {
        "benchmark": "mqar",
        "task": f"K={pairs}",
        "setting": f"{kib:g} KiB",
        "model": model,
        "skeleton": skeleton,
        "match": False,
        "state": state_bytes(model, skeleton),
        "data": {**DATA, **(QUICK if quick else {}), **(data or {}), "pairs": pairs},
        "fit": config,
        "device": device,
    }


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and test one cell."""
    return suite.train_cell(cell, mqar.task(**cell["data"]), tell)


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    models: Sequence[str] = (),
    seeds: int = 3,
    steps: int | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> str:
    """Train every model at every size of state and number of pairs; the table, also in table.md.

    quick: one size, few pairs, sequences and steps: to see that it runs. only: "K=8" and the like.
    models: names of CONTENDERS with a memory (default: MODELS). seeds: trainings with the best
    learning rate.
    """
    steps = (QUICK_STEPS if quick else STEPS) if steps is None else steps
    device = str(resolve_device(device))
    known = [f"K={pairs}" for pairs in PAIRS[: 2 if quick else None]]
    entries = [
        entry(int(name[2:]), model, kib, steps=steps, device=device, quick=quick)
        for name in suite.chosen(only, known, "task")
        for kib in STATES[: 1 if quick else None]
        for model in suite.models(models, MODELS)
    ]
    lrs, seeds = (LRS[:1], 1) if quick else (LRS, seeds)
    records = suite.run_plan(suite.Plan("mqar", work, entries, lrs, seeds), out, workers=workers)
    return report(records, out)


def report(records: Sequence[Record], out: Path) -> str:
    """Write out/table.md and out/mqar.png; the table."""
    tasks = sorted({r.task for r in records}, key=_count)
    rows = [["model", "state", "width", "parameters", *(f"{t[2:]} pairs" for t in tasks)]]
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    kinds = dict.fromkeys((r.setting, r.model) for r in records)
    order = list(CONTENDERS)
    for setting, model in sorted(kinds, key=lambda k: (_kib(k[0]), order.index(k[1]))):
        own = [r for r in records if (r.setting, r.model) == (setting, model)]
        title = contender(model).title
        first = own[0]
        size = f"{first.config['state'] / 1024:.1f} KiB"
        about = [title, size, str(first.config["skeleton"]["dim"]), f"{first.parameters:,}"]
        seeds = {task: [r for r in own if r.task == task] for task in tasks}
        rows.append(about + [suite.spread(rs) for rs in seeds.values()])
        panels.setdefault(f"State of {setting}", {})[title] = {
            _count(task): [r.value for r in rs] for task, rs in seeds.items() if rs
        }
    text = suite.markdown(rows)
    suite.write_table(out, text)
    lines(panels, out / "mqar.png", dial="Pairs to remember")
    return text


def _kib(setting: str) -> float:
    return float(setting.removesuffix(" KiB"))


def _count(task: str) -> int:
    return int(task.removeprefix("K="))
