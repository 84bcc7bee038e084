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

from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import Gates, GradientRule, RuleState
from ..memory.linalg import decay_products, frobenius, inverse_unit_lower
from ..memory.rules import shrunk
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
) -> tuple[Tensor, FastWeights]:
    """What `writer` says chunk by chunk, for the tokens of a span: (y [B, T, V], state).

    The memory is a `Matrix`, read at "boundary"; the span is whole chunks, or lies inside of one.
    last [B, 1, K] is the feature before the first token, h [B, T, K] are the features, v [B, T, V]
    the values, gates [B, T], W0 [V, K] the start value.
    """
    rule = writer.rule
    assert isinstance(rule, GradientRule)
    whole = span.start % writer.chunk == 0 and span.ends(writer.chunk)
    if not whole or writer.first_order or writer.backend == "naive":
        return _chunks(writer, fast, last, h, v, gates, span, W0)
    plain = not rule.momentum and writer.half_life is None
    ys, W, S = [], fast.now[0], fast.rule
    dtype = _products(h)
    for a, b, size in _runs(writer, span, h.is_cuda, joined=plain):
        part = slice(a - span.start, b - span.start)
        inputs = (last, h[:, part], v[:, part], gates.map(lambda g, part=part: g[:, part]))
        if plain:
            form = _Form(writer, rule, size, a, dtype)
            y, W = _Spans.apply(form, W, W0, *inputs[:3], inputs[3].eta)
        else:
            y, W, S = _general(writer, W, S, W0, *inputs)
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
            gates.map(lambda g, part=part: g[:, part]), Span(a, b), (W0,),
        )  # fmt: skip
        ys.append(y)
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], fast


def _runs(writer: Writer, span: Span, on_card: bool, joined: bool) -> list[tuple[int, int, int]]:
    """(first, stop, tokens of a span): runs of spans of one size, which end at its multiples."""
    size = span_size(writer, ON_CARD if on_card else ON_CPU)
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
        carry = (visible @ theta.unsqueeze(-1))  # [B, T + 1, 1]
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
    """size: tokens of a span. start: position of the first token. dtype: of the products."""

    writer: Writer
    rule: GradientRule
    size: int
    start: int
    dtype: torch.dtype

    def bounded(self, i: int) -> bool:
        """Whether the bound acts after span i."""
        stop = self.start + (i + 1) * self.size
        return self.writer.bound is not None and stop % self.writer.bounded == 0

    def masks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[i < c] and l [i < c] + d [i < t], of the products' sums."""
        token = torch.arange(self.size, device=device)
        chunk = token // self.writer.chunk
        earlier = (chunk.unsqueeze(-1) > chunk).float()
        strict = (token.unsqueeze(-1) > token).float()
        return earlier, self.l2 * earlier + float(self.rule.delta) * strict

    @property
    def l2(self) -> float:
        """1 where the error subtracts what the memory says."""
        return float(self.writer.objective == "l2")


class _Spans(torch.autograd.Function):
    """(W [B, V, K], W0, last [B, 1, K], h [B, T, K], v [B, T, V], η [B, T]) -> (y, W after).

    n spans of N tokens, T = n N. What needs no state is done for all spans at once: the Gram matrix
    of the features (keys are the features one token earlier: rows −1 .. N−1 hold both) and the
    inverse. The loop has four products a span forward and three backward. In the backward pass the
    errors of what a feature answers and of what it finds as a key share one product.
    """

    @staticmethod
    def forward(ctx: Any, form: _Form, W, W0, last, h, v, eta):
        B, T, _ = h.shape
        N, n, low = form.size, T // form.size, form.dtype
        wide = torch.promote_types(low, torch.float32)
        both = form.l2 + float(form.rule.delta)
        rows = _rows(last, h, N, low)
        values, eta = _spanned(v, N, low), _spanned(eta.unsqueeze(-1), N, wide)
        gram = _product(rows, rows.mT, wide)
        earlier, factor = form.masks(h.device)
        keys = gram[..., :N, :N]
        length = keys.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clamp(min=1.0)
        s = eta / length
        with _tf32(low):
            inverse = _inverse(s * keys * factor)
        read = (gram[..., 1 : N + 1, :N] * earlier).to(low)

        aims, states = s * values, W.new_empty(n, *W.shape, dtype=low)
        found = W.new_empty(n, B, rows.shape[2], W.shape[1], dtype=wide)
        w, steps, shells = torch.empty_like(values), both * s, []
        for i in range(n):
            states[i].copy_(W)
            found[i] = _product(rows[i], states[i].mT, wide)
            with _tf32(low):
                w[i] = inverse[i] @ torch.addcmul(aims[i], steps[i], found[i, :, :N], value=-1)
            W = _added(W, w[i].mT, rows[i, :, :N])
            if form.bounded(i):
                assert form.writer.bound is not None
                norm, start = frobenius(W), frobenius(W0).to(wide)
                size = norm.clamp(min=form.writer.bound[0] * start, max=form.writer.bound[1] * start)
                W = W * (size / norm.clamp(min=1e-12))
                shells.append((norm, size))
        y = _added(found[:, :, 1 : N + 1], read, w)
        errors = (values - both * found[:, :, :N]).to(low)
        ctx.form, ctx.kinds = form, (last.dtype, h.dtype, v.dtype, W0.dtype)
        ctx.shells = len(shells)
        ctx.save_for_backward(
            W0, rows, gram, eta, length, inverse, read, w, errors, states, W,
            *(x for shell in shells for x in shell),
        )  # fmt: skip
        return y.transpose(0, 1).reshape(B, T, -1).to(h.dtype), W

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dW):
        form, N, low = ctx.form, ctx.form.size, ctx.form.dtype
        W0, rows, gram, eta, length, inverse, read, w, errors, states, W, *flat = ctx.saved_tensors
        wide, n, both = gram.dtype, len(rows), form.l2 + float(form.rule.delta)
        shells = list(zip(flat[::2], flat[1::2]))
        dW0 = torch.zeros_like(W0) if shells else None
        earlier, factor = form.masks(dy.device)
        s = eta / length
        dy = _spanned(dy, N, low)
        dread = _product(dy, w.mT, wide) * earlier
        dw = _product(read.mT, dy, wide)
        back = dy.new_zeros(*rows.shape[:3], dy.shape[-1])  # errors at the rows, answers and keys
        back[:, :, 1 : N + 1] = dy
        dstates, g, steps = torch.empty_like(states), torch.empty_like(w), both * s
        for i in reversed(range(n)):
            if form.bounded(i):
                after = W if i == n - 1 else states[i + 1]
                dW, dstart = _shell_backward(form.writer.bound, after, dW, *shells.pop(), W0)
                dW0 += dstart
            dstates[i].copy_(dW)
            with _tf32(low):
                pull = inverse[i].mT @ _added(dw[i], rows[i, :, :N], dstates[i].mT)
            g[i] = pull
            back[i, :, :N] -= steps[i] * pull
            dW = _added(dW, back[i].mT, rows[i])
        drows = _product(back, states, low)
        drows[:, :, :N] += _product(w, dstates, low)
        dsystem = -_product(g, w.mT, wide) * factor
        ds = (dsystem * gram[..., :N, :N]).sum(-1, keepdim=True)
        ds += (g * errors).sum(-1, keepdim=True, dtype=wide)
        dgram = torch.zeros_like(gram)
        dgram[..., :N, :N] = s * dsystem
        long = torch.where(gram[..., :N, :N].diagonal(dim1=-2, dim2=-1).unsqueeze(-1) > 1, 1.0, 0.0)
        dgram[..., :N, :N].diagonal(dim1=-2, dim2=-1).sub_((ds * s / length * long).squeeze(-1))
        dgram[..., 1 : N + 1, :N] += dread
        drows += _product((dgram + dgram.mT).to(low), rows, low)
        dlast, dh = _features(drows, N)
        kinds = ctx.kinds
        return (
            None, dW, dW0, dlast.to(kinds[0]), dh.to(kinds[1]),
            _streamed(s * g).to(kinds[2]), _streamed(ds / length).squeeze(-1),
        )  # fmt: skip


def _rows(last: Tensor, h: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """Features −1 .. N−1 of each span, [n, B, N + 1, K]; filled up with zeros so that the places of
    bfloat16 matrices are multiples of 16 bytes.
    """
    (B, T, K), n = h.shape, h.shape[1] // N
    fill = 8 if dtype != torch.promote_types(dtype, torch.float32) else 1
    rows = h.new_empty(n, B, N + fill, K, dtype=dtype)
    rows[0, :, 0] = last[:, 0]
    rows[1:, :, 0] = h[:, N - 1 : T - 1 : N].transpose(0, 1)
    rows[:, :, 1 : N + 1] = h.reshape(B, n, N, K).transpose(0, 1)
    rows[:, :, N + 1 :] = 0
    return rows


def _features(drows: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The gradients of `last` and `h` from those of `_rows`."""
    dh = drows[:, :, 1 : N + 1].transpose(0, 1)
    n, B = drows.shape[:2]
    dh = dh.reshape(B, n * N, -1)
    dh[:, N - 1 : n * N - 1 : N] += drows[1:, :, 0].transpose(0, 1)
    return drows[0, :, :1], dh


def _spanned(x: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """[B, n N, d] as [n, B, N, d]."""
    B, T, d = x.shape
    return x.reshape(B, T // N, N, d).transpose(0, 1).to(dtype).contiguous()


def _streamed(x: Tensor) -> Tensor:
    """[n, B, N, d] as [B, n N, d]."""
    n, B, N, d = x.shape
    return x.transpose(0, 1).reshape(B, n * N, d)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b over all leading axes; bfloat16 factors are summed, and given, in `dtype`."""
    lead = a.shape[:-2]
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    y = torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, out_dtype=dtype)
    return y.unflatten(0, lead)


def _added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b in x's type."""
    lead = x.shape[:-2]
    x, a, b = x.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3)
    if a.dtype == x.dtype:
        return torch.baddbmm(x, a, b).unflatten(0, lead)
    return torch.baddbmm(x, a, b, out_dtype=x.dtype).unflatten(0, lead)


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


def _shell_backward(bound, after, dW, norm, size, W0):
    """Through y = W size / norm, size the norm clamped to the start's: (dW, dW_0)."""
    start = frobenius(W0).to(norm.dtype)
    low, high = bound[0] * start, bound[1] * start
    along = (after * dW).sum((-2, -1), keepdim=True) / size.clamp(min=1e-12)
    outside = (norm < low) | (norm > high)
    scale = size / norm.clamp(min=1e-12)
    dW = dW * scale - torch.where(outside, scale * along / size.clamp(min=1e-12), 0.0) * after
    pull = torch.where(norm < low, bound[0] * along, 0.0)
    pull = (pull + torch.where(norm > high, bound[1] * along, 0.0)).sum(0)
    return dW, (pull * W0 / start.clamp(min=1e-12)).to(W0.dtype)
