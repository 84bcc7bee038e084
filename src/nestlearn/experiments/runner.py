"""The one runner: from an experiment's grid to its records, table and figure.

Learning rates are tried on the seeds of the search and chosen here, by what validation data say;
so are checkpoints (`settled`). The best rate goes on to the seeds that are reported.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from nestlearn.disk import atomic_write
from nestlearn.evals import Record, grouped, read_records, write_records
from nestlearn.experiments import SUITES, named
from nestlearn.experiments.cells import Cell, cell_path, digest, failure, run_cells, settled
from nestlearn.experiments.experiment import Experiment, Options
from nestlearn.experiments.provenance import check_place, code_version
from nestlearn.experiments.tables import table
from nestlearn.train.run import resolve_device

_OWN = (  # parts of a result that a record has fields for, or does not keep
    "value", "scores", "checks", "metric", "parameters", "steps", "tokens", "seconds", "headline",
    "models", "diverged",
)  # fmt: skip


def folder(name: str, quick: bool) -> Path:
    """Where results go unless said otherwise: a quick run must not stand where a real one does."""
    return Path("runs", f"{name}-quick") if quick else Path("results", name)


def run(
    what: str | Experiment, out: Path | None = None, *, progress: bool = True, **options: Any
) -> str:
    """Run an experiment, or go on with it, and return its table as Markdown.

    options: fields of `Options`; None and () mean its default. Writes results.json, table.md and a
    figure in `out`; finished cells in out/cells are never run again. ValueError for an option that
    it does not take, and for a place that takes results of clean commits only.
    """
    about = named(what) if isinstance(what, str) else what
    asked, records = measure(about, out, progress=progress, **options)
    text = report(about, records)
    write = partial(Path.write_text, data=text + "\n", encoding="utf-8")
    atomic_write(asked.out / "table.md", write)
    if about.figure:
        about.figure(records, asked.out / f"{about.name}.png")
    return text


def measure(
    about: Experiment, out: Path | None = None, *, progress: bool = True, **options: Any
) -> tuple[Options, list[Record]]:
    """What was asked for, and every record of it, also in results.json."""
    asked = ask(about, out, **options)
    grid = about.grid(asked)
    check_place(asked.out)
    asked.out.mkdir(parents=True, exist_ok=True)
    if about.prepare:
        about.prepare(asked)
    path = asked.out / "results.json"
    fresh = Search(about, asked, grid, progress, _kept(path) if asked.add else ()).records()
    kept = _kept(path)  # what another run has written meanwhile, too
    if asked.add:
        have = {(_same(r.config), r.seed) for r in kept}
        fresh = [r for r in fresh if (_same(r.config), r.seed) not in have]
    else:
        there = {_place(r) for r in fresh}
        kept = [r for r in kept if _place(r) not in there]
    records = about.order(kept + fresh) if about.order else kept + fresh
    write_records(path, records)
    return asked, records


def ask(about: Experiment, out: Path | None = None, **options: Any) -> Options:
    """The options, checked."""
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    quick, add = (given.pop(name, False) for name in ("quick", "add"))
    foreign = sorted(given.keys() - set(about.takes))
    if foreign:
        raise ValueError(f"{about.name} takes no --{foreign[0]}: leave it out")
    given["device"] = str(resolve_device(given.get("device", about.device)))
    given |= {name: tuple(given.get(name, ())) for name in ("only", "models")}
    if given.get("seeds", 1) < 1:
        raise ValueError(f"{about.name}: seeds={given['seeds']}: give 1 or more")
    return Options(out or folder(about.name, quick), quick, add, **given)


class Search:
    """The cells of a run: rates on the seeds of the search, then the best on all others. kept:
    records to which seeds are added, at the rates that were chosen then.
    """

    def __init__(
        self, about: Experiment, asked: Options, grid: list[Cell], progress: bool = True,
        kept: Sequence[Record] = (),
    ) -> None:  # fmt: skip
        self.about, self.asked, self.progress = about, asked, progress
        self.seeds = about.search[: 1 if asked.quick else None]
        code = {"code": code_version(about.file, *about.sources)}
        self.grid = [{**cell, **code, "device": asked.device} for cell in grid]
        self.rates = [about.trials(cell, asked.quick) for cell in self.grid]
        self.kept = {(_same(r.config), r.seed) for r in kept}
        self.known = {_same(r.config): r.config for r in kept}
        _check_known(self.grid, kept)
        _check_fair(about.name, grid, self.rates)

    def _runs(self) -> list[tuple[Cell, tuple[float, ...]]]:
        """The cells of every seed at the chosen rate, with the rates that were tried."""
        seeds = range(self.asked.pick(self.about.quick_seeds, self.asked.seeds or self.about.seeds))
        return [
            ({**cell, **lr, "seed": seed}, self.known.get(_same(cell), {}).get("rates", rates))
            for cell, rates, best in zip(self.grid, self.rates, self._best())
            for lr in ([{"lr": lr} for lr in best] if rates else [{}])
            for seed in seeds
            if (_same(cell), seed) not in self.kept
        ]

    def missing(self) -> list[Cell]:
        """The cells of the reported seeds that are still to be run."""
        folder = self.asked.out / "cells"
        return [cell for cell, _ in self._runs() if not cell_path(folder, cell).is_file()]

    def records(self) -> list[Record]:
        """Those of every seed at the chosen rate."""
        about, runs = self.about, self._runs()
        found: list[Record] = []
        done = self._run([cell for cell, _ in runs], "seeds" if any(self.rates) else "")
        for (cell, rates), d in zip(runs, done):
            if d is not None:
                found += _records(about, d, {**cell, "rates": rates}, self.seeds)
        if runs and not found:
            raise self._failed([cell for cell, _ in runs])
        return found

    def _best(self) -> list[Sequence[float]]:
        """For each cell of the grid the rates to report: the best one, if one is to be chosen."""
        tries = [
            ((n, lr), {**cell, "lr": lr, "seed": seed})
            for n, (cell, rates) in enumerate(zip(self.grid, self.rates))
            if len(rates) > 1 and self.about.chooses and _same(cell) not in self.known
            for lr in rates
            for seed in self.seeds
        ]
        cells = [cell for _, cell in tries]
        done = zip(tries, self._run(cells, "learning rates") if cells else ())
        ranks: dict[int, dict[float, tuple[float, int]]] = {}
        for (n, lr), some in grouped(done, lambda pair: pair[0][0]).items():
            ranks.setdefault(n, {})[lr] = _rank([result for _, result in some])
        best: list[Sequence[float]] = []
        for n, (cell, rates) in enumerate(zip(self.grid, self.rates)):
            if n in ranks:  # a cell that failed at every rate has no more to report
                top = max(rates, key=ranks[n].__getitem__)
                best.append((top,) if ranks[n][top] > _FAILED else ())
            else:
                chose = self.known.get(_same(cell), {}) if self.about.chooses else {}
                best.append((chose["lr"],) if "lr" in chose else rates)
        if cells and not any(best):
            raise self._failed(cells)
        return best

    def _run(self, cells: list[Cell], what: str) -> list[dict[str, Any] | None]:
        return run_cells(
            cells, self.about.work, self.asked.out / "cells", progress=self.progress,
            name=f"{self.about.name}{f': {what}' * bool(what)}",
            workers=self.asked.workers if "workers" in self.about.takes else 0,
        )  # fmt: skip

    def _failed(self, cells: list[Cell]) -> ValueError:
        place = self.asked.out / "cells"
        reasons = (failure(place, cell) for cell in cells)
        reason = next(filter(None, reasons), "unknown").strip().splitlines()[-1]
        rates = f" at {list(self.rates[0])}" * bool(self.rates[0])
        return ValueError(
            f"{self.about.name}: every cell failed ({reason}): {cells[0]['model']} did not end a "
            f"training{rates}; see {place / 'failed'}, or give other learning rates"
        )


def _place(record: Record) -> tuple[str, str, str]:
    return record.task, record.setting, record.model


def _same(config: Cell) -> str:
    """A hash of a cell, or of its record's configuration, whatever its code, rate and seed."""
    return digest(config, ("code", "lr", "seed", "rates", "best_step"))


def _check_known(grid: Sequence[Cell], kept: Sequence[Record]) -> None:
    """Seeds are added to what was measured in the same way alone."""
    key = itemgetter("task", "model")
    theirs = grouped((r.config for r in kept), key)
    for what, ours in grouped(grid, key).items():
        there = {_same(config) for config in theirs.get(what, ())}
        if there and not there & {_same(cell) for cell in ours}:
            raise ValueError(
                f"{', '.join(what)}: the records there are of other settings than a run of today, "
                "so no seed can be added: give the options that they had, or leave out --add"
            )


_FAILED = (float("-inf"), 0)


def _rank(done: Sequence[dict[str, Any] | None]) -> tuple[float, int]:
    """How good a rate is on the seeds of the search; of equals the sooner there is better."""
    results = [settled(d["result"]) for d in done if d is not None]
    if len(results) < len(done):
        return _FAILED
    value = statistics.fmean(result["value"] for result in results)
    return (value, -results[0].get("best_step", 0)) if value == value else _FAILED


def _check_fair(name: str, grid: Sequence[Cell], rates: Sequence[Sequence[float]]) -> None:
    """Every model of a task is tried as often."""
    tried: dict[str, Counter[str]] = {}
    for cell, own in zip(grid, rates):
        tried.setdefault(cell["task"], Counter())[cell["model"]] += max(1, len(own))
    for task, counts in tried.items():
        if len(set(counts.values())) > 1:
            raise ValueError(f"{name}, {task}: {dict(counts)} trials: give every model as many")


def _rule(about: Experiment, rates: Sequence[float], search: Sequence[int], checks: bool) -> str:
    if rates and not about.chooses:
        return "every setting is shown"
    parts = ["learning rate: fixed"] if rates else []
    if len(rates) > 1:
        seeds = ", ".join(map(str, search))
        best = f"the best of {len(rates)} by {about.chooses} (seed {seeds})"
        parts = [f"learning rate: {best}"]
    parts += [f"checkpoint: the best by {about.chooses}"] if checks else []
    return "; ".join(parts) or "nothing is chosen"


def _records(
    about: Experiment, done: dict[str, Any], config: Cell, search: Sequence[int]
) -> list[Record]:
    """A record for each score of a finished cell; the first has what else the training left."""
    whole = settled(done["result"])
    if "models" in whole:  # one cell that measured several side by side
        parts = [(model, {**whole, **own}) for model, own in whole["models"].items()]
    else:
        parts = [(config["model"], whole)]
    # where files stood on the machine that ran it is nobody's business; on what it ran is
    config = {key: value for key, value in config.items() if key not in ("out", "folder")}
    config["device"] = done["cell"]["device"]
    if "best_step" in whole:
        config["best_step"] = whole["best_step"]
    rule = _rule(about, config["rates"], search, "checks" in whole)
    records = []
    for model, result in parts:
        stopped, kind = result.get("diverged"), result.get("metric")
        rest = {key: value for key, value in result.items() if key not in _OWN}
        common: dict[str, Any] = {
            "benchmark": config.get("benchmark", about.name), "task": config["task"],
            "model": model, "seed": config["seed"], "rule": rule,
            "steps": result.get("steps", config.get("steps", 0)),
            "seconds": result.get("seconds", done["seconds"]),
            **{key: result.get(key, 0) for key in ("parameters", "tokens")},
            "config": config, "versions": done["versions"], "commit": done["commit"],
            "note": f"diverged at step {stopped}" if stopped else "",
        }  # fmt: skip
        for i, (name, value) in enumerate(result["scores"].items()):
            setting = config.get("setting", name if kind else "")
            told = {"setting": setting, "metric": kind or name, "value": value}
            records.append(Record(**common, **told, detail=rest if i == 0 else {}))
    return records


def _kept(path: Path) -> list[Record]:
    """The records of runs before this one. What an earlier form left is put aside, once."""
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(rows, list) and all(isinstance(row, dict) and row.get("rule") for row in rows):
        return read_records(path)
    aside = path.with_name("earlier.json")
    if aside.exists():
        raise ValueError(f"{path} and {aside} are both of an earlier form: move one away")
    os.replace(path, aside)
    return []


def report(about: Experiment, records: Sequence[Record]) -> str:
    """The table, what follows it, and by which rule its numbers were chosen."""
    parts = [table(records, about.heads(records), about.by, about.below)]
    if about.notes:
        parts.append(about.notes(records))
    rules = sorted({r.rule for r in records} - {"", "nothing is chosen"})
    most = max(len({r.seed for r in rows}) for rows in grouped(records, about.by).values())
    said = ["Mean ± half the range over seeds."] if most > 1 else []
    parts.append(" ".join([*said, *(f"{rule[0].upper()}{rule[1:]}." for rule in rules)]))
    return "\n\n".join(filter(None, parts))


def evaluate(suite: str, model: str, out: Path | None = None, **options: Any) -> str:
    """Train one contender on every task of a suite and return its scores as Markdown.

    ValueError for an unknown suite or model, and for a folder: these suites train from scratch on
    their own alphabets, so a trained language model has nothing to say there.
    """
    from nestlearn.experiments.models import CONTENDERS

    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: use one of {', '.join(SUITES)}")
    if model not in CONTENDERS and Path(model).exists():
        raise ValueError(
            f"{model} is a folder, but {suite} trains a fresh model on each of its tasks, whose "
            f"tokens a trained one has never seen: name a model, one of {', '.join(CONTENDERS)}"
        )
    place = out or Path("runs", f"eval-{suite}" + "-quick" * options.get("quick", False))
    return run(SUITES[suite], place, models=(model,), **options)
