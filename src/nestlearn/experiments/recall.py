"""What table 1 and figure 9 share: models, a course of lessons, and answers about long texts.

A lesson ends when most of its answers are right, or at its share of the steps. A text is read once,
in pieces, with the state carried. Strictly asked: the state is saved, and another process, which
has the model and that file, is told the question (`nestlearn.experiments.asked`).
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn import state as tree
from nestlearn.captured import Captured
from nestlearn.evals import Record
from nestlearn.evals.haystack import Asked, Row
from nestlearn.experiments import books
from nestlearn.experiments.asked import Elsewhere, answers, autocast, read
from nestlearn.experiments.cells import PLACES, Cell, Tell
from nestlearn.experiments.figures import Panel, curves
from nestlearn.experiments.tables import (
    PARAMETERS,
    RATE,
    SEEDS,
    Column,
    mean,
    spread,
    words,
)
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Attention, DeltaNet, SwiGLU
from nestlearn.train.checkpoint import Record as Step
from nestlearn.train.config import TrainConfig, learning_rate
from nestlearn.train.data import keyed_seed
from nestlearn.train.folder import RunFolder
from nestlearn.train.optimize import adamw
from nestlearn.train.run import resolve_device

SINKS, CACHED = 4, 2  # tokens; bytes of a number of a cache on a card
ROWS: dict[str, dict[str, Any]] = {
    "Hope": {},
    "Hope-Attention": {"mixer": Attention()},
    "DeltaNet with levels": {"mixer": DeltaNet()},
    "DeltaNet": {"mixer": DeltaNet(), "channel": SwiGLU()},
    "Transformer": {"mixer": Attention(), "channel": SwiGLU()},
}
SIZE, QUICK_SIZE = (320, 7, 5), (32, 2, 2)  # width, layers, heads
LATE = 20  # steps over which a lesson's answers are counted
READINGS = ("strict", "ahead")  # the question after the text, in another process; or before it, too


class Lesson(NamedTuple):
    """length, batch: of its sequences, in bytes. drill: the share of them that are drills. until:
    of all steps, the share after which it ends at the latest. enough: of the answers' bytes right.
    """

    length: int
    batch: int
    drill: float
    until: float
    enough: float = 0.95


Make = Callable[[Lesson, np.random.Generator], Row]
Ask = Callable[[Cell, str, int, str, bool], list[Asked]]  # cell, task, length, split, ahead


def config_of(name: str, size: tuple[int, int, int]) -> HopeConfig:
    """The row's model, with Hope's parameters. Attention's window gives its state Hope's bytes."""
    hope = HopeConfig(books.BYTES, dim=size[0], layers=size[1], heads=size[2])
    config = books.sized(ROWS[name], size)
    if not isinstance(config.mixer, Attention):
        return config
    room = _bytes(hope) - _bytes(config)
    window = room // (2 * config.dim * config.layers * CACHED) - SINKS
    return replace(config, mixer=replace(config.mixer, window=max(1, window), sinks=SINKS))


def _bytes(config: HopeConfig) -> int:
    with torch.device("meta"):
        return tree.nbytes(HopeLM(config).init_state(1))


# ------------------------------------------------------------------------------------ training


def trained(cell: Cell, make: Make, tell: Tell) -> tuple[HopeLM, dict[str, Any]]:
    """The cell's model, trained, or read from what an earlier call has left: a killed training goes
    on from its last checkpoint.

    cell: model, size, lessons, steps, language (the weight of the loss of bytes that answer
    nothing), lr, seed, device, out.
    """
    torch.manual_seed(cell["seed"])
    model = HopeLM(config_of(cell["model"], tuple(cell["size"])))
    device = resolve_device(cell["device"])
    model.to(device).train()
    steps, lessons = cell["steps"], [Lesson(*lesson) for lesson in cell["lessons"]]
    settings = TrainConfig(
        steps=steps, lr=cell["lr"], warmup=max(1, min(200, steps // 10)), seed=cell["seed"]
    )
    optimizer = adamw(model, settings, device)
    identity = {"train": asdict(settings), "corpus": course(cell), "model": model.config.to_dict()}
    folder = RunFolder(folder_of(cell), identity)
    if folder.out.is_dir():
        step, log = folder.resume(model, optimizer, None)
    else:
        folder.start()
        step, log = 0, []
    update, saved = _Update(model, cell["language"], device), max(1, steps // 20)
    with ThreadPoolExecutor(1) as pool:
        batches = _Batches(make, lessons, cell["seed"], pool)
        while step < steps:
            began, place = time.perf_counter(), _place(log, lessons, steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            loss, right = update(*(x.to(device) for x in batches(step, place)))
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not (loss.isfinite() and norm.isfinite()):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step + 1}"
                )
            optimizer.step()
            step += 1
            lesson = lessons[place]
            took = time.perf_counter() - began
            record = {
                "step": step, "loss": float(loss), "right": float(right), "lesson": place,
                "tokens_per_second": lesson.length * lesson.batch / took,
            }  # fmt: skip
            log.append(record)
            folder.append(record)
            if step % saved == 0 or step == steps:
                folder.save(step, model, optimizer, None)
                tell(step / steps, f"{lesson.length:,} bytes: {float(right):.2f} right")
    model.eval()
    return model, _told(model, log, lessons)


TESTS = ("lengths", "setting", "validated", "depths", "samples", *PLACES)  # no part of a course


def course(cell: Cell) -> Cell:
    """What a training depends on."""
    return {key: value for key, value in cell.items() if key not in TESTS}


def folder_of(cell: Cell) -> Path:
    """Where a training is kept."""
    digest = hashlib.sha256(json.dumps(course(cell), sort_keys=True).encode()).hexdigest()[:12]
    name = f"{cell['model']}-{cell['lr']}-{cell['seed']}-{digest}".lower().replace(" ", "-")
    return Path(cell["out"]) / "models" / name


def _told(model: HopeLM, log: list[Step], lessons: Sequence[Lesson]) -> dict[str, Any]:
    late = max(1, len(log) // 40)
    tokens = sum(lessons[r["lesson"]].length * lessons[r["lesson"]].batch for r in log)
    return {
        "parameters": model.parameter_count(), "tokens": tokens, "steps": len(log),
        "config": model.config.to_dict(),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in log),
        "curve": [
            [log[i]["step"], log[i]["lesson"],
             round(statistics.fmean(r["right"] for r in log[max(0, i - late) : i + 1]), 4)]
            for i in range(0, len(log), late)
        ],
    }  # fmt: skip


def _place(log: Sequence[Step], lessons: Sequence[Lesson], steps: int) -> int:
    """The lesson of the next step."""
    place = log[-1]["lesson"] if log else 0
    own = [r["right"] for r in log[-LATE:] if r["lesson"] == place]
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

    def __call__(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        future = self.coming.pop((step, place), None)
        self.coming = {(step + 1, place): self.pool.submit(self._made, step + 1, place)}
        return self._made(step, place) if future is None else future.result()

    def _made(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        lesson = self.lessons[place]
        rng = np.random.default_rng(keyed_seed(self.seed, step, place))
        rows = [self.make(lesson, rng) for _ in range(lesson.batch)]
        ids, asked = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        return ids.long(), asked


class _Update:
    """Loss, with gradients in `.grad`, and the share of the answers' bytes that are right; on CUDA
    one graph for each shape.
    """

    def __init__(self, model: HopeLM, language: float, device: torch.device) -> None:
        self.model, self.language, self.device = model, language, device
        self.graphs: dict[tuple[int, ...], Captured] = {}
        self.right = torch.zeros((), device=device)

    def __call__(self, ids: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        if self.device.type != "cuda":
            return self._run(ids, asked), self.right
        if (shape := tuple(ids.shape)) not in self.graphs:
            self.graphs.clear()  # a lesson does not come again
            self.graphs[shape] = Captured(self.model, self._run, ids, asked)
        return self.graphs[shape](ids, asked), self.right

    def _run(self, ids: Tensor, asked: Tensor) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        with autocast(self.device):
            logits = self.model(ids[:, :-1])[0]
        target, answer = ids[:, 1:], asked[:, 1:].float()
        nats = F.cross_entropy(logits.mT.float(), target, reduction="none")
        count = answer.sum().clamp(min=1)
        rest = (1 - answer) / (1 - answer).sum().clamp(min=1)
        loss = (nats * (answer / count + self.language * rest)).sum()
        loss.backward()
        with torch.no_grad():
            self.right.copy_(((logits.argmax(-1) == target) * answer).sum() / count)
        return loss.detach()


# ------------------------------------------------------------------------------------- answers


def said(
    lm: HopeLM, asked: Sequence[Asked], most: int, elsewhere: Elsewhere | None
) -> tuple[list[str], int]:
    """What the model answers, up to `most` bytes each, and the bytes of a state. asked: of texts of
    one length. elsewhere: who is asked with the saved state; None: the model itself.
    """
    state = read(lm, [one.text for one in asked])
    questions = [one.question for one in asked]
    size = tree.nbytes(state) // len(asked)
    if elsewhere is None:
        return answers(lm, state, questions, most), size
    with TemporaryDirectory() as place:
        path = Path(place) / "state.safetensors"
        tree.save(state, path)
        return elsewhere.ask(path, len(asked[0].text), questions, most), size


def measured(
    cell: Cell, lm: HopeLM, names: Sequence[str], ask: Ask, most: int,
    score: Callable[[Asked, str], float], tell: Tell,
) -> dict[str, Any]:  # fmt: skip
    """Percent of the answers that are said, by task, length and reading; "value": on validation
    texts. cell: lengths, validated (a length), device, and what `ask` needs of it.
    """

    def percent(key: tuple[str, int, str], ahead: bool, who: Elsewhere | None) -> float:
        asked = ask(cell, *key, ahead)
        told, sizes[key] = said(lm, asked, most, who)
        return 100 * statistics.fmean(map(score, asked, told))

    sizes: dict[tuple[str, int, str], int] = {}
    scores: dict[str, float] = {}
    with TemporaryDirectory() as place:
        lm.save_pretrained(place)
        value = statistics.fmean(
            percent((name, cell["validated"], "valid"), False, None) for name in names
        )
        with Elsewhere(Path(place), cell["device"]) as elsewhere:
            for length in cell["lengths"]:
                for name in names:
                    for reading, who in zip(READINGS, (elsewhere, None)):
                        key = f"{name}, {length:,}, {reading}"
                        scores[key] = percent((name, length, "test"), who is None, who)
                        tell(1.0, f"{key}: {scores[key]:.0f}")
    strict = [percent for key, percent in scores.items() if key.endswith("strict")]
    return {
        "value": value, "scores": scores, "state_bytes": max(sizes.values()),
        "headline": f"{value:.0f} on validation, {statistics.fmean(strict):.0f} strictly",
    }  # fmt: skip


@cache
def haystacks(folder: Path) -> dict[str, Any]:
    """The training, validation and test books, as bytes."""
    text = books.read(folder / "gutenberg")
    return {
        "train": text.corpus.train.numpy(), "valid": text.corpus.val.numpy(),
        "test": text.test.numpy(),
    }  # fmt: skip


# ------------------------------------------------------------------------- tables and figures


def _length(r: Record) -> int:
    return int(r.metric.split(", ")[1].replace(",", ""))


def _of(records: Sequence[Record], names: Sequence[str], length: int, reading: str) -> list[float]:
    """The means over these tasks, for each seed."""
    own = [
        (r.seed, r.value) for r in records
        if r.metric.split(", ")[0] in names and _length(r) == length
        and r.metric.endswith(f", {reading}")
    ]  # fmt: skip
    seeds = sorted({seed for seed, _ in own})
    return [statistics.fmean(value for s, value in own if s == seed) for seed in seeds]


def columns(records: Sequence[Record], names: Sequence[str]) -> list[Column]:
    """Percent of the answers said, by task and length: strictly / ahead."""

    def column(name: str, length: int) -> Column:
        def text(rows: Sequence[Record]) -> str:
            found = [_of(rows, (name,), length, reading) for reading in READINGS]
            return " / ".join(spread(values, 0) if values else "–" for values in found)

        return Column(f"{name}, {length:,}", text)

    lengths = sorted({_length(r) for r in records})
    state = mean("state, kB", lambda r: r.detail.get("state_bytes", 0) / 1e3 or None, digits=0)
    each = [column(name, length) for name in names for length in lengths]
    return [words("model", lambda r: r.model), PARAMETERS, state, RATE, SEEDS, *each]


def notes(records: Sequence[Record]) -> str:
    """What the two figures are."""
    return (
        "Percent of the answers that are said: strictly (the text is read once, its state saved to "
        "a file, another process asked) / with the question told before the text, too. Lengths in "
        "bytes."
    )


def figure(records: Sequence[Record], panels: dict[str, Sequence[str]], path: Path) -> None:
    """By length, strictly asked; a panel for each group of tasks."""
    drawn = []
    lengths = sorted({_length(r) for r in records})
    for title, names in panels.items():
        lines: dict[str, tuple[list[float], list[list[float]]]] = {}
        for name in dict.fromkeys(r.model for r in records):
            rows = [r for r in records if r.model == name]
            found = {length: _of(rows, names, length, "strict") for length in lengths}
            at = [length for length in lengths if found[length]]
            seeds = min((len(found[length]) for length in at), default=0)
            values = [[found[length][i] for length in at] for i in range(seeds)]
            if values:
                lines[name] = (list(map(float, at)), values)
        drawn.append(Panel(title, "bytes read", "answers (%)", lines))
    curves(drawn, path, log="2", marker=True, ylim=(-2, 104))
