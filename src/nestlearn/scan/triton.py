"""The common chunk as GPU kernels: the algebra of `chunk`, one program for each memory.

Each matrix W of a memory has inputs x_t, u_t = −δ_t and, with n_t = max(1, ‖x_t‖²), the step sizes
r_t = η_t / n_t of the delta term and s_t = r_t or η_t of the gradient. With γ_t = Π α and W_0 x
known from the chunk's first weights,

    (I + L) w = s u − r γ₋ (W_0 x),    L_ts = r_t (γ₋_t / γ_s) (x_t · x_s) for s < t,
    W_t = γ_t W_0 + Σ_{s≤t} (γ_t / γ_s) w_s x_sᵀ,    γ₋_t = γ_{t−1}.

The forward pass saves w, (I + L)⁻¹ and the answers' hidden pre-activations; the backward pass
computes the rest again. What memories share (keys, gates) gets one partial gradient from each
memory, summed by torch: no atomics, so two runs give the same bits. Padding needs no care: a token
of zeros (x = u = η = log α = 0) writes nothing and keeps everything.

`supported` says what the kernels can run; everything else is `chunk`'s. For torch.compile forward
and backward are two operators, so that what surrounds them stays in one graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.memories import Matrix, MatrixMemory, Memory, ResidualMLP, Weights
from ..memory.objectives import Objective, dot_product, l2
from ..memory.rules import Gates, GradientRule, Rule, RuleState
from .tiles import (
    Kind,
    Place,
    _block,
    _dot,
    _dot_t,
    _gates,
    _inverse,
    _jit,
    _matrix,
    _part,
    _phi,
    _put,
    _put_row,
    _ratios,
    _row,
    _steps,
    _t_dot,
    _tile,
    _tokens,
)

# How products of float32 are made: "tf32" (10 bits), "tf32x3" (nearly float32) or "ieee" (without
# tensor cores, slow). None: "tf32" if torch.backends.cuda.matmul.fp32_precision allows it to
# torch's own products, else "tf32x3". The triangular system amplifies errors and has its own.
PRECISION: str | None = None
SYSTEM_PRECISION = "tf32x3"

MAX_TOKENS = 64
MAX_WIDTH = 64
# One warp group: with two, Triton gives each a whole tile of 64 rows instead of a half.
WARPS = 4
_empty = torch.empty  # makes every buffer; the tests put NaN into them


def supported(
    memory: Memory, rule: Rule, W: Weights, S: Any, q: Tensor | None, k: Tensor, v: Tensor,
    gates: Gates, *, at: Weights | None, objective: Objective, read: str, offset: int,
    first_order: bool = False, reader: int | None = None,
) -> bool:  # fmt: skip
    """Whether the kernels can run this chunk: from its start, no momentum, period 1, float32 state,
    a Matrix or an MLP of two matrices, all of it on the card.
    """
    if not isinstance(rule, GradientRule) or rule.momentum or rule.period != 1:
        return False
    if offset != 0 or first_order or (objective is not dot_product and objective is not l2):
        return False
    if not (isinstance(memory, Matrix) or (isinstance(memory, ResidualMLP) and memory.depth == 2)):
        return False
    given = [x for x in (q, k, v, *gates) if x is not None]
    small = max(max(shape) for shape in memory.shapes()) <= MAX_WIDTH and k.shape[-2] <= MAX_TOKENS
    wide = all(w.dtype == torch.float32 for w in W)
    narrow = all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in given)
    there = INTERPRETED or all(x.is_cuda for x in (*W, *given))
    return small and wide and narrow and there


def update(
    memory: MatrixMemory,
    rule: GradientRule,
    W: Weights,
    S: RuleState,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    at: Weights,
    objective: Objective,
    read: str,
    offset: int,
    first_order: bool = False,
    reader: int | None = None,
) -> tuple[Tensor | None, Weights, RuleState]:
    """See `nestlearn.scan.update`; for what is not `supported` it is not defined."""
    phi, gain, residual = "", 1.0, False
    if isinstance(memory, ResidualMLP):
        phi, gain, residual = memory.activation, memory.gain, memory.residual
    flags = (residual, objective is l2, rule.delta, rule.normalize)
    form = f"{phi},{read if q is not None else 'none'},{','.join(str(int(x)) for x in flags)}"
    given = (W[0], W[1] if phi else None, q, k, v, gates.eta, gates.log_alpha)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if save:
        outputs = _Chunk.apply(form, gain, reader, *given)
    else:
        outputs = _call("chunk", _run)(form, gain, reader, False, *given)[:-1]
    after, o = outputs[: len(W)], None if q is None else outputs[-1]
    return o, tuple(after), S


class _Chunk(torch.autograd.Function):
    """(W_1, W_2 if there is one, o if there is q) after the chunk."""

    @staticmethod
    def forward(ctx: Any, form: str, gain: float, reader: int | None, *given: Tensor | None):
        given = tuple(map(_contiguous, given))
        *outputs, kept = _call("chunk", _run)(form, gain, reader, True, *given)
        ctx.options = form, gain, reader
        ctx.save_for_backward(*given, kept)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        *given, kept = ctx.saved_tensors
        found = _call("chunk_backward", _run_backward)(*ctx.options, *given, kept, grads)
        rest = iter(found)
        return None, None, None, *(None if x is None else next(rest) for x in given)


def _call(name: str, run: Callable) -> Callable:
    """`run`, or under a compiler the operator of that name, into which it does not look."""
    return getattr(torch.ops.nestlearn, name) if torch.compiler.is_compiling() else run


def _plan(
    form: str, gain: float, reader: int | None, W1: Tensor, W2: Tensor | None, q: Tensor | None,
    k: Tensor, v: Tensor, eta: Tensor, log_alpha: Tensor | None,
) -> tuple[Kind, Place, list[Any]]:  # fmt: skip
    """What to launch, and the inputs with the axes that the kernels index."""
    lead, T = tuple(W1.shape[:-2]), k.shape[-2]
    own = tuple(map(max, *(_axes(x, lead) for x in (k[..., 0], eta, log_alpha) if x is not None)))
    shared, inner = _shared(lead, own)
    if shared == 0:  # shared in a pattern that the kernels cannot index
        own, shared, inner = lead, 1, 1
    answering = lead if reader is None else lead[:-1]
    groups, reader = (1, 0) if reader is None else (lead[-1], reader % lead[-1])
    place = Place(math.prod(lead), T, shared, inner, groups, reader)
    asked = torch.backends.cuda.matmul.fp32_precision
    dot = PRECISION or ("tf32" if asked == "tf32" else "tf32x3")
    (H, K), V = W1.shape[-2:], (W1 if W2 is None else W2).shape[-2]
    kind = _kind(form, float(gain), K, H, V, log_alpha is not None, T, dot)
    axes = ((q, answering), (k, own), (v, lead))
    tokens = (None if x is None else x.expand(*b, *x.shape[-2:]) for x, b in axes)
    rows = (None if x is None else x.expand(*own, T) for x in (eta, log_alpha))
    return kind, place, [W1, W2, *tokens, *rows]


def _axes(x: Tensor, lead: tuple[int, ...]) -> tuple[int, ...]:
    """Leading axes of x [*c, T], as many as `lead` has."""
    return (1,) * (len(lead) + 1 - x.ndim) + tuple(x.shape[:-1])


def _shared(lead: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, int]:
    """Sizes of the axes that are shared and of those after them; (0, 0) if they are scattered."""
    axes = [i for i, (a, b) in enumerate(zip(lead, own)) if a != b]
    if not axes:
        return 1, 1
    block = slice(axes[0], axes[-1] + 1)
    if math.prod(own[block]) != 1:
        return 0, 0
    return math.prod(lead[block]), math.prod(lead[block.stop :])


@lru_cache
def _kind(
    form: str, gain: float, K: int, H: int, V: int, decay: bool, tokens: int, dot: str
) -> Kind:
    phi, read, *flags = form.split(",")
    residual, is_l2, delta, normalize = (flag == "1" for flag in flags)
    return Kind(
        K, H, V, phi != "", phi, gain, residual, is_l2, delta, decay, normalize, read,
        _block(tokens), dot, SYSTEM_PRECISION,
    )  # fmt: skip


def _kept(kind: Kind, place: Place, save: bool) -> list[int]:
    """Sizes of what the forward pass makes for itself and the backward pass: (I + L)⁻¹ of all
    systems, w of each matrix, the answers' hidden pre-activations.
    """
    second, hidden = int(kind.mlp), int(kind.mlp and kind.read == "token")
    rows = place.N * place.T * int(save)
    return [
        _systems(kind, place) * kind.BT**2 * int(kind.delta), rows * kind.H,
        rows * kind.V * second, rows // place.groups * kind.H * hidden,
    ]  # fmt: skip


def _systems(kind: Kind, place: Place) -> int:
    """How many (I + L)⁻¹: one for each set of keys, for an MLP also one for each memory."""
    return place.N // place.shared + place.N * int(kind.mlp)


def _run(form: str, gain: float, reader: int | None, save: bool, *given: Any) -> list[Tensor]:
    """The chunk: outputs as in `_Chunk`, then one buffer with what `_kept` lists."""
    kind, place, inputs = _plan(form, gain, reader, *given)
    W1, W2, q, k, v, eta, log_alpha = map(_contiguous, inputs)
    V1, V2 = (None if w is None else _empty(w.shape, **_like(w)) for w in (W1, W2))
    o = None if q is None else _empty((*q.shape[:-1], kind.V), **_like(q))
    kept, (inverses, w1, w2, hidden) = _pieces(W1, _kept(kind, place, save))
    if kind.delta:
        _launch(_invert, _systems(kind, place), kind, place, W1, k, eta, log_alpha, inverses)
    _launch(
        _forward, place.N, kind, place,
        W1, W2, q, k, v, eta, log_alpha, inverses, o, V1, V2, w1, w2, hidden,
    )  # fmt: skip
    return [x for x in (V1, V2, o, kept) if x is not None]


def _run_backward(form: str, gain: float, reader: int | None, *tensors: Any) -> list[Tensor]:
    """Gradients of the inputs that there are, from inputs, kept and the outputs' gradients."""
    *given, kept, grads = tensors
    kind, place, inputs = _plan(form, gain, reader, *given)
    W1, W2, q, k, v, eta, log_alpha = map(_contiguous, inputs)
    *dVs, do = map(_contiguous, grads if q is not None else (*grads, None))
    dV1, dV2 = dVs if kind.mlp else (*dVs, None)
    inverses, w1, w2, hidden = _split(kept, _kept(kind, place, True))
    N, T, second = place.N, place.T, int(kind.mlp)
    H, V = N * T * kind.H, N * T * kind.V
    asked = N // place.groups * T * (kind.read == "token")
    dW1, dW2, dq = (None if x is None else _empty(x.shape, **_like(x)) for x in (W1, W2, q))
    dk, dv = _empty((N, T, kind.K), **_like(W1)), _empty((N, T, kind.V), **_like(W1))
    deta, dlog = (None if x is None else _empty((N, T), **_like(W1)) for x in (eta, log_alpha))
    _, (e1, e2, dh, a, rows, dw1, dw2, dk_read, dh_read, dg_read) = _pieces(W1, [
        H, V * second, H * second, H * second, 2 * N * T * (1 + second),
        asked * kind.H, asked * kind.V * second, asked * kind.K, asked * kind.H * second, asked,
    ])  # fmt: skip
    if q is not None:
        _launch(
            _backward_read, N // place.groups, kind, place,
            W1, W2, q, k, log_alpha, w1, w2, hidden, do,
            dq, dW1, dW2, dw1, dw2, dk_read, dh_read, dg_read,
        )  # fmt: skip
    _launch(
        _backward_systems, N * (1 + second), kind, place,
        W1, W2, k, eta, log_alpha, inverses, w1, w2, dV1, dV2, dw1, dw2, dk_read, dh_read,
        e1, e2, dk, dh, rows, a,
    )  # fmt: skip
    _launch(
        _backward_factors, N, kind, place,
        W1, W2, k, v, eta, log_alpha, a, dV1, dV2, e1, e2, dh, rows, dg_read,
        dW1, dW2, dk, dv, deta, dlog,
    )  # fmt: skip
    dk_own, deta_own, dlog_own = (_over_shared(x, place) for x in (dk, deta, dlog))
    found = zip((dW1, dW2, dq, dk_own, dv, deta_own, dlog_own), inputs, given)
    return [
        dx.view(x.shape).sum_to_size(like.shape).to(like.dtype)
        for dx, x, like in found
        if dx is not None
    ]


def _shapes(form: str, gain: float, reader: int | None, save: bool, *given: Any) -> list[Tensor]:
    """What `_run` returns, unwritten: for a compiler."""
    kind, place, (W1, W2, q, *_) = _plan(form, gain, reader, *given)
    o = None if q is None else q.new_empty((*q.shape[:-1], kind.V))
    kept = W1.new_empty(sum(map(_aligned, _kept(kind, place, save))))
    weights = (None if w is None else w.new_empty(w.shape) for w in (W1, W2))
    return [x for x in (*weights, o, kept) if x is not None]


def _shapes_backward(form: str, gain: float, reader: int | None, *tensors: Any) -> list[Tensor]:
    """What `_run_backward` returns, unwritten: for a compiler."""
    return [x.new_empty(x.shape) for x in tensors[:-2] if x is not None]


_OPTIONS = "str form, float gain, int? reader"
_GIVEN = "Tensor W1, Tensor? W2, Tensor? q, Tensor k, Tensor v, Tensor eta, Tensor? log_alpha"
torch.library.custom_op(
    "nestlearn::chunk", _run, mutates_args=(),
    schema=f"({_OPTIONS}, bool save, {_GIVEN}) -> Tensor[]",
).register_fake(_shapes)  # fmt: skip
torch.library.custom_op(
    "nestlearn::chunk_backward", _run_backward, mutates_args=(),
    schema=f"({_OPTIONS}, {_GIVEN}, Tensor kept, Tensor[] grads) -> Tensor[]",
).register_fake(_shapes_backward)  # fmt: skip


def _contiguous(x: Any) -> Any:
    return None if x is None else x.contiguous()


def _like(x: Tensor) -> dict[str, Any]:
    return {"device": x.device, "dtype": x.dtype}


def _aligned(n: int) -> int:
    return (n + 3) // 4 * 4  # the kernels load 16 bytes at a time


def _pieces(where: Tensor, sizes: list[int]) -> tuple[Tensor, list[Tensor | None]]:
    """A buffer not yet written, and its parts of so many numbers each (None for 0)."""
    flat = _empty((sum(map(_aligned, sizes)),), **_like(where))
    return flat, _split(flat, sizes)


def _split(flat: Tensor, sizes: list[int]) -> list[Tensor | None]:
    parts = flat.split([_aligned(n) for n in sizes])
    return [x if n else None for x, n in zip(parts, sizes)]


def _over_shared(x: Tensor | None, place: Place) -> Tensor | None:
    """One partial gradient for each memory, summed over the memories that share the input."""
    if x is None or place.shared == 1:
        return x
    return torch.sum(x.view(-1, place.shared, place.inner, x[0].numel()), 1)


def _launch(
    kernel: Any, programs: int, kind: Kind, place: Place, first: Tensor, *others: Tensor | None
) -> None:
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](first, *others, *place, kind=kind, num_warps=WARPS, num_stages=1)


@_jit
def _invert(
    W1, k, eta, log_alpha, inverses, N, T, shared, inner, groups, reader, kind: tl.constexpr
):
    """(I + L)⁻¹ of the first matrix for each set of keys, then of the second for each memory."""
    system = tl.program_id(0).to(tl.int64)
    n = system - N // shared
    if n < 0:
        c = system
        key = _tokens(k, c, T, kind.K, kind.BT)
        norm2 = tl.sum(key * key, 1)
        overlap = _dot_t(key, key, kind, True)
    else:
        c = n // (shared * inner) * inner + n % inner
        weight1 = _matrix(W1, n, kind.H, kind.K)
        h = _phi(_dot_t(_tokens(k, c, T, kind.K, kind.BT), weight1, kind), kind)
        norm2 = tl.sum(h * h, 1)
        overlap = _dot_t(h, h, kind, True)
    step, log, g = _gates(eta, log_alpha, c, T, kind)
    r, _ = _steps(norm2, step, kind)
    lower = r[:, None] * _ratios(g - log, g, True) * overlap
    _put(inverses, system, kind.BT, kind.BT, _inverse(lower, kind))


@_jit
def _forward(
    W1, W2, q, k, v, eta, log_alpha, inverses, o, V1, V2, w1, w2, hidden,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """The writes w and W after them, and the answers."""
    n = tl.program_id(0).to(tl.int64)
    c = n // (shared * inner) * inner + n % inner
    step, log, g = _gates(eta, log_alpha, c, T, kind)
    fade = tl.exp(g - log)
    key = _tokens(k, c, T, kind.K, kind.BT)
    a = _dot_t(key, _matrix(W1, n, kind.H, kind.K), kind)
    r, s = _steps(tl.sum(key * key, 1), step, kind)
    # A program holds few tiles: each is loaded where it is used, and again rather than kept.
    u = _tokens(v, n, T, kind.V, kind.BT)
    if kind.mlp:
        h = _phi(a, kind)
        u, y = _last(u, h, W2, k, n, c, T, kind)
        r2, s2 = _steps(tl.sum(h * h, 1), step, kind)
        write2 = s2[:, None] * u
        if kind.delta:
            write2 -= (r2 * fade)[:, None] * y
        u = _dot(u, _matrix(W2, n, kind.V, kind.H, True), kind) * _phi(a, kind, 1)
    elif kind.l2:
        u -= a
    write = s[:, None] * u
    if kind.delta:
        write -= (r * fade)[:, None] * a
    if kind.mlp:
        if kind.delta:
            inverse = _matrix(inverses, N // shared + n, kind.BT, kind.BT)
            write2 = _dot(inverse, write2, kind, True)
        if w2 is not None:
            _put(w2, n, T, kind.V, write2)
        weight = _matrix(W2, n, kind.V, kind.H, True)
        _put(V2, n, kind.V, kind.H, _written(weight, h, write2, g, log, kind))
    if kind.delta:
        write = _dot(_matrix(inverses, c, kind.BT, kind.BT), write, kind, True)
    if w1 is not None:
        _put(w1, n, T, kind.H, write)
    key = _tokens(k, c, T, kind.K, kind.BT, True)
    weight = _matrix(W1, n, kind.H, kind.K, True)
    _put(V1, n, kind.H, kind.K, _written(weight, key, write, g, log, kind))

    if kind.read != "none":
        i = n // groups
        if n % groups == reader:
            query = _tokens(q, i, T, kind.K, kind.BT)
            answer = _read(query, weight, key, write, g, kind)
            if kind.mlp:
                if hidden is not None:
                    _put(hidden, i, T, kind.H, answer)
                z = _phi(answer, kind)
                answer = _read(z, _matrix(W2, n, kind.V, kind.H), h, write2, g, kind)
                if kind.residual:
                    answer += query
            _put(o, i, T, kind.V, answer)


@_jit
def _backward_read(
    W1, W2, q, k, log_alpha, w1, w2, hidden, do,
    dq, dW1, dW2, dw1, dw2, dk_read, dh_read, dg_read,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """What the answers ask of W_0, the writes w, the inputs x and log γ; i counts the readers."""
    i = tl.program_id(0).to(tl.int64)
    n = i * groups + reader
    c = n // (shared * inner) * inner + n % inner
    _, _, g = _gates(None, log_alpha, c, T, kind)
    asked = _tokens(do, i, T, kind.V, kind.BT)
    dg = tl.zeros_like(g)
    if kind.mlp:
        if kind.read == "token":
            a = _tokens(hidden, i, T, kind.H, kind.BT)
        else:
            query = _tokens(q, i, T, kind.K, kind.BT)
            a = _dot_t(query, _matrix(W1, n, kind.H, kind.K), kind)
        z = _phi(a, kind)
        dz, dweight = _asked_of_start(asked, z, _matrix(W2, n, kind.V, kind.H), g, kind)
        _put(dW2, n, kind.V, kind.H, dweight)
        if kind.read == "token":
            key = _tokens(k, c, T, kind.K, kind.BT)
            h = _phi(_dot_t(key, _matrix(W1, n, kind.H, kind.K), kind), kind)
            write = _tokens(w2, n, T, kind.V, kind.BT)
            dz, dg = _asked_of_writes(
                asked, z, h, write, g, dz, dw2, dh_read, i, T, kind.V, kind.H, kind
            )
            a = _tokens(hidden, i, T, kind.H, kind.BT, True)
        asked = dz * _phi(a, kind, 1)
    query = _tokens(q, i, T, kind.K, kind.BT, True)
    weight = _matrix(W1, n, kind.H, kind.K, True)
    dz, dweight = _asked_of_start(asked, query, weight, g, kind)
    _put(dW1, n, kind.H, kind.K, dweight)
    if kind.read == "token":
        key = _tokens(k, c, T, kind.K, kind.BT, True)
        write = _tokens(w1, n, T, kind.H, kind.BT)
        dz, dg1 = _asked_of_writes(
            asked, query, key, write, g, dz, dw1, dk_read, i, T, kind.H, kind.K, kind
        )
        _put_row(dg_read, i, T, dg + dg1)
    if kind.residual:
        dz += _tokens(do, i, T, kind.V, kind.BT, True)
    _put(dq, i, T, kind.K, dz)


@_jit
def _backward_systems(
    W1, W2, k, eta, log_alpha, inverses, w1, w2, dV1, dV2, dw1, dw2, dk_read, dh_read,
    e1, e2, dk, dh, rows, hidden,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """`_unsolve` for each matrix of each memory. Keeps a and, in `rows`, dr and dγ of each."""
    second = tl.program_id(0) >= N
    n = (tl.program_id(0) % N).to(tl.int64)
    c = n // (shared * inner) * inner + n % inner
    i = n // groups
    asked = tl.where(n % groups == reader, T, 0)  # tokens that asked this memory
    gates = _gates(eta, log_alpha, c, T, kind)
    key = _tokens(k, c, T, kind.K, kind.BT)
    if second:
        if kind.mlp:
            a = _dot_t(key, _matrix(W1, n, kind.H, kind.K), kind)
            _put(hidden, n, T, kind.H, a)
            h = _phi(a, kind)
            _unsolve(
                h, gates, W2, w2, inverses, N // shared + n, dV2, dw2, dh_read,
                e2, dh, rows + 2 * N * T, n, N, T, i, asked, kind.V, kind.H, kind,
            )  # fmt: skip
    else:
        _unsolve(
            key, gates, W1, w1, inverses, c, dV1, dw1, dk_read,
            e1, dk, rows, n, N, T, i, asked, kind.H, kind.K, kind,
        )  # fmt: skip


@_jit
def _backward_factors(
    W1, W2, k, v, eta, log_alpha, hidden, dV1, dV2, e1, e2, dh, rows, dg_read,
    dW1, dW2, dk, dv, deta, dlog,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """Through u and W_0 x, which the chunk's first weights made of keys and values."""
    n = tl.program_id(0).to(tl.int64)
    c = n // (shared * inner) * inner + n % inner
    answered = n % groups == reader  # then dW holds what the answers asked
    step, log, g = _gates(eta, log_alpha, c, T, kind)
    fade, kept = tl.exp(g - log), tl.exp(tl.sum(log, 0))
    key = _tokens(k, c, T, kind.K, kind.BT)
    norm2 = tl.sum(key * key, 1)
    r, s = _steps(norm2, step, kind)
    # A program holds few tiles: each is loaded where it is used, and u waits in dv.
    u = _tokens(v, n, T, kind.V, kind.BT)
    if kind.mlp:
        h = _phi(_tokens(hidden, n, T, kind.H, kind.BT), kind)
        u, y = _last(u, h, W2, k, n, c, T, kind)
        norm2_h = tl.sum(h * h, 1)
        r2, s2 = _steps(norm2_h, step, kind)
        dstep2, dg2, dbefore2, along2 = _right_side(
            _tokens(e2, n, T, kind.V, kind.BT), u, y, norm2_h, r2, fade, rows, 2 * N + n, N, T, kind
        )
        _put(dv, n, T, kind.V, u)
        u = _dot(u, _matrix(W2, n, kind.V, kind.H, True), kind)
        a = _tokens(hidden, n, T, kind.H, kind.BT, True)
        bent = u * _phi(a, kind, 2)
        slope = _phi(a, kind, 1)
        u *= slope
    else:
        a = u
        if kind.l2 or kind.delta:
            a = _dot_t(key, _matrix(W1, n, kind.H, kind.K), kind)
        if kind.l2:
            u -= a
    e = _tokens(e1, n, T, kind.H, kind.BT)
    dstep, dg, dbefore, along = _right_side(e, u, a, norm2, r, fade, rows, n, N, T, kind)
    du = s[:, None] * e
    da = tl.zeros_like(e)
    if kind.delta:
        da -= (r * fade)[:, None] * e
    if kind.mlp:
        dstep, dg, dbefore = dstep + dstep2, dg + dg2, dbefore + dbefore2
        da += du * bent
        du *= slope
        tl.debug_barrier()
        dweight = _t_dot(_tokens(dv, n, T, kind.V, kind.BT), du, kind)
        du = _dot_t(du, _matrix(W2, n, kind.V, kind.H, True), kind)
        e = _tokens(e2, n, T, kind.V, kind.BT)
        du += s2[:, None] * e
        tl.debug_barrier()
    _put(dv, n, T, kind.V, du)
    key = _tokens(k, c, T, kind.K, kind.BT, True)
    dkey = _tokens(dk, n, T, kind.K, kind.BT) + along[:, None] * key
    if kind.mlp:
        dy = tl.zeros_like(e)
        if kind.delta:
            dy -= (r2 * fade)[:, None] * e
        if kind.l2:
            dy -= du
            if kind.residual:
                dkey -= du
        dhidden = _tokens(dh, n, T, kind.H, kind.BT)
        if kind.l2 or kind.delta:
            dhidden += _dot(dy, _matrix(W2, n, kind.V, kind.H), kind)
        a = _tokens(hidden, n, T, kind.H, kind.BT)
        h = _phi(a, kind)
        if kind.l2 or kind.delta:
            dweight += _t_dot(dy, h, kind)
        dweight += kept * _matrix(dV2, n, kind.V, kind.H)
        if kind.read != "none":
            dweight += _part(dW2, n, answered, kind.V, kind.H)
        _put(dW2, n, kind.V, kind.H, dweight)
        dhidden += along2[:, None] * h
        da += dhidden * _phi(a, kind, 1)
    elif kind.l2:
        da -= du
    dweight = kept * _matrix(dV1, n, kind.H, kind.K)
    if kind.read != "none":
        dweight += _part(dW1, n, answered, kind.H, kind.K)
    if kind.mlp or kind.l2 or kind.delta:
        dweight += _t_dot(da, _tokens(k, c, T, kind.K, kind.BT), kind)
        dkey += _dot(da, _matrix(W1, n, kind.H, kind.K, True), kind)
    _put(dW1, n, kind.H, kind.K, dweight)
    _put(dk, n, T, kind.K, dkey)
    _put_row(deta, n, T, dstep)
    if kind.decay:
        if kind.read == "token":
            dg += _row(dg_read, n // groups, tl.where(answered, T, 0), T, kind.BT)
        # log γ_t sums log α up to t; log γ₋_t lacks the last of them
        _put_row(dlog, n, T, tl.cumsum(dg, 0, reverse=True) - dbefore)


@_jit
def _unsolve(
    x, gates, W, w, inverses, system, dV, dw, dx_read, e, dx, rows, n, N, T, i, asked,
    OUT: tl.constexpr, IN: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """From the gradients of W_C and w (what the answers asked) to e, that of the right side, and to
    x, r and log γ as far as W_C, the answers and L hold them; the right side's own follow later.
    """
    step, log, g = gates
    # W_C = γ_C W_0 + Σ_s (γ_C/γ_s) w_s x_sᵀ
    total = tl.sum(log, 0)
    left = tl.exp(total - g)
    dnew = _matrix(dV, n, OUT, IN)
    dinput = left[:, None] * _dot(_tokens(w, n, T, OUT, kind.BT), dnew, kind)
    dg = -tl.sum(x * dinput, 1)
    kept = tl.sum(tl.sum(_matrix(W, n, OUT, IN) * dnew, 1), 0)
    last = tl.arange(0, kind.BT) == T - 1
    dg += tl.where(last, tl.exp(total) * kept - tl.sum(dg, 0), 0.0)
    dwrite = left[:, None] * _dot_t(x, dnew, kind)
    if kind.read == "token":
        dwrite += _tile(dw, i, asked, T, OUT, kind.BT, _block(OUT))
        dinput += _tile(dx_read, i, asked, T, IN, kind.BT, _block(IN))
    dr = tl.zeros_like(g)
    if kind.delta:
        # (I + L) w = f:  e = df = (I + L)⁻ᵀ dw,  dL = −e wᵀ
        dwrite = _t_dot(_matrix(inverses, system, kind.BT, kind.BT), dwrite, kind, True)
    _put(e, n, T, OUT, dwrite)
    if kind.delta:
        r, _ = _steps(tl.sum(x * x, 1), step, kind)
        write = _tokens(w, n, T, OUT, kind.BT)  # again: registers are few
        dlower = -_dot_t(dwrite, write, kind) * _ratios(g - log, g, True)
        parts = dlower * _dot_t(x, x, kind)
        dr += tl.sum(parts, 1)
        dg -= tl.sum(r[:, None] * parts, 0)
        dlower *= r[:, None]
        dinput += _dot(dlower + tl.trans(dlower), x, kind)
    _put(dx, n, T, IN, dinput)
    _put_row(rows, n, T, dr)
    _put_row(rows, N + n, T, dg)


@_jit
def _right_side(e, u, found, norm2, r, fade, rows, n, N, T, kind: tl.constexpr):
    """From e, the gradient of s u − r γ₋ (W_0 x), to those of η, log γ and log γ₋, and the factor
    of x in its own gradient through ‖x‖²; adds what `rows` has from `_unsolve`.
    """
    dr, dg = _row(rows, n, T, T, kind.BT), _row(rows, N + n, T, T, kind.BT)
    dbefore = tl.zeros_like(dr)
    if kind.delta:
        dr -= fade * tl.sum(e * found, 1)
        dbefore = r * dr
        dg += dbefore
    inv = 1.0 / tl.maximum(norm2, 1.0)
    dstep = tl.sum(e * u, 1)
    if kind.normalize:
        dr += dstep
        dstep = inv * dr
    else:
        dstep += inv * dr
    along = tl.where(norm2 >= 1.0, -2.0 * r * inv * dr, 0.0)
    return dstep, dg, dbefore, along


@_jit
def _last(u, h, W2, k, n, c, T, kind: tl.constexpr):
    """u and W_0 x of an MLP's second matrix, from v and its input h."""
    y = u
    if kind.l2 or kind.delta:
        y = _dot_t(h, _matrix(W2, n, kind.V, kind.H), kind)
    if kind.l2:
        u -= y
        if kind.residual:
            u -= _tokens(k, c, T, kind.K, kind.BT, True)
    return u, y


@_jit
def _written(weight, x, write, g, log, kind: tl.constexpr):
    """W_C."""
    total = tl.sum(log, 0)
    left = tl.exp(total - g)
    return tl.exp(total) * weight + _t_dot(left[:, None] * write, x, kind)


@_jit
def _read(z, weight, x, write, g, kind: tl.constexpr):
    """W_t z_t, or W_0 z_t at the boundary."""
    answer = _dot_t(z, weight, kind)
    if kind.read == "token":
        seen = _ratios(g, g, False) * _dot_t(z, x, kind)
        answer = tl.exp(g)[:, None] * answer + _dot(seen, write, kind)
    return answer


@_jit
def _asked_of_start(asked, z, weight, g, kind: tl.constexpr):
    """Gradients of z and W_0 from γ_t W_0 z_t, or from W_0 z_t at the boundary."""
    if kind.read == "token":
        asked = tl.exp(g)[:, None] * asked
    return _dot(asked, weight, kind), _t_dot(asked, z, kind)


@_jit
def _asked_of_writes(
    asked, z, x, write, g, dz, dw, dx, i, T,
    OUT: tl.constexpr, IN: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Adds Σ_s (γ_t/γ_s) (x_s·z_t) w_s: stores gradients of w and x, gives those of z, log γ."""
    dg = tl.sum(z * dz, 1)
    seen = _ratios(g, g, False) * _dot_t(z, x, kind)
    _put(dw, i, T, OUT, _t_dot(seen, asked, kind))
    dseen = _dot_t(asked, write, kind)
    seen *= dseen
    dg += tl.sum(seen, 1) - tl.sum(seen, 0)
    dseen *= _ratios(g, g, False)
    dz += _dot(dseen, x, kind)
    _put(dx, i, T, IN, _t_dot(dseen, z, kind))
    return dz, dg


INTERPRETED = not isinstance(_forward, triton.JITFunction)
