"""The common chunk as one function with its backward pass written out.

A whole chunk of a gradient rule without momentum or period, the memory a matrix or an MLP: the
mathematics of `parallel`, arranged for speed. What reads the same first weights (the keys, the
inputs of self-generated values, the queries of a boundary read) is one stack of rows. For each
matrix, with y = W x, u = −δ, r = η / max(1, ‖x‖²), s = r if the rule normalizes, else η,

    (I + r (Γ₋ ∘ x xᵀ)) w = s u − r γ₋ y,      W_C = γ_C W + (Γ_C w)ᵀ x,

where row t of Γ₋ and γ₋ is row t − 1 of Γ and γ: what the write of token t finds. Autograd would
keep every intermediate and walk back op by op; the backward pass here spends two products for each
of the forward pass and a few passes over memory. docs/math.md counts both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.linalg import inverse_unit_lower
from ..memory.memories import Matrix, ResidualMLP, Weights
from ..memory.rules import Gates, GradientRule, RuleState
from .chunk import Chunk, Given
from .rows import Scalars, add, add_product, head, nonlinearity, one, plus, split, stacked, steps


def why_not(chunk: Chunk, given: Given) -> str | None:
    """What keeps this form from running the call: `parallel` runs such calls, too."""
    rule = chunk.rule
    if not isinstance(rule, GradientRule):
        return f"{type(rule).__name__} has no parallel form"
    if not isinstance(chunk.memory, Matrix | ResidualMLP):
        return f"{chunk.memory!r} is no Matrix and no ResidualMLP"
    if chunk.aim.name not in ("dot", "l2"):
        return f"objective {chunk.aim.name!r} is not dot or l2"
    if rule.momentum or rule.period > 1:
        return "momentum and periods have no backward pass written out"
    if given.offset or chunk.first_order:
        return "a call that begins inside a chunk, or first_order, has no backward pass written out"
    return None


def options() -> dict[str, Any]:
    """It needs nothing to be told."""
    return {}


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
) -> tuple[Tensor | None, Weights, RuleState]:
    """See `nestlearn.scan.update`."""
    memory, read, reader = chunk.memory, chunk.read, chunk.answering
    apart = read == "boundary" and reader is not None  # one memory's answers: not worth a stack
    form = (
        memory, chunk.rule, chunk.aim.name == "l2", None if apart else read, reader,
        chunk.makes_values,
    )  # fmt: skip
    given = (None if apart else q, k, v, gates.eta, gates.log_alpha, *W)
    outputs = _Chunk.apply(form, *given) if torch.is_grad_enabled() else _forward(form, *given)[0]
    o, after = None, outputs[-len(W) :]
    if q is not None and not apart:
        o = outputs[0]
    elif q is not None:
        o = memory.read(tuple(one(w, reader) for w in W), q)
    return o, tuple(after), S


def answers(memory: Matrix | ResidualMLP, W: Weights, z: Tensor) -> Tensor:
    """`memory.read(W, z)`; of what the backward pass needs only the pre-activations are kept.

    W [*b, out, in], z [*c, T, K] with leading axes that broadcast to *b; returns [*b, T, V].
    """
    with torch.autocast(z.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return memory.read(W, z)
        return _Answers.apply(memory, z, *W)


class _Answers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, memory, z, *W):
        phi, gain, residual = nonlinearity(memory)
        x, y = z, []
        for i, w in enumerate(W):
            y.append(x @ w.mT)
            if i < len(W) - 1:
                x = phi.value(y[i].mul_(gain)).div_(gain)
        ctx.memory = memory
        ctx.save_for_backward(z, *W, *y[:-1])
        return y[-1] + z if residual else y[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        phi, gain, residual = nonlinearity(ctx.memory)
        n = len(ctx.memory.shapes())
        (z,), W, y = split(list(ctx.saved_tensors), 1, n, n - 1)
        dW: list[Tensor] = []
        down = dy
        for i in reversed(range(n)):
            x = z if i == 0 else phi.value(y[i - 1]).div_(gain)
            dW.insert(0, (down.mT @ x).sum_to_size(W[i].shape))
            down = down @ W[i]
            if i > 0:
                down = phi.pull(down, y[i - 1])
        dz = down + dy if residual else down
        return None, dz.sum_to_size(z.shape), *dW


class _Chunk(torch.autograd.Function):
    """(q, k, v, η, log α, W...) -> (o if q is given, W_C...); shapes as in `nestlearn.scan`."""

    @staticmethod
    def forward(ctx: Any, form, *given):
        outputs, saved, ctx.sizes = _forward(form, *given)
        ctx.form = form
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        form = memory, rule, l2, read, reader, own = ctx.form
        phi, gain, residual = nonlinearity(memory)
        q, k, v, eta, log_alpha, *rest = ctx.saved_tensors
        n, T = len(memory.shapes()), k.shape[-2]
        do, dafter = grads[0], grads[-n:]
        W, w, y, back, systems, seen = split(rest, n, n, n, n - 1, *ctx.sizes)
        apart = q is not None and read == "boundary"  # its rows stand after the keys'
        c = Scalars(eta, log_alpha)
        scale = [1.0 / gain] * (n - 1) + [1.0]
        x = [_rows(form, W[0], q, k, v), *(phi.value(a).div_(gain) for a in y[:-1])]
        xk, yk = [head(a, T) for a in x], [head(a, T) for a in y]
        u = [*(phi.pull(p, a) for p, a in zip(back, yk)), _descent(form, y[-1], k, v)]
        deta = torch.zeros_like(eta)
        dtotal = torch.zeros_like(eta if log_alpha is None else log_alpha)

        # W_C = γ_C W + (Γ_C w)ᵀ x
        dW, dw, dx = [], [], []
        for i in range(n):
            pulled = xk[i] @ dafter[i].mT
            dw.append(c.left * pulled)
            dx.append((c.left * w[i]) @ dafter[i])
            dW.append(dafter[i].clone() if log_alpha is None else c.gamma[..., -1:, :] * dafter[i])
            if log_alpha is not None:
                share = c.left.squeeze(-1) * (w[i] * pulled).sum(-1)
                add(dtotal, -share)
                whole = share.sum(-1) + (dW[i] * W[i]).sum((-2, -1))
                add(dtotal[..., -1], whole)

        dq = None
        if q is not None and read == "token":
            dq, df = do, do
            for i in reversed(range(n)):
                share, f = seen[2 * i : 2 * i + 2]
                z = q if i == 0 else phi.value(seen[2 * i - 1]).div_(gain)
                dshare = df @ one(w[i], reader).mT
                if log_alpha is not None:
                    moved = (df * f).sum(-1).mul_(scale[i]) - (dshare * share).sum(-2)
                    add(one(dtotal, reader, 1), moved)
                doverlap = one(c.ratio, reader) * dshare
                dc = one(c.gamma, reader) * df
                add_product(one(dw[i], reader), share.mT, df)
                add_product(one(dW[i], reader), dc.mT, z)
                add_product(one(dx[i], reader), doverlap.mT, z)
                df = plus(dc @ one(W[i], reader), doverlap, one(xk[i], reader))
                if i > 0:
                    df = phi.pull(df, seen[2 * i - 1])
            dq = df + do if residual else df

        # (I + r (Γ₋ ∘ x xᵀ)) w = s u − r γ₋ y
        du, dy, dkeys = [], [], 0
        for i in range(n):
            xs = k if i == 0 else xk[i]
            r, s = steps(c.eta, xs, rule)
            lead = r.shape[:-2]
            right = dw[i]
            if rule.delta:
                faded, inverse = systems[2 * i : 2 * i + 2]
                right = inverse.mT @ right
            du.append(s * right)
            dstep = (right * u[i]).sum(-1)
            if not rule.normalize:
                add(deta, dstep)
                dstep = torch.zeros_like(dstep)
            dr = dstep.sum_to_size(*lead, T)
            if rule.delta:
                dsystem = (right @ w[i].mT).neg_().sum_to_size(*lead, T, T)
                dfaded = dsystem * faded
                seen_y = (right * yk[i]).sum(-1).mul_(scale[i]) * c.found.squeeze(-1)
                drest = dfaded.sum(-1) - seen_y.sum_to_size(*lead, T)
                dr = dr + drest
                dy.append((-r * c.found) * right)
                if log_alpha is not None:
                    later = F.pad((r.squeeze(-1) * drest)[..., 1:], (0, 1))
                    add(dtotal, later - (r.mT @ dfaded).squeeze(-2))
                doverlap = dsystem.mul_(r).mul_(c.faded_by)
            if rule.delta or rule.normalize:
                size = xs.square().sum(-1)
                add(deta, dr / size.clamp(min=1.0))
                dsize = torch.where(size > 1.0, -dr * r.squeeze(-1) / size, 0.0)
            if rule.delta:
                doverlap.diagonal(dim1=-2, dim2=-1).add_(dsize)
                both = doverlap + doverlap.mT
                if lead == dx[i].shape[:-2]:
                    dx[i] = plus(dx[i], both, xk[i])
                else:
                    dkeys = both @ k
            elif rule.normalize and lead == dx[i].shape[:-2]:
                dx[i] += (2 * dsize).unsqueeze(-1) * xk[i]
            elif rule.normalize:
                dkeys = (2 * dsize).unsqueeze(-1) * k
            if not rule.delta:
                dy.append(torch.zeros_like(du[i]))

        # u_i = (u_{i+1} W_{i+1}) ∘ φ'(gain y_i), and at the end u = v − y − k or v
        for i in range(n - 1):
            dy[i] += phi.curve(yk[i]).mul_(back[i]).mul_(du[i]).mul_(gain)
            pulled = phi.pull(du[i], yk[i])
            du[i + 1] = plus(du[i + 1], pulled, W[i + 1].mT)
            add_product(dW[i + 1], u[i + 1].mT, pulled)
        if l2:
            dy[-1] -= du[-1]

        # y = W x of all rows, from the last matrix to the first
        rows = [dy[-1]] + ([du[-1]] if own else []) + ([do] if apart else [])
        down = stacked(rows)
        for i in reversed(range(n)):
            add_product(dW[i], down.mT, x[i])
            dx_rows = down @ W[i]
            head(dx_rows, T).add_(dx[i])
            if i > 0:
                down = phi.pull(dx_rows, y[i - 1])
                head(down, T).add_(dy[i - 1])
        dk, *others = dx_rows.split(T, -2)
        if l2 and residual:
            dk = dk - du[-1]
        dv = du[-1]
        if own:
            dv = others[0] + du[-1] if residual else others[0]
        if apart:
            dq = others[-1] + do if residual else others[-1]
        dlog_alpha = None if log_alpha is None else dtotal.flip(-1).cumsum(-1).flip(-1)
        dk, dv = dk.sum_to_size(k.shape) + dkeys, dv.sum_to_size(v.shape)
        return None, dq, dk, dv, deta, dlog_alpha, *dW


def _forward(form: tuple, q, k, v, eta, log_alpha, *W) -> tuple[tuple, tuple, tuple[int, int]]:
    """The outputs, what the backward pass needs, and how much of that are systems and reads."""
    memory, rule, _, read, reader, _ = form
    phi, gain, residual = nonlinearity(memory)
    c = Scalars(eta, log_alpha)
    x, y = [_rows(form, W[0], q, k, v)], []
    for i, w in enumerate(W):
        y.append(x[i] @ w.mT)
        if i < len(W) - 1:  # hidden: y is gain W x from here on
            x.append(phi.value(y[i].mul_(gain)).div_(gain))
    T = k.shape[-2]
    u = [_descent(form, y[-1], k, v)]  # of each matrix
    back: list[Tensor] = []  # the same before the slope of φ
    for w, a in zip(W[:0:-1], y[-2::-1]):
        back.insert(0, u[0] @ w)
        u.insert(0, phi.pull(back[0], head(a, T)))
    writes, systems, after = [], [], []
    for i, w in enumerate(W):
        xi = head(x[i], T)
        xs = k if i == 0 else xi  # where memories share the keys, one system serves all of them
        r, s = steps(c.eta, xs, rule)
        if rule.delta:
            faded = c.faded_by * (xs @ xs.mT)
            inverse = inverse_unit_lower(r * faded)
            scale = 1.0 if i == len(W) - 1 else 1.0 / gain
            found = (r * c.found * scale) * head(y[i], T)
            writes.append(inverse @ (s * u[i] - found))
            systems += [faded, inverse]
        else:
            writes.append(s * u[i])
        kept = w if log_alpha is None else c.gamma[..., -1:, :] * w
        after.append(plus(kept, (c.left * writes[i]).mT, xi))

    o, seen = None, []
    if q is not None and read == "boundary":
        answer = y[-1].narrow(-2, y[-1].shape[-2] - T, T)
        o = answer + q if residual else answer.clone()
    elif q is not None:
        z = q
        for i, w in enumerate(W):
            share = one(c.ratio, reader) * (z @ one(head(x[i], T), reader).mT)
            f = one(c.gamma, reader) * (z @ one(w, reader).mT)
            f = plus(f, share, one(writes[i], reader))
            if i < len(W) - 1:
                z = phi.value(f.mul_(gain)).div_(gain)
            seen += [share, f]
        o = f + q if residual else f
    saved = (q, k, v, eta, log_alpha, *W, *writes, *y, *back, *systems, *seen)
    outputs = tuple(after) if o is None else (o, *after)
    return outputs, saved, (len(systems), len(seen))


def _rows(form: tuple, W: Tensor, q: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """All that the first weights read, one block of T rows after the other: k, v, q."""
    read, own = form[3], form[5]
    rows = [k] + ([v] if own else []) + ([q] if q is not None and read == "boundary" else [])
    return stacked(rows).expand(*W.shape[:-2], -1, -1).contiguous()


def _descent(form: tuple, y: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """u = −δ of the last matrix, from the answers y of all rows."""
    memory, _, l2, _, _, own = form
    residual, T = nonlinearity(memory)[2], k.shape[-2]
    if own:
        v = y.narrow(-2, T, T) + v if residual else y.narrow(-2, T, T)
    if not l2:
        return v
    return v - head(y, T) - k if residual else v - head(y, T)
