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

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import Gates, GradientRule, RuleState, Weights
from ..memory.linalg import decay_products, inverse_unit_lower
from ..memory.rules import shrunk
from .chunk import note
from .loop import Span
from .plain_spans import Form, Spans
from .writer import FastWeights, Writer, into_shell

ON_CARD, ON_CPU = 512, 64  # tokens of a span: measured; the result does not depend on it


class LevelState(NamedTuple):
    """last [B, 1, K]: the key of the next write, the feature before the next token. fast: the
    weights that learn. start: in a nested system, the value from which the level starts again
    (else None).
    """

    last: Any
    fast: FastWeights
    start: Weights | None = None


def write(
    writer: Writer,
    W0: Tensor,
    state: LevelState,
    xs: tuple[Tensor, Tensor, Gates],
    span: Span,
    options: Mapping[str, Any] | None = None,
) -> tuple[Tensor, LevelState]:
    """What `writer` says chunk by chunk, for the tokens of a span: (y [B, T, V], state).

    The memory is a `Matrix`, read at "boundary"; the span is whole chunks, or lies inside of one.
    xs: features h [B, T, K], values v [B, T, V], gates [B, T]. W0 [V, K] is the start value.
    options: with these, what stands between the products of whole spans goes through torch.compile.
    """
    rule, (last, fast, _), (h, v, gates) = writer.rule, state, xs
    assert isinstance(rule, GradientRule)
    whole = span.start % writer.chunk == 0 and span.ends(writer.chunk)
    if not whole or writer.first_order or writer.backend == "naive":
        return _chunks(writer, W0, state, xs, span)
    note("spans", h.shape[1])
    plain = not rule.momentum and writer.fades == writer.bounded
    ys, W, S = [], fast.now[0], fast.rule
    full = span_size(writer, ON_CARD if h.is_cuda else ON_CPU)
    dtype = _products(h)
    for a, b, size in _runs(span, full, joined=plain):
        part = slice(a - span.start, b - span.start)
        inputs, some = (last, h[:, part], v[:, part]), _cut(gates, part)
        with torch.autocast(h.device.type, enabled=False):  # systems and states stay wide
            if plain:
                form = Form(writer, rule, size, a, dtype, options if size == full else None)
                y, W = Spans.apply(form, W, W0, *inputs, some.eta)
            else:
                y, W, S = _general(writer, W, S, W0, *inputs, some)
                if b % writer.bounded == 0:
                    W = writer.faded(W, W0) if writer.fades == writer.bounded else W
                    W = W if writer.bound is None else into_shell(W, W0, *writer.bound)
        ys.append(y)
        last = h[:, part][:, -1:]
    return _joined(ys), _after(state, h, FastWeights((W,), (W,), S))


def _chunks(writer, W0, state, xs, span):
    """One chunk after another, as `Writer.write` takes them."""
    (last, fast, _), (h, v, gates) = state, xs
    C, keys, ys = writer.chunk, torch.cat([last.to(h.dtype), h[:, :-1]], 1), []
    cuts = sorted({span.start, span.stop, *range(-(-span.start // C) * C, span.stop, C)})
    for a, b in pairwise(cuts):
        part = slice(a - span.start, b - span.start)
        y, fast = writer.write(
            fast, h[:, part], keys[:, part], v[:, part],
            _cut(gates, part), Span(a, b), (W0,),
        )  # fmt: skip
        ys.append(y)
    return _joined(ys), _after(state, h, fast)


def _joined(ys: list[Tensor]) -> Tensor:
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0]


def _after(state: LevelState, h: Tensor, fast: FastWeights) -> LevelState:
    return LevelState(h[:, -1:].to(state.last.dtype).contiguous(), fast, state.start)


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
    """One span with momentum and a short half-life: what is visible at t is a sum of writes with
    factors.

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
    often = writer.half_life is not None and writer.fades < writer.bounded
    kept = 2 ** (-writer.chunk / writer.half_life) if often else 1.0  # type: ignore[operator]
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
