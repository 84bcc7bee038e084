"""Sizes without their squares: a float32 of 1e25 has none, and that of 1e-25 is zero."""

from __future__ import annotations

import torch
from torch import Tensor

_BOTH = (-2, -1)


def near(peak: Tensor) -> Tensor:
    """A power of two about as large as `peak`: to divide by it changes no digit of a number."""
    return peak.clamp(min=torch.finfo(peak.dtype).tiny).log2().floor().exp2()


def unit(matrices: Tensor, eps: float) -> Tensor:
    """G / (‖G‖_F + ε) of each matrix, zero for zero: [..., m, n] -> the same."""
    scale = near(torch.linalg.vector_norm(matrices, float("inf"), dim=_BOTH, keepdim=True))
    scaled = matrices / scale
    return scaled / (torch.linalg.vector_norm(scaled, dim=_BOTH, keepdim=True) + eps / scale)


__all__ = ["near", "unit"]
