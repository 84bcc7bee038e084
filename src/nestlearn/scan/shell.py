"""The shell that a bound keeps matrices in, as operations in place with a backward of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.linalg import frobenius

_EPS = 1e-12


def into_shell_(W: Tensor, start: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Scale W [*b, m, n] so that its Frobenius norm is between low and high times `start`, that of
    its start value [..., 1, 1]: the norm that it had, and the one that it has.
    """
    norm = frobenius(W)
    size = norm.clamp(min=low * start, max=high * start)
    if not _free(norm, size):
        W.mul_(size / norm.clamp(min=_EPS))
    return norm, size


def out_of_shell_(
    W: Tensor, dW: Tensor, norm: Tensor, size: Tensor, start: Tensor, low: float, high: float
) -> Tensor:
    """From the gradient of W as `into_shell_` left it to that of W before, in place; that of start,
    for each W.
    """
    if _free(norm, size):
        return torch.zeros_like(norm)
    # y = c W/n: dW = c/n (dy − ŷ⟨ŷ, dy⟩) and dc = ⟨ŷ, dy⟩ where n is outside, else dW = dy.
    under, over = norm < low * start, norm > high * start
    size = size.clamp(min=_EPS)
    along = (W * dW).sum((-2, -1), keepdim=True) / size
    scale = size / norm.clamp(min=_EPS)
    pull = torch.where(under | over, -scale * along / size, 0.0)
    dW.mul_(scale).addcmul_(pull.expand_as(W), W)
    return torch.where(under, low * along, torch.where(over, high * along, 0.0))


def _free(norm: Tensor, size: Tensor) -> bool:
    """Whether all are known to be inside: on a CPU, where to ask costs nothing."""
    return norm.device.type == "cpu" and not torch.compiler.is_compiling() and norm.equal(size)
