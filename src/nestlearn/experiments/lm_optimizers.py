"""The quickstart's Hope and Transformer under AdamW, Muon, M3 and delta momentum.

Bytes of the standard library, width 128, 3 layers, 200 steps of 8 × 256, the schedule and clipping
of `nestlearn train` for all. Every pair of model and optimizer takes the best of four learning
rates by its validation loss on one seed, and then runs three others. The grids differ in place,
because the units do, not in number or ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn import optim
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.language import corpus_of, matched, quick_models, settings
from nestlearn.experiments.tables import RATE, SEEDS, detail, mean, metric, model
from nestlearn.models.hope import HopeLM
from nestlearn.train import TrainConfig, train

MODELS = ("Hope", "Transformer")
GRIDS = {
    "AdamW": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "Muon": (5e-3, 1e-2, 2e-2, 4e-2),
    "M3": (5e-3, 1e-2, 2e-2, 4e-2),
    "Delta momentum": (0.25, 0.5, 1.0, 2.0),
}
SMOOTH = 20  # steps of one point of the picture
LOSS = "validation loss (nats)"


def build(name: str, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """A contestant; decay as in `nestlearn train`."""
    if name == "Delta momentum":
        return optim.DeltaMomentum(optim.groups(model), config.lr, weight_decay=0.0)
    kind = {"Muon": optim.Muon, "M3": optim.M3}[name]
    return kind(
        optim.groups(model), config.lr, weight_decay=config.weight_decay, betas=config.betas
    )


def grid(asked: Options) -> list[Cell]:
    steps = asked.steps or asked.pick(20, 200)
    return [
        {"task": "stdlib", "model": f"{name}, {optimizer}", "steps": steps, "quick": asked.quick}
        for name in chosen(asked.models, MODELS, "model")
        for optimizer in GRIDS
    ]


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One training, measured on the validation windows at its end."""
    text = corpus_of(())
    name, optimizer = cell["model"].split(", ")
    entries = {e.name: e for e in matched(quick_models(text.vocab_size))}
    config = replace(
        settings(cell["steps"], quick=cell["quick"]), lr=cell["lr"], seed=cell["seed"],
        device=cell["device"],
    )  # fmt: skip
    torch.manual_seed(cell["seed"])
    model = HopeLM(entries[name].config)
    log = train(
        model, text, config, None, progress=False,
        optimizer=None if optimizer == "AdamW" else lambda m, c: build(optimizer, m, c),
        on_step=lambda r: tell(r["step"] / config.steps, f"loss {r['loss']:.3f}"),
    )  # fmt: skip
    last = log[-max(1, len(log) // 10) :]
    loss = log[-1]["val_loss"]
    return {
        "value": -loss, "scores": {LOSS: loss}, "bits_per_byte": log[-1]["val_bits_per_byte"],
        "train_loss": sum(r["loss"] for r in last) / len(last),
        "tokens_per_second": statistics.median_high(r["tokens_per_second"] for r in log),
        "log": [r["loss"] for r in log], "headline": f"validation loss {loss:.4f}",
        "parameters": model.parameter_count(),
    }  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    def along(r: Record) -> Along:
        parts = torch.tensor(r.detail["log"], dtype=torch.float64).split(SMOOTH)
        return [SMOOTH * (i + 0.5) for i in range(len(parts))], [float(p.mean()) for p in parts]

    panels = []
    for name in MODELS:
        own = (r for r in records if r.model.startswith(f"{name}, "))
        if drawn := lines(own, along, lambda r: r.model.split(", ")[1]):
            panels.append(Panel(name, "Optimizer step", "Loss (nats per byte)", drawn))
    curves(panels, path, log="y")


COLUMNS = [
    model("optimizer"), RATE, SEEDS, mean(LOSS, metric(LOSS), digits=4),
    mean("bits per byte", detail("bits_per_byte"), digits=4),
    mean("training loss, last tenth", detail("train_loss"), digits=4),
    mean("tokens/s", detail("tokens_per_second"), digits=0),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="lm-optimizers", shows="Hope and a Transformer under four optimizers",
    price=("~1 hour", "–"),
    takes=("seeds", "steps", "models", "workers", "device"), device="cpu",
    grid=grid, work=work,
    rates=lambda cell: GRIDS[cell["model"].split(", ")[1]], search=(100,),
    columns=COLUMNS, figure=figure,
    sources=("experiments/language.py",),
)  # fmt: skip
