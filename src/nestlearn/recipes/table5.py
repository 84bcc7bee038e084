"""Table 5: formal languages, within and beyond the trained lengths (section 9.5).

No model has positions or a short convolution here, as in the published runs (Irie, Csordás and
Schmidhuber, EMNLP 2023): what a model knows of the string is in its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evals import Record, formal
from nestlearn.recipes import suite
from nestlearn.recipes.cells import Cell, Tell
from nestlearn.recipes.contenders import ABLATIONS, CONTENDERS, RIVALS, contender, levels
from nestlearn.recipes.figures import grid
from nestlearn.train.run import resolve_device

NAMES = {
    "parity": "Parity",
    "aa": "(aa)*",
    "abab": "(abab)*",
    "anbn": "aⁿbⁿ",
    "anbncn": "aⁿbⁿcⁿ",
    "shuffle2": "Shuffle-2",
}
BINS = ("bin0", "bin1")
_FAILS = [46.4, 0, 0, 0, 0, 0], [78.1, 0, 0, 0, 0, 0], [98.2, 10.1, 0, 0, 0, 0]
_ROWS = {
    "Hope": [100.0] * 12,
    "LSTM": [100.0] * 12,
    **{m: [*row, *[100.0] * 6] for m, row in zip(("Transformer", "Linear", "DeltaNet"), _FAILS)},
}
PAIRS = [(language, name) for language in NAMES for name in BINS]
PAPER = {model: dict(zip(PAIRS, row)) for model, row in _ROWS.items()}

MODELS = (
    "hope-matrix",
    "hope",
    *RIVALS,
    *(f"hope-matrix-{name}" for name in ABLATIONS),
)
LRS = (3e-3, 1e-2)
STEPS = dict.fromkeys(NAMES, 1500) | {"shuffle2": 3000}  # which has two counters at once
QUICK_STEPS = 8

# DGD in half of the heads: its retention can flip a sign, and so tell odd from even, but forgets
# what a key has counted; plain gradient descent adds up and cannot flip. Steps up to 2: eigenvalues
# down to −1, without which nothing alternates. One chunk holds a whole string: over a boundary keys
# and gates drift, and longer strings than the trained ones fail; so no level of the continuum
# memory is written inside a string (docs/log.md has what that costs), and their outputs start at
# full size: these runs were made before a smaller start was the default.
SKELETON: dict[str, Any] = {
    "dim": 64,
    "layers": 2,
    "heads": 4,
    "conv": 0,
    "rotary": False,
    "chunk": 640,
    "dgd": 0.5,
    "eta_max": 2.0,
    "levels": levels(640, None, scale=None),
}
QUICK = {"dim": 32, "chunk": 32, "levels": levels(32, None)}


def entry(
    language: str,
    model: str,
    *,
    steps: int | None = None,
    skeleton: Mapping[str, Any] | None = None,
    device: str = "auto",
    quick: bool = False,
    **fit: Any,
) -> Cell:
    """One (language, model) of the plan; skeleton: changes of it; fit: fields of FitConfig."""
    steps = (QUICK_STEPS if quick else STEPS[language]) if steps is None else steps
    many = language in ("parity", "shuffle2")
    config = {
        "steps": steps,
        "batch": 4 if quick else 32 if many else 16,
        "warmup": min(50, steps // 10),
        "schedule": "constant",  # as published; a falling rate settles before it generalises
        "eval_every": min(50, max(1, steps // 10)),
        **fit,
    }
    data = {"train": 200, "test": 8} if quick else {"test": 1000 if many else None}
    return {
        "benchmark": "formal",
        "task": language,
        "model": model,
        "skeleton": {**SKELETON, **(QUICK if quick else {}), **(skeleton or {})},
        "data": data,
        "fit": config,
        "device": device,
    }


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and test one cell."""
    return suite.train_cell(cell, formal.task(cell["task"], **cell["data"]), tell)


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
    """Train every model on every language and return the table, also in out/table.md.

    quick: one learning rate, few strings and steps: to see that it runs. only: languages of NAMES.
    models: names of CONTENDERS (default: MODELS). seeds: trainings with the best learning rate.
    """
    device = str(resolve_device(device))
    entries = [
        entry(language, model, steps=steps, device=device, quick=quick)
        for language in suite.chosen(only, tuple(NAMES), "language")
        for model in suite.models(models, ("hope", "lstm") if quick else MODELS)
    ]
    lrs, seeds = (LRS[1:2], 1) if quick else (LRS, seeds)
    plan = suite.Plan("table5", work, entries, lrs, seeds)
    records = suite.run_plan(plan, out, workers=workers)
    return report(records, out)


def report(records: Sequence[Record], out: Path) -> str:
    """Write out/table.md and out/table5.png; the table."""
    columns = [
        (f"{title} {BINS[0]} / {BINS[1]}", [(language, name) for name in BINS])
        for language, title in NAMES.items()
    ]
    order = (*MODELS, *(name for name in CONTENDERS if name not in MODELS))
    text = suite.table(records, columns, PAPER, order)
    suite.write_table(out, text)
    values: dict[str, dict[str, list[float]]] = {}
    paper: dict[str, dict[str, float]] = {}
    for model in (name for name in order if any(r.model == name for r in records)):
        about = contender(model)
        for pair in PAIRS:
            seeds = [r.value for r in records if r.model == model and (r.task, r.setting) == pair]
            column = f"{NAMES[pair[0]]}\n{'longer' if pair[1] == BINS[1] else 'trained'}"
            if seeds:
                values.setdefault(about.title, {})[column] = seeds
            if seeds and about.paper in PAPER:
                paper.setdefault(about.title, {})[column] = PAPER[about.paper][pair]
    grid(values, out / "table5.png", paper=paper)
    return text
