"""One default for every task: levels and steps chosen on data that no table is measured on.

Each candidate, a change of `HopeConfig`, trains once (seed 0) on language (bytes of books), the
five tasks of MAD, MQAR and two formal languages, all drawn with another seed than the tables' own.
The score of a candidate is the mean over tasks of its rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nestlearn.evals import formal, mad, mqar
from nestlearn.layers import Level
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.recipes import suite, table4
from nestlearn.recipes.cells import Cell, Tell, run_cells
from nestlearn.recipes.equal_time import books
from nestlearn.train import TrainConfig, evaluate, train
from nestlearn.train.run import resolve_device

SEED = 777  # of the data: no table is drawn with it
LR = {"language": (4e-3, 8e-3), "mad": (3e-3,), "mqar": (3e-3,), "formal": (3e-3,)}
STEPS, QUICK_STEPS = 2000, 3
LANGUAGES = ("parity", "anbncn")


def levels(*chunks: int | None, **options: Any) -> tuple[Level, ...]:
    """A level for each chunk."""
    return tuple(Level(chunk=chunk, **options) for chunk in chunks)


DOT: dict[str, Any] = {"objective": "dot"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "l2, 16 and 64": {"levels": levels(16, 64, None, objective="l2")},
    "dot, 16 and 64": {"levels": levels(16, 64, None, **DOT)},
    "dot, 16 and 64, lr 0.1": {"levels": levels(16, 64, None, lr=0.1, **DOT)},
    "dot, 4 and 64": {"levels": levels(4, 64, None, **DOT)},
    "dot, 1 and 16": {"levels": levels(1, 16, None, **DOT)},
    "dot, 4 and 16, side by side": {
        "levels": levels(4, 16, None, **DOT), "variant": "independent",
    },
    "l2, 4 and 16, side by side": {
        "levels": levels(4, 16, None, objective="l2"), "variant": "independent",
    },
    "dot, 4 and 64, half gd, steps to 2": {
        "levels": levels(4, 64, None, **DOT), "dgd": 0.5, "eta_max": 2.0,
    },
}  # fmt: skip


def entry(kind: str, task: str, candidate: str, lr: float, steps: int, device: str) -> Cell:
    """One training of a candidate."""
    change = CANDIDATES[candidate]
    plain = {**change, "levels": [asdict(level) for level in change["levels"]]}
    return {
        "benchmark": kind, "task": task, "model": candidate, "changes": plain, "lr": lr,
        "steps": steps, "seed": 0, "data": SEED, "device": device,
    }  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and measure one cell; "value": the higher the better."""
    changes = {**cell["changes"], "depth": 1}
    if cell["benchmark"] == "language":
        return _language(cell, changes, tell)
    skeleton = {k: v for k, v in table4.SKELETON.items() if k not in ("levels", "variant", "chunk")}
    steps = cell["steps"]
    fit = {
        "steps": steps, "batch": 32, "warmup": min(100, steps // 10), "weight_decay": 0.1,
        "eval_every": max(1, steps // 10), "stop": 99.9,
    }  # fmt: skip
    wrap = None
    if cell["benchmark"] == "mad":
        task = mad.task(cell["task"], seed=SEED)
        wrap = None if task.causal else table4.auto_encoder
    elif cell["benchmark"] == "mqar":
        task = mqar.task(128, 16, vocab=512, train=20_000, test=1000, seed=SEED)
        skeleton |= {"dim": 64, "heads": 2}
    else:
        task = formal.task(cell["task"], seed=SEED)
        skeleton |= {"dim": 64, "conv": 0, "rotary": False}
        fit |= {"schedule": "constant", "weight_decay": 0.0, "eval_every": 50}
    train_cell = {
        **cell, "model": "hope", "match": False, "skeleton": {**skeleton, **changes}, "fit": fit,
    }  # fmt: skip
    return suite.train_cell(train_cell, task, tell, wrap=wrap)


def _language(cell: Cell, changes: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    corpus, _ = books(Path(cell["books"]))
    quick = cell["steps"] <= QUICK_STEPS
    sizes = {"dim": 32, "layers": 1, "heads": 2} if quick else {"dim": 256, "layers": 6, "heads": 4}
    steps = cell["steps"] if quick else cell["steps"] // 8
    config = TrainConfig(
        steps=steps, batch=2 if quick else 32, length=128 if quick else 512, lr=cell["lr"],
        warmup=steps // 5, eval_every=steps, device=cell["device"],
        dtype="bfloat16" if cell["device"].startswith("cuda") else "float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = HopeLM(HopeConfig.from_dict({**sizes, **changes}))
    log = train(model, corpus, config, None, progress=False)
    T = config.length
    long = corpus.val_windows(2 if quick else 32, 4 * T)
    pieces = torch.cat([long[:, i * T : (i + 1) * T + 1] for i in range(4)])
    near, _ = evaluate(model, pieces, config.batch, config.dtype)
    far, _ = evaluate(model, long, max(1, config.batch // 4), config.dtype)
    norms = sorted(r["grad_norm"] for r in log[config.warmup :])
    tell(1.0, f"{near:.3f} {far:.3f}")
    return {
        "value": -(near + far) / 2, "near": near, "far": far, "steps": steps,
        "grad_norm": norms[len(norms) // 2] if norms else None,
        "headline": f"{near:.3f} {far:.3f} at {cell['lr']:g}",
    }  # fmt: skip


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    data: str | Path | None = None,
    models: Sequence[str] = (),
    workers: int | None = None,
    device: str = "auto",
) -> str:
    """Train every candidate on everything and return the table, also in out/table.md.

    data: the folder of books (none: language is left out). models: candidates (default: all).
    """
    device = str(resolve_device(device))
    steps = QUICK_STEPS if quick else STEPS
    tasks = [("mad", name) for name in table4.TASKS] + [("mqar", "K=16")]
    tasks += [("formal", name) for name in LANGUAGES]
    tasks = tasks[:2] if quick else tasks
    names = suite.chosen(models, tuple(CANDIDATES), "candidate")
    cells = [
        {**entry(kind, task, name, lr, steps, device), **({"books": str(data)} if data else {})}
        for kind, task in ([("language", "books")] if data else []) + tasks
        for name in names
        for lr in LR[kind]
    ]
    found = run_cells(cells, work, out / "cells", workers=workers, name="defaults")
    text = table(cells, found)
    suite.write_table(out, text)
    return text


def table(cells: Sequence[Cell], found: Sequence[dict[str, Any] | None]) -> str:
    """Candidates by tasks, the best rate of each, and the mean rank; the best candidate first."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for cell, done in zip(cells, found):
        key = (cell["model"], cell["task"])
        if done and (key not in best or done["result"]["value"] > best[key]["value"]):
            best[key] = done["result"]
    names = list(dict.fromkeys(cell["model"] for cell in cells))
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    ranks: dict[str, list[float]] = {name: [] for name in names}
    for task in tasks:
        values = {n: best[n, task]["value"] for n in names if (n, task) in best}
        for name, value in values.items():
            above = sum(v > value for v in values.values())
            equal = sum(v == value for v in values.values())
            ranks[name].append(above + (equal + 1) / 2)
    heads = ["levels", *(f"{t}" for t in tasks), "mean rank"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    means = {name: sum(r) / len(r) if r else float("inf") for name, r in ranks.items()}
    for name in sorted(names, key=means.__getitem__):
        row = []
        for task in tasks:
            result = best.get((name, task))
            if result is None:
                row.append("–")
            elif "near" in result:
                row.append(f"{result['near']:.3f} / {result['far']:.3f}")
            else:
                row.append(" / ".join(f"{x:.1f}" for x in result["best"].values()))
        lines.append("| " + " | ".join([name, *row, f"{means[name]:.1f}"]) + " |")
    return "\n".join(lines)
