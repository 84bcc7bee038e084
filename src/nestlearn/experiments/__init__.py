"""The paper's experiments: what `nestlearn reproduce` runs, each in a file of its own.

A new one is a module here that makes an `Experiment`, named EXPERIMENT, and its name in NAMES.
"""

from __future__ import annotations

from importlib import import_module

from nestlearn.experiments.experiment import Experiment

NAMES = (
    "table4", "table5", "mqar", "defaults", "equal-time", "stability", "switching", "language",
    "stream", "scored-first", "fig4", "orthogonal-tasks", "update-size", "fig11", "fig12",
    "lm-optimizers", "frontier", "closed-book", "in-a-row", "fig6", "fig7", "fig8", "reach",
    "table1", "table2", "table3", "table6", "fig9", "fig10", "tiny",
)  # fmt: skip
SUITES = {"formal": "table5", "mad": "table4", "mqar": "mqar"}  # of `nestlearn eval`


def named(name: str) -> Experiment:
    """The experiment of that name; ValueError lists the names."""
    if name not in NAMES:
        raise ValueError(f"experiment {name!r} is unknown: use one of {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name.replace('-', '_')}").EXPERIMENT


__all__ = ["NAMES", "SUITES", "Experiment", "named"]
