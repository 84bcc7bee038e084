"""Table 4: the MAD tasks (section 9.4).

The paper's figures are those of its own, larger budget, and means over all difficulties; ours are
of the baseline setting unless `only` names others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.evals import Record, Task, mad
from nestlearn.recipes import suite
from nestlearn.recipes.cells import Cell, Tell
from nestlearn.recipes.contenders import CONTENDERS, RIVALS, contender, levels
from nestlearn.recipes.figures import bars
from nestlearn.train.run import resolve_device

NAMES = {
    "compression": "compression",
    "recall": "in-context recall",
    "fuzzy": "fuzzy recall",
    "copying": "selective copying",
    "memorization": "memorization",
    "noisy": "noisy recall",
}
TASKS = tuple(NAMES)[:5]  # the paper's table has no noisy recall
_ROWS = {
    "Transformer": (49.4, 100, 47.9, 96.2, 83.7),
    "Titans": (49.8, 100, 50.0, 99.4, 83.4),
    "Hope": (51.2, 100, 52.1, 99.7, 85.2),
}
PAPER = {m: {(t, "baseline"): float(v) for t, v in zip(TASKS, row)} for m, row in _ROWS.items()}

_VARIANTS = ("hope-dot", "hope-slow", "hope-mlp", "hope-attention-dot", "hope-attention-slow")
MODELS = ("hope", *RIVALS, *_VARIANTS)
LRS = (1e-3, 3e-3, 8e-3)
STEPS, QUICK_STEPS = 2000, 3

# A level that is written every 4 tokens, beside one every 16: slow ones see too little of sequences
# of 32 tokens, and in a chain the second level learns from what the first one is still changing
# (docs/results.md).
SKELETON: dict[str, Any] = {
    "dim": 128,
    "layers": 2,
    "heads": 4,
    "conv": 4,
    "chunk": 32,
    "levels": levels(4, 16, None),
    "variant": "independent",
}


class AutoEncoder(nn.Module):
    """MAD's compression model: from the encoder's last vector alone, every input token.

    encoder: ids [B, T] -> (vectors [B, T, dim], ...). z, its last vector, plus a sinusoid of the
    position passes two layers of an MLP and a linear readout: [B, T] -> [B, T, classes].
    """

    def __init__(self, encoder: nn.Module, dim: int, classes: int):
        super().__init__()
        self.encoder = encoder
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, dim), nn.GELU()]
        self.decoder = nn.Sequential(
            *layers, nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, classes, bias=False)
        )

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.encoder(ids)[0]
        return self.decoder(vectors[:, -1:] + sinusoid(ids.shape[1], vectors))


def sinusoid(length: int, like: Tensor) -> Tensor:
    """Sines and cosines of the positions, [length, dim] with like's dim, dtype and device."""
    dim = like.shape[-1]
    half = (dim + 1) // 2
    rate = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000) / half))
    angle = torch.outer(torch.arange(length, device=like.device).float(), rate)
    return torch.cat([angle.sin(), angle.cos()], -1)[:, :dim].to(like.dtype)


def auto_encoder(model: Any, task: Task) -> nn.Module:
    """The model as encoder of an AutoEncoder: its head gives way to the vectors before it."""
    dim = model.embed.embedding_dim
    model.head = nn.Identity()
    return AutoEncoder(model, dim, task.classes)


def entry(
    task: str,
    model: str,
    setting: str = "baseline",
    *,
    steps: int = STEPS,
    skeleton: Mapping[str, Any] | None = None,
    device: str = "auto",
    quick: bool = False,
    **fit: Any,
) -> Cell:
    """One (task, model) of the plan; skeleton: changes of SKELETON; fit: fields of FitConfig."""
    config = {
        "steps": steps,
        "batch": 8 if quick else 32,
        "warmup": min(100, steps // 10),
        "schedule": "cosine",
        "weight_decay": 0.1,
        "eval_every": max(1, steps // 10),
        "stop": 99.9,
        **fit,
    }
    return {
        "benchmark": "mad",
        "task": task,
        "setting": setting,
        "model": model,
        "skeleton": {**SKELETON, **({"dim": 32} if quick else {}), **(skeleton or {})},
        "data": {"train": 64, "test": 16} if quick else {},
        "fit": config,
        "device": device,
    }


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and test one cell."""
    task = mad.task(cell["task"], cell["setting"], **cell["data"])
    wrap = None if task.causal else auto_encoder
    return suite.train_cell(cell, task, tell, wrap=wrap)


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
    """Train every model on every task and return the table, also in out/table.md.

    quick: one learning rate, few sequences and steps: to see that it runs. only: tasks of NAMES,
    "recall/vocab=32" for another setting, "recall/all" for all of them. models: names of CONTENDERS
    (default: MODELS). seeds: trainings with the best learning rate.
    """
    steps = (QUICK_STEPS if quick else STEPS) if steps is None else steps
    device = str(resolve_device(device))
    entries = [
        entry(task, model, setting, steps=steps, device=device, quick=quick)
        for task, setting in _pairs(only)
        for model in suite.models(models, ("hope", "transformer") if quick else MODELS)
    ]
    lrs, seeds = (LRS[1:2], 1) if quick else (LRS, seeds)
    records = suite.run_plan(suite.Plan("table4", work, entries, lrs, seeds), out, workers=workers)
    return report(records, out)


def _pairs(only: Sequence[str]) -> list[tuple[str, str]]:
    """The (task, setting) pairs that `only` names."""
    pairs = []
    for name in only or TASKS:
        task, _, setting = name.partition("/")
        suite.chosen([task], tuple(NAMES), "task")
        known = list(mad.settings(task))
        asked = known if setting == "all" else [setting or "baseline"]
        pairs += [(task, s) for s in suite.chosen(asked, tuple(known), "setting")]
    return pairs


def _means(records: Sequence[Record]) -> str:
    """Of each model that has all of TASKS, the best first."""
    found = {}
    for model in dict.fromkeys(r.model for r in records):
        own = [r for r in records if r.model == model and r.setting == "baseline"]
        scores = [[r.value for r in own if r.task == task] for task in TASKS]
        if all(scores):
            found[contender(model).title] = statistics.mean(map(statistics.mean, scores))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{title} {mean:.1f}" for title, mean in ranked) or "none has run them all"


def report(records: Sequence[Record], out: Path) -> str:
    """Write out/table.md and out/table4.png; the table."""
    every = [(task, setting) for task in NAMES for setting in mad.settings(task)]
    heads = {p: NAMES[p[0]] + ("" if p[1] == "baseline" else f", {p[1]}") for p in every}
    text = suite.table(records, [(head, [pair]) for pair, head in heads.items()], PAPER)
    text += f"\n\nMean over the baselines of all five: {_means(records)}."
    text += "\n\nThe paper's figures: larger models and budgets, means over all difficulties."
    suite.write_table(out, text)
    values: dict[str, dict[str, list[float]]] = {}
    paper: dict[str, dict[str, float]] = {}
    models = list(CONTENDERS)
    rank = {(model, *pair): i for i, (model, pair) in enumerate(product(models, every))}
    for record in sorted(records, key=lambda r: rank[r.model, r.task, r.setting]):
        about = contender(record.model)
        pair = (record.task, record.setting)
        column = heads[pair].replace(" ", "\n")
        values.setdefault(about.title, {}).setdefault(column, []).append(record.value)
        if about.paper in PAPER and pair in PAPER[about.paper]:
            paper.setdefault(about.title, {})[column] = PAPER[about.paper][pair]
    bars(values, out / "table4.png", paper=paper)
    return text
