"""Chunks of self-modifying matrices by the transition that all memories of a head share.

The form of `nestlearn.scan.transition`: with x of one triangular system and D = xᵀ (Γ_C k), every
memory becomes W_C = γ_C W + W D. A chunk is two kernels: one program a head makes D of k, v, η and
α, one a memory writes it and says its k, v, η or α of the next chunk. The answers W z, z = γ q +
(Γ ∘ q kᵀ) x, of all chunks are one launch. In the backward pass what they ask is known first; a
chunk then is two kernels again; what z gets is one launch after all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .given import _launch, _new, _pieces, _split
from .plan import Plan, laid
from .transition_kernels import (
    _answer_through,
    _backward_read_through,
    _backward_say,
    _backward_transition,
    _backward_write,
    _transition,
    _write,
)

Part = tuple[Any, Any, Any]  # of what `_write` and its backward pass are given
NOTHING: Part = (None, None, None)


class Kept(NamedTuple):
    """What the kernels of a run leave for each other and for the backward pass, or its sizes.

    Of each chunk its first weights (unless there is one chunk), k and v, rows of scalars, x and
    (I + L)⁻¹ of the system, D, the norms of W.
    """

    W: Any
    said: Any
    rows: Any
    x: Any
    inverses: Any
    D: Any
    norms: Any

    def chunk(self, c: int, sizes: Kept) -> Kept:
        """From chunk c on."""
        return Kept(*(None if x is None else x[c * n :] for x, n in zip(self, sizes)))


def _sizes(plan: Plan, save: bool) -> Kept:
    """Of one chunk, and of k, v and rows one each."""
    kind, place, heads = plan.kind, plan.place, plan.heads
    tokens = heads * place.T
    return Kept(
        place.N * kind.V * kind.K * int(plan.chunks > 1), tokens * kind.K, tokens, tokens * kind.K,
        heads * kind.BT**2 * int(kind.delta and save), heads * kind.K**2,
        place.N * int(kind.shell and save),
    )  # fmt: skip


def _total(plan: Plan, sizes: Kept) -> list[int]:
    """Of the whole run."""
    return [plan.chunks * n for n in sizes._replace(said=2 * sizes.said, rows=5 * sizes.rows)]


def _decay(plan: Plan, here: Kept, sizes: Kept) -> Tensor | None:
    """log α out of the rows."""
    return here.rows[4 * plan.chunks * sizes.rows :] if plan.kind.decay else None


def _weights(plan: Plan, kept: Kept, sizes: Kept, first: Tensor, last: Any) -> list[Any]:
    """W before, between and after the chunks."""
    return [first, *(kept.chunk(c, sizes).W for c in range(1, plan.chunks)), last]


def run(
    plan: Plan, save: bool, z: Tensor, q: Tensor, constants: Tensor, W: Tensor, W2: None
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """The run: W after it and o, and one buffer of what is `Kept`."""
    kind, chunks, place, held = plan
    sizes = _sizes(plan, save)
    flat, pieces = _pieces(W, _total(plan, sizes))
    kept = Kept(*pieces)
    V, o = _new(W.shape, W), _new((*q.shape[:-1], kind.V), q)
    (z, given), (q, asking), (o, answering) = (laid(x, place.T) for x in (z, q, o))
    weights = _weights(plan, kept, sizes, W, V)
    wrote: Part = NOTHING

    def write(before: Tensor, after: Tensor, *say: Any) -> None:
        _launch(_write, place.N, kind, place, before, after, *wrote, *say, constants, given, held)

    for c in range(chunks):
        here = kept.chunk(c, sizes)
        write(weights[max(0, c - 1)], weights[c], z[:, :, c * place.T :], here.said, here.rows)
        _launch(
            _transition, plan.heads, kind, place,
            here.said, here.rows, here.x, here.inverses, here.D, held,
        )  # fmt: skip
        wrote = here.D, _decay(plan, here, sizes), here.norms
    write(weights[-2], V, *NOTHING)
    if chunks > 1:  # whose first weights must lie side by side
        kept.W[: sizes.W].view(W.shape).copy_(W)
        W = kept.W
    _launch(
        _answer_through, chunks * plan.heads, kind, plan.every,
        W, q, kept.said, _decay(plan, kept, sizes), kept.x, o, asking, answering,
    )  # fmt: skip
    return [V, o], flat


def run_backward(
    plan: Plan, z: Tensor, q: Tensor, constants: Tensor, W: Tensor, W2: None, flat: Tensor,
    after: list[Tensor], grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of z, q, constants and W from these, what was kept, W in its shell at the end and
    the outputs' gradients.
    """
    kind, chunks, place, held = plan
    T, sizes = place.T, _sizes(plan, True)
    kept = Kept(*_split(flat, _total(plan, sizes)))
    tokens = plan.heads * T * int(kind.read == "token")
    of_reads = plan.heads * kind.V * kind.K, tokens * kind.K, tokens * kind.K, tokens
    _, reads = _pieces(W, [chunks * n for n in of_reads])
    between = W.numel() * int(chunks > 1)
    _, (dD, dsaid, dgates, dconstants, *dbetween) = _pieces(W, [
        place.N * kind.K**2, *(2 * chunks * n for n in (sizes.said, sizes.rows)),
        chunks * constants.numel(), between, between,
    ])  # fmt: skip
    dW, dq, dz = _new(W.shape, W), _new(q.shape, q), _new(z.shape, z)
    dV, do = grads
    (z, given), (q, asking), (do, answering) = (laid(x, T) for x in (z, q, do))
    dasking, dgiven = laid(dq, T)[1], laid(dz, T)[1]
    first = W if chunks == 1 else kept.W
    _launch(
        _backward_read_through, chunks * plan.heads, kind, plan.every,
        first, q, kept.said, _decay(plan, kept, sizes), kept.x, do, dq, *reads,
        asking, answering, dasking,
    )  # fmt: skip
    weights = _weights(plan, kept, sizes, W, (*after, None)[0])
    dweights = [dW, *(dbetween[c % 2] for c in range(1, chunks)), dV.contiguous()]
    said: Part = NOTHING
    for c in reversed(range(chunks)):
        here = kept.chunk(c, sizes)
        dW_read, *asked = (None if x is None else x[c * n :] for x, n in zip(reads, of_reads))
        _launch(
            _backward_write, place.N, kind, place,
            weights[c], weights[c + 1], here.D, _decay(plan, here, sizes), here.norms, *said,
            dweights[c + 1], dW_read, dweights[c], dD, constants,
            dconstants[c * constants.numel() :], given, held,
        )  # fmt: skip
        said = z[:, :, c * T :], dsaid[c * sizes.said :], dgates[c * sizes.rows :]
        _launch(
            _backward_transition, plan.heads, kind, place,
            here.said, here.rows, here.x, here.inverses, dD, *asked, *said[1:], held,
        )  # fmt: skip
    _launch(
        _backward_write, place.N, kind, place,
        W, None, *NOTHING, *said, dW, None, dW, None, constants, None, given, held,
    )  # fmt: skip
    _launch(
        _backward_say, chunks * plan.heads, kind, plan.every,
        first, z, constants, dsaid, dgates, dz, dconstants, given, held, dgiven, plan.heads,
    )  # fmt: skip
    many = dconstants[: chunks * constants.numel()].view(chunks, *constants.shape)
    return dz, dq, torch.sum(many, 0), dW, None
