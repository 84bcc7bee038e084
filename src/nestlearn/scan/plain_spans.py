"""Spans of a rule without momentum that fade seldom: the backward pass written out (`spans`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import GradientRule
from ..memory.linalg import frobenius, inverse_unit_lower
from .shell import into_shell_, out_of_shell_
from .writer import Writer

BLOCK = 64  # systems up to this size are inverted by torch


class Form(NamedTuple):
    """size: tokens of a span. start: position of the first token. dtype: of the products.

    options: with these, what stands between the products goes through torch.compile.
    """

    writer: Writer
    rule: GradientRule
    size: int
    start: int
    dtype: torch.dtype
    options: Mapping[str, Any] | None

    def ends(self, i: int) -> bool:
        """Whether the weights fade and the bound acts after span i."""
        return (self.start + (i + 1) * self.size) % self.writer.bounded == 0

    @property
    def fading(self) -> float:
        """How far towards the start value, where the weights fade."""
        half_life = self.writer.half_life
        return 0.0 if half_life is None else 1 - 2 ** (-self.writer.fades / half_life)

    @property
    def both(self) -> float:
        """l + d."""
        return float(self.writer.objective == "l2") + float(self.rule.delta)

    def masks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """[i < c] and l [i < c] + d [i < t], of the products' sums."""
        token = torch.arange(self.size, device=like.device)
        chunk = token // self.writer.chunk
        earlier = (chunk.unsqueeze(-1) > chunk).to(like)
        strict = (token.unsqueeze(-1) > token).to(like)
        l2, replaces = float(self.writer.objective == "l2"), float(self.rule.delta)
        return earlier, l2 * earlier + replaces * strict

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


class Spans(torch.autograd.Function):
    """(W [B, V, K], W0 [V, K] or [B, V, K], last [B, 1, K], h [B, T, K], v [B, T, V], η [B, T]) ->
    (y, W after).

    n spans of N tokens, T = n N. What needs no state is done for all spans at once: the Gram matrix
    of the features (keys are the features one token earlier: rows −1 .. N−1 hold both) and the
    inverse. The loop has three products a span in each direction; `_is_chain` says where it has
    two, because all that does not depend on the state is multiplied beforehand. In the backward
    pass the errors of what a feature answers and of what it finds as a key share one product.
    """

    @staticmethod
    def forward(ctx: Any, form: Form, W, W0, last, h, v, eta):
        N, n, low = form.size, h.shape[1] // form.size, form.dtype
        # compiled code would be made again for each that needs a gradient and one that does not
        W0, last, h, v, eta = (x.detach() for x in (W0, last, h, v, eta))
        wide = torch.promote_types(low, torch.float32)
        (earlier, factor), both = form.masks(h.new_empty(0, dtype=wide)), form.both
        rows, values, eta = form(_laid, last, h, v, eta, earlier, low)
        gram = _product(rows, rows.mT, wide)
        system, read, s = form(_systems, gram, eta, earlier, factor, low)
        with _tf32(low):
            inverse = _inverse(system)
        states, found = rows.new_empty(n, *W.shape), gram.new_empty(*rows.shape[:3], W.shape[1])
        chain = _is_chain(rows)
        if chain:  # w = (I + L)⁻¹ s v − (l + d) ((I + L)⁻¹ s k) Wᵀ
            solve = (inverse * s.mT).to(low)
            w, solved = (_product(solve, x, low) for x in (values, rows[:, :, :N]))
        else:
            w, aims, steps = torch.empty_like(values), s * values, both * s
        shells, W, start = [], W.clone(), frobenius(W0).to(W.dtype)
        states[0].copy_(W)
        for i in range(n):
            if chain:
                w[i].baddbmm_(solved[i], states[i].mT, alpha=-form.both)
            else:
                _product(rows[i], states[i].mT, wide, out=found[i])
                with _tf32(low):
                    right = torch.addcmul(aims[i], steps[i], found[i, :, :N], value=-1)
                    _write(w[i], inverse[i], right)
            _add(W, w[i].mT, rows[i, :, :N])
            then = states[i + 1] if i + 1 < n else None
            if form.ends(i):
                shells += form(_ended, W, W0, start, form.fading, form.writer.bound, then)
            elif then is not None:
                then.copy_(W)
        if chain:
            _product(rows, states.mT, wide, out=found)
        errors = form(_errors, values, found, gram.new_full((), both))
        _add(found[:, :, 1 : N + 1], read, w)
        ctx.form, ctx.kinds = form, (last.dtype, h.dtype, v.dtype)
        ctx.save_for_backward(W0, rows, gram, eta, s, inverse, read, w, errors, states, W, *shells)
        return form(_streamed, found[:, :, 1 : N + 1], h.dtype), W

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dW):
        with torch.autocast(dy.device.type, enabled=False):
            return Spans._backward(ctx, dy, dW)

    @staticmethod
    def _backward(ctx: Any, dy, dW):
        form, N, low = ctx.form, ctx.form.size, ctx.form.dtype
        W0, rows, gram, eta, s, inverse, read, w, errors, states, W, *shells = ctx.saved_tensors
        wide, n = gram.dtype, len(rows)
        start, dW0, dW = frobenius(W0).to(wide), torch.zeros_like(W0), dW.clone()
        dstart = dW.new_zeros(len(dW), 1, 1)
        (earlier, factor), both = form.masks(gram.new_empty(0)), form.both
        dy, back = form(_laid_errors, dy, earlier, rows, low)
        dread = _product(dy, w.mT, wide)
        chain, steps, drows = _is_chain(rows), both * s, torch.empty_like(rows)
        dw = _product(read.mT, dy, low if chain else wide)
        if chain:  # g = (I + L)⁻ᵀ dw + ((I + L)⁻ᵀ k) dWᵀ, and (l + d) s g goes back
            solve, dstates = inverse.mT.to(low), torch.empty_like(states)
            g, solved = (_product(solve, x, low) for x in (dw, rows[:, :, :N]))
            scaled = form(_scaled, solved, g, steps, back)
        else:
            g = torch.empty_like(w)
        for i in reversed(range(n)):
            then = dstates[i] if chain else None
            if form.ends(i):
                after = W if i == n - 1 else states[i + 1]
                size, norm = (shells.pop(), shells.pop()) if shells else (None, None)
                form(
                    _began, after, dW, norm, size, start, dstart, dW0, form.fading,
                    form.writer.bound, then,
                )  # fmt: skip
            elif then is not None:
                then.copy_(dW)
            if chain:
                back[i, :, :N].baddbmm_(scaled[i], dstates[i].mT, alpha=-1)
            else:
                dlow = dW.to(low)
                _add(dw[i], rows[i, :, :N], dlow.mT)
                with _tf32(low):
                    pull = _write(g[i], inverse[i].mT, dw[i])
                back[i, :, :N].addcmul_(steps[i], pull, value=-1)
                _product(back[i], states[i], low, out=drows[i])
                _add(drows[i, :, :N], w[i], dlow)
            _add(dW, back[i].mT, rows[i])
        if chain:
            _add(g, solved, dstates.mT)
            _product(back, states, low, out=drows)
            _add(drows[:, :, :N], w, dstates)
        dW0 += dstart.sum_to_size(start.shape) * W0 / start.clamp(min=1e-12)
        overlap = _product(g, w.mT, wide)
        dgram, dv, deta = form(
            _systems_backward, overlap, dread, gram, g, errors, s, eta, earlier, factor,
            ctx.kinds[2],
        )  # fmt: skip
        _add(drows, dgram, rows)
        dlast, dh = form(_features, drows, earlier, *ctx.kinds[:2])
        return None, dW, dW0, dlast, dh, dv, deta


def _is_chain(rows: Tensor) -> bool:
    """On a card the chain of kernels is what counts, not a product more beside it."""
    return rows.is_cuda and not torch.compiler.is_exporting()


def _ended(W, W0, start, fading, bound, then):
    """The weights fade and are brought into their shell, in place; what the shell did. `then`
    becomes a copy.
    """
    if fading:
        W.lerp_(W0.to(W.dtype), fading)
    shell = () if bound is None else into_shell_(W, start, *bound)
    if then is not None:
        then.copy_(W)
    return shell


def _began(after, dW, norm, size, start, dstart, dW0, fading, bound, then):
    """Through `_ended`: dW in place; what start and W0 get is added."""
    if bound is not None:
        dstart += out_of_shell_(after, dW, norm, size, start, *bound)
    if fading:
        dW0 += fading * dW.sum_to_size(dW0.shape)
        dW *= 1 - fading
    if then is not None:
        then.copy_(dW)


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


def _systems(gram, eta, earlier, factor, low):
    """The system, what is read of each write, and s."""
    N = earlier.shape[0]
    keys = gram[..., :N, :N]
    s = eta / keys.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clamp(min=1.0)
    read = (gram[..., 1 : N + 1, :N] * earlier).to(low)
    return s * keys * factor, read, s


def _errors(values, found, both):
    return (values - both * found[:, :, : values.shape[2]]).to(values.dtype)


def _laid_errors(dy, earlier, rows, low):
    """dy [n, B, N, V], and at the rows of the features that answered."""
    N = earlier.shape[0]
    dy = _spanned(dy, N, low)
    zeros = dy.new_zeros(*dy.shape[:2], 1, dy.shape[3])
    fill = zeros.expand(-1, -1, rows.shape[2] - N - 1, -1)
    return dy, torch.cat([zeros, dy, fill], 2)


def _scaled(solved, g, steps, back):
    """solved, times the steps; g, times them, is taken from `back` in place."""
    back[:, :, : g.shape[2]] -= (steps * g).to(back.dtype)
    return (steps * solved).to(solved.dtype)


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
    """The gradients of `last` and `h` from those of the rows: a span's first key is the feature
    before it.
    """
    (n, B, _, K), N = drows.shape, earlier.shape[0]
    dh = _streamed(drows[:, :, 1 : N + 1], drows.dtype)
    dh.view(B, n, N, K)[:, :-1, -1] += drows[1:, :, 0].transpose(0, 1)
    return drows[0, :, :1].to(kinds[0]), dh.to(kinds[1])


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


def _write(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x = a b, rounded to x's type; the product itself."""
    if a.dtype != x.dtype or torch.compiler.is_exporting():
        x.copy_(product := torch.bmm(a, b))
        return product
    return torch.bmm(a, b, out=x)


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
