"""A whole chunk of self-modifying memories as seven GPU kernels: generate, write, read, bound.

What `layers.titans` composes of torch's operations and `triton.update`, with nothing between the
kernels. Of a head's memories the first three or four say k, v, η (and log α), the last answers q.

    k = unit M_k(z), v = unit M_v(z), η = step_sizes(w_η · M_η(z) + b_η), α = σ(w_α · M_α(z) + b_α)

Then every memory makes its own values of v and is written, and at the end of a chunk brought back
into its shell. The logit of a gate needs no answer: w · (W_2 h) = (W_2ᵀ w) · h, a product less and,
in the backward pass, rank-one gradients. The η that is kept is eta_max σ: where α belongs to it,
(1 + α) / 2 comes in on load, so that M_η and M_α need not wait for one another.

`constants` [B, heads, 2 (d + 1) + 2 memories]: w and b of η, of α, and the norms of the start
values, first matrices first: one tensor, so that a chunk adds its gradient in one step. Parts of it
that a form lacks (α, a second matrix) are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.memories import Matrix, ResidualMLP, Weights
from ..memory.objectives import Objective
from ..memory.rules import GradientRule
from .kernels import (
    _backward_factors,
    _backward_generate,
    _backward_read,
    _backward_systems,
    _forward,
    _generate,
    _invert,
)
from .tiles import Kind, Place
from .triton import (
    _aligned,
    _call,
    _form,
    _kept,
    _kind,
    _launch,
    _new,
    _pieces,
    _precisions,
    _split,
    _systems,
    precision,
)

Tokens = tuple[int, int, int, int]


def chunk(
    memory: Matrix | ResidualMLP,
    rule: GradientRule,
    W: Weights,
    z: Tensor,
    q: Tensor,
    constants: Tensor,
    *,
    objective: Objective,
    read: str,
    eta_max: float,
    bound: tuple[float, float] | None,
) -> tuple[Tensor, Weights]:
    """(o, W) after a chunk from its start: z, q [B, heads, T, d], W of [B, heads, memories, ...].

    bound: the shell, if the chunk ends here. For what `triton.supported` refuses not defined.
    """
    form, gain = _form(memory, rule, objective, read, precision())
    options = (form, gain, float(eta_max), [] if bound is None else [float(x) for x in bound])
    given = (z, q, constants, W[0], W[1] if len(W) > 1 else None)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        outputs = _SelfModified.apply(*options, *given)
    else:
        outputs = _call("selfmodify", _run)(*options, False, *given)[:-1]
    return outputs[-1], tuple(outputs[:-1])


class _SelfModified(torch.autograd.Function):
    """(W_1, W_2 if there is one, o) after the chunk."""

    @staticmethod
    def forward(ctx: Any, form: str, gain: float, eta_max: float, bound: list, *given: Any):
        *outputs, kept = _call("selfmodify", _run)(form, gain, eta_max, bound, True, *given)
        ctx.options = form, gain, eta_max, bound
        V1, V2 = (*outputs[:-1], None)[:2] if bound else (None, None)
        ctx.save_for_backward(*given, kept, V1, V2)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        *given, kept, V1, V2 = ctx.saved_tensors
        after = [x for x in (V1, V2) if x is not None]
        run = _call("selfmodify_backward", _run_backward)
        found = iter(run(*ctx.options, *given, kept, after, grads))
        return None, None, None, None, *(None if x is None else next(found) for x in given)


def _plan(
    form: str, gain: float, eta_max: float, bound: list[float], z: Tensor, q: Tensor,
    constants: Tensor, W1: Tensor, W2: Tensor | None,
) -> tuple[Kind, Place, tuple[int, ...]]:  # fmt: skip
    """What to launch, and how a kernel finds the constants, see `kernels._constants`."""
    B, heads, memories = W1.shape[:3]
    T = z.shape[2]
    (H, K), V = W1.shape[-2:], (W1 if W2 is None else W2).shape[-2]
    many = constants.shape[-1]
    norms = memories * (1 if W2 is None else 2)
    kind = _kind(
        form, float(gain), K, H, V, many - norms > V + 1, T, *_precisions(form),
        own=True, shell=len(bound) > 0, low=bound[0] if bound else 0.0,
        high=bound[1] if bound else 0.0, eta_max=float(eta_max),
    )  # fmt: skip
    place = Place(B * heads * memories, T, memories, 1, memories, memories - 1)
    return kind, place, (heads, constants.stride(0), many, many - norms)


def _kept_here(kind: Kind, place: Place, save: bool) -> list[int]:
    """Sizes of what is made between the kernels and for the backward pass: k and v, rows of
    scalars, pre-activations of what said them, of the own values, the norms of W; then as in
    `triton._kept`.
    """
    heads, rows = place.N // place.groups * place.T, place.N * place.T * int(save)
    return [
        2 * heads * kind.K, 6 * heads, heads * _roles(kind) * kind.H * int(kind.mlp and save),
        rows * kind.H * int(kind.mlp), 2 * place.N * int(kind.shell and save),
        *_kept(kind, place, save),
    ]  # fmt: skip


def _roles(kind: Kind) -> int:
    return 4 if kind.decay else 3


def _said(kind: Kind, place: Place, said: Tensor, rows: Tensor) -> tuple[Tensor | None, ...]:
    """k, v, η and log α out of what holds them."""
    heads = place.N // place.groups * place.T
    k, v = said[: heads * kind.K], said[heads * kind.K :]
    return k, v, rows[4 * heads :], rows[5 * heads :] if kind.decay else None


def _tokens(x: Tensor) -> tuple[Tensor, Tokens]:
    """x [B, heads, T, d] as it lies, and how a kernel finds its tokens, see `tiles._among`."""
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    sample, head, token, _ = x.stride()
    return x, (x.shape[1], sample, head, token)


def _run(
    form: str, gain: float, eta_max: float, bound: list[float], save: bool, z: Tensor, q: Tensor,
    constants: Tensor, W1: Tensor, W2: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The chunk: outputs as in `_SelfModified`, then one buffer with what `_kept_here` lists."""
    kind, place, held = _plan(form, gain, eta_max, bound, z, q, constants, W1, W2)
    (z, given), (q, asking) = _tokens(z), _tokens(q)
    kept, pieces = _pieces(W1, _kept_here(kind, place, save))
    said, rows, asked, values, norms, inverses, w1, w2, hidden, before, aims = pieces
    k, v, eta, log_alpha = _said(kind, place, said, rows)
    V1, V2 = _new(W1.shape, W1), None if W2 is None else _new(W2.shape, W2)
    o = _new((*q.shape[:-1], kind.V), q)
    many = place.N // place.groups * _roles(kind)
    _launch(
        _generate, many, kind, place, W1, W2, z, constants, said, rows, asked, given, held
    )  # fmt: skip
    if kind.delta:
        _launch(
            _invert, _systems(kind, place), kind, place, W1, k, eta, log_alpha, inverses, before
        )
    _launch(
        _forward, place.N, kind, place,
        W1, W2, q, k, v, eta, log_alpha, inverses, constants, o, V1, V2, w1, w2, hidden,
        before, aims, values, norms, asking, held,
    )  # fmt: skip
    return [x for x in (V1, V2, o, kept) if x is not None]


def _run_backward(
    form: str, gain: float, eta_max: float, bound: list[float], z: Tensor, q: Tensor,
    constants: Tensor, W1: Tensor, W2: Tensor | None, kept: Tensor, after: list[Tensor],
    grads: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of z, q, constants, W, from these, kept, W in its shell and the outputs' ones."""
    kind, place, held = _plan(form, gain, eta_max, bound, z, q, constants, W1, W2)
    *dVs, do = grads
    (z, given), (q, asking), (do, answering) = _tokens(z), _tokens(q), _tokens(do)
    dV1, dV2 = (*(x.contiguous() for x in dVs), None)[:2]
    V1, V2 = (*after, None, None)[:2]
    said, rows, asked, values, norms, inverses, w1, w2, hidden, before, aims = _split(
        kept, _kept_here(kind, place, True)
    )
    k, v, eta, log_alpha = _said(kind, place, said, rows)
    N, T, second = place.N, place.T, int(kind.mlp)
    heads, many = N // place.groups, N // place.groups * _roles(kind)
    H, V, readers = N * T * kind.H, N * T * kind.V, heads * T * int(kind.read == "token")
    _, (dsaid, dgates, parts, e1, e2, dh, sums, dw1, dw2, dk_read, dh_read, dg_read) = _pieces(
        W1, [
            2 * V, 2 * N * T, many * T * kind.K,
            H, V * second, H * second, N * T * (2 + 3 * second), readers * kind.H,
            readers * kind.V * second, readers * kind.K, readers * kind.H * second, readers,
        ]
    )  # fmt: skip
    dW1, dW2 = _new(W1.shape, W1), None if W2 is None else _new(W2.shape, W2)
    dq, dconstants = _new(q.shape, q), _new(constants.shape, constants)
    dk, dv, deta, dlog = dsaid, dsaid[V:], dgates, dgates[N * T :] if kind.decay else None
    _launch(
        _backward_read, heads, kind, place,
        W1, W2, q, k, log_alpha, w1, w2, hidden, before, do,
        dq, dW1, dW2, dw1, dw2, dk_read, dh_read, dg_read, asking, answering,
    )  # fmt: skip
    _launch(
        _backward_systems, N * (1 + second), kind, place,
        W1, W2, k, v, eta, log_alpha, inverses, w1, w2, before, aims, dV1, dV2, dw1, dw2,
        dk_read, dh_read, V1, V2, constants, norms, dconstants, e1, e2, dk, dh, sums, dW1, dW2,
        held,
    )  # fmt: skip
    _launch(
        _backward_factors, N, kind, place,
        W1, W2, k, v, eta, log_alpha, before, aims, values, e1, e2, dh, sums, dg_read,
        dW1, dW2, dk, dv, deta, dlog,
    )  # fmt: skip
    _launch(
        _backward_generate, many, kind, place,
        W1, W2, z, constants, said, rows, asked, dsaid, dgates, dW1, dW2, parts, dconstants,
        given, held,
    )  # fmt: skip
    dz = torch.sum(parts[: many * z[0, 0].numel()].view(_roles(kind), *z.shape), 0)
    return [x for x in (dz, dq, dconstants, dW1, dW2) if x is not None]


def _shapes(
    form: str, gain: float, eta_max: float, bound: list[float], save: bool, z: Tensor, q: Tensor,
    constants: Tensor, W1: Tensor, W2: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """What `_run` returns, unwritten: for a compiler."""
    kind, place, _ = _plan(form, gain, eta_max, bound, z, q, constants, W1, W2)
    kept = W1.new_empty(sum(map(_aligned, _kept_here(kind, place, save))))
    weights = (w.new_empty(w.shape) for w in (W1, W2) if w is not None)
    return [*weights, q.new_empty((*q.shape[:-1], kind.V)), kept]


def _shapes_backward(
    form: str, gain: float, eta_max: float, bound: list[float], *tensors: Any
) -> list[Tensor]:
    """What `_run_backward` returns, unwritten: for a compiler."""
    return [x.new_empty(x.shape) for x in tensors[:-3] if x is not None]


_OPTIONS = "str form, float gain, float eta_max, float[] bound"
_GIVEN = "Tensor z, Tensor q, Tensor constants, Tensor W1, Tensor? W2"
torch.library.custom_op(
    "nestlearn::selfmodify", _run, mutates_args=(),
    schema=f"({_OPTIONS}, bool save, {_GIVEN}) -> Tensor[]",
).register_fake(_shapes)  # fmt: skip
torch.library.custom_op(
    "nestlearn::selfmodify_backward", _run_backward, mutates_args=(),
    schema=f"({_OPTIONS}, {_GIVEN}, Tensor kept, Tensor[] after, Tensor[] grads) -> Tensor[]",
).register_fake(_shapes_backward)  # fmt: skip
