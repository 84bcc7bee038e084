"""What `fused` does with rows [*b, T, d]: scalars that scale them, products added in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.memories import ACTIVATIONS, Matrix, ResidualMLP
from ..memory.rules import GradientRule


class Scalars:
    """A chunk's scalars, each shaped to scale what it acts on: rows [*b, T, 1] or pairs [*b, T, T].

    gamma, ratio: γ_t and Γ_ts. found, faded_by: the same one token earlier. left: Γ_Ts.
    """

    def __init__(self, eta: Tensor, log_alpha: Tensor | None, *decays: Tensor):
        """decays: gamma and ratio, if they are known."""
        self.eta = eta.unsqueeze(-1)
        if decays:
            self.gamma, self.ratio = decays
        elif log_alpha is None:
            ones = eta.new_ones(eta.shape[-1:] * 2)
            self.gamma, self.ratio = ones[0].unsqueeze(-1), ones.tril()
        else:
            total = log_alpha.cumsum(-1)
            self.gamma = total.exp().unsqueeze(-1)
            # no gradient comes this way, so what overflows above the diagonal may be cut off after
            self.ratio = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp_().tril_()
        self.found = F.pad(self.gamma[..., :-1, :], (0, 0, 1, 0), value=1.0)
        self.left = self.ratio[..., -1, :].unsqueeze(-1)

    @property
    def faded_by(self) -> Tensor:
        return F.pad(self.ratio[..., :-1, :], (0, 0, 1, 0))

    def fade_(self, pairs: Tensor) -> Tensor:
        """pairs ∘ faded_by, in place."""
        pairs[..., 1:, :].mul_(self.ratio[..., :-1, :])
        pairs[..., 0, :] = 0.0
        return pairs


def nonlinearity(memory: Matrix | ResidualMLP) -> tuple[Any, float, bool]:
    if isinstance(memory, Matrix):
        return None, 1.0, False
    return ACTIVATIONS[memory.activation], memory.gain, memory.residual


def steps(eta: Tensor, x: Tensor, rule: GradientRule) -> tuple[Tensor, Tensor]:
    """Step sizes [*b, T, 1] of the delta term and of the gradient."""
    if not (rule.delta or rule.normalize):
        return eta, eta
    r = eta / x.square().sum(-1, keepdim=True).clamp(min=1.0)
    return r, r if rule.normalize else eta


def head(rows: Tensor, T: int) -> Tensor:
    """The first T rows: those of the keys."""
    return rows if rows.shape[-2] == T else rows.narrow(-2, 0, T)


def stacked(rows: list[Tensor]) -> Tensor:
    """Rows [*b, T, d] one after the other, leading axes broadcast."""
    if len(rows) == 1:
        return rows[0]
    lead = torch.broadcast_shapes(*(a.shape[:-2] for a in rows))
    return torch.cat([a.expand(*lead, *a.shape[-2:]) for a in rows], -2)


def one(x: Tensor, reader: int | None, tail: int = 2) -> Tensor:
    """The reader's part along the last leading axis, where `tail` axes follow it."""
    if reader is None:
        return x
    axis = x.ndim - tail - 1
    if axis < 0:
        return x
    return x.select(axis, reader if x.shape[axis] > 1 else 0)


def plus(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + a @ b, in one pass where no axis is broadcast."""
    lead = base.shape[:-2]
    if not (len(lead) and a.shape[:-2] == lead == b.shape[:-2]):
        return base + a @ b
    sum_ = torch.baddbmm(base.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3))
    return sum_.view(*lead, *sum_.shape[-2:])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without forming the product where no axis is broadcast."""
    lead = total.shape[:-2]
    if total.is_contiguous() and len(lead) and a.shape[:-2] == lead == b.shape[:-2]:
        total.view(-1, *total.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    else:
        total += (a @ b).sum_to_size(total.shape)


def add(total: Tensor, part: Tensor) -> None:
    """total += part, summed over the axes that total shares."""
    total += part.sum_to_size(total.shape)


def split(tensors: list, *sizes: int) -> list[list]:
    """The list in parts of these lengths."""
    parts = []
    for size in sizes:
        parts.append(list(tensors[:size]))
        tensors = tensors[size:]
    return parts
