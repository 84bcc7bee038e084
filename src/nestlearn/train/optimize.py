"""What every training shares: the schedule, AdamW, and a step captured as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Rates(Protocol):
    """What AdamW takes of a configuration."""

    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def betas(self) -> tuple[float, float]: ...


def schedule(
    step: int,
    steps: int,
    warmup: int,
    *,
    kind: str = "cosine",
    final: float = 0.0,
    lands: bool = True,
) -> float:
    """Return the share of the peak rate in the update after `step` others.

    Linear to 1 in `warmup` steps; then 1 ("constant") or along a cosine to `final`, which the last
    of the `steps` updates has (lands) or the one after it would have.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = (step + lands - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(model: nn.Module, config: Rates, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with decay on matrices only."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not getattr(parameter, "no_decay", False)
            (decayed if matrix else plain).append(parameter)
    if not decayed and not plain:
        raise ValueError("the model has no trainable parameters; set requires_grad on some")
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


class Captured:
    """Forward and backward pass for one shape of input, captured once and replayed as one graph.

    A memory's chunk is some hundred small kernels, which take longer to launch from Python than to
    run. run(*inputs) -> loss, with fresh gradients in `.grad`: this graph's own, which a replay
    puts back. first: what is run, twice, before the capture (default: run).
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., Tensor],
        *inputs: Tensor,
        first: Callable[..., object] | None = None,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at the first call is made outside the graph
            for _ in range(2):
                (first or run)(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run(*self.inputs)
        self.gradients = [(p, p.grad) for p in model.parameters()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the loss of these inputs."""
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss
