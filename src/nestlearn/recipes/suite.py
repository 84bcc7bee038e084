"""From a table's plan to its numbers: learning rates searched, seeds run, records, Markdown.

A plan is one entry for each (task, model), without learning rate and seed. Every entry is trained
with every learning rate on seed 0; the best goes on to the other seeds. As in the benchmarks' own
code, rate and checkpoint are chosen by the test sets, so figures are the best that was reached, for
every model alike. Data do not change with the seed, which is that of weights and batches.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.disk import atomic_write
from nestlearn.evals import Record, Task, read_records, write_records
from nestlearn.recipes.cells import Cell, Tell, Work, failure, run_cells
from nestlearn.recipes.contenders import CONTENDERS, build, contender
from nestlearn.recipes.fit import FitConfig, fit


@dataclass(frozen=True)
class Plan:
    """What a table trains. entries: see `entry`. lrs: of the search. seeds: trainings of each."""

    name: str
    work: Work
    entries: Sequence[Cell]
    lrs: tuple[float, ...]
    seeds: int = 1

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.lrs or not self.entries:
            raise ValueError(
                f"{self.name}: seeds={self.seeds}, lrs={self.lrs}, {len(self.entries)} entries: "
                "give at least one of each"
            )


def chosen(asked: Iterable[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """The asked ones, all if none is; ValueError lists the known."""
    asked = tuple(dict.fromkeys(asked))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"{what} {unknown[0]!r} is unknown: use {', '.join(known)}")
    return asked or tuple(known)


def models(asked: Iterable[str], default: Sequence[str]) -> tuple[str, ...]:
    """The asked contenders, or the table's own; ValueError lists them all."""
    return chosen(asked or default, tuple(CONTENDERS), "model")


def train_cell(
    cell: Cell, task: Task, tell: Tell, *, wrap: Callable[[Any, Task], nn.Module] | None = None
) -> dict[str, Any]:
    """Train and test one cell: {"best", "last", "curve", ..., "headline"} (see `fit.Outcome`).

    cell: model, skeleton, fit (fields of FitConfig), lr, seed, device, and match (see `build`) if
    not True. wrap: makes of the model what answers the task, where that is not the model itself.
    """
    size = max(task.vocab, task.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell["seed"])
        model = build(cell["model"], size, cell["skeleton"], match=cell.get("match", True))
        module = wrap(model, task) if wrap else model
    own = {key: cell[key] for key in ("lr", "seed", "device")}
    config = FitConfig(**{**cell["fit"], **own})
    out = fit(module, task, config, tell)
    line = " ".join(f"{name} {value:.1f}" for name, value in out.best.items())
    if out.diverged:
        line += f", diverged at step {out.diverged}"
    return {
        **out.to_dict(),
        "value": statistics.mean(out.best.values()),
        "headline": f"{line} after {out.steps} steps, {out.seconds:.0f} s",
        "metric": f"{task.metric} accuracy (%)",
    }


def run_plan(plan: Plan, out: Path, *, workers: int | None = None) -> list[Record]:
    """Train what is not done yet; the records of every seed at the best learning rate.

    Also in out/results.json, where records of other tasks and models stay; the cells are in
    out/cells, and cells that failed left their tracebacks in out/cells/failed. ValueError, naming
    one, if all did.
    """
    folder = out / "cells"
    search = [{**e, "lr": lr, "seed": 0} for e in plan.entries for lr in plan.lrs]
    name = f"{plan.name}: learning rates"
    found = run_cells(search, plan.work, folder, workers=workers, name=name)
    best = _best(search, found)
    if not best:
        reason = (failure(folder, search[0]) or "unknown").strip().splitlines()[-1]
        raise ValueError(f"{plan.name}: every cell failed ({reason}); see {folder / 'failed'}")
    more = [{**cell, "seed": seed} for cell in best for seed in range(1, plan.seeds)]
    found += run_cells(more, plan.work, folder, workers=workers, name=f"{plan.name}: seeds")
    done = [d for cell, d in zip(search + more, found) if d and {**cell, "seed": 0} in best]
    records = _merged(out / "results.json", [record for d in done for record in _records(d)])
    write_records(out / "results.json", records)
    return records


def _best(search: list[Cell], found: list[dict[str, Any] | None]) -> list[Cell]:
    """For each entry the learning rate with the best mean of tests; of equals, the sooner there."""
    best: dict[str, tuple[tuple[float, int], Cell]] = {}
    for cell, done in zip(search, found):
        if done is None:
            continue
        key = json.dumps({k: v for k, v in cell.items() if k != "lr"}, sort_keys=True)
        rank = (done["result"]["value"], -done["result"]["best_step"])
        if key not in best or rank > best[key][0]:
            best[key] = (rank, cell)
    return [cell for _, cell in best.values()]


def _records(done: dict[str, Any]) -> list[Record]:
    """One record for each test set of a finished cell."""
    cell, result = done["cell"], done["result"]
    note = f"diverged at step {result['diverged']}" if result["diverged"] else ""
    config = {**cell, "last": result["last"], "best_step": result["best_step"]}
    return [
        Record(
            benchmark=cell["benchmark"],
            task=cell["task"],
            setting=cell.get("setting", test),
            model=cell["model"],
            seed=cell["seed"],
            metric=result["metric"],
            value=value,
            parameters=result["parameters"],
            steps=result["steps"],
            tokens=result["tokens"],
            seconds=result["seconds"],
            config=config,
            versions=done["versions"],
            commit=done["commit"],
            note=note,
        )
        for test, value in result["best"].items()
    ]


def _merged(path: Path, records: list[Record]) -> list[Record]:
    """The records, and those at `path` of tasks and models that are not among them."""
    fresh = {(r.task, r.setting, r.model) for r in records}
    kept = read_records(path) if path.is_file() else []
    return [r for r in kept if (r.task, r.setting, r.model) not in fresh] + records


# ------------------------------------------------------------------------------------- the table

Column = tuple[str, Sequence[tuple[str, str]]]  # head, the (task, setting) pairs in its cells


def table(
    records: Sequence[Record],
    columns: Sequence[Column],
    paper: Mapping[str, Mapping[tuple[str, str], float]],
    order: Sequence[str] = tuple(CONTENDERS),
) -> str:
    """Markdown: each model's mean over seeds ± half their range, the paper's figure below it.

    columns: those without a record are left out. paper: by row of its table, then (task, setting).
    `*` marks a mean of which a run diverged. After it the best learning rates and the parameters.
    """
    present = {(r.task, r.setting) for r in records}
    columns = [(head, pairs) for head, pairs in columns if present & set(pairs)]
    heads = [head for head, _ in columns]
    rows, rates = [["model", *heads]], [["model", "parameters", *heads]]
    for model in order:
        own = [r for r in records if r.model == model]
        if not own:
            continue
        about = contender(model)
        at = [[[r for r in own if (r.task, r.setting) == p] for p in pairs] for _, pairs in columns]
        rows.append([about.title, *(" / ".join(map(spread, cell)) for cell in at)])
        if about.paper is not None and about.paper in paper:
            row = paper[about.paper]
            told = (" / ".join(_number(row.get(p)) for p in pairs) for _, pairs in columns)
            rows.append([f"*{about.paper}, paper*", *told])
        counts = sorted({r.parameters for r in own})
        size = " – ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
        lrs = ({f"{r.config['lr']:g}": 0 for seeds in cell for r in seeds} for cell in at)
        rates.append([about.title, size, *map(" / ".join, lrs)])
    return f"{markdown(rows)}\n\nBest learning rates:\n\n{markdown(rates)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def spread(records: Sequence[Record]) -> str:
    """Mean ± half the range over seeds; "–" of none; `*` where a run diverged."""
    if not records:
        return "–"
    values = [r.value for r in records]
    text = _number(statistics.mean(values))
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.1f}"
    return text + "*" * any(r.note for r in records)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def write_table(out: Path, text: str) -> None:
    """Write out/table.md, whole or not at all."""
    atomic_write(out / "table.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
