"""Optimizers side by side, tuned alike: a small grid of learning rates, then fresh seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.disk import atomic_write
from nestlearn.recipes.cells import Cell, Work, run_cells

Record = dict[str, Any]


def compare(
    grids: Mapping[str, Sequence[float]],
    cell: Callable[[str, float, int], Cell],
    work: Work,
    out: Path,
    *,
    score: str,
    tune_seeds: Sequence[int],
    seeds: Sequence[int],
    workers: int | None = None,
) -> list[Record]:
    """One record for each contestant: its best learning rate and what the fresh seeds came to.

    grids: learning rates by name, as many for each. cell(name, lr, seed): one training, as
    `run_cells` takes it. score: the number in a result that tuning minimises (its mean over
    `tune_seeds`; a training that failed or is not finite counts as infinite). A record has name,
    lr, edge (the best stood at the end of its grid: widen it), tuning {lr: score}, results (of
    `seeds`, in order). Finished cells in out/cells are never trained again.
    ValueError where a contestant has no finite training at any learning rate.
    """
    folder = out / "cells"
    tried = {name: lrs if len(lrs) > 1 else () for name, lrs in grids.items()}
    todo = [cell(name, lr, s) for name, lrs in tried.items() for lr in lrs for s in tune_seeds]
    done = iter(run_cells(todo, work, folder, workers=workers, name="tuning"))
    records: list[Record] = []
    for name, lrs in grids.items():
        if len(lrs) == 1:  # nothing to choose
            records.append({"name": name, "lr": lrs[0], "edge": False, "tuning": {}})
            continue
        tuning = {lr: statistics.fmean(_score(next(done), score) for _ in tune_seeds) for lr in lrs}
        best = min(tuning, key=lambda lr: tuning[lr])
        if tuning[best] == float("inf"):
            raise ValueError(
                f"{name} did not end a training at any of {list(lrs)}: see {folder / 'failed'}, or "
                "give it other learning rates"
            )
        edge = best in (min(lrs), max(lrs))
        records.append({"name": name, "lr": best, "edge": edge, "tuning": tuning})
    final = [cell(r["name"], r["lr"], s) for r in records for s in seeds]
    ended = iter(run_cells(final, work, folder, workers=workers, name="seeds"))
    for record in records:
        record["results"] = [f["result"] for f in [next(ended) for _ in seeds] if f is not None]
    return records


def settings(optimizer: torch.optim.Optimizer) -> str:
    """Its class and options but the learning rate: part of a cell, so that others are not read."""
    options = {k: v for k, v in sorted(optimizer.defaults.items()) if k != "lr"}
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}({options})"


def _score(finished: Record | None, score: str) -> float:
    value = float("inf") if finished is None else finished["result"].get(score)
    return value if value is not None and value == value else float("inf")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(records: Sequence[Record], columns: Mapping[str, tuple[str, int]]) -> str:
    """A Markdown table; columns: {heading: (key of the results, digits)}."""
    lines = [
        "| optimizer | lr | seeds | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for r in records:
        cells = [r["name"], f"{r['lr']:g}{' (end of grid)' if r['edge'] else ''}"]
        cells.append(str(len(r["results"])))
        for key, digits in columns.values():
            cells.append(spread([x[key] for x in r["results"]], digits) if r["results"] else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(out: Path, results: Record, text: str) -> str:
    """Write results.json and table.md in `out`; the table."""
    raw = json.dumps(results, indent=1)
    atomic_write(out / "results.json", lambda path: path.write_text(raw + "\n", encoding="utf-8"))
    atomic_write(out / "table.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return text


__all__ = ["compare", "settings", "spread", "table", "write"]
