"""Chunks of self-modifying memories as GPU kernels: generate, write and bound; then answer.

What `layers.titans` composes of torch's operations and `given.update`, with nothing between the
kernels: eight of MLPs, here, and seven of matrices in `transition`. Of a head's memories the first
three or four say k, v, η (and log α), the last answers q.

    k = unit M_k(z), v = unit M_v(z), η = step_sizes(w_η · M_η(z) + b_η), α = σ(w_α · M_α(z) + b_α)

Then every memory makes its own values of v and is written, and at the end of a chunk brought back
into its shell: three kernels, chunk by chunk. No chunk waits for an answer, so those of a whole run
of chunks are one launch; in the backward pass what they ask of the writes is known before the first
of three kernels for each chunk. The logit of a gate needs no answer either: w · (W_2 h) =
(W_2ᵀ w) · h, a product less and, in the backward pass, rank-one gradients. The η that is kept is
eta_max σ, or 0 below eta_min (its gradient passes as if it were not 0): where α belongs to it,
(1 + α) / 2 comes in on load, so that M_η and M_α need not wait for one another.

`constants` [B, heads, 2 (d + 1) + 2 memories]: w and b of η, of α, and the norms of the start
values, first matrices first: one tensor, so that their gradients are summed once. Parts of it that
a form lacks (α, a second matrix) are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...memory.memories import Weights
from ..chunk import Chunk
from . import transition
from .given import _form, _kept, _launch, _new, _pieces, _split, _systems, precision
from .kernels import (
    _answer,
    _backward_factors,
    _backward_generate,
    _backward_read,
    _backward_systems,
    _forward,
    _generate,
    _invert,
)
from .plan import Plan, laid, plan_of

Pair = tuple[Any, ...]  # the first matrix of each memory and the second, if there is one


def run(
    chunk: Chunk,
    tokens: int,
    W: Weights,
    z: Tensor,
    q: Tensor,
    constants: Tensor,
    *,
    steps: tuple[float, float],
    bound: tuple[float, float] | None,
) -> tuple[Tensor, Weights]:
    """(o, W) after whole chunks of so many tokens, or after the beginning of one: z, q
    [B, heads, T, d], W of [B, heads, memories, ...].

    bound: the shell, if the last chunk ends here. For what has a `given.why_not` not defined.
    """
    form, gain = _form(chunk, precision())
    W = tuple(w.contiguous() for w in W)
    given = (z, q, constants, W[0], W[1] if len(W) > 1 else None)
    plan = plan_of(tokens, form, gain, steps, bound, *given)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        *after, o = _SelfModified.apply(plan, *given)
    else:
        *after, o = _forms(plan)[0](plan, False, *given)[0]
    return o, tuple(after)


class _SelfModified(torch.autograd.Function):
    """(W_1, W_2 if there is one, o) after the run."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *given: Any):
        outputs, kept = _forms(plan)[0](plan, True, *given)
        ctx.plan = plan
        ctx.save_for_backward(*given, kept, *(outputs[:-1] if plan.kind.shell else ()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        z, q, constants, W1, W2, kept, *after = ctx.saved_tensors
        backward = _forms(ctx.plan)[1]
        return None, *backward(ctx.plan, z, q, constants, W1, W2, kept, after, grads)


def _forms(plan: Plan) -> tuple[Any, Any]:
    """Forward and backward, of MLPs here, of matrices in `transition`."""
    mlp = (_run, _run_backward)
    return mlp if plan.kind.mlp else (transition.run, transition.run_backward)


class Kept(NamedTuple):
    """What the kernels of a run leave for each other and for the backward pass, or its sizes.

    Of each chunk its first weights (unless there is one chunk), k and v, rows of scalars, the
    pre-activations of what said them and of the own values, the norms of W; then as in
    `given._kept`.
    """

    W1: Any
    W2: Any
    said: Any
    rows: Any
    asked: Any
    values: Any
    norms: Any
    inverses: Any
    w1: Any
    w2: Any
    hidden: Any
    before: Any
    aims: Any

    def chunk(self, c: int, sizes: Kept) -> Kept:
        """From chunk c on."""
        return Kept(*(None if x is None else x[c * n :] for x, n in zip(self, sizes)))


def _sizes(plan: Plan, save: bool) -> Kept:
    """Of one chunk, and of k, v and rows one each."""
    kind, place = plan.kind, plan.place
    tokens, rows = plan.heads * place.T, place.N * place.T * int(save)
    several = int(plan.chunks > 1)
    return Kept(
        place.N * kind.H * kind.K * several, place.N * kind.V * kind.H * several,
        tokens * kind.K, tokens, plan.roles * tokens * kind.H * int(save),
        rows * kind.H, 2 * place.N * int(kind.shell and save),
        *_kept(kind, place, save),
    )  # fmt: skip


def _totals(plan: Plan, sizes: Kept) -> list[int]:
    """Of the whole run."""
    return [plan.chunks * n for n in sizes._replace(said=2 * sizes.said, rows=6 * sizes.rows)]


def _said(plan: Plan, kept: Kept, sizes: Kept) -> tuple[Tensor | None, ...]:
    """k, v, η and log α out of what holds them."""
    rows = plan.chunks * sizes.rows
    alpha = kept.rows[5 * rows :] if plan.kind.decay else None
    return kept.said, kept.said[plan.chunks * sizes.said :], kept.rows[4 * rows :], alpha


def _weights(plan: Plan, kept: Kept, sizes: Kept, first: Pair, last: Pair) -> list[Pair]:
    """The weights before, between and after the chunks."""
    between = (kept.chunk(c, sizes)[:2] for c in range(1, plan.chunks))
    return [first, *between, last]


def _run(
    plan: Plan, save: bool, z: Tensor, q: Tensor, constants: Tensor, W1: Tensor, W2: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The run: outputs as in `_SelfModified`, and one buffer of what is `Kept`."""
    kind, chunks, place, held = plan
    sizes = _sizes(plan, save)
    flat, pieces = _pieces(W1, _totals(plan, sizes))
    kept = Kept(*pieces)
    V1, V2 = _new(W1.shape, W1), _new(W2.shape, W2)
    o = _new((*q.shape[:-1], kind.V), q)
    (z, given), (q, asking), (o, answering) = (laid(x, place.T) for x in (z, q, o))
    weights = _weights(plan, kept, sizes, (W1, W2), (V1, V2))
    for c in range(chunks):
        here = kept.chunk(c, sizes)
        k, v, eta, log_alpha = _said(plan, here, sizes)
        _launch(
            _generate, plan.heads * plan.roles, kind, place,
            *weights[c], z[:, :, c * place.T :], constants, here.said, here.rows, here.asked,
            given, held,
        )  # fmt: skip
        if kind.delta:
            _launch(
                _invert, _systems(kind, place), kind, place,
                weights[c][0], k, eta, log_alpha, here.inverses, here.before,
            )  # fmt: skip
        _launch(
            _forward, place.N, kind, place,
            *weights[c], k, v, eta, log_alpha, here.inverses, constants, *weights[c + 1],
            here.w1, here.w2, here.before, here.aims, here.values, here.norms, held,
        )  # fmt: skip
    if chunks > 1:  # whose first weights must lie side by side
        for start, w, n in zip(kept[:2], (W1, W2), sizes[:2]):
            start[:n].view(w.shape).copy_(w)
        W1, W2 = kept[:2]
    k, _, _, log_alpha = _said(plan, kept, sizes)
    _launch(
        _answer, chunks * plan.heads, kind, plan.every,
        W1, W2, q, k, log_alpha, kept.w1, kept.w2, kept.before, o, kept.hidden, asking, answering,
    )  # fmt: skip
    return [V1, V2, o], flat


def _of_reads(plan: Plan) -> list[int]:
    """Sizes of the gradients that a chunk's answers ask of its first weights and its writes."""
    kind = plan.kind
    asked = plan.heads * plan.place.T * int(kind.read == "token")
    return [
        plan.heads * kind.H * kind.K, plan.heads * kind.V * kind.H, asked * kind.H,
        asked * kind.V, asked * kind.K, asked * kind.H, asked,
    ]  # fmt: skip


def _run_backward(
    plan: Plan, z: Tensor, q: Tensor, constants: Tensor, W1: Tensor, W2: Tensor,
    flat: Tensor, after: list[Tensor], grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of z, q, constants and W from these, what was kept, W in its shell at the end and
    the outputs' gradients.
    """
    kind, chunks, place, held = plan
    sizes = _sizes(plan, True)
    kept = Kept(*_split(flat, _totals(plan, sizes)))
    N, T = place.N, place.T
    H, V, of_reads = N * T * kind.H, N * T * kind.V, _of_reads(plan)
    first, last = of_reads[:2]
    _, reads = _pieces(W1, [chunks * n for n in of_reads])
    _, (dsaid, dgates, e1, e2, dh, sums, dconstants, *between) = _pieces(W1, [
        2 * V, 2 * N * T, H, V, H, 5 * N * T,
        chunks * constants.numel(),
        *([first * place.groups, last * place.groups] * 2 if chunks > 1 else ()),
    ])  # fmt: skip
    dk, dv, deta, dlog = dsaid, dsaid[V:], dgates, dgates[N * T :] if kind.decay else None
    dW1, dW2 = _new(W1.shape, W1), _new(W2.shape, W2)
    dq, dz = _new(q.shape, q), _new((plan.roles, *z.shape), z)
    *dVs, do = grads
    (z, given), (q, asking), (do, answering) = (laid(x, T) for x in (z, q, do))
    dasking, dgiven = laid(dq, T)[1], laid(dz[0], T)[1]
    k, _, _, log_alpha = _said(plan, kept, sizes)
    _launch(
        _backward_read, chunks * plan.heads, kind, plan.every,
        *((W1, W2) if chunks == 1 else kept[:2]), q, k, log_alpha, kept.w1, kept.w2, kept.hidden,
        kept.before, do, dq, *reads, asking, answering, dasking,
    )  # fmt: skip
    weights = _weights(plan, kept, sizes, (W1, W2), (*after, None, None)[:2])
    dweights = [(dW1, dW2), *(between[c % 2 * 2 :][:2] for c in range(1, chunks))]
    dweights.append(tuple(x.contiguous() for x in dVs))
    for c in reversed(range(chunks)):
        here = kept.chunk(c, sizes)
        k, v, eta, log_alpha = _said(plan, here, sizes)
        dW1_read, dW2_read, dw1, dw2, dk_read, dh_read, dg_read = (
            None if x is None else x[c * n :] for x, n in zip(reads, of_reads)
        )
        dheld = dconstants[c * constants.numel() :]
        _launch(
            _backward_systems, 2 * N, kind, place,
            *weights[c], k, v, eta, log_alpha, here.inverses, here.w1, here.w2, here.before,
            here.aims, *dweights[c + 1], dw1, dw2, dk_read, dh_read, dW1_read, dW2_read,
            *weights[c + 1], constants, here.norms, dheld, e1, e2, dk, dh, sums, *dweights[c], held,
        )  # fmt: skip
        _launch(
            _backward_factors, N, kind, place,
            *weights[c], k, v, eta, log_alpha, here.before, here.aims, here.values, e1, e2, dh,
            sums, dg_read, *dweights[c], dk, dv, deta, dlog,
        )  # fmt: skip
        _launch(
            _backward_generate, plan.heads * plan.roles, kind, place,
            *weights[c], z[:, :, c * T :], constants, here.said, here.rows, here.asked,
            dsaid, dgates, *dweights[c], dz[:, :, :, c * T :], dheld, given, held,
            dgiven, dz.stride(0),
        )  # fmt: skip
    many = dconstants[: chunks * constants.numel()].view(chunks, *constants.shape)
    return dz.sum(0), dq, many.sum(0), dW1, dW2
