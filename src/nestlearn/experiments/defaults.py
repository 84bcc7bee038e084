"""One default for every task: levels and steps chosen on data that no table is measured on.

Each candidate, a change of Hope's options, trains once (seed 0) on language (bytes of books), the
five tasks of MAD, MQAR and two formal languages, all drawn with another seed than the tables' own.
The score of a candidate is the mean over tasks of its rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nestlearn.evals import formal, grouped, mad, mqar
from nestlearn.experiments import books, table4
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.fit import settings, train_cell, train_lm
from nestlearn.experiments.models import build
from nestlearn.experiments.tables import model
from nestlearn.options import Level

SEED = 777  # of the data: no table is drawn with it
LR = {"language": (4e-3, 8e-3), "mad": (3e-3,), "mqar": (3e-3,), "formal": (3e-3,)}
STEPS, QUICK_STEPS = 2000, 3
LANGUAGES = ("parity", "anbncn")


def levels(*chunks: int | None, **own: Any) -> dict[str, Any]:
    """A level for each chunk, as JSON: by dot product if not said otherwise; it does not fade."""
    options: dict[str, Any] = {"objective": "dot", "half_life": None, **own}
    return {"levels": [asdict(Level(chunk=chunk, **options)) for chunk in chunks]}


SIDE_BY_SIDE = {"variant": "independent"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "l2, 16 and 64": levels(16, 64, None, objective="l2"),
    "dot, 16 and 64": levels(16, 64, None),
    "dot, 16 and 64, lr 0.1": levels(16, 64, None, lr=0.1),
    "dot, 4 and 64": levels(4, 64, None),
    "dot, 1 and 16": levels(1, 16, None),
    "dot, 4 and 16, side by side": levels(4, 16, None) | SIDE_BY_SIDE,
    "l2, 4 and 16, side by side": levels(4, 16, None, objective="l2") | SIDE_BY_SIDE,
    "dot, 4 and 64, half gd, steps to 2": levels(4, 64, None) | {"dgd": 0.5, "eta_max": 2.0},
}


def grid(asked: Options) -> list[Cell]:
    """Every candidate on everything; language where there is a folder of books."""
    tasks: list[tuple[str, str, dict[str, str]]] = [
        *(("mad", name, {}) for name in table4.TASKS), ("mqar", "K=16", {}),
        *(("formal", name, {}) for name in LANGUAGES),
    ]  # fmt: skip
    text = [("language", "books", books.text_of(asked.data))] if asked.data else []
    return [
        {
            "benchmark": kind, "task": task, "model": name, "changes": CANDIDATES[name],
            "seeded": SEED, "steps": asked.pick(QUICK_STEPS, STEPS), **own,
        }
        for kind, task, own in text + asked.pick(tasks[:2], tasks)
        for name in chosen(asked.models, CANDIDATES, "candidate")
    ]  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    # As when the choice was made: nothing faded, and levels were a chain where a row does not say.
    changes = {"variant": "sequential", **cell["changes"], "depth": 1, "half_life": None}
    if cell["benchmark"] == "language":
        return _language(cell, changes, tell)
    skeleton, steps, wrap = table4.SKELETON | {"chunk": 64}, cell["steps"], None
    fit = settings(steps, False)
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
    made = {"model": "hope", "match": False, "skeleton": {**skeleton, **changes}, "fit": fit}
    return train_cell({**cell, **made}, task, tell, wrap=wrap)


def _language(cell: Cell, changes: dict[str, Any], tell: Tell) -> dict[str, Any]:
    corpus = books.read(Path(cell["folder"])).corpus
    quick = cell["steps"] <= QUICK_STEPS
    sizes = {"dim": 32, "layers": 1, "heads": 2} if quick else {"dim": 256, "layers": 6, "heads": 4}
    steps = cell["steps"] if quick else cell["steps"] // 8
    torch.manual_seed(0)
    model = build("hope", corpus.vocab_size, {**sizes, **changes}, match=False)
    cell = {**cell, "steps": steps, "batch": 2 if quick else 32}
    log, config = train_lm(
        model, corpus, cell, tell, length=128 if quick else 512, warmup=steps // 5
    )
    count = 2 if quick else 32
    near, far = books.losses(model, corpus.val, config.length, count, config.batch, config.dtype)
    norms = [r["grad_norm"] for r in log[config.warmup :]]
    return {
        "value": -(near + far) / 2, "scores": {"near": near, "far": far}, "steps": steps,
        "grad_norm": statistics.median_high(norms) if norms else None,
        "headline": f"{near:.3f} {far:.3f} at {cell['lr']:g}",
    }  # fmt: skip


def ranks(records: Sequence[Record]) -> dict[str, float]:
    """The mean over tasks of each candidate's rank, the better ones first."""
    found: dict[str, list[float]] = {r.model: [] for r in records}
    for own in grouped(records, lambda r: r.task).values():
        sign = -1 if own[0].benchmark == "language" else 1
        values = {
            name: sign * statistics.fmean(r.value for r in some)
            for name, some in grouped(own, lambda r: r.model).items()
        }
        for name, value in values.items():
            above = sum(v > value for v in values.values())
            equal = sum(v == value for v in values.values())
            found[name].append(above + (equal + 1) / 2)
    return {name: statistics.fmean(some) for name, some in found.items()}


def best_first(records: Sequence[Record]) -> list[Record]:
    place = ranks(records)
    return sorted(records, key=lambda r: place[r.model])


def columns(records: Sequence[Record]) -> list[Column]:
    """Candidates by tasks, at the best rate of each, and the mean rank."""
    place = ranks(records)

    def scores(task: str) -> Column:
        def text(rows: Sequence[Record]) -> str:
            own = (r for r in rows if r.task == task)
            digits = ((r.value, 3 if r.benchmark == "language" else 1) for r in own)
            return " / ".join(f"{value:.{n}f}" for value, n in digits) or "–"

        return Column(task, text)

    tasks = dict.fromkeys(r.task for r in records)
    mean_rank = Column("mean rank", lambda rows: f"{place[rows[0].model]:.1f}")
    return [model("levels"), *map(scores, tasks), mean_rank]


EXPERIMENT = Experiment(
    name="defaults", shows="how the default levels were chosen", price=("–", "~3 hours"),
    takes=("data", "models", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: LR[cell["benchmark"]], quick_rates=(0, None), seeds=1,
    columns=columns, order=best_first,
    sources=("experiments/table4.py", "experiments/books.py"),
)  # fmt: skip
