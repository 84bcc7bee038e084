"""Whether training is stable: gradient norms at the usual learning rate and at twice it.

Hope and its relatives on bytes of books, in windows of 512 and of 2,048, without truncation. A run
that diverges, or whose gradient norm after the warm-up goes beyond 1, is what this looks for.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nestlearn.experiments import books
from nestlearn.experiments.equal_time import FAMILIES, config_of
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Tell
from nestlearn.experiments.fit import train_lm
from nestlearn.experiments.tables import RATE, SEEDS, mean, metric, model, words
from nestlearn.models.hope import HopeLM

MODELS = ("Hope", "Hope-Attention", "DeltaNet with levels")
LENGTHS = (512, 2048)
STEPS, TOKENS = 300, 32768  # in a batch
LOSS, MEDIAN, LARGEST = "last training loss", "gradient norm, median", "largest after warm-up"


def grid(asked: Options) -> list[Cell]:
    windows = {str(n): asked.pick({}, {"length": n, "batch": TOKENS // n}) for n in LENGTHS}
    asked = replace(asked, models=asked.models or MODELS)
    usual = (STEPS, 0, 0)  # batch and length are each window's own
    return books.cells(asked, windows, FAMILIES, usual, what=("length", "model"))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    corpus, steps = books.read(Path(cell["folder"])).corpus, cell["steps"]
    torch.manual_seed(cell["seed"])
    lm = HopeLM(config_of(cell["model"], "6M"))
    log, settings = train_lm(
        lm, corpus, cell, tell, length=cell["length"], warmup=max(1, steps // 6)
    )
    norms = [r["grad_norm"] for r in log[settings.warmup :]]
    last = statistics.mean(r["loss"] for r in log[-max(1, steps // 10) :])
    scores = {LOSS: last, MEDIAN: statistics.median(norms), LARGEST: max(norms)}
    return {
        "value": -last, "scores": scores, "parameters": lm.parameter_count(),
        "norms": [round(r["grad_norm"], 4) for r in log],
        "headline": f"loss {last:.3f}, gradient norm at most {scores[LARGEST]:.2f}",
    }  # fmt: skip


COLUMNS = [
    model(), words("windows of", lambda r: f"{int(r.task):,}"), RATE, SEEDS,
    mean(LOSS, metric(LOSS)), mean(MEDIAN, metric(MEDIAN), digits=2),
    Column(LARGEST, lambda rows: f"{max(r.value for r in rows if r.metric == LARGEST):.2f}"),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="stability", shows="gradient norms at the usual learning rate and at twice it",
    price=("–", "30 minutes"),
    takes=("seeds", "steps", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=(1.2e-2, 2.4e-2), chooses="",
    columns=COLUMNS, by=lambda r: (r.model, r.task, r.config["lr"]),
    sources=("experiments/equal_time.py", "experiments/books.py"),
)  # fmt: skip
