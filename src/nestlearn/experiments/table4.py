"""Table 4: the MAD tasks (section 9.4).

The paper's figures are those of its own, larger budget, and means over all difficulties; ours are
of the baseline setting unless `only` names others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.evals import Task, grouped, mad
from nestlearn.experiments.accuracy import Accuracies
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.fit import settings, train_cell
from nestlearn.experiments.models import CONTENDERS, RIVALS, contender

NAMES = {
    "compression": "compression", "recall": "in-context recall", "fuzzy": "fuzzy recall",
    "copying": "selective copying", "memorization": "memorization", "noisy": "noisy recall",
}  # fmt: skip
TASKS = tuple(NAMES)[:5]  # the paper's table has no noisy recall
_ROWS = {
    "Transformer": (49.4, 100, 47.9, 96.2, 83.7),
    "Titans": (49.8, 100, 50.0, 99.4, 83.4),
    "Hope": (51.2, 100, 52.1, 99.7, 85.2),
}
PAPER = {m: {(t, "baseline"): float(v) for t, v in zip(TASKS, row)} for m, row in _ROWS.items()}
PAIRS = {
    (task, setting): name + ("" if setting == "baseline" else f", {setting}")
    for task, name in NAMES.items()
    for setting in mad.settings(task)
}
ACCURACIES = Accuracies(
    {head: [pair] for pair, head in PAIRS.items()},
    PAPER,
    {pair: head.replace(" ", "\n") for pair, head in PAIRS.items()},
)

_VARIANTS = ("hope-dot", "hope-slow", "hope-mlp", "hope-attention-dot", "hope-attention-slow")
MODELS = ("hope", *RIVALS, *_VARIANTS)
STEPS, QUICK_STEPS = 2000, 3
SKELETON: dict[str, Any] = {"dim": 128, "layers": 2, "heads": 4, "conv": 4, "chunk": 32}


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
        layers += [nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, classes, bias=False)]
        self.decoder = nn.Sequential(*layers)

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


def grid(asked: Options) -> list[Cell]:
    steps = asked.pick(QUICK_STEPS, STEPS) if asked.steps is None else asked.steps
    names = asked.models or asked.pick(("hope", "transformer"), MODELS)
    return [
        {
            "benchmark": "mad", "task": task, "setting": setting, "model": model,
            "skeleton": SKELETON | asked.pick({"dim": 32}, {}),
            "data": asked.pick({"train": 64, "test": 16}, {}),
            "fit": settings(steps, asked.quick),
        }
        for task, setting in _pairs(asked.only)
        for model in chosen(names, CONTENDERS, "model")
    ]  # fmt: skip


def _pairs(only: Sequence[str]) -> list[tuple[str, str]]:
    """The (task, setting) pairs that `only` names."""
    pairs = []
    for name in only or TASKS:
        task, _, setting = name.partition("/")
        chosen([task], NAMES, "task")
        asked = () if setting == "all" else [setting or "baseline"]
        pairs += [(task, s) for s in chosen(asked, mad.settings(task), "setting")]
    return pairs


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    task = mad.task(cell["task"], cell["setting"], **cell["data"])
    wrap = None if task.causal else auto_encoder
    return train_cell(cell, task, tell, wrap=wrap)


def notes(records: Sequence[Record]) -> str:
    """Rates; the mean of each model that has all of TASKS, the best first."""
    found = {}
    baselines = (r for r in records if r.setting == "baseline")
    for model, own in grouped(baselines, lambda r: r.model).items():
        scores = [[r.value for r in own if r.task == task] for task in TASKS]
        if all(scores):
            found[contender(model).title] = statistics.mean(map(statistics.mean, scores))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    means = ", ".join(f"{title} {mean:.1f}" for title, mean in ranked) or "none has run them all"
    return (
        f"{ACCURACIES.rates(records)}\n\nMean over the baselines of all five: {means}.\n\n"
        "The paper's figures: larger models and budgets, means over all difficulties."
    )


EXPERIMENT = Experiment(
    name="table4", shows="MAD: compression, recall, copying, memorization",
    price=("~9 hours", "~10 hours"),
    grid=grid, work=work,
    rates=(1e-3, 3e-3, 8e-3),
    columns=ACCURACIES.columns,
    order=lambda records: sorted(records, key=lambda r: list(CONTENDERS).index(r.model)),
    below=ACCURACIES.below, notes=notes, figure=ACCURACIES.figure,
)  # fmt: skip
