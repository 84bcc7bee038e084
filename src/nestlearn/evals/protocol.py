"""The door for models: `logits(ids)`, and one adapter for what models usually return."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Scorable(Protocol):
    """Anything with `logits(ids int64 [B, T]) -> [B, T, V]`, causal unless the task says so."""

    def logits(self, ids: Tensor) -> Tensor:
        """Scores of the classes at every position."""
        ...


class Logits(nn.Module):
    """A module that returns logits, (logits, state, ...) or an object with `.logits`, as Scorable.

    So a plain nn.Module, `nestlearn.HopeLM` and a Hugging Face causal LM enter alike.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def logits(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> [B, T, V]; ValueError if the module returns no such thing."""
        out: Any = self.module(ids)
        out = getattr(out, "logits", out)
        out = out[0] if isinstance(out, tuple) else out
        if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != ids.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.module).__name__} returned {got} for ids {tuple(ids.shape)}: return "
                "logits [B, T, V], alone, first of a tuple, or as .logits"
            )
        return out

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)


@torch.no_grad()
def predict(model: Scorable, ids: Tensor, classes: int) -> Tensor:
    """The likeliest of the first `classes` classes at each position: int64 [B, T]."""
    return model.logits(ids)[..., :classes].argmax(-1)
