"""Many small trainings, side by side and never twice: the cells of a table.

A cell is a dict of plain JSON that says all about one training, the version of the code too. What
it came to is one file, named by a hash of the cell and written whole; so a run killed at any moment
loses the cells that were running, and the same call goes on with the rest. A cell that failed
leaves its traceback, does not end the others, and is tried again by the next call.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from nestlearn.disk import atomic_write
from nestlearn.experiments.provenance import commit
from nestlearn.train.checkpoint import versions

Cell = dict[str, Any]
Tell = Callable[[float, str], None]
Work = Callable[[Cell, Tell], dict[str, Any]]

PLACES = ("device", "out", "folder")  # where it runs and its files stand, not what it is
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_cells(
    cells: Sequence[Cell],
    work: Work,
    folder: Path,
    *,
    workers: int | None = None,
    name: str = "cells",
    progress: bool = True,
) -> list[dict[str, Any] | None]:
    """What each cell came to: {"cell", "result", "seconds", "versions", "commit"}, None if failed.

    work(cell, tell) -> result, both plain JSON: a function of a module, for workers to import. It
    may call tell(share done, text); a "headline" (text) and a "value" (the higher the better) in
    the result are shown. folder: a file for each finished cell, failed/ for tracebacks. workers:
    processes of one thread each, in turn on each card (None: one for each core, on CUDA one; 0: in
    this process).
    KeyboardInterrupt ends the workers; what is finished is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [cell_path(folder, cell) for cell in cells]
    # seed after seed: a run that is stopped has whole seeds
    order = sorted(zip(paths, cells), key=lambda pair: pair[1].get("seed", 0))
    todo = {path: cell for path, cell in order if not path.is_file()}
    with _Board(name, len(set(paths)), len(todo), progress) as board:
        if workers == 0:
            for path, cell in todo.items():
                board.done(path, _attempt(cell, work, path, lambda *a, p=path: board.told(p, *a)))
        elif todo:
            cuda = any(str(cell.get("device", "")).startswith("cuda") for cell in todo.values())
            size = workers or (1 if cuda else os.cpu_count() or 1)
            _Crew(work, min(size, len(todo))).run(todo, board)
    return [
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None for path in paths
    ]


def cell_path(folder: Path, cell: Cell) -> Path:
    """Where a cell's result is: readable parts of its name, and a hash of all but its places."""
    parts = [str(cell[k]) for k in ("task", "model", "lr", "seed") if k in cell]
    name = "".join(c if c.isalnum() or c == "." else "-" for c in "_".join(parts))
    return folder / f"{name or 'cell'}_{digest(cell)}.json"


def digest(cell: Cell, without: Sequence[str] = ()) -> str:
    """A short hash of a cell, but for its places and what else it is to be without."""
    said = {k: v for k, v in cell.items() if k not in (*PLACES, *without)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def settled(result: dict[str, Any]) -> dict[str, Any]:
    """The result at the checkpoint with the best mean on validation data; of equals the sooner."""
    if "checks" not in result:
        return result
    best = max(result["checks"], key=lambda check: statistics.mean(check["validation"].values()))
    return result | {
        "value": statistics.mean(best["validation"].values()), "validation": best["validation"],
        "scores": best["scores"], "best_step": best["step"],
    }  # fmt: skip


def failure(folder: Path, cell: Cell) -> str | None:
    """The traceback that the cell's last attempt left, None if it did not fail."""
    path = _failed(cell_path(folder, cell))
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _failed(path: Path) -> Path:
    return path.parent / "failed" / f"{path.stem}.txt"


def _attempt(cell: Cell, work: Work, path: Path, tell: Tell) -> str | None:
    """Run one cell into its file; the last line of its traceback if it failed."""
    began = time.time()
    try:
        done = {"cell": cell, "result": work(cell, tell), "seconds": round(time.time() - began, 2)}
        text = json.dumps(done | {"versions": versions(), "commit": commit()}, indent=1)
    except Exception as error:
        _note_failure(path, traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    atomic_write(path, lambda temp: temp.write_text(text + "\n", encoding="utf-8"))
    _failed(path).unlink(missing_ok=True)
    return None


def _note_failure(path: Path, text: str) -> None:
    _failed(path).parent.mkdir(exist_ok=True)
    atomic_write(_failed(path), lambda temp: temp.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------- the workers


class _Crew:
    """Worker processes and what they are at. Death of one costs its cell, not the others. A card
    that has too little memory for all gets one worker fewer, and the cell a second try.
    """

    def __init__(self, work: Work, size: int):
        self.work, self.size = work, size
        self.queue: list[tuple[Path, Cell]] = []
        self.again: set[Path] = set()
        self.context = multiprocessing.get_context("spawn")  # CUDA and threads survive no fork
        self.busy: dict[Connection, tuple[Any, Path, Cell]] = {}
        self.idle: list[tuple[Connection, Any]] = []
        self.hired, self.cards = 0, _cards()

    def run(self, todo: dict[Path, Cell], board: _Board) -> None:
        self.queue = list(todo.items())
        try:
            while self.queue or self.busy:
                while self.queue and len(self.busy) < self.size:
                    self._start(*self.queue.pop(0))
                for door in wait(list(self.busy)):
                    assert isinstance(door, Connection)
                    self._hear(door, board)
        finally:
            self._end()

    def _start(self, path: Path, cell: Cell) -> None:
        door, process = self.idle.pop() if self.idle else self._hire()
        door.send((path, cell))
        self.busy[door] = (process, path, cell)

    def _hire(self) -> tuple[Connection, Any]:
        door, inside = self.context.Pipe()
        variables = dict.fromkeys(_THREADS, "1")
        if len(self.cards) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = self.cards[self.hired % len(self.cards)]
        self.hired += 1
        with _environment(variables):
            process = self.context.Process(target=_worker, args=(self.work, inside), daemon=True)
            process.start()
        inside.close()  # else the door would never tell that the worker died
        return door, process

    def _hear(self, door: Connection, board: _Board) -> None:
        process, path, cell = self.busy[door]
        try:
            kind, *said = door.recv()
        except (EOFError, OSError):
            process.join()
            del self.busy[door]
            died = f"the worker died (exit code {process.exitcode}); out of memory?"
            _note_failure(path, died + "\n")
            board.done(path, died)
            return
        if kind == "tell":
            board.told(path, *said)
            return
        del self.busy[door]
        self.idle.append((door, process))
        crowded = (said[0] or "").startswith("OutOfMemoryError") and len(self.busy) > 0
        if crowded and path not in self.again:
            self.again.add(path)
            self.size = max(1, self.size - 1)
            self.queue.append((path, cell))
        else:
            board.done(path, said[0])

    def _end(self) -> None:
        for process in [p for p, *_ in self.busy.values()] + [p for _, p in self.idle]:
            process.terminate()
            process.join()


def _worker(work: Work, door: Connection) -> None:
    """A process's life: cells come in by the door, news goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent acts
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    commit()  # of what was loaded just now
    while True:
        path, cell = door.recv()
        error = _attempt(cell, work, path, lambda share, text: door.send(("tell", share, text)))
        gc.collect()
        torch.cuda.empty_cache()  # the other workers' memory, too
        door.send(("done", error))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed: nobody waits for this cell, and the next call runs it again


def _cards() -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        named = ",".join(map(str, range(torch.cuda.device_count())))
    return named.split(",")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What is started inside has these variables: libraries read threads and cards when loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ------------------------------------------------------------------------------------ the board


class _Board:
    """A bar over the cells, the parts of running ones included, and a line for each that ended."""

    def __init__(self, name: str, every: int, todo: int, shown: bool):
        self.parts: dict[Path, float] = {}
        self.ended = self.failed = 0
        self.kept, self.every, self.best = every - todo, every, (-math.inf, "")
        self.bar = Progress(
            "[bold]{task.description}", BarColumn(), "{task.fields[count]}", "{task.fields[rate]}",
            TimeElapsedColumn(), "left", TimeRemainingColumn(), "{task.fields[text]}",
            console=Console(file=sys.stderr), disable=not shown or not todo,
            speed_estimate_period=3600,
        )  # fmt: skip
        self.began = time.monotonic()
        self.row = self.bar.add_task(name, total=float(todo), count="", rate="", text="")

    def __enter__(self) -> _Board:
        self.bar.__enter__()
        self._draw("")
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def told(self, path: Path, share: float, text: str) -> None:
        """News of a running cell."""
        self.parts[path] = min(1.0, share)
        self._draw(f"{path.stem.rsplit('_', 1)[0]}: {text}")

    def done(self, path: Path, error: str | None) -> None:
        """A cell has ended."""
        self.parts.pop(path, None)
        self.ended += 1
        name = path.stem.rsplit("_", 1)[0]
        if error is None:
            result = settled(json.loads(path.read_text(encoding="utf-8"))["result"])
            if "value" in result:
                self.best = max(self.best, (result["value"], name))
            line, style = f"{name}: {result.get('headline', 'done')}", ""
        else:
            self.failed += 1
            line, style = f"failed: {name}: {error} (in {_failed(path)})", "red"
        self.bar.console.print(line, style=style, highlight=False, markup=False)
        self._draw("")

    def _draw(self, text: str) -> None:
        count = f"{self.kept + self.ended}/{self.every}"
        count += f", {self.failed} failed" if self.failed else ""
        hours = (time.monotonic() - self.began) / 3600
        rate = f"{self.ended / hours:.0f} cells/h" if self.ended else ""
        best = f"best {self.best[0]:.1f} ({self.best[1]})" if self.best[1] else ""
        self.bar.update(
            self.row, completed=self.ended + sum(self.parts.values()), count=count, rate=rate,
            text=text or best,
        )  # fmt: skip
