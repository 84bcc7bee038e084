"""How to train, and the learning rate that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nestlearn.train.optimize import schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARALLEL = ("auto", "ddp", "fsdp")
_COUNTS = (
    "steps", "batch", "length", "stream", "eval_every", "eval_windows", "checkpoint_every",
    "accumulate",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warmup, cosine decay, clipped gradients.

    steps: optimizer steps. batch, length: windows per step and tokens per window. lr: the peak;
    warmup: steps of the linear rise to it; final_lr: the share of lr at the last step.
    weight_decay: on matrices only (ndim >= 2, without `no_decay = True`). clip: the largest
    gradient norm. eval_every, checkpoint_every: in steps; the last step always does both.
    dtype: "float32", or "bfloat16" (autocast; weights stay float32). device: "auto" is CUDA
    where there is one, else Apple's GPU where it works, else the CPU. cuda_graph: on CUDA, capture
    a step's forward and backward.
    stream: windows that a row of the batch reads one after another with the model's memory carried
    from step to step, before it starts anew elsewhere (1: every window starts anew). So a model
    learns to go on in streams much longer than its windows. The gradient stays within a step: what
    was carried is data, and start values learn as if the memory were theirs plus a constant. Rows
    start anew at different steps; validation reads every window from the start.
    stream_from: steps in which every window starts anew all the same, before streams are carried.
    accumulate: parts that a step's batch is read in, one after another, for want of memory.
    parallel: with several processes, "ddp" (each holds the whole model), "fsdp" (each a part of it)
    or "auto" (ddp, unless that would fill half of a card). profile: trace a few steps. batch is
    that of all processes together: it, and not their number, says what a step is.
    """

    steps: int = 500
    batch: int = 8
    length: int = 256
    lr: float = 3e-3
    warmup: int = 50
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_every: int = 100
    eval_windows: int = 16
    checkpoint_every: int = 100
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    cuda_graph: bool = True
    stream: int = 1
    stream_from: int = 0
    accumulate: int = 1
    parallel: str = "auto"
    profile: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "an integer of 1 or more")
        later = "0 or more steps, with a stream of more than 1 window"
        ok = self.stream_from >= 0 and (self.stream > 1 or not self.stream_from)
        require(ok, "stream_from", self.stream_from, later)
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more steps")
        shorter = f"at most steps={self.steps}, e.g. warmup={self.steps // 10}"
        require(self.warmup <= self.steps, "warmup", self.warmup, shorter)
        require(0 < self.lr < math.inf, "lr", self.lr, "a positive learning rate, e.g. 3e-3")
        require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "a share of lr, from 0 to 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        betas_ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(betas_ok, "betas", self.betas, "two numbers from 0 to below 1")
        require(self.clip > 0, "clip", self.clip, "a positive norm (math.inf: no clipping)")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        ways = ", ".join(PARALLEL)
        require(self.parallel in PARALLEL, "parallel", self.parallel, f"one of {ways}")
        parts = f"a multiple of accumulate={self.accumulate}"
        require(self.batch % self.accumulate == 0, "batch", self.batch, parts)


def require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: choose {remedy}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of the update after `step` others: linear to lr, then cosine to the end."""
    return config.lr * schedule(step, config.steps, config.warmup, final=config.final_lr)
