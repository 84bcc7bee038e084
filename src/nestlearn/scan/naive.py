"""The definition: one chunk, token by token, with the inner gradient taken by autograd.

Everything faster in this room is tested against this file, which is tested against the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.memories import Memory, Weights
from ..memory.objectives import Objective
from ..memory.rules import Gates, Gradient, GradientRule, Rule


def update(
    memory: Memory,
    rule: Rule,
    W: Weights,
    S,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    at: Weights,
    objective: Objective,
    read: str,
    offset: int,
    first_order: bool = False,
    reader: int | None = None,
):
    """See `nestlearn.scan.update`."""

    origin = tuple(w.detach() for w in at) if first_order else at

    def grad(k: Tensor, v: Tensor) -> Gradient:
        return inner_gradient(memory, origin, k, v, objective)

    period = rule.period if isinstance(rule, GradientRule) else 1
    outputs = []
    for t in range(k.shape[-2]):
        due = (offset + t + 1) % period == 0
        W, S = rule.step(W, S, grad, k[..., t, :], v[..., t, :], gates.at(t), due)
        if q is not None:
            seen = W if read == "token" else at
            if reader is not None:
                seen = tuple(w.select(k.ndim - 3, reader) for w in seen)
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
