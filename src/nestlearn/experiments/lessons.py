"""A course of lessons: sequences of growing length, of which some bytes are answers.

A lesson ends when most of its answers are right, or at its share of the steps. The last one may be
of streams: sequences in several windows, one a step, with the memory carried from window to window.
Sequences are made on the fly, a function of (seed, step, lesson) alone, in the background; a killed
training goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn import state as tree
from nestlearn.captured import Captured
from nestlearn.evals.haystack import Row
from nestlearn.experiments.asked import autocast
from nestlearn.experiments.cells import PLACES, Cell, Tell
from nestlearn.models.hope import HopeLM
from nestlearn.options import Attention
from nestlearn.train.carried import Carried
from nestlearn.train.checkpoint import Record
from nestlearn.train.config import TrainConfig, learning_rate
from nestlearn.train.data import keyed_seed
from nestlearn.train.folder import RunFolder
from nestlearn.train.optimize import adamw
from nestlearn.train.run import resolve_device

LATE = 20  # steps over which a lesson's answers are counted


class Lesson(NamedTuple):
    """length, batch: of its sequences, in bytes. drill: the share of them that are drills. until:
    of all steps, the share after which it ends at the latest. enough: of the answers' bytes right.
    windows: of such a length that a sequence has.
    """

    length: int
    batch: int
    drill: float
    until: float
    enough: float = 0.95
    windows: int = 1


Make = Callable[[Lesson, np.random.Generator], Row]


def teach(model: HopeLM, cell: Cell, make: Make, tell: Tell) -> dict[str, Any]:
    """Train the cell's model in place, or read what an earlier call has left of it.

    cell: lessons, steps, language (the weight of the loss of bytes that answer nothing), lr, seed,
    device, out, and all else that the training depends on.
    """
    device = resolve_device(cell["device"])
    model.to(device).train()
    steps, lessons = cell["steps"], lessons_of(cell, model)
    last = lessons[-1]
    settings = TrainConfig(
        steps=steps, lr=cell["lr"], warmup=max(1, min(200, steps // 10)), seed=cell["seed"],
        length=last.length, batch=last.batch, stream=last.windows,
    )  # fmt: skip
    carried = Carried(model, settings) if last.windows > 1 else None
    state = carried and carried.state
    optimizer = adamw(model, settings, device)
    identity = {"train": asdict(settings), "corpus": course(cell), "model": model.config.to_dict()}
    folder = RunFolder(folder_of(cell), identity)
    if folder.out.is_dir():
        step, log = folder.resume(model, optimizer, state)
    else:
        folder.start()
        step, log = 0, []
    update, saved = _Update(model, cell["language"], device, carried), max(1, steps // 20)
    with ThreadPoolExecutor(1) as pool:
        batches = _Batches(make, lessons, cell["seed"], pool)
        while step < steps:
            began, place = time.perf_counter(), _place(log, lessons, steps)
            lesson = lessons[place]
            begins = step % lesson.windows == 0 or not log or log[-1]["lesson"] < place
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            ids, asked = batches(step, place)
            anew = None if lesson.windows == 1 else begins
            loss, right = update(ids.to(device), asked.to(device), anew)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not (loss.isfinite() and norm.isfinite()):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step + 1}"
                )
            optimizer.step()
            step += 1
            took = time.perf_counter() - began
            record = {
                "step": step, "loss": float(loss), "lesson": place,
                "right": float(right) if asked.any() else None,
                "tokens_per_second": lesson.length * lesson.batch / took,
            }  # fmt: skip
            log.append(record)
            folder.append(record)
            if step % saved == 0 or step == steps:
                folder.save(step, model, optimizer, state)
                tell(step / steps, f"{lesson.length:,} bytes: {float(right):.2f} right")
    model.eval()
    return _told(model, log, lessons)


def lessons_of(cell: Cell, model: HopeLM) -> list[Lesson]:
    """The cell's lessons. A cache of attention grows, and is not carried: it has single windows."""
    lessons = [Lesson(*lesson) for lesson in cell["lessons"]]
    assert all(lesson.windows == 1 for lesson in lessons[:-1]), "only the last is of streams"
    if isinstance(model.config.mixer, Attention):
        lessons[-1] = lessons[-1]._replace(windows=1)
    return lessons


TESTS = ("lengths", "setting", "validated", "depths", "samples", "said")  # no part of a course


def course(cell: Cell) -> Cell:
    """What a training depends on."""
    return {key: value for key, value in cell.items() if key not in (*TESTS, *PLACES)}


def folder_of(cell: Cell) -> Path:
    """Where a training is kept."""
    digest = hashlib.sha256(json.dumps(course(cell), sort_keys=True).encode()).hexdigest()[:12]
    name = f"{cell['model']}-{cell['lr']}-{cell['seed']}-{digest}".lower().replace(" ", "-")
    return Path(cell["out"]) / "models" / name


def _told(model: HopeLM, log: list[Record], lessons: Sequence[Lesson]) -> dict[str, Any]:
    late = max(1, len(log) // 40)
    tokens = sum(lessons[r["lesson"]].length * lessons[r["lesson"]].batch for r in log)
    return {
        "parameters": model.parameter_count(), "tokens": tokens, "steps": len(log),
        "config": model.config.to_dict(),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in log),
        "curve": [
            [log[i]["step"], log[i]["lesson"],
             round(statistics.fmean(found), 4)]
            for i in range(0, len(log), late)
            if (found := _right(log[max(0, i - late) : i + 1]))
        ],
    }  # fmt: skip


def _right(log: Iterable[Record]) -> list[float]:
    """Of the steps that asked anything."""
    return [r["right"] for r in log if r["right"] is not None]


def _place(log: Sequence[Record], lessons: Sequence[Lesson], steps: int) -> int:
    """The lesson of the next step."""
    place = log[-1]["lesson"] if log else 0
    own = _right(r for r in log[-LATE:] if r["lesson"] == place)
    learned = len(own) == LATE and statistics.fmean(own) >= lessons[place].enough
    over = len(log) >= lessons[place].until * steps
    return min(place + (learned or over), len(lessons) - 1)


class _Batches:
    """ids, asked [batch, length + 1] of a step, a function of (seed, step, lesson) alone; the next
    ones are made in the background while the device is at work.
    """

    def __init__(
        self, make: Make, lessons: Sequence[Lesson], seed: int, pool: ThreadPoolExecutor
    ) -> None:
        self.make, self.lessons, self.seed, self.pool = make, lessons, seed, pool
        self.coming: dict[tuple[int, int], Any] = {}
        self.stream: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def __call__(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        future = self.coming.pop((step, place), None)
        self.coming = {(step + 1, place): self.pool.submit(self._made, step + 1, place)}
        return self._made(step, place) if future is None else future.result()

    def _made(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        lesson = self.lessons[place]
        number, window = divmod(step, lesson.windows)
        kept = self.stream  # another thread may replace it at any time
        if kept is None or kept[0] != (number, place):
            rng = np.random.default_rng(keyed_seed(self.seed, number, place))
            whole = lesson._replace(length=lesson.length * lesson.windows)
            rows = [self.make(whole, rng) for _ in range(lesson.batch)]
            ids, asked = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
            kept = self.stream = (number, place), (ids, asked)
        part = slice(window * lesson.length, (window + 1) * lesson.length + 1)
        ids, asked = kept[1]
        return ids[:, part].long(), asked[:, part]


class _Update:
    """Loss, with gradients in `.grad`, and the share of the answers' bytes that are right; on CUDA
    one graph for each shape. carried: the memory of a lesson of streams.
    """

    def __init__(
        self, model: HopeLM, language: float, device: torch.device, carried: Carried | None
    ) -> None:
        self.model, self.language, self.device, self.carried = model, language, device, carried
        self.graphs: dict[tuple[int, ...], Captured] = {}
        self.right = torch.zeros((), device=device)

    def __call__(
        self, ids: Tensor, asked: Tensor, anew: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """anew: whether these windows begin their streams (None: they are whole sequences)."""
        run = self._run
        if anew is not None:
            assert self.carried is not None
            self.carried.starts(torch.tensor([anew]).expand(len(ids)))
            run = partial(self._run, carried=self.carried)
        if self.device.type != "cuda":
            return run(ids, asked), self.right
        if (shape := (*ids.shape, anew is None)) not in self.graphs:
            self.graphs.clear()  # a lesson does not come again
            first = partial(run, takes=False)
            self.graphs[shape] = Captured(self.model, run, ids, asked, first=first)
        return self.graphs[shape](ids, asked), self.right

    def _run(
        self, ids: Tensor, asked: Tensor, carried: Carried | None = None, takes: bool = True
    ) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        with autocast(self.device):
            logits, state = self.model(ids[:, :-1], carried.given() if carried else None)
        state = tree.detach(state) if carried else None  # no graph of it is kept
        target, answer = ids[:, 1:], asked[:, 1:].float()
        nats = F.cross_entropy(logits.mT.float(), target, reduction="none")
        count = answer.sum().clamp(min=1)
        rest = (1 - answer) / (1 - answer).sum().clamp(min=1)
        loss = (nats * (answer / count + self.language * rest)).sum()
        loss.backward()
        if carried and takes:
            carried.take(state)
        with torch.no_grad():
            self.right.copy_(((logits.argmax(-1) == target) * answer).sum() / count)
        return loss.detach()
