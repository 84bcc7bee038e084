"""What a piece's loss says to each layer that learns; to say nothing is an error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestlearn.layers.streaming import wide

from .deltas import Deltas
from .lending import Factors, Weights
from .writes import Fast


def leaves(fast: Fast, graph: str | None) -> Fast:
    """Names of their own for the deltas as this piece reads them: what earlier pieces left in the
    cache is a constant of the inner gradient, though not of the outer one.
    """
    own = lambda w: (  # noqa: E731
        w.view_as(w) if graph and w.requires_grad else w.detach().requires_grad_()
    )
    return tuple(Factors(own(a), None if b is None else own(b)) for a, b in fast)


def shared_gradients(
    model: Deltas, total: Tensor, weights: Weights, active: list[int]
) -> dict[int, Fast]:
    """Of full deltas: one gradient for each layer, which all active levels of it have."""
    numbers = sorted({j for i in active for j in model.owned[i]})
    bases = [base for j in numbers if (base := weights[model.layers[j]].base) is not None]
    grads = _grad(model, total, bases, numbers)
    factors = {j: Factors(wide(g)) for j, g in zip(numbers, grads)}
    return {i: tuple(factors[j] for j in model.owned[i]) for i in active}


def gradients(
    model: Deltas, total: Tensor, own: dict[int, Fast], graph: str | None
) -> dict[int, Fast]:
    """The gradient in each level's own deltas; with graph "full" it can be differentiated."""
    flat = [w for fast in own.values() for factors in fast for w in factors if w is not None]
    places = [
        j for i, fast in own.items() for j, factors in zip(model.owned[i], fast)
        for w in factors if w is not None
    ]  # fmt: skip
    grads = iter(
        _grad(
            model, total, flat, places,
            create=graph == "full", retain=graph is not None,
        )
    )  # fmt: skip
    return {
        i: tuple(Factors(next(grads), None if b is None else next(grads)) for _, b in fast)
        for i, fast in own.items()
    }


def _grad(
    model: Deltas,
    total: Tensor,
    leaves: list[Tensor],
    places: list[int],
    *,
    create: bool = False,
    retain: bool = False,
) -> tuple[Tensor, ...]:
    """The gradients of the leaves, which are of the layers in `places`; ValueError, naming the
    first, for a layer that the loss does not depend on.
    """
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(
            total, leaves, allow_unused=True, create_graph=create, retain_graph=retain
        )
    for j, gradient in zip(places, found):
        if gradient is None:
            raise ValueError(
                f"{model.paths[model.layers[j]]} gets no gradient, so it cannot learn: something "
                "computes past it, or without gradients; undo that, or stack the model anew"
            )
    return tuple(g for g in found if g is not None)


def constant(inputs: dict[nn.Module, Tensor], graph: str | None) -> dict[nn.Module, Tensor]:
    """The layers' inputs, apart from the graph unless that goes through the inner gradients."""
    return inputs if graph == "full" else {layer: x.detach() for layer, x in inputs.items()}
