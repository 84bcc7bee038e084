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
        return f"{type(chunk.memory).__name__} is no Matrix and no ResidualMLP"
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
        back = _Backward(ctx.form, ctx.sizes, list(ctx.saved_tensors))
        do, dafter = grads[0], grads[-back.n :]
        back.through_update(dafter)
        dq = back.through_read(do) if back.q is not None and back.read == "token" else None
        back.through_systems()
        back.through_descent()
        return None, *back.through_rows(do, dq), *back.dW


class _Backward:
    """The backward pass, equation by equation from the last to the first.

    Of each matrix, first to last: x, y, w, u as in the equations (of all rows of the stack, with a
    k of the keys alone), dw, dW and dx, of the keys, the gradients gathered so far, and du, dy.
    """

    def __init__(self, form: tuple, sizes: tuple[int, int], saved: list[Any]):
        self.form = form
        self.memory, self.rule, self.l2, self.read, self.reader, self.own = form
        self.phi, self.gain, self.residual = nonlinearity(self.memory)
        self.q, self.k, self.v, eta, self.log_alpha, *rest = saved
        self.n, self.T = len(self.memory.shapes()), self.k.shape[-2]
        parts = split(rest, self.n, self.n, self.n, self.n - 1, *sizes)
        self.W, self.w, self.y, self.back, self.systems, self.seen = parts
        self.apart = self.q is not None and self.read == "boundary"  # behind the keys' rows
        self.c = Scalars(eta, self.log_alpha)
        self.scale = [1.0 / self.gain] * (self.n - 1) + [1.0]
        hidden = (self.phi.value(a).div_(self.gain) for a in self.y[:-1])
        self.x = [_rows(form, self.W[0], self.q, self.k, self.v), *hidden]
        self.xk, self.yk = [[head(a, self.T) for a in rows] for rows in (self.x, self.y)]
        pulled = (self.phi.pull(p, a) for p, a in zip(self.back, self.yk))
        self.u = [*pulled, _descent(form, self.y[-1], self.k, self.v)]
        self.deta = torch.zeros_like(eta)
        self.dtotal = torch.zeros_like(eta if self.log_alpha is None else self.log_alpha)
        self.dW: list[Tensor] = []
        self.dw: list[Tensor] = []
        self.dx: list[Tensor] = []
        self.du: list[Tensor] = []
        self.dy: list[Tensor] = []
        self.dkeys: Tensor | int = 0

    def through_update(self, dafter: tuple[Tensor, ...]) -> None:
        """W_C = γ_C W + (Γ_C w)ᵀ x"""
        c = self.c
        for d, x, w, W in zip(dafter, self.xk, self.w, self.W):
            pulled = x @ d.mT
            self.dw.append(c.left * pulled)
            self.dx.append((c.left * w) @ d)
            self.dW.append(d.clone() if self.log_alpha is None else c.gamma[..., -1:, :] * d)
            if self.log_alpha is not None:
                share = c.left.squeeze(-1) * (w * pulled).sum(-1)
                add(self.dtotal, -share)
                add(self.dtotal[..., -1], share.sum(-1) + (self.dW[-1] * W).sum((-2, -1)))

    def through_read(self, do: Tensor) -> Tensor:
        """Reads at their tokens: f = γ W z + (Γ ∘ z xᵀ) w, through all matrices; returns dq."""
        reader, df = self.reader, do
        gamma, ratio = one(self.c.gamma, reader), one(self.c.ratio, reader)
        for i in reversed(range(self.n)):
            share, f = self.seen[2 * i : 2 * i + 2]
            hidden = i > 0
            z = self.phi.value(self.seen[2 * i - 1]).div_(self.gain) if hidden else self.q
            dshare = df @ one(self.w[i], reader).mT
            if self.log_alpha is not None:
                moved = (df * f).sum(-1).mul_(self.scale[i]) - (dshare * share).sum(-2)
                add(one(self.dtotal, reader, 1), moved)
            doverlap, dc = ratio * dshare, gamma * df
            add_product(one(self.dw[i], reader), share.mT, df)
            add_product(one(self.dW[i], reader), dc.mT, z)
            add_product(one(self.dx[i], reader), doverlap.mT, z)
            df = plus(dc @ one(self.W[i], reader), doverlap, one(self.xk[i], reader))
            if hidden:
                df = self.phi.pull(df, self.seen[2 * i - 1])
        return df + do if self.residual else df

    def through_systems(self) -> None:
        """(I + r (Γ₋ ∘ x xᵀ)) w = s u − r γ₋ y"""
        rule = self.rule
        for i in range(self.n):
            xs = self.k if i == 0 else self.xk[i]
            r, s = steps(self.c.eta, xs, rule)
            right = self.dw[i]
            if rule.delta:
                right = self.systems[2 * i + 1].mT @ right  # the inverse of the system
            self.du.append(s * right)
            dr = (right * self.u[i]).sum(-1)
            if not rule.normalize:  # s = η
                add(self.deta, dr)
                dr = torch.zeros_like(dr)
            dr = dr.sum_to_size(*r.shape[:-1])
            doverlap = None
            if rule.delta:
                dr, doverlap = self._through_system(i, r, right, dr)
                self.dy.append((-r * self.c.found) * right)
            else:
                self.dy.append(torch.zeros_like(right))
            if rule.delta or rule.normalize:
                self._through_sizes(i, xs, r, dr, doverlap)

    def _through_system(
        self, i: int, r: Tensor, right: Tensor, dr: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of r and of x xᵀ, to which the system's own are added."""
        lead, T = r.shape[:-2], self.T
        dsystem = (right @ self.w[i].mT).neg_().sum_to_size(*lead, T, T)
        dfaded = dsystem * self.systems[2 * i]
        seen = (right * self.yk[i]).sum(-1).mul_(self.scale[i]) * self.c.found.squeeze(-1)
        drest = dfaded.sum(-1) - seen.sum_to_size(*lead, T)
        if self.log_alpha is not None:
            later = F.pad((r.squeeze(-1) * drest)[..., 1:], (0, 1))
            add(self.dtotal, later - (r.mT @ dfaded).squeeze(-2))
        return dr + drest, dsystem.mul_(r).mul_(self.c.faded_by)

    def _through_sizes(
        self, i: int, xs: Tensor, r: Tensor, dr: Tensor, doverlap: Tensor | None
    ) -> None:
        """r = η / max(1, ‖x‖²), and x xᵀ where there is a system."""
        size = xs.square().sum(-1)
        add(self.deta, dr / size.clamp(min=1.0))
        dsize = torch.where(size > 1.0, -dr * r.squeeze(-1) / size, 0.0)
        own = r.shape[:-2] == self.dx[i].shape[:-2]  # else the memories share the keys
        if doverlap is not None:
            doverlap.diagonal(dim1=-2, dim2=-1).add_(dsize)
            both = doverlap + doverlap.mT
            if own:
                self.dx[i] = plus(self.dx[i], both, self.xk[i])
            else:
                self.dkeys = both @ self.k
        elif own:
            self.dx[i] += (2 * dsize).unsqueeze(-1) * self.xk[i]
        else:
            self.dkeys = (2 * dsize).unsqueeze(-1) * self.k

    def through_descent(self) -> None:
        """u_i = (u_{i+1} W_{i+1}) ∘ φ'(gain y_i), and at the end u = v − y − k or v"""
        for i in range(self.n - 1):
            slope = self.phi.curve(self.yk[i]).mul_(self.back[i])
            self.dy[i] += slope.mul_(self.du[i]).mul_(self.gain)
            pulled = self.phi.pull(self.du[i], self.yk[i])
            self.du[i + 1] = plus(self.du[i + 1], pulled, self.W[i + 1].mT)
            add_product(self.dW[i + 1], self.u[i + 1].mT, pulled)
        if self.l2:
            self.dy[-1] -= self.du[-1]

    def through_rows(self, do: Tensor, dq: Tensor | None) -> tuple[Tensor | None, ...]:
        """y = W x of all rows, from the last matrix to the first; dq, dk, dv, dη, d log α."""
        dv = self.du[-1]
        rows = [self.dy[-1]] + ([dv] if self.own else []) + ([do] if self.apart else [])
        down = stacked(rows)
        for i in reversed(range(self.n)):
            add_product(self.dW[i], down.mT, self.x[i])
            dx = down @ self.W[i]
            head(dx, self.T).add_(self.dx[i])
            if i > 0:
                down = self.phi.pull(dx, self.y[i - 1])
                head(down, self.T).add_(self.dy[i - 1])
        dk, *others = dx.split(self.T, -2)
        if self.l2 and self.residual:
            dk = dk - dv
        if self.own:
            dv = others[0] + dv if self.residual else others[0]
        if self.apart:
            dq = others[-1] + do if self.residual else others[-1]
        dlog_alpha = None if self.log_alpha is None else self.dtotal.flip(-1).cumsum(-1).flip(-1)
        dk = dk.sum_to_size(self.k.shape) + self.dkeys
        return dq, dk, dv.sum_to_size(self.v.shape), self.deta, dlog_alpha


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
