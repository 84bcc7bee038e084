"""Newton–Schulz: the non-linear output that makes Muon of momentum (eqs. 43, 44, 52)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .chain import At, Transform, Updates, stateless

Coefficients = tuple[float, float, float]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)  # Muon's: steepest at zero, ends in 0.7 to 1.2
CUBIC: Coefficients = (1.5, -0.5, 0.0)  # eq. 44 at step ½: slow, and exact in the limit
Precision = Literal["auto", "bfloat16", "float32"]
Adjust = Literal["match_rms_adamw", "original", "none"]
_AT_ONCE = {"cpu": 2**16, "cuda": 2**24}  # values of one batched product: caches; allocation


def near(peak: Tensor) -> Tensor:
    """A power of two about as large as `peak`: to divide by it changes no digit of a number."""
    return peak.clamp(min=torch.finfo(peak.dtype).tiny).log2().floor().exp2()


def unit(matrices: Tensor, eps: float) -> Tensor:
    """G / (‖G‖_F + ε) of each matrix, zero for zero: [..., m, n] -> the same.

    No number is squared as it is: a float32 of 1e25 has no square, and that of 1e-25 is zero.
    """
    over: dict[str, Any] = {"dim": (-2, -1), "keepdim": True}
    scale = near(torch.linalg.vector_norm(matrices, math.inf, **over))
    scaled = matrices / scale
    return scaled / (torch.linalg.vector_norm(scaled, **over) + eps / scale)


def newton_schulz(
    matrices: Sequence[Tensor],
    steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    *,
    eps: float = 1e-7,
    precision: Precision = "auto",
    sizes: Sequence[float] | None = None,
    widen: bool = True,
) -> list[Tensor]:
    """The nearest orthogonal matrix of each, about: G = U S Vᵀ ↦ U p(S) Vᵀ (eqs. 43, 44).

    X ← a X + (b A + c A²) X with A = X Xᵀ, from X = G / ‖G‖_F. The cubic coefficients are gradient
    descent on ¼‖XᵀX − I‖²; the default quintic ones bring every singular value above 1e-2 of the
    largest into 0.7 to 1.2 within 5 steps. A zero matrix stays zero.
    matrices: [..., m, n] each; equal shapes are one batched product, transposed so that the short
    side is first. sizes: a factor for each result. precision: "auto" is bfloat16 on CUDA and
    float32 elsewhere; float64 stays. widen: results of the given type, not of the precision's.
    Not for a vector, which it only normalises.
    """
    results: list[Tensor | None] = [None] * len(matrices)
    sizes = sizes or [1.0] * len(matrices)
    for indices in _alike(matrices, sizes).values():
        for part in _batches(matrices, indices):
            g = [matrices[i].reshape(-1, *matrices[i].shape[-2:]) for i in part]
            if len(part) > 1:
                g = [m.mT if m.shape[-2] > m.shape[-1] else m for m in g]
            x = _prepared(g, eps, _work_type(g[0], precision))
            x = _iterated(x, steps, coefficients, sizes[part[0]])
            x = x.to(g[0].dtype) if widen else x
            for i, o in zip(part, x.split([m.shape[0] for m in g])):
                given = matrices[i].shape
                results[i] = (o if o.shape[-2:] == given[-2:] else o.mT).reshape(given)
    return [r for r in results if r is not None]


def _alike(matrices: Sequence[Tensor], sizes: Sequence[float]) -> dict[tuple, list[int]]:
    groups: dict[tuple, list[int]] = {}
    for i, (m, size) in enumerate(zip(matrices, sizes)):
        sides = sorted(m.shape[-2:])
        groups.setdefault((*sides, size, m.dtype, m.device), []).append(i)
    return groups


def _batches(matrices: Sequence[Tensor], indices: list[int]) -> list[list[int]]:
    """The indices in parts of bounded size."""
    limit = _AT_ONCE.get(matrices[indices[0]].device.type, 2**24)
    parts: list[list[int]] = []
    size = math.inf
    for i in indices:
        if size + matrices[i].numel() > limit:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += matrices[i].numel()
    return parts


def _work_type(m: Tensor, precision: Precision) -> torch.dtype:
    if m.dtype == torch.float64:
        return m.dtype
    if precision == "auto":
        return torch.bfloat16 if m.is_cuda else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def _prepared(g: list[Tensor], eps: float, dtype: torch.dtype) -> Tensor:
    """The matrices as one batch [k, m, n] of Frobenius norm 1."""
    alone = len(g) == 1 and len(g[0]) == 1  # without axes: the faster call
    x = g[0].to(dtype, copy=True) if alone else torch.cat([m.to(dtype) for m in g])
    over: dict[str, Any] = {} if alone else {"dim": (-2, -1), "keepdim": True}
    scale = near(torch.linalg.vector_norm(x, math.inf, **over))
    norm = torch.linalg.vector_norm(x.div_(scale), **over)
    return x.mul_(torch.maximum(norm, eps / scale).reciprocal_())


def _iterated(x: Tensor, steps: int, coefficients: Coefficients, size: float) -> Tensor:
    """Newton–Schulz on a batch [k, m, n], its result times `size`; from the shorter side.

    For long matrices three steps at a time act on the short square S = X Xᵀ alone: X ↦ p(S) X takes
    S to p(S) S p(S), and one product brings all three p to X. That is two thirds of the operations
    at n = 4 m. More at a time would let the error of S, which is made once, grow by (3.4²)³.
    """
    a, b, c = coefficients
    alone = len(x) == 1  # then the plain products are the faster calls
    product, plus = (torch.mm, torch.addmm) if alone else (torch.bmm, torch.baddbmm)
    x = x[0] if alone else x
    short, long = sorted(x.shape[-2:])
    wide = x.shape[-2] == short
    while steps:
        run = min(steps, 3 if long >= 2 * short else 1)
        steps -= run
        scale = 1.0 if steps else size
        s = product(x, x.mT) if wide else product(x.mT, x)
        p = plus(s, s, s, beta=b, alpha=c)
        if run == 1:
            x = plus(x, *((p, x) if wide else (x, p)), beta=scale * a, alpha=scale)
            continue
        q = p.clone()
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        for _ in range(run - 1):
            s = plus(s, p, s, beta=a)
            s = plus(s, s, p, beta=a)
            p = plus(s, s, s, beta=b, alpha=c)
            q = plus(q, p, q, beta=a)
        q = q.mul_(scale)
        x = product(q, x) if wide else product(x, q)
    return x[None] if alone else x


def orthogonalize(
    steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    *,
    eps: float = 1e-7,
    precision: Precision = "auto",
    adjust: Adjust = "none",
    widen: bool = True,
) -> Transform:
    """σ(m) = Newton–Schulz(m) of every matrix of the parameters (eq. 52), at a size for its shape.

    adjust, for a matrix [A, B], as in torch.optim.Muon: "match_rms_adamw" is 0.2 √max(A, B), so
    that a value moves as under AdamW and takes its learning rate; "original" is √max(1, A/B).
    widen=False leaves the answer in the precision that it was computed in, for a chain's end.
    """

    def f(ms: list[Tensor]) -> list[Tensor]:
        sizes = [size(m.shape[-2], m.shape[-1], adjust) for m in ms]
        return newton_schulz(
            ms, steps, coefficients, eps=eps, precision=precision, sizes=sizes, widen=widen
        )

    return stateless(lambda u, at: at.on_matrices(f, u))


def size(rows: int, columns: int, adjust: Adjust) -> float:
    """The factor of an orthogonal update of that shape; see `orthogonalize`."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if adjust == "original" else 1.0


def unit_rms(rms: float) -> Transform:
    """u scaled so that the root mean square of its values is `rms`."""

    def update(u: Updates, at: At) -> Updates:
        roots = (math.sqrt(slot.shape.numel()) for slot in at.slots)
        factors = [rms * root / (n + 1e-12) for root, n in zip(roots, at.norms(u))]
        return list(torch._foreach_mul(u, factors))

    return stateless(update)
