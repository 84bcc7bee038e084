"""One supervised training loop for the benchmarks' fixed training sets.

Batches are keyed by (seed, epoch); sequences of like length share a batch, so that little padding
is computed. A loss that is not finite ends the run with a mark, not with an exception: in a table
a model that diverges is a result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.captured import Captured
from nestlearn.evals import IGNORED, Examples, Logits, Task, score
from nestlearn.experiments.cells import Cell, Tell
from nestlearn.experiments.models import build
from nestlearn.train import Corpus, TrainConfig, train
from nestlearn.train.config import require
from nestlearn.train.data import keyed_seed
from nestlearn.train.optimize import adamw, schedule
from nestlearn.train.run import resolve_device

_SCHEDULES = ("constant", "cosine")
TESTED = 128  # sequences of a test batch
_POOL = 16  # batches whose sequences are sorted by length together
_FLOOD = "x has NaN or infinity"  # how layers begin their complaint about such an input


@dataclass(frozen=True)
class FitConfig:
    """How to train: AdamW, a linear warm-up, then lr constant or to zero along a cosine.

    steps: optimizer steps. batch: sequences of a step. warmup: steps of the linear rise. clip: the
    largest gradient norm. weight_decay: on matrices only. eval_every: steps between two tests on
    all sets. stop: percent at which, on every validation set, training ends early. device: as for
    `nestlearn train`.
    """

    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    eval_every: int = 200
    stop: float = 100.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(0 < self.lr < math.inf, "lr", self.lr, "a positive learning rate, e.g. 1e-3")
        require(self.warmup >= 0, "warmup", self.warmup, "0 steps or more")
        require(self.schedule in _SCHEDULES, "schedule", self.schedule, f"one of {_SCHEDULES}")
        require(self.clip > 0, "clip", self.clip, "a positive norm (math.inf: no clipping)")


def fit(
    module: nn.Module, task: Task, config: FitConfig, tell: Tell = lambda *_: None
) -> dict[str, Any]:
    """Train the module in place on the task, testing it as it goes.

    module: ids [B, T] -> logits [B, T, V ≥ classes], alone or first of a tuple. tell: called with
    (share done, text) at every test. Afterwards the weights are those of the last step.

    Returns plain JSON data. checks: what each test found: {"step", "loss": of training since the
    last test, "validation", "scores": percent by set}; of step 0, with zeros, if none came.
    parameters. steps, tokens, seconds: spent, padding and what nobody asks for not counted.
    diverged: the step whose loss or gradient was not finite, else None.
    """
    device = resolve_device(config.device)
    began = time.perf_counter()
    model = Logits(module).to(device).train()
    update = _Update(model, task, config, device)
    checks: list[dict[str, Any]] = []
    losses: list[float] = []
    step, tokens, diverged = 0, 0, None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        batches = _batches(task, config)
        while step < config.steps:
            batch = next(batches)
            loss = update(batch, step)
            step += 1
            tokens += int(batch.lengths.sum())
            if loss is None:
                diverged = step
                break
            losses.append(loss)
            if step % config.eval_every == 0 or step == config.steps:
                held, scores = (
                    _test(model, task, s, device) for s in (task.validation, task.tests)
                )
                loss = sum(losses) / len(losses)
                checks.append({"step": step, "loss": loss, "validation": held, "scores": scores})
                losses = []
                tell(step / config.steps, _line(held))
                if min(held.values()) >= config.stop:
                    break
    none = dict.fromkeys(task.tests, 0.0)
    untested = {"step": 0, "loss": 0.0, "validation": none, "scores": none}
    return {
        "checks": checks or [untested], "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step, "tokens": tokens, "seconds": round(time.perf_counter() - began, 2),
        "diverged": diverged,
    }  # fmt: skip


class _Update:
    """One optimizer step on a batch; on CUDA its forward and backward pass as one graph.

    Lengths are rounded up there, so that few graphs serve all batches.
    """

    def __init__(self, model: Logits, task: Task, config: FitConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.optimizer = adamw(model, config, device)
        recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
        self.captures = device.type == "cuda" and not recurrent
        self.pads = self.captures and task.causal
        self.graphs: dict[tuple[int, ...], Captured] = {}

    def __call__(self, batch: Examples, step: int) -> float | None:
        """The batch's loss, or None, and no update, where loss or gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.config, step)
        try:
            loss = float(self._gradients(batch))
        except ValueError as error:  # a layer met what the step before has made
            if _FLOOD in str(error):
                return None
            raise
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        self.optimizer.step()
        return loss

    def _gradients(self, batch: Examples) -> Tensor:
        inputs, targets = batch.inputs, batch.targets
        if self.pads:
            more = _shape(inputs.shape[1]) - inputs.shape[1]
            inputs, targets = F.pad(inputs, (0, more)), F.pad(targets, (0, more), value=IGNORED)
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if not self.captures or len(inputs) != self.config.batch:
            return self.run(inputs, targets)
        if (key := tuple(inputs.shape)) not in self.graphs:
            self.graphs[key] = Captured(self.model, self.run, inputs, targets)
        return self.graphs[key](inputs, targets)

    def run(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, with fresh gradients in `.grad`."""
        self.model.zero_grad()
        logits = self.model.logits(inputs).flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        return loss.detach()


def _shape(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def _test(
    model: Logits, task: Task, sets: Mapping[str, Examples], device: torch.device
) -> dict[str, float]:
    model.eval()
    try:
        return score(model, task, sets=sets, batch=TESTED, device=device)
    except ValueError as error:
        if _FLOOD not in str(error):
            raise
        return dict.fromkeys(task.tests, 0.0)  # on longer sequences than the trained ones
    finally:
        model.train()


def _line(scores: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.1f}" for name, value in scores.items())


def _rate(config: FitConfig, step: int) -> float:
    """The learning rate of the update after `step` others."""
    return config.lr * schedule(
        step, config.steps, config.warmup, kind=config.schedule, lands=False
    )


def _batches(task: Task, config: FitConfig) -> Iterator[Examples]:
    """Batches without end: every example once an epoch, those of like length together."""
    lengths, size = task.train.lengths, config.batch
    epoch = 0
    while True:
        rng = torch.Generator().manual_seed(keyed_seed(config.seed, epoch, 2))
        order = torch.randperm(len(task.train), generator=rng)
        pools = order.split(size * _POOL)
        cut = [part for pool in pools for part in pool[lengths[pool].argsort()].split(size)]
        for i in torch.randperm(len(cut), generator=rng).tolist():
            yield task.train.rows(cut[i])
        epoch += 1


def train_cell(
    cell: Cell, task: Task, tell: Tell, *, wrap: Callable[[Any, Task], nn.Module] | None = None
) -> dict[str, Any]:
    """Train and test one cell: what `fit` returns, metric and headline.

    cell: model, skeleton, fit (fields of FitConfig), lr, seed, device, and match (see `build`) if
    not True. wrap: makes of the model what answers the task, where that is not the model itself.
    """
    size = max(task.vocab, task.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell["seed"])
        model = build(cell["model"], size, cell["skeleton"], match=cell.get("match", True))
        module = wrap(model, task) if wrap else model
    own = {key: cell[key] for key in ("lr", "seed", "device")}
    out = fit(module, task, FitConfig(**cell["fit"], **own), tell)
    line = _line(out["checks"][-1]["validation"])
    if out["diverged"]:
        line += f", diverged at step {out['diverged']}"
    line += f" after {out['steps']} steps, {out['seconds']:.0f} s"
    return out | {"headline": line, "metric": f"{task.metric} accuracy (%)"}


def plan(cell: Cell, **own: Any) -> TrainConfig:
    """How a cell's language model trains. cell: steps, batch, lr, seed, device. own: what else."""
    return TrainConfig(
        **{key: cell[key] for key in ("steps", "batch", "lr", "seed", "device")},
        eval_every=cell["steps"], **own,
        dtype="bfloat16" if cell["device"].startswith("cuda") else "float32",
    )  # fmt: skip


def train_lm(
    model: nn.Module, corpus: Corpus, cell: Cell, tell: Tell, **own: Any
) -> tuple[list[dict[str, Any]], TrainConfig]:
    """Train a language model in place: its log, and how it trained. cell, own: as of `plan`."""
    config = plan(cell, **own)

    def on_step(r: dict[str, Any]) -> None:
        tell(r["step"] / config.steps, f"loss {r['loss']:.3f}, gradient norm {r['grad_norm']:.2f}")

    return train(model, corpus, config, None, progress=False, on_step=on_step), config


def settings(steps: int, quick: bool, **own: Any) -> dict[str, Any]:
    """The fit of a table's cell: fields of FitConfig, as most have them."""
    return {
        "steps": steps, "batch": 8 if quick else 32, "warmup": min(100, steps // 10),
        "schedule": "cosine", "weight_decay": 0.1, "eval_every": max(1, steps // 10),
        "stop": 99.9, **own,
    }  # fmt: skip
