"""The quickstart's Hope and Transformer under AdamW, Muon, M3 and delta momentum.

    nestlearn reproduce lm-optimizers

Bytes of the standard library, width 128, 3 layers, 200 steps of 8 × 256, the schedule and clipping
of `nestlearn train` for all. Every pair of model and optimizer takes the best of four learning
rates by its validation loss on one seed, and then runs three others. The grids differ in place,
because the units do, not in number or ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn import optim
from nestlearn.models.hope import HopeLM
from nestlearn.recipes.cells import Cell, Tell, commit
from nestlearn.recipes.language import _matched, quick_models
from nestlearn.recipes.quickstart import settings
from nestlearn.recipes.tuned import compare, table, write
from nestlearn.recipes.tuned import settings as described
from nestlearn.train import Corpus, TrainConfig, load_text, stdlib_text, train
from nestlearn.train.plots import COLOURS, new_figure, write_figure

MODELS = ("Hope", "Transformer")
GRIDS = {
    "AdamW": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "Muon": (5e-3, 1e-2, 2e-2, 4e-2),
    "M3": (5e-3, 1e-2, 2e-2, 4e-2),
    "Delta momentum": (0.25, 0.5, 1.0, 2.0),
}
COLUMNS = {
    "validation loss (nats)": ("value_loss", 4),
    "bits per byte": ("bits_per_byte", 4),
    "training loss, last tenth": ("train_loss", 4),
    "tokens/s": ("tokens_per_second", 0),
}


def build(name: str, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """A contestant; decay as in `nestlearn train`."""
    decay = config.weight_decay
    if name == "Delta momentum":
        return optim.DeltaMomentum(optim.groups(model), config.lr, weight_decay=0.0)
    kind = {"Muon": optim.Muon, "M3": optim.M3}[name]
    return kind(optim.groups(model), config.lr, weight_decay=decay, betas=config.betas)


@cache
def corpus() -> Corpus:
    """The standard library's text, read once in a process."""
    return load_text(stdlib_text())


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One training, measured on the validation windows at its end."""
    text = corpus()
    name, optimizer = cell["model"].split(", ")
    entries = {e.name: e for e in _matched(quick_models(text.vocab_size))}
    base = settings(cell["steps"], quick=cell["quick"])
    config = TrainConfig(
        steps=base.steps, batch=base.batch, length=base.length, warmup=base.warmup,
        eval_every=base.eval_every, eval_windows=base.eval_windows, lr=cell["lr"],
        seed=cell["seed"], device=cell["device"],
    )  # fmt: skip
    torch.manual_seed(cell["seed"])
    model = HopeLM(entries[name].config)
    log = train(
        model, text, config, None, progress=False,
        optimizer=None if optimizer == "AdamW" else lambda m, c: build(optimizer, m, c),
        on_step=lambda r: tell(r["step"] / config.steps, f"loss {r['loss']:.3f}"),
    )  # fmt: skip
    last = log[-max(1, len(log) // 10) :]
    rates = sorted(r["tokens_per_second"] for r in log)
    return {
        "value": -log[-1]["val_loss"],
        "value_loss": log[-1]["val_loss"],
        "bits_per_byte": log[-1]["val_bits_per_byte"],
        "train_loss": sum(r["loss"] for r in last) / len(last),
        "tokens_per_second": rates[len(rates) // 2],
        "log": [r["loss"] for r in log],
        "headline": f"validation loss {log[-1]['val_loss']:.4f}",
        "parameters": model.parameter_count(),
    }


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    models: Sequence[str] = (),
    seeds: int = 3,
    steps: int | None = None,
    workers: int | None = None,
    device: str = "cpu",
) -> str:
    """Tune, compare and return the table, also in out/table.md; figure and cells beside it.

    quick: 20 small steps, one learning rate, one seed: two minutes, and no conclusion. models: of
    Hope and Transformer. seeds: trainings after the tuning.
    """
    if unknown := set(models) - set(MODELS):
        raise ValueError(f"model {sorted(unknown)[0]!r} is unknown: use {', '.join(MODELS)}")
    out.mkdir(parents=True, exist_ok=True)
    steps = (20 if quick else 200) if steps is None else steps
    names = [f"{m}, {o}" for m in models or MODELS for o in GRIDS]
    grids: dict[str, tuple[float, ...]] = {n: GRIDS[n.split(", ")[1]] for n in names}
    if quick:
        grids = {n: lrs[1:2] for n, lrs in grids.items()}

    def cell(model: str, lr: float, seed: int) -> Cell:
        optimizer = model.split(", ")[1]
        if optimizer != "AdamW":  # which is train's own
            optimizer = described(build(optimizer, nn.Linear(16, 16), TrainConfig(lr=lr)))
        return {
            "task": "stdlib", "model": model, "lr": lr, "seed": seed, "steps": steps,
            "quick": quick, "device": device, "optimizer": optimizer,
        }  # fmt: skip

    chosen = range(1 if quick else seeds)
    records = compare(
        grids, cell, work, out, score="value_loss", tune_seeds=(100,), seeds=chosen, workers=workers
    )
    results = {"quick": quick, "steps": steps, "records": records, "commit": commit()}
    draw(records, out / "lm-optimizers.png")
    return write(out, results, table(records, COLUMNS))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss by step, a panel for each model: means over seeds and twenty steps."""
    size = 20
    figure, panels = new_figure(*("Optimizer step", "Loss (nats per byte)") * 2)
    for axes, model in zip(panels, MODELS):
        mine = [r for r in records if r["name"].startswith(f"{model}, ")]
        for colour, record in zip(COLOURS, mine):
            mean = torch.tensor([r["log"] for r in record["results"]]).mean(0)
            parts = [float(part.mean()) for part in mean.split(size)]
            at = [size * (i + 0.5) for i in range(len(parts))]
            axes.semilogy(at, parts, color=colour, lw=1.6, label=record["name"].split(", ")[1])
        axes.set_title(model, loc="left", fontsize=12)
    panels[0].legend(frameon=False, fontsize=10)
    write_figure(figure, path)
