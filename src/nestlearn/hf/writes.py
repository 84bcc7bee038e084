"""What a level of a stacked model does when its chunk ends: pure functions on its state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lending import Factors

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
    """The sum, factor by factor; () counts as zero."""
    if not a or not b:
        return a or b
    return tuple(_each(lambda p, q: p + q, x, y) for x, y in zip(a, b))


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
    steps, deltas = [], []
    for i, (delta, total) in enumerate(zip(fast, state.total)):
        scale = -pace.lr[i].clamp(min=0.0) * mean
        if pace.theta is None:
            moved = _each(lambda d, g: torch.addcmul(d, _rows(scale, g), g), delta, total)  # noqa: B023
        else:
            past = state.velocity[i] if state.velocity else _each(torch.zeros_like, delta)
            step = _each(lambda s, g: pace.theta * s + _rows(scale, g) * g, past, total)  # noqa: B023
            moved = _each(torch.add, delta, step)
            steps.append(step if every else _where(some, step, past))
        if pace.keep != 1.0:
            moved = _each(lambda d: pace.keep * d, moved)
        moved = limit(moved, pace.bound[i])
        deltas.append(moved if every else _where(some, moved, delta))
    none = torch.zeros_like(state.seen)
    writes = state.writes + some
    return LevelState(tuple(deltas), (), none, tuple(steps), state.start, writes)


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
    taken = tuple(
        _where_moved(f, z, limit(_sum([(1.0, s), (1.0, f), (-1.0, z)]), high), s)
        for s, f, z, high in zip(slow.fast or of_slow, fast.fast, of_fast, bound)
    )
    return slow._replace(fast=taken), fast._replace(fast=())


def restart(level: LevelState, first: Fast, share: Tensor) -> LevelState:
    """Eq. 72: the start value moves towards what was learned, and the level starts from it.

    Φ ← Φ + share (Δ − Φ);  Δ ← Φ. first: the start value as long as it has not moved.
    """
    if not level.fast:
        return level
    share = share.clamp(0.0, 1.0)
    moved = tuple(
        _where_moved(now, start, _sum([(1.0 - share, start), (share, now)]), start)
        for start, now in zip(level.start or first, level.fast)
    )
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
        terms.append(Factors(term) if right is None else Factors(torch.zeros_like(left), term))
    return tuple(terms)


def _each(f, *factors: Factors) -> Factors:
    lefts, rights = zip(*factors)
    return Factors(f(*lefts), None if rights[0] is None else f(*rights))


def _rows(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like.dtype if per_sample.is_floating_point() else None)[:, None, None]


def _where(some: Tensor, new: Factors, old: Factors) -> Factors:
    """The new value for some samples, the old for the others."""
    return _each(lambda n, o: torch.where(_rows(some, n), n, o), new, old)


def _where_moved(delta: Factors, start: Factors, new: Factors, old: Factors) -> Factors:
    """The new value for the samples whose delta has left its start value, the old for others: a
    sample that has learned nothing is not rewritten for its batch-mates' sake.
    """
    pairs = [(a, b) for a, b in zip(delta, start) if a is not None and b is not None]
    moved = torch.stack([(a != b).flatten(1).any(1) for a, b in pairs]).any(0)
    return _where(moved, new, old)


def _sum(terms: list[tuple[float | Tensor, Factors]]) -> Factors:
    """The weighted sum; of low-rank deltas its best approximation of the same rank."""
    rank = terms[0][1].right
    if rank is None:
        return Factors(sum((c * f.left for c, f in terms[1:]), terms[0][0] * terms[0][1].left))
    left = torch.cat([c * f.left for c, f in terms], -1)
    right = torch.cat([f.right for _, f in terms if f.right is not None], 1)
    q_out, r_out = torch.linalg.qr(left)
    q_in, r_in = torch.linalg.qr(right.mT)
    u, s, v = torch.linalg.svd(r_out @ r_in.mT)
    r = rank.shape[1]
    # The size stays on the left, the right has unit rows: so an empty direction can still learn.
    return Factors(q_out @ (u[:, :, :r] * s[:, None, :r]), v[:, :r] @ q_in.mT)
