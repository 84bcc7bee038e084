"""What the kernels are written in: tiles in registers, their products and their places.

A pointer p leads to [parts, rows, cols]; a tile is one part in float32, padded with zeros to a
power of two. kind: what the kernel is compiled for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Kind(NamedTuple):
    """What a kernel is compiled for; read may be "none", BT is the tile of tokens.

    full: the chunk fills its tile, so that no token is masked. own: v is what every memory makes
    its own values from. shell: W ends within low and high times the norm of its start value.
    eta_min, eta_max: the limits of step sizes that the memories generate.
    """

    K: int
    H: int
    V: int
    mlp: bool
    phi: str
    gain: float
    residual: bool
    l2: bool
    delta: bool
    decay: bool
    normalize: bool
    read: str
    BT: int
    dot: str
    system: str
    full: bool = False
    own: bool = False
    shell: bool = False
    low: float = 0.0
    high: float = 0.0
    eta_min: float = 0.0
    eta_max: float = 1.0


class Place(NamedTuple):
    """Sizes of one call. Memory n has keys and gates n // (shared · inner) · inner + n % inner, and
    answers a query if n % groups = reader.
    """

    N: int
    T: int
    shared: int
    inner: int
    groups: int
    reader: int


def _jit(f: Callable) -> Any:
    """`triton.jit` of the function itself: tests wrap functions to check shapes, not so kernels."""
    sizes = [n for n in Place._fields if n in inspect.signature(f).parameters]
    return triton.jit(inspect.unwrap(f), do_not_specialize=sizes)


@triton.constexpr_function
def _block(size):
    """The tile that holds `size`: a power of 2, and 16 at least to be multiplied."""
    return max(16, 1 << (size - 1).bit_length())


@_jit
def _inverse(system, kind: tl.constexpr):
    """(I + L)⁻¹ by joining blocks of twice the size: D ← D − D O D, O the blocks of L between two.

    Every D is the inverse of blocks of I + L, so nothing grows that the answer does not hold; the
    powers of L in a Neumann series would, for keys that are alike and η near 1. Blocks up to 16
    stand apart in a small tensor, where a product is cheap.
    """
    SIZE: tl.constexpr = kind.BT
    N: tl.constexpr = SIZE // 16
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(system, [N, 16, N, 16]), 0.0), 2)
    t, s = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    joined = tl.where(t == s, 1.0, tl.where(t // 2 == s // 2, -small, 0.0))
    for side in tl.static_range(1, 4):
        between = (t >> side != s >> side) & (t >> side + 1 == s >> side + 1)
        off = tl.where(between, small, 0.0)
        joined -= _dot(_dot(joined, off, kind, True), joined, kind, True)
    joined = tl.reshape(tl.where(same, tl.expand_dims(joined, 2), 0.0), [SIZE, SIZE])
    t, s = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    for side in tl.static_range(4, 7):
        if 2**side < SIZE:
            between = (t >> side != s >> side) & (t >> side + 1 == s >> side + 1)
            off = tl.where(between, system, 0.0)
            joined -= _dot(_dot(joined, off, kind, True), joined, kind, True)
    return joined


@_jit
def _gates(eta, log_alpha, c, T, kind: tl.constexpr):
    """η, log α and log γ."""
    BT: tl.constexpr = kind.BT
    zeros = tl.zeros([BT], tl.float32)
    log = _row(log_alpha, c, T, T, BT) if kind.decay else zeros
    step = zeros if eta is None else _row(eta, c, T, T, BT)
    if kind.eta_max > 1 and kind.decay:  # generated without regard to α, by another memory
        step *= 0.5 + 0.5 * tl.exp(log)
    return step, log, tl.cumsum(log, 0)


@_jit
def _steps(norm2, eta, kind: tl.constexpr):
    """The step sizes r of the delta term and s of the gradient."""
    r = eta / tl.maximum(norm2, 1.0)
    s = r if kind.normalize else eta
    return r, s


@_jit
def _ratios(upper, lower, STRICT: tl.constexpr):
    """exp(upper_t − lower_s) for s ≤ t (s < t if strict), else 0."""
    t = tl.arange(0, upper.shape[0])[:, None]
    s = tl.arange(0, upper.shape[0])[None, :]
    past = s < t if STRICT else s <= t
    return tl.exp(tl.where(past, upper[:, None] - lower[None, :], float("-inf")))


@_jit
def _phi(a, kind: tl.constexpr, ORDER: tl.constexpr = 0):
    """φ(gain · a) / gain, or its first or second derivative by a."""
    x = kind.gain * a
    if kind.phi == "silu":
        p = _sigmoid(x, kind)
        if ORDER == 0:
            y = x * p
        elif ORDER == 1:
            y = p * (1 + x * (1 - p))
        else:
            y = p * (1 - p) * (2 + x * (1 - 2 * p))
    elif kind.phi == "gelu":
        p = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        if ORDER == 0:
            y = x * p
        elif ORDER == 1:
            y = p + x * density
        else:
            y = density * (2 - x * x)
    elif kind.phi == "relu":
        p = tl.where(x > 0, 1.0, 0.0)
        y = x * p if ORDER == 0 else p if ORDER == 1 else tl.zeros_like(x)
    else:
        p = 2 * tl.sigmoid(2 * x) - 1
        y = p if ORDER == 0 else 1 - p * p if ORDER == 1 else -2 * p * (1 - p * p)
    return y / kind.gain if ORDER == 0 else y if ORDER == 1 else y * kind.gain


@_jit
def _sigmoid(x, kind: tl.constexpr):
    """Between products of bfloat16 by one instruction of the card, within 2⁻¹²."""
    if kind.dot == "bf16" and not INTERPRETED:
        tanh: tl.constexpr = "tanh.approx.f32 $0, $1;"
        half = tl.inline_asm_elementwise(tanh, "=r,r", [0.5 * x], tl.float32, True, 1)
        p = 0.5 + 0.5 * half
    else:
        p = tl.sigmoid(x)
    return p


@_jit
def _dot(a, b, kind: tl.constexpr, SYSTEM: tl.constexpr = False):
    """a b, in the precision of the system or of all else."""
    return _product(a, b, kind, SYSTEM)


@_jit
def _dot_t(a, b, kind: tl.constexpr, SYSTEM: tl.constexpr = False):
    """a bᵀ."""
    return _product(a, tl.trans(b), kind, SYSTEM)


@_jit
def _t_dot(a, b, kind: tl.constexpr, SYSTEM: tl.constexpr = False):
    """aᵀ b."""
    return _product(tl.trans(a), b, kind, SYSTEM)


@_jit
def _log_sigmoid(x):
    """log σ(x), to the last bits where it is nearly 0: the logarithm of a card is not so exact."""
    e = tl.exp(-tl.abs(x))
    t = e / (2 + e)  # log(1 + e) = 2 artanh t, t ≤ 1/3
    s = t * t
    series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s / 13)))))
    return tl.minimum(x, 0.0) - 2 * t * series


@_jit
def _product(a, b, kind: tl.constexpr, SYSTEM: tl.constexpr):
    """a b, summed in float32."""
    PRECISION: tl.constexpr = kind.system if SYSTEM else kind.dot
    if PRECISION == "bf16" and not INTERPRETED:
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "bf16":  # the interpreter would multiply bits
        product = tl.dot(_rounded(a, 16), _rounded(b, 16))
    elif PRECISION == "tf32":  # the tensor cores would cut, and cuts add up
        product = tl.dot(_rounded(a, 13), _rounded(b, 13), input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@_jit
def _rounded(x, BITS: tl.constexpr):
    """To the nearest float32 whose last bits are zero."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    MASK: tl.constexpr = -(1 << BITS)
    return ((x.to(tl.int32, bitcast=True) + HALF) & MASK).to(tl.float32, bitcast=True)


@_jit
def _tokens(p, n, T, WIDTH: tl.constexpr, BT: tl.constexpr, AGAIN: tl.constexpr = False):
    """Part n of [*, T, WIDTH]."""
    return _tile(p, n, T, T, WIDTH, BT, _block(WIDTH), AGAIN)


@_jit
def _among(p, i, at, T, WIDTH: tl.constexpr, BT: tl.constexpr, AGAIN: tl.constexpr = False):
    """The tokens of one head: i counts heads, then samples, then chunks; `at` = (heads, samples,
    the strides of chunk, sample, head and token).
    """
    r, c = tl.arange(0, BT)[:, None], tl.arange(0, _block(WIDTH))[None, :]
    cache: tl.constexpr = ".ca" if AGAIN else ""
    inside = (r < T) & (c < WIDTH)
    where = p + _head(i, at) + r * at[5] + c
    return tl.load(where, mask=inside, other=0.0, cache_modifier=cache).to(tl.float32)


@_jit
def _put_among(p, i, at, T, width, tile):
    """Store what `_among` loads."""
    r, c = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    where = p + _head(i, at) + r * at[5] + c
    tl.store(where, tile.to(p.dtype.element_ty), mask=(r < T) & (c < width))


@_jit
def _head(i, at):
    """Where the tokens of that head begin, see `_among`."""
    sample = i // at[0]
    return sample // at[1] * at[2] + sample % at[1] * at[3] + i % at[0] * at[4]


@_jit
def _matrix(p, n, OUT: tl.constexpr, IN: tl.constexpr, AGAIN: tl.constexpr = False):
    """Part n of [*, OUT, IN]."""
    return _tile(p, n, OUT, OUT, IN, _block(OUT), _block(IN), AGAIN)


@_jit
def _part(p, n, wanted, OUT: tl.constexpr, IN: tl.constexpr):
    """`_matrix` if `wanted`, else zeros."""
    return _tile(p, n, tl.where(wanted, OUT, 0), OUT, IN, _block(OUT), _block(IN))


@_jit
def _tile(p, n, count, rows, cols, R: tl.constexpr, C: tl.constexpr, AGAIN: tl.constexpr = False):
    """The first `count` rows of part n of [*, rows, cols] in float32, zeros around them.

    AGAIN: by an instruction of its own; the compiler would merge two equal ones and keep the tile.
    """
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    at = p + n * rows * cols + r * cols + c
    cache: tl.constexpr = ".ca" if AGAIN else ""
    inside = (r < count) & (c < cols)
    return tl.load(at, mask=inside, other=0.0, cache_modifier=cache).to(tl.float32)


@_jit
def _put(p, n, rows, cols, tile):
    """Store part n of [*, rows, cols]."""
    r, c = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    at = p + n * rows * cols + r * cols + c
    tl.store(at, tile.to(p.dtype.element_ty), mask=(r < rows) & (c < cols))


@_jit
def _row(p, n, count, T, BT: tl.constexpr):
    t = tl.arange(0, BT)
    return tl.load(p + n * T + t, mask=t < count, other=0.0).to(tl.float32)


@_jit
def _put_row(p, n, T, row):
    t = tl.arange(0, row.shape[0])
    tl.store(p + n * T + t, row, mask=t < T)


@_jit
def _vector(p, size: tl.constexpr):
    c = tl.arange(0, _block(size))
    return tl.load(p + c, mask=c < size, other=0.0)


@_jit
def _put_vector(p, size, vector):
    c = tl.arange(0, vector.shape[0])
    tl.store(p + c, vector, mask=c < size)


INTERPRETED = tl.constexpr(not isinstance(_row, triton.JITFunction))
