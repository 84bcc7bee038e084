"""One chunk in parallel: the algebra of `naive`, as matrix products and triangular solves.

Inside a chunk every error u_t = −δ_t and every input x_t is known from the chunk's first weights,
so each matrix obeys a gated delta rule with given data,

    W_t = W_{t−1} (α_t I − r_t x_t x_tᵀ) + S_t,    S_t = θ_t S_{t−1} + s_t u_t x_tᵀ,

r_t = η_t / max(1, ‖x_t‖²) and s_t = r_t or η_t. It is linear in (W_0, S_0, u): with γ_t = Π α,
Γ_ts = γ_t / γ_s and c = Γ Θ,

    W_t = γ_t W_0 + b_t S_0 + Σ_{i≤t} (c_ti s_i u_i + Γ_ti w_i) x_iᵀ,   w_i = −r_i W_{i−1} x_i,

where the w solve one unit lower triangular system. Without momentum, c = Γ and S_0 = 0: the two
terms are one. docs/math.md counts operations and bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..memory.linalg import decay_products, inverse_unit_lower
from ..memory.memories import MatrixMemory, Memory, Weights
from ..memory.rules import Gates, GradientRule, RuleState, shrunk
from .chunk import Chunk, Given


def why_not(chunk: Chunk, given: Given) -> str | None:
    """What keeps the algebra from running this call."""
    if not isinstance(chunk.rule, GradientRule):
        return f"{type(chunk.rule).__name__} has no parallel form"
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
    memory, rule, reader = chunk.memory, chunk.rule, chunk.answering
    assert isinstance(rule, GradientRule)
    if chunk.makes_values:
        v = memory.read(at, v)
    T = k.shape[-2]
    scalars = coefficients(rule, gates)
    live = W if S.ahead is None else S.ahead
    origin = tuple(w.detach() for w in at) if chunk.first_order else at
    speed = S.momentum or (None,) * len(W)
    written: list[Any]
    if isinstance(memory, MatrixMemory):
        inputs, outputs, errors = memory.factors(origin, k, v, chunk.aim)
        known = (
            offset == 0 and S.ahead is None and not chunk.first_order
        )  # then W x is among the gradient's own values
        found = outputs if known else tuple(x @ w.mT for x, w in zip(inputs, live))
        each = zip(live, speed, inputs, found, errors)
        written = [
            Written(rule, w, x, y, d, scalars)
            if s is None
            else WrittenWithMomentum(rule, w, s, x, y, d, scalars)
            for w, s, x, y, d in each
        ]
    else:
        grads = memory.grad(origin, k, v, chunk.aim)
        written = [DenseWritten(w, s, g, scalars) for w, s, g in zip(live, speed, grads)]

    def answering(W: Weights) -> Weights:
        return W if reader is None else tuple(w.select(k.ndim - 3, reader) for w in W)

    # Writes seen after each token: all of them, or those of the periods that have ended.
    ended = [rule.period * ((offset + t + 1) // rule.period) - offset for t in range(T)]
    o = None
    if q is not None and chunk.read == "boundary":
        o = memory.read(answering(at), q)
    elif q is not None:
        readable = written if reader is None else [m.only(reader) for m in written]
        o = _read_tokens(memory, readable, answering(W), q, None if rule.period == 1 else ended)

    ahead = tuple(m.weights(T - 1) for m in written)
    if ended[-1] < T:
        W = tuple(m.weights(ended[-1] - 1) for m in written) if ended[-1] > 0 else W
    else:
        W = ahead
    momentum = tuple(m.momentum() for m in written) if rule.momentum else None
    return o, W, RuleState(momentum, None if S.ahead is None else ahead)


def one(x: Tensor, reader: int | None, tail: int = 2) -> Tensor:
    """That memory's part along the last leading axis, where `tail` axes follow it."""
    if reader is None:
        return x
    axis = x.ndim - tail - 1
    return x.select(axis, reader if x.shape[axis] > 1 else 0)


class Coefficients(NamedTuple):
    """The scalars of a chunk, the same for all matrices that share its gates.

    eta, gamma [*b, T]: step size, γ. retain, force [*b, T, T]: Γ, c. With momentum: carry [*b, T]
    is b_t, theta [*b, T] is Π θ, keep [*b, T] what is left of each gradient in S at the end.
    """

    eta: Tensor
    gamma: Tensor
    retain: Tensor
    force: Tensor
    carry: Tensor | None = None
    theta: Tensor | None = None
    keep: Tensor | None = None


def coefficients(rule: GradientRule, gates: Gates) -> Coefficients:
    """The chunk's scalars from its gates, each gate [*b, T]."""
    eta, log_alpha, log_theta = gates
    if log_alpha is None:
        gamma = eta.new_ones(eta.shape[-1])
        retain = eta.new_ones(eta.shape[-1:] * 2).tril()
    else:
        gamma, retain = decay_products(log_alpha.cumsum(-1))
    if not rule.momentum:
        return Coefficients(eta, gamma, retain, retain)
    assert log_theta is not None
    theta, keep = decay_products(log_theta.cumsum(-1))
    carry = (retain @ theta.unsqueeze(-1)).squeeze(-1)
    return Coefficients(eta, gamma, retain, retain @ keep, carry, theta, keep[..., -1, :])


def before(x: Tensor, axis: int, first: float) -> Tensor:
    """What stood one token earlier: for the state that token t's write finds."""
    start = torch.full_like(x.narrow(axis, 0, 1), first)
    return torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis)


class Written:
    """One matrix along the chunk, no momentum: every W_t as a few factors, never formed."""

    def __init__(
        self,
        rule: GradientRule,
        W: Float[Tensor, "*b out in"],
        x: Float[Tensor, "*c T in"],
        y: Float[Tensor, "*b T out"],
        error: Float[Tensor, "*b T out"],
        c: Coefficients,
    ):
        self.W, self.x, self.c = W, x, c
        r = shrunk(c.eta, x).unsqueeze(-1)
        self.w = -error * (r if rule.normalize else c.eta.unsqueeze(-1))
        if rule.delta:
            system = r * before(c.retain, -2, 0.0) * (x @ x.mT)
            found = r * before(c.gamma, -1, 1.0).unsqueeze(-1) * y
            self.w = inverse_unit_lower(system) @ (self.w - found)

    def read(self, z: Float[Tensor, "*b T in"]) -> Float[Tensor, "*b T out"]:
        """W_t z_t for every token."""
        out = self.c.gamma.unsqueeze(-1) * (z @ self.W.mT)
        return out + (self.c.retain * (z @ self.x.mT)) @ self.w

    def only(self, reader: int) -> Written:
        """The same for one memory along the last leading axis."""
        view = self._view()
        view.W, view.x, view.w = (one(a, reader) for a in (self.W, self.x, self.w))
        if self.c.gamma.ndim > 1:  # else there is no retention gate
            gamma, retain = one(self.c.gamma, reader, 1), one(self.c.retain, reader)
            view.c = self.c._replace(gamma=gamma, retain=retain)
        return view

    def rows(self, index: Tensor) -> Written:
        """The same, where token t is seen as token index[t]."""
        view = self._view()
        view.c = self.c._replace(
            gamma=self.c.gamma.index_select(-1, index),
            retain=self.c.retain.index_select(-2, index),
        )
        return view

    def _view(self) -> Written:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        return view

    def weights(self, t: int) -> Float[Tensor, "*b out in"]:
        """W_t."""
        c = self.c
        return (
            c.gamma[..., t, None, None] * self.W
            + (c.retain[..., t, :].unsqueeze(-1) * self.w).mT @ self.x
        )


class WrittenWithMomentum(Written):
    """The same with momentum: gradients and delta terms fade differently, so they are two terms."""

    def __init__(
        self,
        rule: GradientRule,
        W: Float[Tensor, "*b out in"],
        S: Float[Tensor, "*b out in"],
        x: Float[Tensor, "*c T in"],
        y: Float[Tensor, "*b T out"],
        error: Float[Tensor, "*b T out"],
        c: Coefficients,
    ):
        self.W, self.S, self.x, self.c = W, S, x, c
        assert c.carry is not None
        r = shrunk(c.eta, x)
        s = r if rule.normalize else c.eta
        self.forced = -error * s.unsqueeze(-1)
        self.w = torch.zeros_like(self.forced)
        if rule.delta:
            overlap, r = x @ x.mT, r.unsqueeze(-1)
            found = before(c.gamma, -1, 1.0).unsqueeze(-1) * y
            found = found + before(c.carry, -1, 0.0).unsqueeze(-1) * (x @ S.mT)
            found = found + (before(c.force, -2, 0.0) * overlap) @ self.forced
            self.w = inverse_unit_lower(r * before(c.retain, -2, 0.0) * overlap) @ (-r * found)

    def read(self, z: Float[Tensor, "*b T in"]) -> Float[Tensor, "*b T out"]:
        """W_t z_t for every token."""
        assert self.c.carry is not None
        out = super().read(z) + self.c.carry.unsqueeze(-1) * (z @ self.S.mT)
        return out + (self.c.force * (z @ self.x.mT)) @ self.forced

    def only(self, reader: int) -> Written:
        """The same for one memory along the last leading axis."""
        view = super().only(reader)
        assert isinstance(view, WrittenWithMomentum)
        assert self.c.carry is not None
        view.S, view.forced = one(self.S, reader), one(self.forced, reader)
        view.c = view.c._replace(
            carry=one(self.c.carry, reader, 1), force=one(self.c.force, reader)
        )
        return view

    def rows(self, index: Tensor) -> Written:
        """The same, where token t is seen as token index[t]."""
        view = super().rows(index)
        assert self.c.carry is not None
        view.c = view.c._replace(
            carry=self.c.carry.index_select(-1, index), force=self.c.force.index_select(-2, index)
        )
        return view

    def weights(self, t: int) -> Float[Tensor, "*b out in"]:
        """W_t."""
        c = self.c
        assert c.carry is not None
        W = c.gamma[..., t, None, None] * self.W + c.carry[..., t, None, None] * self.S
        left = c.force[..., t, :].unsqueeze(-1) * self.forced
        return W + (left + c.retain[..., t, :].unsqueeze(-1) * self.w).mT @ self.x

    def momentum(self) -> Float[Tensor, "*b out in"]:
        """S at the chunk's end."""
        c = self.c
        assert c.theta is not None
        assert c.keep is not None
        left = (c.keep.unsqueeze(-1) * self.forced).mT @ self.x
        return c.theta[..., -1, None, None] * self.S + left


class DenseWritten:
    """One weight of a `FunctionMemory` along the chunk: every W_t, formed."""

    def __init__(self, W: Tensor, S: Tensor | None, grad: Tensor, scalars: Coefficients):
        self.S, self.c = S, scalars
        lead, shape = grad.shape[: scalars.eta.ndim], W.shape[scalars.eta.ndim - 1 :]
        self.shape = shape
        self.forced = -scalars.eta.unsqueeze(-1) * grad.reshape(*lead, -1)
        every = scalars.force @ self.forced
        every = every + scalars.gamma.unsqueeze(-1) * self._flat(W).unsqueeze(-2)
        if S is not None and scalars.carry is not None:
            every = every + scalars.carry.unsqueeze(-1) * self._flat(S).unsqueeze(-2)
        self.every = every.reshape(*lead, *shape)

    def _flat(self, w: Tensor) -> Tensor:
        return w.reshape(*w.shape[: w.ndim - len(self.shape)], -1)

    def only(self, reader: int) -> DenseWritten:
        """The same for one memory along the last leading axis."""
        view = object.__new__(DenseWritten)
        view.__dict__.update(self.__dict__)
        view.every = one(self.every, reader, 1 + len(self.shape))
        view.c = self.c._replace(eta=one(self.c.eta, reader, 1))
        return view

    def weights(self, t: int) -> Tensor:
        """W_t."""
        return self.every.select(self.c.eta.ndim - 1, t)

    def momentum(self) -> Tensor:
        """S at the chunk's end."""
        c = self.c
        assert self.S is not None
        assert c.theta is not None
        assert c.keep is not None
        left = (c.keep.unsqueeze(-2) @ self.forced).squeeze(-2)
        return (c.theta[..., -1:] * self._flat(self.S) + left).reshape(self.S.shape)


def _read_tokens(
    memory: Memory, written: list, W: Weights, q: Tensor, ended: list[int] | None
) -> Tensor:
    """M_t(q_t) through each token's own weights; `ended` counts the writes that token t sees."""
    if isinstance(memory, MatrixMemory):
        if ended is None:
            return memory.run(lambda i, z: written[i].read(z), q)
        index = torch.tensor([max(n - 1, 0) for n in ended], device=q.device)
        fresh = torch.tensor([n > 0 for n in ended], device=q.device).unsqueeze(-1)
        views = [m.rows(index) for m in written]
        return memory.run(
            lambda i, z: torch.where(fresh, views[i].read(z), z @ W[i].mT),
            q,
        )
    every = [m.every for m in written]
    if ended is not None:
        axis = q.ndim - 2
        every = [
            torch.stack([m.weights(n - 1) if n > 0 else w for n in ended], axis)
            for m, w in zip(written, W)
        ]
    return memory.read(tuple(every), q.unsqueeze(-2)).squeeze(-2)
