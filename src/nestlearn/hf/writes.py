"""What a level of a stacked model does when its chunk ends: pure functions on its state.

A low-rank delta is the best approximation, of its rank, of what the full one would be after the
same write; so are the gradients that a level gathers, and its momentum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lending import Factors

SPARE, SWEEPS = 8, 2  # directions more than the rank, and passes, with which its space is sought
FLAT = 1e-7  # of a matrix: what single precision does not tell from nothing
GROUP = 2**25  # numbers of layers' inputs and errors that are brought together, at most

Pairs = Sequence[tuple[Tensor, Tensor]]
Scale = float | Tensor | list[Tensor]  # of all layers, or of each
Fast = tuple[Factors, ...]  # one entry for each linear layer of the level; () where there is none


class LevelState(NamedTuple):
    """One level's fast weights, and what it has gathered since its last write.

    fast: deltas from the pretrained weights; () while they stand at their start value. total:
    the chunk's summed gradients; () at its start. seen [B]: tokens (or their weights) in them.
    velocity: momentum; () without. start: in a nested system the start value; () while it has
    not moved. writes [B], int64: how often the level has written what it gathered itself.
    """

    fast: Fast
    total: Fast
    seen: Tensor
    velocity: Fast
    start: Fast
    writes: Tensor


class Pace(NamedTuple):
    """How a level writes. lr: one step size for each linear layer. theta: momentum's decay, None
    without. keep: what is left of a delta after a write. bound: largest norm of each delta.
    """

    lr: Tensor
    theta: Tensor | None
    keep: float
    bound: tuple[float, ...]


def add(a: Fast, b: Fast) -> Fast:
    """The sum, layer by layer; () counts as zero."""
    if not a or not b:
        return a or b
    return _sums([(1.0, a), (1.0, b)])


def write(state: LevelState, fast: Fast, pace: Pace) -> LevelState:
    """One step along the mean of the gathered gradients (eq. 71; momentum: eq. 33).

    S ← θ S − η g;  Δ ← keep · (Δ + S), then scaled back to `bound`. fast: the level's weights
    before the step. A sample that gathered nothing stays as it is.
    """
    if not state.total:
        return state
    some = state.seen > 0
    mean = 1.0 / torch.where(some, state.seen, 1.0)
    every = bool(some.all())
    scales = [-lr.clamp(min=0.0) * mean for lr in pace.lr]
    steps: Fast = ()
    if pace.theta is None:
        moved = _sums([(pace.keep, fast), ([pace.keep * scale for scale in scales], state.total)])
    else:
        past = state.velocity or tuple(map(zero, fast))
        step = _sums([(pace.theta, past), (scales, state.total)])
        moved = _sums([(pace.keep, fast), (pace.keep, step)])
        steps = step if every else tuple(_where(some, *pair) for pair in zip(step, past))
    deltas = tuple(map(limit, moved, pace.bound))
    if not every:
        deltas = tuple(_where(some, *pair) for pair in zip(deltas, fast))
    none = torch.zeros_like(state.seen)
    writes = state.writes + some
    return LevelState(deltas, (), none, steps, state.start, writes)


def consolidate(
    slow: LevelState, fast: LevelState, starts: tuple[Fast, Fast], bound: tuple[float, ...]
) -> tuple[LevelState, LevelState]:
    """The slow level takes over what the fast one has moved from its start, which begins again.

    The sum of their deltas, so what the model computes, stays (up to the bound, and for low-rank
    deltas up to the best approximation of their rank). starts: the start values of (slow, fast).
    """
    if not fast.fast:
        return slow, fast
    of_slow, of_fast = starts
    before = slow.fast or of_slow
    added = map(limit, _sums([(1.0, before), (1.0, fast.fast), (-1.0, of_fast)]), bound)
    taken = tuple(map(_where_moved, fast.fast, of_fast, added, before))
    return slow._replace(fast=taken), fast._replace(fast=())


def restart(level: LevelState, first: Fast, share: Tensor) -> LevelState:
    """Eq. 72: the start value moves towards what was learned, and the level starts from it.

    Φ ← Φ + share (Δ − Φ);  Δ ← Φ. first: the start value as long as it has not moved.
    """
    if not level.fast:
        return level
    share = share.clamp(0.0, 1.0)
    before = level.start or first
    new = _sums([(1.0 - share, before), (share, level.fast)])
    moved = tuple(map(_where_moved, level.fast, before, new, before))
    return level._replace(fast=moved, start=moved, velocity=())


def limit(delta: Factors, bound: float) -> Factors:
    """Each sample's delta scaled back to a Frobenius norm of `bound`, if it is beyond."""
    if bound == float("inf"):
        return delta
    norm = size(delta)
    if not bool((norm > bound).any()):
        return delta
    scale = torch.where(norm > bound, bound / norm.clamp(min=1e-30), 1.0)
    return Factors(delta.left * _rows(scale, delta.left), delta.right)


def size(delta: Factors) -> Tensor:
    """The Frobenius norm of each sample's delta [B]; of low-rank ones without forming them."""
    if delta.right is None:
        return torch.linalg.vector_norm(delta.left, dim=(1, 2))
    left, right = delta.left, delta.right
    squared = ((left.mT @ left) * (right @ right.mT)).sum((1, 2))
    return squared.clamp(min=0.0).sqrt()


def inner(one: Fast, two: Fast) -> float:
    """The inner product of one sample's deltas in two memories; of low rank, by their factors."""
    total = 0.0
    for a, b in zip(one, two):  # () where nothing was learned: zero
        left, other = a.left[0].double(), b.left[0].double()
        if a.right is None or b.right is None:
            total += float((a.dense()[0].double() * b.dense()[0].double()).sum())
        else:
            rights = a.right[0].double() @ b.right[0].double().T
            total += float(((left.T @ other) * rights).sum())
    return total


def decay(fast: Fast, inputs: list[Tensor], weight: Tensor, lr: Tensor, forget: Tensor) -> Fast:
    """Delta gradient descent's retention term (eq. 57) as a gradient: it makes the level let go
    of what it adds along the present inputs x [B, T, in].

    forget · Σ_t Δ x_t x_tᵀ / (1 + η m), m the mean of ‖x_t‖²: for one token, with its step η,
    Δ (η′ x xᵀ) with η′ = η / (1 + η ‖x‖²). It falls on the delta, never on the pretrained weights.
    """
    count = weight.sum(1)
    count = torch.where(count > 0, count, 1.0)
    terms = []
    for i, ((left, right), x) in enumerate(zip(fast, inputs)):
        x = x.to(left.dtype)
        mean = (x.square().sum(-1) * weight).sum(1) / count
        share = forget / (1.0 + lr[i].clamp(min=0.0) * mean)
        share = share * (left != 0).flatten(1).any(1)  # nothing added yet: nothing to let go of
        weighted = x * (weight * share[:, None])[:, :, None]
        side = left if right is None else right
        term = (weighted @ side.mT).mT @ x
        terms.append(Factors(term) if right is None else Factors(left, term))
    return tuple(terms)


def approximate(pairs: Sequence[Pairs], rank: int) -> Fast:
    """Of each layer's gradient Σ e xᵀ, which is never formed, the best approximation of a rank.

    pairs: for each layer, those of e [B, N, out] and x [B, N, in]. The space of the right side is
    found by subspace iteration from a fixed draw.
    """
    joined = [  # most layers run once, and nothing of theirs is to be kept twice
        of[0] if len(of) == 1 else tuple(torch.cat(side, 1) for side in zip(*of)) for of in pairs
    ]
    found: dict[int, Factors] = {}
    for some in _alike(joined, most=GROUP):
        errors, inputs = (torch.cat(side) for side in zip(*(joined[i] for i in some)))
        side = _space(errors, inputs, rank)
        total = _sum([(1.0, _within(errors.mT, inputs, side))], rank)
        found |= zip(some, _parts(total, len(some)))
    return tuple(found[i] for i in range(len(joined)))


@torch.no_grad()
def _space(errors: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """In which most of the right side of Σ e xᵀ lies [B, in, rank + SPARE]."""
    width = inputs.shape[-1]
    drawn = torch.Generator().manual_seed(0)
    beside = min(rank + SPARE, width)
    side = torch.randn(width, beside, generator=drawn, dtype=torch.float32, device="cpu")
    side = side.to(inputs).expand(len(inputs), -1, -1)
    for _ in range(SWEEPS):
        out = _basis(errors.mT @ (inputs @ side))
        side = _basis(inputs.mT @ (errors @ out))
    return side


def _sums(terms: list[tuple[Scale, Fast]]) -> Fast:
    """The weighted sum, layer by layer; low-rank layers of one shape at once."""
    first = terms[0][1]
    if first[0].right is None:
        scaled = [([c] * len(f) if not isinstance(c, list) else c, f) for c, f in terms]
        return tuple(_sum([(c[i], f[i]) for c, f in scaled]) for i in range(len(first)))
    found: dict[int, Factors] = {}
    for some in _alike(first):
        joined = []
        for c, f in terms:
            scale = torch.cat([c[i] for i in some]) if isinstance(c, list) else c
            sides = [torch.cat(side) for side in zip(*(f[i] for i in some))]
            joined.append((scale, Factors(*sides)))
        found |= zip(some, _parts(_sum(joined), len(some)))
    return tuple(found[i] for i in range(len(first)))


def _alike(
    layers: Sequence[Factors | tuple[Tensor, ...]], most: int | None = None
) -> Iterator[list[int]]:
    """Layers of one shape, not more at once than have `most` numbers."""
    alike: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, sides in enumerate(layers):
        alike.setdefault(tuple(x.shape for x in sides if x is not None), []).append(i)
    for some in alike.values():
        size = sum(x.numel() for x in layers[some[0]] if x is not None)
        each = len(some) if most is None else max(1, most // max(1, size))
        yield from (some[a : a + each] for a in range(0, len(some), each))


def _parts(joined: Factors, count: int) -> list[Factors]:
    """So many layers that were computed as one batch, each in a memory of its own."""
    sides = [[x.clone() for x in side.chunk(count)] for side in joined if side is not None]
    return [Factors(*pair) for pair in zip(*sides)]


def zero(delta: Factors) -> Factors:
    """A delta of nothing, of the same form."""
    return Factors(torch.zeros_like(delta.left), delta.right)


def _rows(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like.dtype if per_sample.is_floating_point() else None)[:, None, None]


def _where(some: Tensor, new: Factors, old: Factors) -> Factors:
    """The new value for some samples, the old for the others."""
    left = torch.where(_rows(some, new.left), new.left, old.left)
    if new.right is None or old.right is None:
        return Factors(left)
    return Factors(left, torch.where(_rows(some, new.right), new.right, old.right))


def _where_moved(delta: Factors, start: Factors, new: Factors, old: Factors) -> Factors:
    """The new value for the samples whose delta has left its start value, the old for others: a
    sample that has learned nothing is not rewritten for its batch-mates' sake.
    """
    pairs = [(a, b) for a, b in zip(delta, start) if a is not None and b is not None]
    moved = torch.stack([(a != b).flatten(1).any(1) for a, b in pairs]).any(0)
    return _where(moved, new, old)


def _sum(terms: list[tuple[float | Tensor, Factors]], rank: int | None = None) -> Factors:
    """The weighted sum; of low-rank deltas its best approximation of the first one's rank, or of
    `rank`. The size stands on the left; the right has orthonormal rows.
    """
    lefts = [_times(c, f.left) for c, f in terms]
    own = terms[0][1].right
    if own is None:
        return Factors(sum(lefts[1:], lefts[0]))
    left = torch.cat(lefts, -1)
    right = torch.cat([f.right for _, f in terms if f.right is not None], 1)
    with torch.no_grad():
        q = _basis(right.mT)
        side = q @ _principal(left @ (right @ q), rank or own.shape[1])
    return _within(left, right, side)


def _basis(x: Tensor) -> Tensor:
    """Orthonormal columns [B, n, k] that span those of x, and others where these are dependent."""
    if not _loops(x):
        return torch.linalg.qr(x).Q
    drawn = torch.Generator(x.device).manual_seed(0)
    noise = torch.randn(x.shape[1:], generator=drawn, dtype=torch.float64, device=x.device)
    size = torch.linalg.matrix_norm(x.double(), keepdim=True)
    basis = x.double() + FLAT * torch.where(size > 0, size, 1.0) * noise
    for _ in range(2):  # the first leaves what is small not quite orthogonal
        values, vectors = _gram(basis)
        basis = basis @ (vectors * values.clamp(min=1e-300).rsqrt()[:, None])
    return basis.to(x.dtype)


def _principal(x: Tensor, count: int) -> Tensor:
    """The first right singular vectors [B, k, count] of x [B, n, k]."""
    if not _loops(x):
        r = torch.linalg.qr(x, mode="r").R
        return torch.linalg.svd(r, full_matrices=False).Vh[:, :count].mT
    return _gram(x)[1].flip(-1)[..., :count].to(x.dtype)


def _loops(x: Tensor) -> bool:
    """Whether QR and SVD of many matrices run one after the other: on a card. There eigenvectors of
    xᵀx do instead; in double precision they keep all that single precision has.
    """
    return x.is_cuda and x.dtype != torch.float64


def _gram(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    return values, vectors


def _within(a: Tensor, b: Tensor, side: Tensor) -> Factors:
    """The matrix a b as far as it lies in a space `side` [B, in, r] of its right side.

    Its derivative is taken at a fixed rank, both spaces turning with the matrix: exact where
    nothing is left out, and else without how the choice of the space depends on what is left out.
    """
    left, right = a @ (b @ side), side.mT
    if left.requires_grad:
        back = torch.linalg.pinv(left.detach(), rtol=1e-6)
        turn = (back @ a) @ b - back @ left @ right
        right = right + (turn - turn.detach())
    return Factors(left, right)


def _times(scale: float | Tensor, w: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return (_rows(scale, w) if scale.ndim else scale) * w
    return w if scale == 1.0 else scale * w
