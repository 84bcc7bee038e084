"""Many chunks at once, for a matrix whose keys do not depend on what was written.

A level whose second matrix learns reads and writes features h of the input (eq. 71 with W_1 fixed
along the stream): y_t = W_c h_t, and the pair (k_t, v_t) with k_t = h_{t−1}, W_c the weights at the
chunk's start. Then all keys are known for the whole call, and the state is linear in what is
written. With s = η / max(1, ‖k‖²), d = 1 for DGD (else 0), l = 1 for L2 (0 for the dot product),

    w_t = s_t (v_t − l W_c k_t − d W_{t−1} k_t),    W_t = W_{t−1} + w_t k_tᵀ,

so over a span of any number of whole chunks, `i < c` meaning that i is in an earlier chunk than t,

    (I + L) w = s (v − (l + d) W_0 k),   L_ti = s_t (l [i < c] + d [i < t]) k_t · k_i,
    y_t = W_0 h_t + Σ_{i < c} (k_i · h_t) w_i,   W_N = W_0 + Σ_i w_i k_iᵀ:

a few products and one triangular system, whose inverse needs no state. The definition is
`Writer.write`, one chunk after another; its backend "naive" goes token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import Gates, GradientRule, RuleState
from ..memory.linalg import decay_products, frobenius, inverse_unit_lower
from ..memory.rules import shrunk
from .chunk import note
from .loop import Span
from .writer import FastWeights, Writer, into_shell

ON_CARD, ON_CPU = 256, 64  # tokens of a span: measured; the result does not depend on it
BLOCK = 64  # systems up to this size are inverted by torch


def write(
    writer: Writer,
    fast: FastWeights,
    last: Tensor,
    h: Tensor,
    v: Tensor,
    gates: Gates,
    span: Span,
    W0: Tensor,
    options: Mapping[str, Any] | None = None,
) -> tuple[Tensor, FastWeights]:
    """What `writer` says chunk by chunk, for the tokens of a span: (y [B, T, V], state).

    The memory is a `Matrix`, read at "boundary"; the span is whole chunks, or lies inside of one.
    last [B, 1, K] is the feature before the first token, h [B, T, K] are the features, v [B, T, V]
    the values, gates [B, T], W0 [V, K] the start value. options: with these, what stands
    between the products of whole spans goes through torch.compile.
    """
    rule = writer.rule
    assert isinstance(rule, GradientRule)
    whole = span.start % writer.chunk == 0 and span.ends(writer.chunk)
    if not whole or writer.first_order or writer.backend == "naive":
        return _chunks(writer, fast, last, h, v, gates, span, W0)
    note("spans", h.shape[1])
    plain = not rule.momentum and writer.half_life is None
    ys, W, S = [], fast.now[0], fast.rule
    full = span_size(writer, ON_CARD if h.is_cuda else ON_CPU)
    dtype = _products(h)
    for a, b, size in _runs(span, full, joined=plain):
        part = slice(a - span.start, b - span.start)
        inputs, some = (last, h[:, part], v[:, part]), _cut(gates, part)
        with torch.autocast(h.device.type, enabled=False):  # systems and states stay wide
            if plain:
                form = _Form(writer, rule, size, a, dtype, options if size == full else None)
                y, W = _Spans.apply(form, W, W0, *inputs, some.eta)
            else:
                y, W, S = _general(writer, W, S, W0, *inputs, some)
                if writer.bound is not None and b % writer.bounded == 0:
                    W = into_shell(W, W0, *writer.bound)
        ys.append(y)
        last = h[:, part][:, -1:]
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], FastWeights((W,), (W,), S)


def _chunks(writer, fast, last, h, v, gates, span, W0):
    """One chunk after another, as `Writer.write` takes them."""
    C, keys, ys = writer.chunk, torch.cat([last.to(h.dtype), h[:, :-1]], 1), []
    cuts = sorted({span.start, span.stop, *range(-(-span.start // C) * C, span.stop, C)})
    for a, b in pairwise(cuts):
        part = slice(a - span.start, b - span.start)
        y, fast = writer.write(
            fast, h[:, part], keys[:, part], v[:, part],
            _cut(gates, part), Span(a, b), (W0,),
        )  # fmt: skip
        ys.append(y)
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], fast


def _cut(gates: Gates, part: slice) -> Gates:
    return gates.map(lambda g: g[:, part])


def _runs(span: Span, size: int, joined: bool) -> list[tuple[int, int, int]]:
    """(first, stop, tokens of a span): runs of spans of one size, which end at its multiples."""
    a, b = -(-span.start // size) * size, span.stop // size * size
    if a > b:
        return [(span.start, span.stop, span.stop - span.start)]
    middle = [(a, b, size)] if joined else [(x, x + size, size) for x in range(a, b, size)]
    runs = [(span.start, a, a - span.start), *middle, (b, span.stop, span.stop - b)]
    return [run for run in runs if run[0] < run[1]]


def span_size(writer: Writer, most: int) -> int:
    """Tokens of a span: chunks that divide those between two bounds, at most `most` if they can."""
    chunks = writer.bounded // writer.chunk
    fit = [n for n in range(1, chunks + 1) if chunks % n == 0 and n * writer.chunk <= most]
    return writer.chunk * max(fit, default=1)


def _products(h: Tensor) -> torch.dtype:
    """The type of the products: autocast's on a card, else that of the state."""
    kind = h.device.type
    if kind == "cuda" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(h.dtype, torch.float32)


# ----------------------------------------------------------------------- any rule, by autograd


def _general(
    writer: Writer, W: Tensor, S: RuleState, W0: Tensor, last: Tensor, h: Tensor, v: Tensor,
    gates: Gates,
) -> tuple[Tensor, Tensor, RuleState]:  # fmt: skip
    """One span with momentum and half-life: what is visible at t is a sum of writes with factors.

    A write enters the momentum, S_t = θ_t S_{t−1} + w_t k_tᵀ, and W with it; what is in W fades
    towards W_0 by λ at each chunk's end. visible_ti counts how often and how faded w_i is in W_c.
    """
    rule, wide = writer.rule, torch.promote_types(h.dtype, torch.float32)
    assert isinstance(rule, GradientRule)
    out, h, v = h.dtype, h.to(wide), v.to(wide)
    k = torch.cat([last.to(wide), h[:, :-1]], 1)
    T, l2 = h.shape[1], writer.objective == "l2"
    token = torch.arange(T, device=h.device)
    chunk = torch.arange(T + 1, device=h.device) // writer.chunk  # the last: after the span
    ended = (chunk.unsqueeze(-1) - chunk[:-1]).to(wide)
    kept = 1.0 if writer.half_life is None else 2 ** (-writer.chunk / writer.half_life)
    visible = torch.where(ended > 0, kept**ended, 0.0)
    fade = (kept ** chunk.to(wide)).unsqueeze(-1)
    carry = None
    if rule.momentum:
        assert gates.log_theta is not None
        theta, held = decay_products(gates.log_theta.to(wide).cumsum(-1))
        carry = visible @ theta.unsqueeze(-1)  # [B, T + 1, 1]
        visible = visible @ held

    def found(x: Tensor, rows: slice) -> Tensor:
        y = fade[rows] * (x @ W.mT)
        if kept < 1:
            y = y + (1 - fade[rows]) * (x @ W0.to(wide).mT)
        if carry is not None:
            y = y + carry[:, rows] * (x @ S.momentum[0].mT)  # type: ignore[index]
        return y

    now, end = slice(0, T), slice(T, T + 1)
    overlap = k @ k.mT
    s = shrunk(gates.eta.to(wide), k).unsqueeze(-1)
    both = float(l2) + float(rule.delta)
    factor = visible[..., now, :] * float(l2)
    if rule.delta:
        before = token.unsqueeze(-1) > token
        factor = factor + torch.where(before, kept ** ended[now], 0.0)
    w = inverse_unit_lower(s * overlap * factor) @ (s * (v - both * found(k, now)))
    y = found(h, now) + (visible[..., now, :] * (h @ k.mT)) @ w

    left = visible[..., end, :].mT * w
    after = fade[-1] * W + left.mT @ k
    if kept < 1:
        after = after + (1 - fade[-1]) * W0.to(wide)
    if carry is not None:
        assert S.momentum is not None
        after = after + carry[:, end] * S.momentum[0]
        speed = theta[:, -1:, None] * S.momentum[0] + (held[:, -1].unsqueeze(-1) * w).mT @ k
        S = S._replace(momentum=(speed,))
    return y.to(out), after, S


# -------------------------------------------------------- the common case, backward written out


class _Form(NamedTuple):
    """size: tokens of a span. start: position of the first token. dtype: of the products.

    options: with these, what stands between the products goes through torch.compile.
    """

    writer: Writer
    rule: GradientRule
    size: int
    start: int
    dtype: torch.dtype
    options: Mapping[str, Any] | None

    def bounded(self, i: int) -> bool:
        """Whether the bound acts after span i."""
        stop = self.start + (i + 1) * self.size
        return self.writer.bound is not None and stop % self.writer.bounded == 0

    def masks(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[i < c] and l [i < c] + d [i < t], of the products' sums, and l + d."""
        token = torch.arange(self.size, device=like.device)
        chunk = token // self.writer.chunk
        earlier = (chunk.unsqueeze(-1) > chunk).to(like)
        strict = (token.unsqueeze(-1) > token).to(like)
        l2, replaces = float(self.writer.objective == "l2"), float(self.rule.delta)
        return earlier, l2 * earlier + replaces * strict, like.new_full((), l2 + replaces)

    def __call__(self, f: Callable, *args: Any) -> Any:
        """f(*args), f without products."""
        if self.options is None:
            return f(*args)
        for x in args:
            if isinstance(x, Tensor) and x.ndim > 2:
                torch._dynamo.maybe_mark_dynamic(x, (0, 1))
        key = (f, repr(sorted(self.options.items())))
        if key not in _COMPILED:
            _COMPILED[key] = torch.compile(f, **self.options)
        return _COMPILED[key](*args)


_COMPILED: dict[tuple[Callable, str], Callable] = {}


class _Spans(torch.autograd.Function):
    """(W [B, V, K], W0, last [B, 1, K], h [B, T, K], v [B, T, V], η [B, T]) -> (y, W after).

    n spans of N tokens, T = n N. What needs no state is done for all spans at once: the Gram matrix
    of the features (keys are the features one token earlier: rows −1 .. N−1 hold both) and the
    inverse. The loop has three products a span in each direction. In the backward pass the errors
    of what a feature answers and of what it finds as a key share one product.
    """

    @staticmethod
    def forward(ctx: Any, form: _Form, W, W0, last, h, v, eta):
        N, n, low = form.size, h.shape[1] // form.size, form.dtype
        wide = torch.promote_types(low, torch.float32)
        earlier, factor, both = form.masks(h.new_empty(0, dtype=wide))
        rows, values, eta = form(_laid, last, h, v, eta, earlier, low)
        gram = _product(rows, rows.mT, wide)
        system, read, s, aims, steps = form(_systems, gram, values, eta, earlier, factor, both, low)
        with _tf32(low):
            inverse = _inverse(system)
        states, found = (rows.new_empty(n, *W.shape), gram.new_empty(*rows.shape[:3], W.shape[1]))
        w, shells, W = torch.empty_like(values), [], W.clone()
        for i in range(n):
            states[i].copy_(W)
            _product(rows[i], states[i].mT, wide, out=found[i])
            with _tf32(low):
                w[i] = inverse[i] @ torch.addcmul(aims[i], steps[i], found[i, :, :N], value=-1)
            _add(W, w[i].mT, rows[i, :, :N])
            if form.bounded(i):
                assert form.writer.bound is not None
                shells.append(form(_into_shell, W, W0, *form.writer.bound))
        errors = form(_errors, values, found, both)
        _add(found[:, :, 1 : N + 1], read, w)
        ctx.form, ctx.kinds = form, (last.dtype, h.dtype, v.dtype)
        ctx.save_for_backward(
            W0, rows, gram, eta, s, inverse, read, w, errors, states, W,
            *(x for shell in shells for x in shell),
        )  # fmt: skip
        return form(_streamed, found[:, :, 1 : N + 1], h.dtype), W

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dW):
        with torch.autocast(dy.device.type, enabled=False):
            return _Spans._backward(ctx, dy, dW)

    @staticmethod
    def _backward(ctx: Any, dy, dW):
        form, N, low = ctx.form, ctx.form.size, ctx.form.dtype
        W0, rows, gram, eta, s, inverse, read, w, errors, states, W, *flat = ctx.saved_tensors
        wide, n = gram.dtype, len(rows)
        shells = list(zip(flat[::2], flat[1::2]))
        dW0, dW = torch.zeros_like(W0) if shells else None, dW.clone()
        earlier, factor, both = form.masks(gram.new_empty(0))
        dy, back = form(_laid_errors, dy, earlier, rows, low)
        dread = _product(dy, w.mT, wide)
        dw = _product(read.mT, dy, wide)
        dstates, g, steps = torch.empty_like(states), torch.empty_like(w), both * s
        for i in reversed(range(n)):
            if form.bounded(i):
                after = W if i == n - 1 else states[i + 1]
                dW0 += form(_shell_backward, after, dW, *shells.pop(), W0, *form.writer.bound)
            dstates[i].copy_(dW)
            _add(dw[i], rows[i, :, :N], dstates[i].mT)
            with _tf32(low):
                pull = inverse[i].mT @ dw[i]
            g[i] = pull
            back[i, :, :N].addcmul_(steps[i], pull, value=-1)
            _add(dW, back[i].mT, rows[i])
        drows = _product(back, states, low)
        _add(drows[:, :, :N], w, dstates)
        overlap = _product(g, w.mT, wide)
        dgram, dv, deta = form(
            _systems_backward,
            overlap,
            dread,
            gram,
            g,
            errors,
            s,
            eta,
            earlier,
            factor,
            ctx.kinds[2],
        )
        _add(drows, dgram, rows)
        dlast, dh = form(_features, drows, earlier, *ctx.kinds[:2])
        return None, dW, dW0, dlast, dh, dv, deta


def _laid(last, h, v, eta, earlier, low):
    """Features −1 .. N−1 of each span, [n, B, N + 1, K]; values [n, B, N, V]; η [n, B, N, 1].

    The rows are filled up with zeros so that those of bfloat16 matrices begin at 16 bytes.
    """
    (B, T, K), N = h.shape, earlier.shape[0]
    fill = 0 if low == earlier.dtype else 7
    first = torch.cat([last.to(h.dtype), h[:, N - 1 : T - 1 : N]], 1).mT.unsqueeze(-1)
    spans = h.reshape(B, T // N, N, K).transpose(0, 1)
    parts = [first.permute(2, 0, 3, 1), spans, h.new_zeros(T // N, B, fill, K)]
    rows = torch.cat(parts, 2).to(low)
    return rows, _spanned(v, N, low), _spanned(eta.unsqueeze(-1), N, earlier.dtype)


def _systems(gram, values, eta, earlier, factor, both, low):
    """The system, what is read of each write, s, and what s times v and what is found get."""
    N = earlier.shape[0]
    keys = gram[..., :N, :N]
    s = eta / keys.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clamp(min=1.0)
    read = (gram[..., 1 : N + 1, :N] * earlier).to(low)
    return s * keys * factor, read, s, s * values, both * s


def _errors(values, found, both):
    return (values - both * found[:, :, : values.shape[2]]).to(values.dtype)


def _laid_errors(dy, earlier, rows, low):
    """dy [n, B, N, V], and at the rows of the features that answered."""
    N = earlier.shape[0]
    dy = _spanned(dy, N, low)
    zeros = dy.new_zeros(*dy.shape[:2], 1, dy.shape[3])
    fill = zeros.expand(-1, -1, rows.shape[2] - N - 1, -1)
    return dy, torch.cat([zeros, dy, fill], 2)


def _systems_backward(overlap, dread, gram, g, errors, s, eta, earlier, factor, kind):
    """The gradients of the Gram matrix, plus its transpose, of v and of η."""
    N, rest = earlier.shape[0], gram.shape[-1] - earlier.shape[0]
    keys, dsystem = gram[..., :N, :N], -overlap * factor
    ds = (dsystem * keys).sum(-1, keepdim=True)
    ds = ds + (g.to(ds.dtype) * errors).sum(-1, keepdim=True)
    size = keys.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    length = size.clamp(min=1.0)
    dlength = torch.where(size > 1, -ds * s / length, 0.0)
    one = torch.eye(N, dtype=gram.dtype, device=gram.device)
    dkeys = F.pad(s * dsystem + dlength * one, (0, rest, 0, rest))
    dgram = dkeys + F.pad(dread * earlier, (0, rest, 1, rest - 1))
    dgram = (dgram + dgram.mT).to(g.dtype)
    return dgram, _streamed(s * g, kind), _streamed(ds / length, eta.dtype).squeeze(-1)


def _features(drows, earlier, *kinds):
    """The gradients of `last` and `h` from those of the rows."""
    N = earlier.shape[0]
    more = F.pad(drows[1:, :, :1], (0, 0, 0, 0, 0, 0, 0, 1))  # of the next span's first key
    body = drows[:, :, 1 : N + 1] + F.pad(more, (0, 0, N - 1, 0))
    return drows[0, :, :1].to(kinds[0]), _streamed(body, kinds[1])


def _spanned(x: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """[B, n N, d] as [n, B, N, d]."""
    B, T, d = x.shape
    return x.reshape(B, T // N, N, d).transpose(0, 1).to(dtype).contiguous()


def _streamed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, B, N, d] as [B, n N, d]."""
    n, B, N, d = x.shape
    return x.to(dtype).transpose(0, 1).reshape(B, n * N, d)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a b over all leading axes; bfloat16 factors are summed, and given, in `dtype`."""
    lead = a.shape[:-2]
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    into = None if out is None else out.flatten(0, -3)
    mixed = {} if a.dtype == dtype else {"out_dtype": dtype}
    if into is not None and torch.compiler.is_exporting():  # the program may run with gradients on
        return into.copy_(torch.bmm(a, b, **mixed, out=None)).unflatten(0, lead)
    return torch.bmm(a, b, **mixed, out=into).unflatten(0, lead)


def _add(x: Tensor, a: Tensor, b: Tensor) -> None:
    """x += a b, in x's type."""
    x, a, b = x.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3)
    if a.dtype == x.dtype:
        x.baddbmm_(a, b)
    else:
        torch.baddbmm(x, a, b, out_dtype=x.dtype, out=x)


def _inverse(system: Tensor) -> Tensor:
    """(I + L)⁻¹: of halves, joined, until they are small enough for torch's own."""
    N = system.shape[-1]
    half = N // 2
    if N <= BLOCK or N % 2 or not system.is_cuda:
        return inverse_unit_lower(system)
    one, two = _inverse(torch.stack([system[..., :half, :half], system[..., half:, half:]]))
    joined = torch.zeros_like(system)
    joined[..., :half, :half] = one
    joined[..., half:, half:] = two
    joined[..., half:, :half] = -(two @ (system[..., half:, :half] @ one))
    return joined


@contextmanager
def _tf32(dtype: torch.dtype):
    """Float32 products as TF32 where the others are bfloat16."""
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _into_shell(W, W0, low, high):
    """`into_shell` in place; the norm and what it is brought to."""
    norm, start = frobenius(W), frobenius(W0).to(W.dtype)
    size = norm.clamp(min=low * start, max=high * start)
    W.mul_(size / norm.clamp(min=1e-12))
    return norm, size


def _shell_backward(after, dW, norm, size, W0, low, high):
    """Through `_into_shell`: dW in place, dW_0."""
    start = frobenius(W0).to(norm.dtype)
    under, over = norm < low * start, norm > high * start
    along = (after * dW).sum((-2, -1), keepdim=True) / size.clamp(min=1e-12)
    scale = size / norm.clamp(min=1e-12)
    pull = torch.where(under | over, scale * along / size.clamp(min=1e-12), 0.0)
    dW.copy_(dW * scale - pull * after)
    pull = torch.where(under, low * along, torch.where(over, high * along, 0.0)).sum(0)
    return (pull * W0 / start.clamp(min=1e-12)).to(W0.dtype)
