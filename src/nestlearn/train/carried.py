"""A memory that is carried from step to step: rows of a batch read on where they were."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nestlearn import state as tree
from nestlearn.scan import Writer
from nestlearn.train.config import TrainConfig
from nestlearn.train.losses import evaluating
from nestlearn.train.ranks import ALONE, Ranks


class Carried:
    """What every row's memory holds from step to step, and what a step makes of it.

    state: tensors [batch, ...], always the same ones, written in place: a CUDA graph and a
    checkpoint that is loaded find them there. They are data, no part of a graph of gradients.
    A rank has its own rows of the batch alone.
    """

    def __init__(self, model: Any, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        _check_carries(model, config)
        self.model = model
        self.rows = ranks.rows(config.batch)
        count = self.rows.stop - self.rows.start
        with torch.no_grad():  # clones: two leaves of a first state may be one tensor
            self.state = tree.tree_map(torch.clone, model.init_state(count))
        device = next(model.parameters()).device
        self._anew = torch.ones(count, dtype=torch.bool, device=device)

    def starts(self, anew: torch.Tensor) -> None:
        """Say which rows of the batch start anew at the next step, bool [batch]."""
        self._anew.copy_(anew[self.rows])

    def given(self, rows: slice = slice(None)) -> Any:
        """Return the state that these rows begin with, differentiable in the start values."""
        anew = self._anew[rows]

        def begin(fresh: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():  # a choice, no factor: a row that starts anew takes nothing over
                value = torch.where(anew.view(-1, *[1] * (fresh.ndim - 1)), fresh, carried[rows])
            if not fresh.is_floating_point():
                return value
            return value + (fresh - fresh.detach())  # a zero with the start value's gradient

        return tree.tree_map(begin, self.model.init_state(len(anew)), self.state)

    def take(self, state: Any, rows: slice = slice(None)) -> None:
        """Carry the state that the step ended with in these rows."""
        with torch.no_grad():
            tree.tree_map(lambda mine, new: mine[rows].copy_(new), self.state, state)


def _check_carries(model: nn.Module, config: TrainConfig) -> None:
    """Refuse, by ValueError, a model whose memory cannot be carried, and a length that cuts it."""
    given = f"stream={config.stream}"
    if not hasattr(model, "init_state"):
        raise ValueError(f"{given}: {type(model).__name__} has no init_state(batch); use stream=1")
    before, after = _shapes_around_a_token(model)
    for path, shape in before.items():
        if after.get(path) != shape:
            raise ValueError(
                f"{given}: the model's state grows with the stream (state.{path} has shape {shape} "
                f"before a token and {after.get(path)} after it), as attention's cache does, and "
                "is not carried from step to step; use stream=1, or a mixer with a memory of fixed "
                "size"
            )
    # A step begins at position 0 again, so it has to end where every chunk and bound does.
    period = math.lcm(*_periods(model))
    if config.length % period:
        raise ValueError(
            f"length={config.length}: with {given} give a multiple of {period}, so that every "
            "window ends where the chunks, bounds and fades of the model's memories do"
        )


def _shapes_around_a_token(model: Any) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the state's tensors before and after one token."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        before = model.init_state(1)
        _, after = model(torch.zeros(1, 1, dtype=torch.int64, device=device), state=before)
    return [
        {path: tuple(x.shape) for path, x in tree.leaves(state) if isinstance(x, torch.Tensor)}
        for state in (before, after)
    ]


def _periods(model: nn.Module) -> list[int]:
    """After how many tokens each memory of the model is at a chunk's end, its bound, its fade."""
    writers, fades = [], []
    for module in model.modules():
        fades.append(getattr(module, "fade_every", None) or 1)
        groups = getattr(module, "groups", ())  # a number in a convolution of torch
        parts = (module, *groups) if isinstance(groups, tuple) else (module,)
        writers += [getattr(part, "writer", None) for part in parts]
    known = [writer for writer in writers if isinstance(writer, Writer)]
    ends = [w.chunk if w.bound is None else w.bounded for w in known]
    return [*ends, *fades, *(w.chunk if w.half_life is None else w.fades for w in known)]
