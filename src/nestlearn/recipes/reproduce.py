"""The paper's experiments by name: what `nestlearn reproduce` runs.

A new one is a module with a function `reproduce(out: Path, *, quick: bool, ...) -> str` that
returns what to print as Markdown, and a line in EXPERIMENTS. It may take any of seeds, steps, only,
models, data, workers, device; an option that it does not take is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

EXPERIMENTS = {  # name: (module, what it shows)
    "table4": ("nestlearn.recipes.table4", "MAD: compression, recall, copying, memorization"),
    "table5": ("nestlearn.recipes.table5", "formal languages, within and beyond trained lengths"),
    "mqar": ("nestlearn.recipes.mqar", "associative recall by number of pairs and size of state"),
    "defaults": ("nestlearn.recipes.defaults", "how the default levels were chosen"),
    "equal-time": (
        "nestlearn.recipes.equal_time", "losses on books along tokens and along seconds",
    ),
    "switching": (
        "nestlearn.recipes.switching", "what self-modification adds where rules change midway",
    ),
    "fig4": ("nestlearn.recipes.fig4", "momentum and delta momentum in the landscape of eq. 53"),
    "orthogonal-tasks": (
        "nestlearn.recipes.orthogonal_tasks", "what momentum forgets and M3's slow memory keeps",
    ),
    "update-size": ("nestlearn.recipes.update_size", "the size of M3's updates over 10,000 steps"),
    "fig11": ("nestlearn.recipes.fig11", "a vision transformer under AdamW, Muon and M3"),
    "fig12": ("nestlearn.recipes.fig12", "time of a step under Muon, AdaMuon, M3 and AdamW"),
    "lm-optimizers": (
        "nestlearn.recipes.lm_optimizers", "Hope and a Transformer under four optimizers",
    ),
    "frontier": (
        "nestlearn.recipes.frontier", "a pretrained model learns a novel: gain against forgetting",
    ),
}  # fmt: skip
SUITES = {"formal": "table5", "mad": "table4", "mqar": "mqar"}  # of `nestlearn eval`


def experiment(name: str) -> Callable[..., str]:
    """The experiment's `reproduce` function; ValueError lists the names."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is unknown: use one of {', '.join(EXPERIMENTS)}")
    return import_module(EXPERIMENTS[name][0]).reproduce


def folder(name: str, quick: bool) -> Path:
    """Where results go unless said otherwise: a quick run must not stand where a real one does."""
    return Path("runs", f"{name}-quick") if quick else Path("results", name)


def run(name: str, out: Path | None = None, *, quick: bool = False, **options: Any) -> str:
    """Run an experiment, or go on with it, and return its tables as Markdown.

    options: those of the experiment; None and () mean its default. ValueError for one that it does
    not take.
    """
    reproduce = experiment(name)
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    foreign = sorted(given.keys() - inspect.signature(reproduce).parameters.keys())
    if foreign:
        raise ValueError(f"{name} takes no --{foreign[0]}: leave it out")
    return reproduce(out or folder(name, quick), quick=quick, **given)


def evaluate(suite: str, model: str, out: Path | None = None, **options: Any) -> str:
    """Train one contender on every task of a suite and return its scores as Markdown.

    ValueError for an unknown suite or model, and for a folder: these suites train from scratch on
    their own alphabets, so a trained language model has nothing to say there.
    """
    from nestlearn.recipes.contenders import CONTENDERS

    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: use one of {', '.join(SUITES)}")
    if model not in CONTENDERS and Path(model).exists():
        raise ValueError(
            f"{model} is a folder, but {suite} trains a fresh model on each of its tasks, whose "
            f"tokens a trained one has never seen: name a model, one of {', '.join(CONTENDERS)}"
        )
    quick = options.get("quick", False)
    place = out or Path("runs", f"eval-{suite}" + "-quick" * quick)
    return run(SUITES[suite], place, models=(model,), **options)
