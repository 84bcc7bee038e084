"""Rules that change in the middle: what does a memory gain that rewrites its own projections?

A sequence is a walk through a Markov chain of its own, whose table is drawn anew after some 192
symbols, without a sign. A model has to learn the table from the symbols, and to notice that it no
longer holds. Rates are chosen on validation sequences, figures are of test sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestlearn.experiments.books import surprise
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.fit import train_lm
from nestlearn.experiments.models import parameter_count, with_parameters
from nestlearn.experiments.tables import PARAMETERS, RATE, SEEDS, mean, metric, model
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Channel, Continuum, DeltaNet, Mixer, SwiGLU, Titans
from nestlearn.train import Corpus

SYMBOLS, LENGTH, STAY, SHARPNESS, TABLES = 32, 512, 192, 4.0, 4
MIXERS: dict[str, Mixer] = {
    "Hope": Titans(),
    "Hope, only the gates adapt": Titans(adapt=("eta", "alpha")),
    "Hope, only the values adapt": Titans(adapt=("v",)),
    "static projections": Titans(adapt=()),
    "DeltaNet": DeltaNet(),
}
CHANNELS: dict[str, Channel] = {"levels": Continuum(), "static MLP": SwiGLU()}
MODELS = tuple(f"{mixer}; {channel}" for channel in CHANNELS for mixer in MIXERS)
SINCE = ((0, 32), (32, 96), (96, 192))  # symbols since the table changed


class Walks(NamedTuple):
    """ids [rows, LENGTH + 1]; since: symbols since the table was drawn; changed: not the first
    table; surprise: −log of each symbol's probability under its table.
    """

    ids: Tensor
    since: Tensor
    changed: Tensor
    surprise: Tensor


@lru_cache(4)
def walks(rows: int, seed: int) -> Walks:
    """So many sequences, the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    logits = SHARPNESS * torch.randn(rows, TABLES, SYMBOLS, SYMBOLS, generator=g)
    p, below = logits.softmax(-1), logits.softmax(-1).cumsum(-1)
    new = torch.rand(rows, LENGTH + 1, generator=g) < 1 / STAY
    new &= new.cumsum(1) < TABLES
    place = torch.arange(LENGTH + 1)
    which, since = new.cumsum(1), place - torch.where(new, place, 0).cummax(1).values
    draws, all_rows = torch.rand(rows, LENGTH + 1, generator=g), torch.arange(rows)
    ids = torch.zeros(rows, LENGTH + 1, dtype=torch.int64)
    surprise = torch.zeros(rows, LENGTH + 1)
    for t in range(1, LENGTH + 1):
        at = all_rows, which[:, t], ids[:, t - 1]
        ids[:, t] = (below[at] < draws[:, t, None]).sum(1).clamp(max=SYMBOLS - 1)
        surprise[:, t] = -p[(*at, ids[:, t])].log()
    return Walks(ids, since, which > 0, surprise)


class _Sequences(Corpus):
    """Batches are whole sequences."""

    def batch(self, step: int, batch: int, length: int, seed: int, stream: int = 1) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = self.train.view(-1, length + 1)
        return rows[torch.randint(len(rows), (batch,), generator=g)]


def config_of(model: str) -> HopeConfig:
    """The row's configuration, with the parameters of Hope's of that channel."""
    mixer, channel = model.split("; ")
    base = HopeConfig(SYMBOLS, dim=128, layers=2, heads=2, channel=CHANNELS[channel])
    config = replace(base, mixer=MIXERS[mixer])
    return config if config == base else with_parameters(config, parameter_count(base))


def grid(asked: Options) -> list[Cell]:
    steps, batch, rows = asked.pick((2, 2, 32), (400, 64, 4096))
    return cells(asked, ["switching"], MODELS, steps=steps, batch=batch, rows=rows)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and measure one cell; "value" is minus the validation loss."""
    rows, steps = cell["rows"], cell["steps"]
    held = [walks(rows // 16, seed) for seed in (10_001, 10_002)]
    ids = walks(rows, cell["seed"]).ids.flatten()
    corpus = _Sequences(ids, held[0].ids.flatten(), SYMBOLS, name="switching")
    torch.manual_seed(cell["seed"])
    config = config_of(cell["model"])
    model = HopeLM(config)
    log, _ = train_lm(model, corpus, cell, tell, length=LENGTH, warmup=max(1, steps // 8))
    val, test = (_losses(model.eval(), w) for w in held)
    return {
        "value": -val["all"], "scores": test, "validation": val, "config": config.to_dict(),
        "parameters": model.parameter_count(), "tokens": steps * cell["batch"] * LENGTH,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in log),
        "headline": f"{test['all']:.3f}",
    }  # fmt: skip


def _losses(model: HopeLM, w: Walks) -> dict[str, float]:
    """Nats per symbol: all, those so long after a change, and of whoever knows the tables."""
    loss = torch.cat([surprise(model, ids, LENGTH) for ids in w.ids.split(64)])
    since, changed = w.since[:, 1:], w.changed[:, 1:]
    found = {"all": float(loss.mean())}
    for a, b in SINCE:
        found[f"{a}–{b}"] = float(loss[changed & (since >= a) & (since < b)].mean())
    return found | {"tables known": float(w.surprise[:, 1:].mean())}


def notes(records: Sequence[Record]) -> str:
    floor = next(r.value for r in records if r.metric == "tables known")
    return f"Nats per symbol. Whoever knows the tables has {floor:.3f}."


COLUMNS = [
    model("model; channel"), PARAMETERS, RATE, SEEDS, mean("all symbols", metric("all")),
    *(mean(f"{a}–{b} after a change", metric(f"{a}–{b}")) for a, b in SINCE),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="switching", shows="what self-modification adds where rules change midway",
    price=("–", "20 minutes"),
    takes=("seeds", "models", "workers", "device"),
    grid=grid, work=work,
    rates=(3e-3, 6e-3, 1.2e-2),
    columns=COLUMNS, notes=notes,
    sources=("experiments/books.py",),
)  # fmt: skip
