"""The few pieces of linear algebra that memories and rules share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_EPS = 1e-12


def unit(x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b 1"]]:
    """x / ‖x‖ and ‖x‖ along the last axis; a zero vector stays zero, its gradient finite but large.

    The norm is taken in float32 at least: in float16 the square of a small vector is zero.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = (wide.square().sum(-1, keepdim=True) + _EPS).sqrt()
    return (wide / norm).to(x.dtype), norm.to(x.dtype)


def decay_products(
    log_decay: Float[Tensor, "*b T"],
) -> tuple[Float[Tensor, "*b T"], Float[Tensor, "*b T T"]]:
    """Products of decays: γ_t = Π_{r≤t} a_r, and Γ_ts = γ_t / γ_s for s ≤ t (0 above the diagonal).

    In log space, so that a long product of small decays neither divides by zero nor overflows.
    """
    total = log_decay.cumsum(-1)
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device)
    ratio = total.unsqueeze(-1) - total.unsqueeze(-2)
    ratio = ratio.masked_fill(future.triu(1), float("-inf"))
    return total.exp(), ratio.exp()


def solve_unit_lower(
    strictly_lower: Float[Tensor, "*b T T"], right: Float[Tensor, "*c T n"]
) -> Float[Tensor, "*c T n"]:
    """Solve (I + L) w = right, L strictly lower triangular; leading axes broadcast."""
    return torch.linalg.solve_triangular(strictly_lower, right, upper=False, unitriangular=True)


def frobenius(W: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b 1 1"]:
    """Frobenius norm of the last two axes, kept for broadcasting; differentiable at zero."""
    return (W.square().sum((-2, -1), keepdim=True) + _EPS).sqrt()
