"""What a piece's loss says to each layer that learns; to say nothing is an error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestlearn.layers.streaming import wide

from .deltas import Deltas
from .lending import Effective, Factors
from .writes import Fast, approximate


class Sought:
    """The weights to compute a loss with, so that `gradients` finds what it says to the levels.

    graph: None; "full", gradients that can be differentiated themselves; "first-order", constants
    of a graph that goes on.
    """

    def __init__(self, model: Deltas, fasts: dict[int, Fast], active: list[int], graph: str | None):
        self.model, self.active, self.graph = model, active, graph
        self.numbers = sorted({j for i in active for j in model.owned[i]})
        self.own: dict[int, Fast] = {}
        if model.config.rank is not None:
            self.weights = model.effective(fasts, tapped=True)
        elif graph is None:  # a delta's gradient is that of the sum that it is in
            self.weights = model.effective(fasts)
            for lent in self.weights.values():
                assert lent.base is not None
                lent.base.requires_grad_()
        else:
            self.own = {i: _leaves(fasts[i]) for i in active}
            self.weights = model.effective({**fasts, **self.own})

    def gradients(self, total: Tensor) -> dict[int, Fast]:
        """For each active level the gradient in the deltas of each of its layers."""
        if self.own:
            owned = self.model.owned
            places = [j for i in self.own for j in owned[i]]
            grads = iter(self._grad(total, [w.left for f in self.own.values() for w in f], places))
            return {i: tuple(Factors(next(grads)) for _ in fast) for i, fast in self.own.items()}
        if self.model.config.rank is not None:
            found = self._low_rank(total, self.model.config.rank)
        else:
            bases = [b for j in self.numbers if (b := self._lent(j).base) is not None]
            grads = iter(self._grad(total, bases, self.numbers))
            found = {j: Factors(wide(next(grads))) for j in self.numbers}
        return {i: tuple(found[j] for j in self.model.owned[i]) for i in self.active}

    def _low_rank(self, total: Tensor, rank: int) -> dict[int, Factors]:
        """Of what each layer has taken in, and of the loss's gradients in what it gave."""
        batch = len(self._lent(self.numbers[0]).added[0].left)
        runs = [(j, x, y) for j in self.numbers for x, y in self._lent(j).taps or ()]
        silent = set(self.numbers) - {j for j, *_ in runs}
        if silent:
            raise _no_gradient(self.model, min(silent))
        errors = self._grad(total, [y for *_, y in runs], [j for j, *_ in runs])
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {j: [] for j in self.numbers}
        for (j, x, _), error in zip(runs, errors):
            x = x if self.graph == "full" else x.detach()
            rows = [wide(t).reshape(batch, -1, t.shape[-1]) for t in (error, x)]
            pairs[j].append((rows[0], rows[1]))
        return dict(zip(pairs, approximate(list(pairs.values()), rank)))

    def _lent(self, j: int) -> Effective:
        return self.weights[self.model.layers[j]]

    def _grad(self, total: Tensor, leaves: list[Tensor], places: list[int]) -> tuple[Tensor, ...]:
        """The gradients of the leaves, which are of the layers in `places`; ValueError, naming
        the first, for a layer that the loss does not depend on.
        """
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if total.requires_grad:
            found = torch.autograd.grad(
                total, leaves, allow_unused=True,
                create_graph=self.graph == "full", retain_graph=self.graph is not None,
            )  # fmt: skip
        for j, gradient in zip(places, found):
            if gradient is None:
                raise _no_gradient(self.model, j)
        return tuple(g for g in found if g is not None)


def _leaves(fast: Fast) -> Fast:
    """Names of their own for the deltas as this piece reads them: what earlier pieces left in the
    cache is a constant of the inner gradient, though not of the outer one.
    """
    return tuple(
        Factors(w.view_as(w) if w.requires_grad else w.detach().requires_grad_()) for w, _ in fast
    )


def _no_gradient(model: Deltas, j: int) -> ValueError:
    return ValueError(
        f"{model.paths[model.layers[j]]} gets no gradient, so it cannot learn: something "
        "computes past it, or without gradients; undo that, or stack the model anew"
    )


def constant(inputs: dict[nn.Module, Tensor], graph: str | None) -> dict[nn.Module, Tensor]:
    """The layers' inputs, apart from the graph unless that goes through the inner gradients."""
    return inputs if graph == "full" else {layer: x.detach() for layer, x in inputs.items()}
