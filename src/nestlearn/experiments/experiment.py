"""The one noun: what an experiment trains, by what it chooses, and what it shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestlearn.evals import Record
from nestlearn.experiments.cells import Cell, Tell, Work
from nestlearn.experiments.tables import Below, Column

VALIDATION = "validation data"


@dataclass(frozen=True)
class Options:
    """What a run is asked for; None and () mean the experiment's own. add: seeds to the records
    that are there, which stay, with the rates that they chose.
    """

    out: Path
    quick: bool = False
    add: bool = False
    seeds: int | None = None
    steps: int | None = None
    only: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    data: str | None = None
    workers: int | None = None
    device: str = "cpu"

    def pick(self, quick: Any, usual: Any) -> Any:
        """The one for a quick run, or the usual one."""
        return quick if self.quick else usual


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper; `nestlearn.experiments.runner.run` runs it.

    shows: in one line. price: the time of all of it, on two cores and on a card. takes: the options
    that it has beside quick and out.

    grid: its cells, without rate and seed: task, model, by choice setting and benchmark, and what
    else they depend on; ValueError for unknown names. work(cell, tell): one training: {"value": how
    good it is by what `chooses`, the higher the better; "scores": measured on test data, by name;
    by choice metric, parameters, steps, tokens, seconds, diverged, headline}, and what else is to
    be kept. Where it tests along the way it has "checks" instead of value and scores, {"step",
    "validation", "scores"} each; where it measured several models side by side, "models".

    rates: learning rates to try for a cell, as many for every model; none: cells have no rate.
    chooses: the data that choose; "": every rate is shown. search: the seeds on which rates are
    tried. seeds: those that are reported. prepare: makes what must stand before the first cell.

    columns, by: of the table, or from its records; a row for each `by`. order: sorts them (default:
    as in the grid). below: what stands below a row. notes: what follows the table. figure: draws
    at a path. sources: files and rooms that results depend on, beside those of every training.
    """

    name: str
    shows: str
    price: tuple[str, str]
    grid: Callable[[Options], list[Cell]]
    work: Work
    columns: Sequence[Column] | Callable[[Sequence[Record]], Sequence[Column]]
    takes: tuple[str, ...] = ("seeds", "steps", "only", "models", "workers", "device")
    rates: Callable[[Cell], Sequence[float]] | Sequence[float] = ()
    quick_rates: tuple[int, int | None] = (1, 2)
    chooses: str = VALIDATION
    search: tuple[int, ...] = (0,)
    seeds: int = 3
    quick_seeds: int = 1
    device: str = "auto"
    order: Callable[[Sequence[Record]], list[Record]] | None = None
    by: Callable[[Record], Any] = lambda r: r.model
    below: Below = lambda rows, columns: None
    notes: Callable[[Sequence[Record]], str] | None = None
    figure: Callable[[Sequence[Record], Path], None] | None = None
    prepare: Callable[[Options], None] | None = None
    sources: tuple[str, ...] = ()

    def heads(self, records: Sequence[Record]) -> Sequence[Column]:
        return self.columns(records) if callable(self.columns) else self.columns

    @property
    def file(self) -> str:
        """Where its work is written."""
        return inspect.getfile(self.work)

    def trials(self, cell: Cell, quick: bool) -> tuple[float, ...]:
        """The learning rates to try for a cell."""
        rates = tuple(self.rates(cell) if callable(self.rates) else self.rates)
        return rates[slice(*self.quick_rates)] if quick else rates


def chosen(asked: Iterable[str], known: Iterable[str], what: str) -> tuple[str, ...]:
    """The asked ones, all if none is; ValueError lists the known."""
    asked, known = tuple(dict.fromkeys(asked)), tuple(known)
    for name in asked:
        if name not in known:
            raise ValueError(f"{what} {name!r} is unknown: use {', '.join(known)}")
    return asked or known


def cells(
    asked: Options, tasks: Mapping[str, Cell] | Sequence[str], models: Iterable[str],
    what: tuple[str, str] = ("task", "model"), **own: Any,
) -> list[Cell]:  # fmt: skip
    """A cell for each task that `asked.only` names and each model that `asked.models` does.

    tasks: names, or with what is each one's own. what: they are called in an error. own: of all.
    """
    parts = tasks if isinstance(tasks, Mapping) else {task: {} for task in tasks}
    return [
        {"task": task, "model": model, **own, **parts[task]}
        for task in chosen(asked.only, parts, what[0])
        for model in chosen(asked.models, models, what[1])
    ]


__all__ = [  # the noun, and what it is made of
    "Cell", "Column", "Experiment", "Options", "Record", "Tell", "cells", "chosen",
]  # fmt: skip
