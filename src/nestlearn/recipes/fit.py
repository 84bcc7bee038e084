"""One supervised training loop for the benchmarks' fixed training sets.

Batches are keyed by (seed, epoch); sequences of like length share a batch, so that little padding
is computed. A loss that is not finite ends the run with a mark, not with an exception: in a table
a model that diverges is a result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.evals import IGNORED, Examples, Logits, Task, score
from nestlearn.train.data import keyed_seed
from nestlearn.train.run import resolve_device

_SCHEDULES = ("constant", "cosine")
_POOL = 16  # batches whose sequences are sorted by length together
_FLOOD = "x has NaN or infinity"  # how layers begin their complaint about such an input


@dataclass(frozen=True)
class FitConfig:
    """How to train: AdamW, a linear warm-up, then lr constant or to zero along a cosine.

    steps: optimizer steps. batch: sequences of a step. warmup: steps of the linear rise. clip: the
    largest gradient norm. smoothing: of the labels, by which a loss does not vanish where all is
    right. weight_decay: on matrices only. eval_every: steps between two tests on
    all test sets. stop: percent at which, on every test set, training ends early. eval_batch:
    sequences of a test batch. device: as for `nestlearn train`.
    """

    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    smoothing: float = 0.0
    eval_every: int = 200
    eval_batch: int = 128
    stop: float = 100.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every", "eval_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: give a positive learning rate, e.g. 1e-3")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: give 0 steps or more")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: use one of {_SCHEDULES}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing}: give a share in [0, 1)")
        if self.clip <= 0:
            raise ValueError(f"clip={self.clip}: give a positive norm (math.inf: no clipping)")


@dataclass(frozen=True)
class Outcome:
    """What a training came to, as plain data.

    best, last: percent by test set, at the step with the best mean and at the end. best_step: of
    the former; 0 if never tested. curve: [step, training loss since the last test, scores] for each
    test. steps, tokens, seconds: spent, padding and what nobody asks for not counted. diverged: the
    step whose loss or gradient was not finite, else None.
    """

    best: dict[str, float]
    last: dict[str, float]
    best_step: int
    curve: list[list[Any]]
    parameters: int
    steps: int
    tokens: int
    seconds: float
    diverged: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


def fit(
    module: nn.Module,
    task: Task,
    config: FitConfig,
    tell: Callable[[float, str], None] | None = None,
) -> Outcome:
    """Train the module in place on the task, testing it as it goes.

    module: ids [B, T] -> logits [B, T, V ≥ classes], alone or first of a tuple. tell: called with
    (share done, text) at every test. Afterwards the weights are those of the last step.
    """
    device = resolve_device(config.device)
    began = time.perf_counter()
    model = Logits(module).to(device).train()
    update = _Update(model, task, config, device)
    untested = dict.fromkeys(task.tests, 0.0)
    tests: list[tuple[int, float, dict[str, float]]] = []
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
                scores = _test(model, task, config, device)
                tests.append((step, sum(losses) / len(losses), scores))
                losses = []
                if tell:
                    tell(step / config.steps, " ".join(f"{k} {v:.1f}" for k, v in scores.items()))
                if min(scores.values()) >= config.stop:
                    break
    best = max(tests, key=lambda test: sum(test[2].values()), default=(0, 0.0, untested))
    return Outcome(
        best=best[2],
        last=tests[-1][2] if tests else untested,
        best_step=best[0],
        curve=[list(test) for test in tests],
        parameters=sum(p.numel() for p in model.parameters()),
        steps=step,
        tokens=tokens,
        seconds=round(time.perf_counter() - began, 2),
        diverged=diverged,
    )


class _Update:
    """One optimizer step on a batch; on CUDA its forward and backward pass as one graph.

    A memory's chunk is some hundred small kernels, which take longer to launch than to run. Lengths
    are rounded up there, so that few graphs serve all batches.
    """

    def __init__(self, model: Logits, task: Task, config: FitConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.optimizer = _adamw(model, config)
        recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
        self.captures = device.type == "cuda" and not recurrent
        self.pads = self.captures and task.causal
        self.graphs: dict[tuple[int, ...], _Graph] = {}

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
            self.graphs[key] = _Graph(self, inputs, targets)
        return self.graphs[key].replay(inputs, targets)

    def run(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, with fresh gradients in `.grad`."""
        for parameter in self.model.parameters():
            parameter.grad = None
        logits = self.model.logits(inputs).flatten(0, 1).float()
        loss = F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=self.config.smoothing
        )
        loss.backward()
        return loss.detach()


class _Graph:
    """Forward and backward pass for one shape of batch, captured, with gradients of its own."""

    def __init__(self, update: _Update, inputs: Tensor, targets: Tensor) -> None:
        self.parameters = list(update.model.parameters())
        self.inputs, self.targets = inputs.clone(), targets.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at the first call is made outside the graph
            for _ in range(2):
                update.run(self.inputs, self.targets)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = update.run(self.inputs, self.targets)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return self.loss


def _shape(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def _test(model: Logits, task: Task, config: FitConfig, device: torch.device) -> dict[str, float]:
    model.eval()
    try:
        return score(model, task, batch=config.eval_batch, device=device)
    except ValueError as error:
        if _FLOOD not in str(error):
            raise
        return dict.fromkeys(task.tests, 0.0)  # on longer sequences than the trained ones
    finally:
        model.train()


def _adamw(model: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _rate(config: FitConfig, step: int) -> float:
    """The learning rate of the update after `step` others."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = 1.0
    if config.schedule == "cosine":
        done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * warm * left


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
