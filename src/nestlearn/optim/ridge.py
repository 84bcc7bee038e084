"""Adam and AdaGrad as associative memories (appendix B, eqs. 101–111), as executable mathematics.

The memory m answers to the gradients g_i, its keys, and is asked for one value P, their running
root variance. Its objective is ridge regression, weighted by how much of each step is left, w_i:

    Σ w_i ‖m ⊙ g_i − P‖² + λ ‖m‖²   ⇒   m = P Σ w_i g_i / (Σ w_i g_i² + λ)

With P = √(Σ w_i g_i² + λ) that is m = Σ w_i g_i / √(Σ w_i g_i² + λ), and W ← W − lr m is
* Adam with β1 = β2 = β, for w_i = (1 − β) β^(t−i) / (1 − β^t): the bias correction makes them
  sum to 1. torch adds ε outside of the root, λ = ε² stands inside: at most ε apart in the divisor.
* AdaGrad with momentum, for w_i = 1: nothing is forgotten. Plain AdaGrad has only the newest
  gradient above the line, which is a second memory that forgets at once.

With β1 ≠ β2, as everybody runs Adam, no single weighting does: it is two memories, one above the
line and one below, `two_memories`. For computing a step use torch.optim; this is here to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weights(steps: int, beta: float, like: Tensor) -> Tensor:
    """What is left of each step, oldest first, [steps]: β^(t−i), summing to 1; for β = 1 ones."""
    age = torch.arange(steps - 1, -1, -1, dtype=like.dtype, device=like.device)
    if beta == 1:
        return torch.ones_like(age)
    return (1 - beta) * beta**age / (1 - beta**steps)


def elementwise(gradients: Tensor, w: Tensor, value: Tensor, penalty: float = 0.0) -> Tensor:
    """argmin_m Σ w_i ‖m ⊙ g_i − P‖² + λ‖m‖² (eqs. 101–106): gradients [t, ...], w [t], P [...]."""
    return value * _sum(w, gradients) / (_sum(w, gradients.square()) + penalty)


def root_variance(gradients: Tensor, w: Tensor, penalty: float = 0.0) -> Tensor:
    """P = √(Σ w_i g_i² + λ), the value that makes the memory Adam or AdaGrad: [...]."""
    return (_sum(w, gradients.square()) + penalty).sqrt()


def two_memories(gradients: Tensor, above: Tensor, below: Tensor, eps: float = 0.0) -> Tensor:
    """Σ a_i g_i / (√(Σ b_i g_i²) + ε): Adam as it is run, each moment with its own forgetting.

    above: weights [t] by β1; below: by β2; AdaGrad is above = [0, …, 0, 1], below = [1, …, 1].
    """
    return _sum(above, gradients) / (root_variance(gradients, below) + eps)


def _sum(w: Tensor, x: Tensor) -> Tensor:
    """Σ w_i x_i of weights [t] and values [t, ...]."""
    return (w.reshape(-1, *(1,) * (x.ndim - 1)) * x).sum(0)


def outer_product(gradients: Tensor, w: Tensor, penalty: float = 0.0) -> Tensor:
    """The same with whole outer products (eqs. 107–111): gradients [t, n] -> m [n].

    argmin_m ½ mᵀ H m − ⟨m, P Σ w_i g_i⟩ with H = Σ w_i g_i g_iᵀ + λ I and P = H^½, which is
    m = H^−½ Σ w_i g_i, full-matrix AdaGrad with momentum. Needs H of full rank: λ > 0, or t ≥ n.
    """
    H = (w[:, None] * gradients).mT @ gradients
    H = H + penalty * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    values, vectors = torch.linalg.eigh(H)
    return vectors @ ((vectors.mT @ (w @ gradients)) / values.sqrt())
