"""The few pieces of linear algebra that memories and rules share."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_EPS = 1e-12


def unit(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """x / ‖x‖ along the last axis; a zero vector stays zero, its gradient finite but large.

    The norm is taken in float32 at least: in float16 the square of a small vector is zero.
    """
    return _Unit.apply(x) if torch.is_grad_enabled() else unit_with_norm(x)[0].to(x.dtype)


def unit_with_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / ‖x‖ and ‖x‖, wide."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = (wide.square().sum(-1, keepdim=True) + _EPS).sqrt()
    return wide / norm, norm


class _Unit(torch.autograd.Function):
    """y = x / n has dx = (dy − y ⟨y, dy⟩) / n: a third of the passes that autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, norm = unit_with_norm(x)
        ctx.save_for_backward(y, norm)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, norm = ctx.saved_tensors
        return through_unit(y, norm, dy.to(y.dtype)).to(dy.dtype)


def through_unit(y: Tensor, norm: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x from that of y = x / ‖x‖."""
    along = (y * dy).sum(-1, keepdim=True)
    return dy.addcmul(y, along, value=-1).div_(norm)


def decay_products(
    total: Float[Tensor, "*b T"],
) -> tuple[Float[Tensor, "*b T"], Float[Tensor, "*b T T"]]:
    """γ_t and Γ_ts = γ_t / γ_s for s ≤ t (0 above the diagonal), from `total` = log γ.

    In log space, so that a long product of small decays neither divides by zero nor overflows.
    """
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device)
    ratio = total.unsqueeze(-1) - total.unsqueeze(-2)
    ratio = ratio.masked_fill(future.triu(1), float("-inf"))
    return total.exp(), ratio.exp()


def inverse_unit_lower(strictly_lower: Float[Tensor, "*b T T"]) -> Float[Tensor, "*b T T"]:
    """(I + L)⁻¹, L strictly lower triangular (what stands elsewhere is not read)."""
    one = torch.eye(
        strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device
    )
    return torch.linalg.solve_triangular(strictly_lower, one, upper=False, unitriangular=True)


def frobenius(W: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b 1 1"]:
    """Frobenius norm of the last two axes, kept for broadcasting; its gradient at zero is zero."""
    return torch.linalg.vector_norm(W, dim=(-2, -1), keepdim=True)
