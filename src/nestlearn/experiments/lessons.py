"""A course of lessons: sequences of growing length, of which some bytes are answers.

A lesson ends when most of its answers are right, or at its share of the steps. Sequences are made
on the fly, a function of (seed, step, lesson) alone, in the background; a killed training goes on
from its last checkpoint.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.captured import Captured
from nestlearn.evals.haystack import Row
from nestlearn.experiments.asked import autocast
from nestlearn.experiments.cells import PLACES, Cell, Tell, digest
from nestlearn.layers.linear import StaticProjections
from nestlearn.layers.parts import BiasedLinear
from nestlearn.layers.titans import SelfModifyingTitans
from nestlearn.models.hope import HopeLM
from nestlearn.train.checkpoint import Record
from nestlearn.train.config import TrainConfig, learning_rate
from nestlearn.train.data import keyed_seed
from nestlearn.train.folder import RunFolder
from nestlearn.train.optimize import adamw
from nestlearn.train.run import resolve_device

LATE = 20  # steps over which a lesson's answers are counted
SKIPPED = 100  # one step in so many may be left out: its gradient is no number


class Lesson(NamedTuple):
    """length, batch: of its sequences, in bytes. drill: the share of them that are drills. until:
    of all steps, the share after which it ends at the latest. shut: what a step at all bytes of the
    haystacks costs, in nats, where steps cost. enough: of the answers' bytes right.
    """

    length: int
    batch: int
    drill: float
    until: float
    shut: float = 0.0
    enough: float = 0.95


Make = Callable[[Lesson, np.random.Generator], Row]


def teach(model: HopeLM, cell: Cell, make: Make, tell: Tell) -> dict[str, Any]:
    """Train the cell's model in place, or read what an earlier call has left of it.

    cell: lessons, steps, language (the weight of the loss of bytes that answer nothing), costly
    (whether steps cost), lr, seed, device, out, and all else that the training depends on.
    """
    device = resolve_device(cell["device"])
    model.to(device).train()
    steps, lessons = cell["steps"], [Lesson(*lesson) for lesson in cell["lessons"]]
    last = lessons[-1]
    settings = TrainConfig(
        steps=steps, lr=cell["lr"], warmup=max(1, min(200, steps // 10)), seed=cell["seed"],
        length=last.length, batch=last.batch,
    )  # fmt: skip
    optimizer = adamw(model, settings, device)
    identity = {"train": asdict(settings), "corpus": course(cell), "model": model.config.to_dict()}
    folder = RunFolder(folder_of(cell), identity)
    if folder.out.is_dir():
        step, log = folder.resume(model, optimizer)
    else:
        folder.start()
        step, log = 0, []
    update, saved = _Update(model, cell["language"], cell["costly"], device), max(1, steps // 20)
    with ThreadPoolExecutor(1) as pool:
        batches = _Batches(make, lessons, cell["seed"], pool)
        while step < steps:
            began, place = time.perf_counter(), _place(log, lessons, steps)
            lesson = lessons[place]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            ids, asked, hay = (part.to(device) for part in batches(step, place))
            loss, right = update(ids, asked, hay, lesson.shut)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            step += 1
            if finite := bool(loss.isfinite() and norm.isfinite()):
                optimizer.step()
            elif sum(r["skipped"] for r in log) >= steps // SKIPPED:
                raise FloatingPointError(f"the loss or its gradient is not finite at step {step}")
            took = time.perf_counter() - began
            record = {
                "step": step, "loss": float(loss), "lesson": place, "skipped": not finite,
                "right": float(right) if asked.any() else None,
                "tokens_per_second": lesson.length * lesson.batch / took,
            }  # fmt: skip
            log.append(record)
            folder.append(record)
            if step % saved == 0 or step == steps:
                folder.save(step, model, optimizer)
                tell(step / steps, f"{lesson.length:,} bytes: {float(right):.2f} right")
    model.eval()
    return _told(model, log, lessons)


TESTS = ("lengths", "setting", "validated", "depths", "samples", "said")  # no part of a course


def course(cell: Cell) -> Cell:
    """What a training depends on."""
    return {key: value for key, value in cell.items() if key not in (*TESTS, *PLACES)}


def folder_of(cell: Cell) -> Path:
    """Where a training is kept."""
    name = f"{cell['model']}-{cell['lr']}-{cell['seed']}-{digest(cell, TESTS)}"
    return Path(cell["out"]) / "models" / name.lower().replace(" ", "-")


def _told(model: HopeLM, log: list[Record], lessons: Sequence[Lesson]) -> dict[str, Any]:
    late = max(1, len(log) // 40)
    tokens = sum(lessons[r["lesson"]].length * lessons[r["lesson"]].batch for r in log)
    return {
        "parameters": model.parameter_count(), "tokens": tokens, "steps": len(log),
        "skipped": sum(r["skipped"] for r in log), "config": model.config.to_dict(),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in log),
        "curve": [
            [log[i]["step"], log[i]["lesson"], round(statistics.fmean(found), 4)]
            for i in range(0, len(log), late) if (found := _right(log[max(0, i - late) : i + 1]))
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
    """ids, asked and hay [batch, length + 1] of a step, a function of (seed, step, lesson) alone;
    the next ones are made in the background while the device is at work.
    """

    def __init__(
        self, make: Make, lessons: Sequence[Lesson], seed: int, pool: ThreadPoolExecutor
    ) -> None:
        self.make, self.lessons, self.seed, self.pool = make, lessons, seed, pool
        self.coming: dict[tuple[int, int], Any] = {}

    def __call__(self, step: int, place: int) -> tuple[Tensor, ...]:
        future = self.coming.pop((step, place), None)
        self.coming = {(step + 1, place): self.pool.submit(self._made, step + 1, place)}
        return self._made(step, place) if future is None else future.result()

    def _made(self, step: int, place: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(keyed_seed(self.seed, step, place))
        lesson = self.lessons[place]
        rows = [self.make(lesson, rng) for _ in range(lesson.batch)]
        ids, *masks = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        return ids.long(), *masks


class _Update:
    """Loss, with gradients in `.grad`, and the share of the answers' bytes that are right; on CUDA
    one graph for each shape.

    costly: a step at a byte of a haystack costs, also one that a lower limit makes none. Answers
    alone leave many gates just below it, and another book opens them.
    """

    def __init__(self, model: HopeLM, language: float, costly: bool, device: torch.device) -> None:
        self.model, self.language, self.device = model, language, device
        self.steps: dict[int, list[Tensor]] = {}  # of each layer, its calls' [B, T]: means of heads
        kinds = (StaticProjections, SelfModifyingTitans) if costly else ()
        layers = [m for m in model.modules() if isinstance(m, kinds)]
        assert layers or not costly, "no steps are seen"
        for n, layer in enumerate(layers):
            said = layer.gates if isinstance(layer, StaticProjections) else layer.eta
            said.register_forward_hook(partial(self._see, n))
            if isinstance(layer, SelfModifyingTitans):  # what generates whole chunks tells no steps
                layer.groups = tuple(
                    g._replace(writer=replace(g.writer, backend="torch")) for g in layer.groups
                )
        self.graphs: dict[tuple[float, ...], Captured] = {}
        self.right = torch.zeros((), device=device)

    def __call__(
        self, ids: Tensor, asked: Tensor, hay: Tensor, shut: float
    ) -> tuple[Tensor, Tensor]:
        """shut: see `Lesson`."""
        self.shut = shut
        if self.device.type != "cuda":
            return self._run(ids, asked, hay), self.right
        if (key := (*ids.shape, shut)) not in self.graphs:
            self.graphs.clear()  # a lesson does not come again
            self.graphs[key] = Captured(self.model, self._run, ids, asked, hay)
        return self.graphs[key](ids, asked, hay), self.right

    def _see(self, layer: int, said: nn.Module, _: Any, out: Tensor) -> None:
        if torch.is_grad_enabled():
            if isinstance(said, BiasedLinear):
                out = out[..., : said.heads].mT
            self.steps.setdefault(layer, []).append(out.float().sigmoid().mean(-2))

    def _run(self, ids: Tensor, asked: Tensor, hay: Tensor) -> Tensor:
        self.model.zero_grad()
        self.steps.clear()
        with autocast(self.device):
            logits, _ = self.model(ids[:, :-1])
        target, answer, idle = ids[:, 1:], asked[:, 1:].float(), hay[:, :-1].float()
        nats = F.cross_entropy(logits.mT.float(), target, reduction="none")
        count = answer.sum().clamp(min=1)
        rest = (1 - answer) / (1 - answer).sum().clamp(min=1)
        loss = (nats * (answer / count + self.language * rest)).sum()
        cost: Tensor | float = 0.0
        if self.steps:
            mean = torch.stack([torch.cat(calls, -1) for calls in self.steps.values()]).mean(0)
            cost = self.shut * (mean * idle).sum() / idle.sum().clamp(min=1)
        (loss + cost).backward()
        with torch.no_grad():
            self.right.copy_(((logits.argmax(-1) == target) * answer).sum() / count)
        return loss.detach()
