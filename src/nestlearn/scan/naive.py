"""The definition: one chunk, token by token, with the inner gradient taken by autograd.

Everything faster in this room is tested against this file, which is tested against the equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory.memories import Memory, Weights
from ..memory.objectives import Objective
from ..memory.rules import Gates, Gradient, GradientRule
from .chunk import Chunk, Given


def why_not(chunk: Chunk, given: Given) -> None:
    """It runs everything."""


def options() -> dict[str, Any]:
    """It needs nothing to be told."""
    return {}


def update(
    chunk: Chunk,
    W: Weights,
    S,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    at: Weights,
    offset: int,
):
    """See `nestlearn.scan.update`."""
    memory, rule = chunk.memory, chunk.rule
    if chunk.makes_values:
        v = memory.read(at, v)
    origin = tuple(w.detach() for w in at) if chunk.first_order else at

    def grad(k: Tensor, v: Tensor) -> Gradient:
        return inner_gradient(memory, origin, k, v, chunk.aim)

    period = rule.period if isinstance(rule, GradientRule) else 1
    outputs = []
    for t in range(k.shape[-2]):
        due = (offset + t + 1) % period == 0
        W, S = rule.step(W, S, grad, k[..., t, :], v[..., t, :], gates.at(t), due)
        if q is not None:
            seen = W if chunk.read == "token" else at
            if chunk.answering is not None:
                seen = tuple(w.select(k.ndim - 3, chunk.answering) for w in seen)
            outputs.append(memory.read(seen, q[..., t : t + 1, :]))
    return torch.cat(outputs, -2) if q is not None else None, W, S


def inner_gradient(
    memory: Memory, W: Weights, k: Tensor, v: Tensor, objective: Objective
) -> Gradient:
    """∂L(M(k); v)/∂W of one token, k [*b, K], v [*b, V]; differentiable once more.

    The weights are aliased first: v may have been read from the same weights, and for the inner
    gradient it is a constant.
    """
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = tuple(w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in W)
        y = memory.read(alias, k.unsqueeze(-2)).squeeze(-2)
        loss = objective.value(y, v).sum()
        dW = torch.autograd.grad(loss, alias, create_graph=outer)
    inputs = getattr(memory, "inputs", None)
    return Gradient(
        tuple(dW),
        None if inputs is None else tuple(x.squeeze(-2) for x in inputs(W, k.unsqueeze(-2))),
    )
