"""The common chunk as GPU kernels: the algebra of `parallel`, one program for each memory.

Each matrix W of a memory has inputs x_t, u_t = −δ_t and, with n_t = max(1, ‖x_t‖²), the step sizes
r_t = η_t / n_t of the delta term and s_t = r_t or η_t of the gradient. With γ_t = Π α and W_0 x
known from the chunk's first weights,

    (I + L) w = s u − r γ₋ (W_0 x),    L_ts = r_t (γ₋_t / γ_s) (x_t · x_s) for s < t,
    W_t = γ_t W_0 + Σ_{s≤t} (γ_t / γ_s) w_s x_sᵀ,    γ₋_t = γ_{t−1}.

The forward pass saves w, (I + L)⁻¹, u and the hidden pre-activations of keys and answers; the
backward pass computes the rest again. What memories share (keys, gates) gets one partial gradient
from each memory, summed by torch: no atomics, so two runs give the same bits. Padding needs no
care: a token of zeros (x = u = η = log α = 0) writes nothing and keeps everything. The kernels
stand in `kernels`.

`why_not` says what the kernels cannot run. For torch.compile forward and backward are two
operators, so that what surrounds them stays in one graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...memory.memories import Matrix, ResidualMLP, Weights
from ...memory.objectives import dot_product, l2
from ...memory.rules import Gates, GradientRule, RuleState
from ..chunk import Chunk, Given
from .kernels import (
    WARPS,
    _answer,
    _backward_factors,
    _backward_read,
    _backward_systems,
    _forward,
    _invert,
)
from .tiles import INTERPRETED, Kind, Place, _block

# How products of float32 are made: "bf16" (7 bits, summed in float32), "tf32" (10 bits), "tf32x3"
# (nearly float32) or "ieee" (without tensor cores, slow). None: "bf16" where autocast makes
# torch's own products so, "tf32" where torch.backends.cuda.matmul.fp32_precision does, else
# "tf32x3". The triangular system amplifies errors and has its own, with bf16 around it "tf32".
PRECISION: str | None = None
SYSTEM_PRECISION = "tf32x3"

# Widths up to which an autocast to bfloat16 means "tf32x3": for these Triton 3.6 makes kernels of
# "bf16" that reach beyond memory (seen on an H200 at 32; at 64 they do not).
NARROW = 32

MAX_TOKENS = 64
MAX_WIDTH = 64
_empty = torch.empty  # makes every buffer; the tests put NaN into them


def why_not(chunk: Chunk, given: Given) -> str | None:
    """What keeps the kernels from running this call: they take whole chunks or their beginnings,
    no momentum, period 1, a float32 state, a Matrix or an MLP of two matrices, all on the card.
    """
    memory, rule = chunk.memory, chunk.rule
    if not isinstance(rule, GradientRule) or rule.momentum or rule.period != 1:
        return "the kernels have no such rule"
    if given.offset != 0 or chunk.first_order:
        return "the call begins inside a chunk, or is first_order"
    if chunk.aim is not dot_product and chunk.aim is not l2:
        return "the objective is neither dot product nor L2"
    if not (isinstance(memory, Matrix) or (isinstance(memory, ResidualMLP) and memory.depth == 2)):
        return f"the kernels write a Matrix or an MLP of two matrices, not {memory!r}"
    if max(max(shape) for shape in memory.shapes()) > MAX_WIDTH or given.k.shape[-2] > MAX_TOKENS:
        return f"a width above {MAX_WIDTH} or a chunk above {MAX_TOKENS} tokens"
    some = [x for x in (given.q, given.k, given.v, *given.gates) if x is not None]
    wide = all(w.dtype == torch.float32 for w in given.W)
    narrow = all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in some)
    if not (wide and narrow):
        return "a state or an input is neither float32 nor narrower"
    if not (INTERPRETED.value or all(x.is_cuda for x in (*given.W, *some))):
        return "a tensor is not on CUDA"
    return None


def options() -> dict[str, Any]:
    """The precision of products, as the caller's autocast says it."""
    return {"dot": precision()}


def update(
    chunk: Chunk,
    W: Weights,
    S: RuleState,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    at: Weights,
    offset: int,
    dot: str = "",
) -> tuple[Tensor | None, Weights, RuleState]:
    """See `nestlearn.scan.update`; for calls that have a `why_not` it is not defined.

    dot: what `precision()` said where the caller's autocast still held.
    """
    form, gain = _form(chunk, dot, asked=q is not None)
    given = (W[0], W[1] if len(W) > 1 else None, q, k, v, gates.eta, gates.log_alpha)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if save:
        outputs = _Chunk.apply(form, gain, chunk.answering, *given)
    else:
        outputs = _call("chunk", _run)(form, gain, chunk.answering, False, *given)[:-1]
    after, o = outputs[: len(W)], None if q is None else outputs[-1]
    return o, tuple(after), S


def precision() -> str:
    """ "bf16" under an autocast to it, else "": asked before autocast is turned off."""
    on = torch.is_autocast_enabled("cuda")
    return "bf16" if on and torch.get_autocast_dtype("cuda") == torch.bfloat16 else ""


def _form(chunk: Chunk, dot: str, asked: bool = True) -> tuple[str, float]:
    """What `_kind` needs to know, and the gain."""
    memory, rule, phi, gain, residual = chunk.memory, chunk.rule, "", 1.0, False
    assert isinstance(rule, GradientRule)
    if isinstance(memory, ResidualMLP):
        phi, gain, residual = memory.activation, memory.gain, memory.residual
    flags = (residual, chunk.aim is l2, rule.delta, rule.normalize)
    read = chunk.read if asked else "none"
    return ",".join((phi, read, *(str(int(x)) for x in flags), dot)), gain


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
    (H, K), V = W1.shape[-2:], (W1 if W2 is None else W2).shape[-2]
    kind = _kind(form, float(gain), K, H, V, log_alpha is not None, T, *_precisions(form, K, H, V))
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


def _precisions(form: str, *widths: int) -> tuple[str, str]:
    """Of the products and of the system."""
    torchs = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    autocasts = form.rpartition(",")[2]
    if autocasts and max(widths) <= NARROW:
        autocasts = "tf32x3"
    dot = PRECISION or autocasts or torchs
    return dot, "tf32" if dot == "bf16" else SYSTEM_PRECISION


@lru_cache
def _kind(
    form: str, gain: float, K: int, H: int, V: int, decay: bool, tokens: int, dot: str,
    system: str, **options: Any,
) -> Kind:  # fmt: skip
    phi, read, *flags = form.split(",")
    residual, is_l2, delta, normalize = (flag == "1" for flag in flags[:4])
    return Kind(
        K, H, V, phi != "", phi, gain, residual, is_l2, delta, decay, normalize, read,
        _block(tokens), dot, system, _block(tokens) == tokens, **options,
    )  # fmt: skip


def _kept(kind: Kind, place: Place, save: bool) -> list[int]:
    """Sizes of what the kernels leave for each other and the backward pass: (I + L)⁻¹ of all
    systems, w of each matrix, the answers' hidden pre-activations, those of the keys, and u of the
    last matrix where it is not simply v.
    """
    second, token = int(kind.mlp), int(kind.read == "token")
    hidden, aims = second * token, int(kind.own or (kind.mlp and kind.l2))
    tokens = place.N * place.T
    rows, writes = tokens * int(save), tokens * int(save or token)
    return [
        _systems(kind, place) * kind.BT**2 * int(kind.delta), writes * kind.H,
        writes * kind.V * second, rows // place.groups * kind.H * hidden,
        tokens * kind.H * second * int(save or kind.delta or token), rows * kind.V * aims,
    ]  # fmt: skip


def _systems(kind: Kind, place: Place) -> int:
    """How many (I + L)⁻¹: one for each set of keys, for an MLP also one for each memory."""
    return place.N // place.shared + place.N * int(kind.mlp)


def _run(form: str, gain: float, reader: int | None, save: bool, *given: Any) -> list[Tensor]:
    """The chunk: outputs as in `_Chunk`, then one buffer with what `_kept` lists."""
    kind, place, inputs = _plan(form, gain, reader, *given)
    W1, W2, q, k, v, eta, log_alpha = map(_contiguous, inputs)
    V1, V2 = (None if w is None else _new(w.shape, w) for w in (W1, W2))
    o = None if q is None else _new((*q.shape[:-1], kind.V), q)
    kept, (inverses, w1, w2, hidden, before, aims) = _pieces(W1, _kept(kind, place, save))
    if kind.delta:
        _launch(
            _invert, _systems(kind, place), kind, place, W1, k, eta, log_alpha, inverses, before
        )
    _launch(
        _forward, place.N, kind, place,
        W1, W2, k, v, eta, log_alpha, inverses, None, V1, V2, w1, w2, before, aims, None, None,
        None,
    )  # fmt: skip
    if q is not None:
        _launch(
            _answer, place.N // place.groups, kind, place,
            W1, W2, q, k, log_alpha, w1, w2, before, o, hidden,
            _dense(place.T, kind.K), _dense(place.T, kind.V),
        )  # fmt: skip
    return [x for x in (V1, V2, o, kept) if x is not None]


def _run_backward(form: str, gain: float, reader: int | None, *tensors: Any) -> list[Tensor]:
    """Gradients of the inputs that there are, from inputs, kept and the outputs' gradients."""
    *given, kept, grads = tensors
    kind, place, inputs = _plan(form, gain, reader, *given)
    W1, W2, q, k, v, eta, log_alpha = map(_contiguous, inputs)
    *dVs, do = map(_contiguous, grads if q is not None else (*grads, None))
    dV1, dV2 = dVs if kind.mlp else (*dVs, None)
    inverses, w1, w2, hidden, before, aims = _split(kept, _kept(kind, place, True))
    N, T, second = place.N, place.T, int(kind.mlp)
    H, V = N * T * kind.H, N * T * kind.V
    readers = N // place.groups * int(kind.read != "none")
    asked = readers * T * int(kind.read == "token")
    dW1, dW2, dq = (None if x is None else _new(x.shape, x) for x in (W1, W2, q))
    dk, dv = _new((N, T, kind.K), W1), _new((N, T, kind.V), W1)
    deta, dlog = (None if x is None else _new((N, T), W1) for x in (eta, log_alpha))
    _, (e1, e2, dh, rows, dW1_read, dW2_read, dw1, dw2, dk_read, dh_read, dg_read) = _pieces(W1, [
        H, V * second, H * second, N * T * (2 + 3 * second),
        readers * kind.H * kind.K, readers * kind.V * kind.H * second, asked * kind.H,
        asked * kind.V * second, asked * kind.K, asked * kind.H * second, asked,
    ])  # fmt: skip
    if q is not None:
        _launch(
            _backward_read, N // place.groups, kind, place,
            W1, W2, q, k, log_alpha, w1, w2, hidden, before, do,
            dq, dW1_read, dW2_read, dw1, dw2, dk_read, dh_read, dg_read,
            _dense(T, kind.K), _dense(T, kind.V), _dense(T, kind.K),
        )  # fmt: skip
    _launch(
        _backward_systems, N * (1 + second), kind, place,
        W1, W2, k, v, eta, log_alpha, inverses, w1, w2, before, aims, dV1, dV2, dw1, dw2,
        dk_read, dh_read, dW1_read, dW2_read, None, None, None, None, None,
        e1, e2, dk, dh, rows, dW1, dW2, None,
    )  # fmt: skip
    _launch(
        _backward_factors, N, kind, place,
        W1, W2, k, v, eta, log_alpha, before, aims, None, e1, e2, dh, rows, dg_read,
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


def _new(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return _empty(shape, device=like.device, dtype=like.dtype)


def _aligned(n: int) -> int:
    return (n + 3) // 4 * 4  # the kernels load 16 bytes at a time


def _pieces(where: Tensor, sizes: list[int]) -> tuple[Tensor, list[Any]]:
    """A buffer not yet written, and its parts of so many numbers each (None for 0)."""
    flat = _new((sum(map(_aligned, sizes)),), where)
    return flat, _split(flat, sizes)


def _split(flat: Tensor, sizes: list[int]) -> list[Any]:
    parts = flat.split([_aligned(n) for n in sizes])
    return [x if n else None for x, n in zip(parts, sizes)]


def _over_shared(x: Tensor | None, place: Place) -> Tensor | None:
    """One partial gradient for each memory, summed over the memories that share the input."""
    if x is None or place.shared == 1:
        return x
    return torch.sum(x.view(-1, place.shared, place.inner, x[0].numel()), 1)


def _dense(T: int, width: int) -> tuple[int, int, int, int, int, int]:
    """How a kernel finds the tokens of [*, T, width], see `tiles._among`."""
    return 1, 1, T * width, 0, 0, width


def _launch(
    kernel: Any, programs: int, kind: Kind, place: Place, first: Tensor, *others: Any
) -> None:
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](first, *others, *place, kind=kind, num_warps=WARPS, num_stages=1)
