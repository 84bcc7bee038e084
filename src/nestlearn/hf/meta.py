"""Training how a stacked model learns: its step sizes and start values, by what they lead to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestlearn import state as trees

from . import learning, reading
from .deltas import Deltas
from .plan import StackMemory
from .writes import Fast

GRAPHS = ("full", "first-order")
_SMALLEST = 1e-6  # a step size in training stays above it: its logarithm is what moves


@dataclass(frozen=True)
class MetaConfig:
    """How the step sizes (and start values) are trained.

    steps: of Adam. batch, length: streams read side by side, and their tokens; each begins at a
    random place, with a new memory. reach: tokens after which the outer gradient is cut off.
    lr: Adam's, for the logarithms of step sizes; start_lr: for start values, None to leave these
    alone. graph: "full", through the inner gradients, or "first-order", which takes them as
    constants. keep: the weight of the loss on a text that is not to be forgotten.
    """

    steps: int = 50
    batch: int = 4
    length: int = 512
    reach: int = 512
    lr: float = 0.05
    start_lr: float | None = None
    graph: str = "full"
    keep: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "reach"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if self.length < 2:
            raise ValueError(f"length={self.length}: give 2 tokens or more")
        if self.graph not in GRAPHS:
            raise ValueError(f"graph={self.graph!r}: use one of {GRAPHS}")
        if self.lr <= 0 or (self.start_lr is not None and self.start_lr <= 0) or self.keep < 0:
            raise ValueError("lr, start_lr and keep are positive numbers")


def train_stack(
    model: Deltas,
    ids: Tensor,
    config: MetaConfig | None = None,
    *,
    keep: Tensor | None = None,
    say: Callable[[int, float, float], None] | None = None,
) -> list[tuple[float, float]]:
    """Move the step sizes (one for each level and linear layer; momentum's θ, DGD's share, the
    nested start's share) and, by choice, the start values against the loss while learning.

    The outer loss is the mean −log p of each token, predicted before it is learned from, plus
    config.keep times the loss on `keep` under what was learned. ids [N]: a text's tokens; keep
    [M]: tokens of the kind that is not to be forgotten. say: called with the step and both losses.

    Returns both losses of every step. The trained values are in the model (`save_stack` keeps
    them); memories from before do not fit new start values. ValueError for a text that is too
    short.
    """
    config = config or MetaConfig()
    for name, text in (("ids", ids), ("keep", keep)):
        if text is not None and (text.ndim != 1 or len(text) < config.length):
            raise ValueError(
                f"{name} is {list(text.shape)}: pass one stream of {config.length} tokens or more"
            )
    if config.start_lr is not None and not len(model.starts):
        add_starts(model)
    rates = rate_parameters(model)
    starts = list(model.starts) if config.start_lr is not None else []
    logs = [nn.Parameter(rate.detach().clamp(min=_SMALLEST).log()) for rate in rates]
    groups = [{"params": logs, "lr": config.lr}]
    if starts:
        groups.append({"params": starts, "lr": config.start_lr or 0.0})
    adam = torch.optim.Adam(groups)
    draw = torch.Generator().manual_seed(config.seed)
    history = []
    for parameter in (*rates, *starts):
        parameter.requires_grad_(True)
    try:
        for step in range(config.steps):
            windows = _windows(ids, config, draw).to(rates[0].device)
            kept = None if keep is None else _windows(keep, config, draw).to(rates[0].device)
            history.append(_step(model, windows, kept, config, adam, logs, rates))
            if say is not None:
                say(step + 1, *history[-1])
    finally:
        for parameter in (*rates, *starts):
            parameter.requires_grad_(False).grad = None
    return history


def _step(model, windows, kept, config, adam, logs, rates) -> tuple[float, float]:
    memory: StackMemory | None = None
    learned, forgot = 0.0, 0.0
    pieces = windows.split(config.reach, 1)
    for piece in pieces:
        loss, memory = learning.unroll(model, piece, memory, graph=config.graph)
        total = loss[~loss.isnan()].sum() / (windows.numel() - len(windows))
        learned += float(total.detach())
        if kept is not None and config.keep:
            with torch.enable_grad():
                own = reading.losses(model, kept, memory)[:, 1:].mean() / len(pieces)
            forgot += float(own.detach())
            total = total + config.keep * own
        total.backward()
        memory = trees.detach(memory)
    with torch.no_grad():
        for log, rate in zip(logs, rates):
            log.grad = torch.zeros_like(log) if rate.grad is None else rate.grad * rate
            rate.grad = None
    adam.step()
    adam.zero_grad()
    with torch.no_grad():
        for log, rate in zip(logs, rates):
            rate.copy_(log.exp())
    return learned, forgot


def rate_parameters(model: Deltas) -> list[nn.Parameter]:
    """The parameters that say how the levels learn, of the levels that do."""
    found = []
    for i in model.config.faster_first():
        found.append(model.lr[i])
        rule = model.config.levels[i].rule
        found += [model.theta[i]] if rule == "momentum" else []
        found += [model.forget[i]] if rule == "dgd" else []
        nested = model.config.variant == "nested" and model.parents[i] is not None
        found += [model.meta_lr[i]] if nested else []
    return found


def add_starts(model: Deltas) -> None:
    """Give the levels start values of their own, which are zero until they are trained."""
    each: list[Fast] = [model.start(i, 1) for i in range(len(model.config.levels))]
    flat = [w for fast in each for factors in fast for w in factors if w is not None]
    model.starts.extend(nn.Parameter(w.clone(), requires_grad=False) for w in flat)


def _windows(text: Tensor, config: MetaConfig, draw: torch.Generator) -> Tensor:
    """Windows [batch, length] from random places of a stream [N]."""
    at = torch.randint(0, len(text) - config.length + 1, (config.batch, 1), generator=draw)
    return text.cpu()[at + torch.arange(config.length)]
