"""What a memory is trained on: the inner objective L(M(k); v) and its error signal (eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """An inner objective as its value and its error signal δ = ∂L/∂y.

    `value(y, v)` maps [..., V] and [..., V] to [...]; `error(y, v)` to [..., V]. The target `v` is
    a constant of the inner gradient; outer gradients flow through it.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]


dot_product = Objective(
    "dot",  # L = −⟨y, v⟩: with the delta rule, eq. 88 is then the gated delta rule
    value=lambda y, v: -(y * v).sum(-1),
    error=lambda y, v: -v,
)

l2 = Objective(
    "l2",  # L = ½ ‖y − v‖²
    value=lambda y, v: 0.5 * (y - v).square().sum(-1),
    error=lambda y, v: y - v,
)

_BY_NAME = {o.name: o for o in (dot_product, l2)}


def objective(spec: str | Objective) -> Objective:
    """The objective of that name ("dot" or "l2"), or `spec` itself if it is one already."""
    if isinstance(spec, Objective):
        return spec
    if spec not in _BY_NAME:
        raise ValueError(f"objective {spec!r} is unknown: use one of {sorted(_BY_NAME)}")
    return _BY_NAME[spec]
