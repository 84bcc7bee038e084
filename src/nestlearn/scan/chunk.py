"""One chunk in parallel: the algebra of `naive`, as matrix products and triangular solves.

Inside a chunk every error u_t = −δ_t and every input x_t is known from the chunk's first weights,
so each matrix obeys a gated delta rule with given data,

    W_t = W_{t−1} (α_t I − η_t x_t x_tᵀ) + S_t,    S_t = θ_t S_{t−1} + η_t u_t x_tᵀ,

which is linear in (W_0, S_0, u): W_t = γ_t W_0 + b_t S_0 + Σ_{s≤t} (c_ts η_s u_s + Γ_ts w_s) x_sᵀ,
with Γ_ts = γ_t/γ_s, c = Γ Θ and w_s = −η_s W_{s−1} x_s from one unit lower triangular system.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..memory.linalg import decay_products, solve_unit_lower, unit
from ..memory.memories import MatrixMemory, Memory, Weights
from ..memory.objectives import Objective
from ..memory.rules import Gates, GradientRule, RuleState, strengths


def update(
    memory: Memory,
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
) -> tuple[Tensor | None, Weights, RuleState]:
    """See `nestlearn.scan.update`."""
    T = k.shape[-2]
    scalars = coefficients(rule, gates)
    live = W if S.ahead is None else S.ahead
    origin = tuple(w.detach() for w in at) if first_order else at
    speed = S.momentum or (None,) * len(W)
    written: list[Written] | list[DenseWritten]
    if isinstance(memory, MatrixMemory):
        inputs, outputs, errors = memory.factors(origin, k, v, objective)
        known = (
            offset == 0 and S.ahead is None and not first_order
        )  # then W x is among the gradient's own values
        found = outputs if known else (None,) * len(W)
        each = zip(live, speed, inputs, found, errors)
        written = [Written(rule, w, s, x, y, d, scalars) for w, s, x, y, d in each]
    else:
        grads = memory.grad(origin, k, v, objective)
        written = [DenseWritten(w, s, g, scalars) for w, s, g in zip(live, speed, grads)]

    # Writes seen after each token: all of them, or those of the periods that have ended.
    ended = [rule.period * ((offset + t + 1) // rule.period) - offset for t in range(T)]
    o = None
    if q is not None and read == "boundary":
        o = memory.read(at, q)
    elif q is not None:
        o = _read_tokens(memory, written, W, q, None if rule.period == 1 else ended)

    ahead = tuple(m.weights(T - 1) for m in written)
    if ended[-1] < T:
        W = tuple(m.weights(ended[-1] - 1) for m in written) if ended[-1] > 0 else W
    else:
        W = ahead
    momentum = tuple(m.momentum() for m in written) if rule.momentum else None
    return o, W, RuleState(momentum, None if S.ahead is None else ahead)


class Coefficients(NamedTuple):
    """The scalars of a chunk, the same for all matrices that share its gates.

    eta, gamma [*b, T]: step size, and retention γ_t since the chunk's start (None: 1). retain,
    force [*b, T, T]: what is left at t of token s's delta term (Γ) and gradient (c), s ≤ t.
    With momentum: carry [*b, T] is b_t, theta [*b, T] is Π θ, keep [*b, T] what is left of each
    gradient in S at the end.
    """

    eta: Tensor
    gamma: Tensor | None
    retain: Tensor
    force: Tensor
    carry: Tensor | None
    theta: Tensor | None
    keep: Tensor | None


def coefficients(rule: GradientRule, gates: Gates) -> Coefficients:
    """The chunk's scalars from its gates, each gate [*b, T]."""
    eta, log_alpha, log_theta = gates
    if log_alpha is None:
        gamma, retain = (
            None,
            torch.ones(eta.shape[-1:] * 2, dtype=eta.dtype, device=eta.device).tril(),
        )
    else:
        gamma, retain = decay_products(log_alpha)
    if not rule.momentum:
        return Coefficients(eta, gamma, retain, retain, None, None, None)
    assert log_theta is not None
    theta, keep = decay_products(log_theta)
    carry = (retain @ theta.unsqueeze(-1)).squeeze(-1)
    return Coefficients(eta, gamma, retain, retain @ keep, carry, theta, keep[..., -1, :])


def before(x: Tensor, axis: int, first: float) -> Tensor:
    """What stood one token earlier: for the state that token t's write finds."""
    start = torch.full_like(x.narrow(axis, 0, 1), first)
    return torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis)


class Written:
    """One matrix along the chunk: every W_t as a few factors, never formed."""

    def __init__(
        self,
        rule: GradientRule,
        W: Float[Tensor, "*b out in"],
        S: Float[Tensor, "*b out in"] | None,
        x: Float[Tensor, "*c T in"],
        y: Float[Tensor, "*b T out"] | None,
        error: Float[Tensor, "*b T out"],
        scalars: Coefficients,
    ):
        self.W, self.S, self.c = W, S, scalars
        self.x, norm = unit(x)
        error_strength, self.fade = strengths(norm, rule.normalize)
        self.forced = -error * (error_strength * scalars.eta.unsqueeze(-1))
        self.terms = [(scalars.force, self.forced)]
        if rule.delta:
            self._add_delta_term(self.x @ W.mT if y is None else y / norm)

    def _add_delta_term(self, found: Tensor) -> None:
        c, eta = self.c, self.c.eta.unsqueeze(-1) * self.fade
        overlap = self.x @ self.x.mT
        system = eta * before(c.retain, -2, 0.0) * overlap
        if c.gamma is not None:
            found = before(c.gamma, -1, 1.0).unsqueeze(-1) * found
        if self.S is None:  # gradient and delta term fade alike: one term for both
            w = solve_unit_lower(system, self.forced - eta * found)
            self.terms = [(c.retain, w)]
        else:
            assert c.carry is not None
            found = found + before(c.carry, -1, 0.0).unsqueeze(-1) * (self.x @ self.S.mT)
            found = found + (before(c.force, -2, 0.0) * overlap) @ self.forced
            self.terms.append((c.retain, solve_unit_lower(system, -eta * found)))

    def read(self, z: Float[Tensor, "*b T in"]) -> Float[Tensor, "*b T out"]:
        """W_t z_t for every token."""
        c = self.c
        out = z @ self.W.mT
        if c.gamma is not None:
            out = c.gamma.unsqueeze(-1) * out
        if self.S is not None and c.carry is not None:
            out = out + c.carry.unsqueeze(-1) * (z @ self.S.mT)
        overlap = z @ self.x.mT
        for coefficient, value in self.terms:
            out = out + (coefficient * overlap) @ value
        return out

    def rows(self, index: Tensor) -> Written:
        """The same, where token t is seen as token index[t]."""
        view = object.__new__(Written)
        view.__dict__.update(self.__dict__)
        c = self.c
        carry = None if c.carry is None else c.carry.index_select(-1, index)
        gamma = None if c.gamma is None else c.gamma.index_select(-1, index)
        view.c = c._replace(gamma=gamma, carry=carry)
        view.terms = [(a.index_select(-2, index), value) for a, value in self.terms]
        return view

    def weights(self, t: int) -> Float[Tensor, "*b out in"]:
        """W_t."""
        c = self.c
        W = self.W if c.gamma is None else c.gamma[..., t, None, None] * self.W
        if self.S is not None and c.carry is not None:
            W = W + c.carry[..., t, None, None] * self.S
        for coefficient, value in self.terms:
            W = W + (coefficient[..., t, :].unsqueeze(-1) * value).mT @ self.x
        return W

    def momentum(self) -> Float[Tensor, "*b out in"]:
        """S at the chunk's end."""
        c = self.c
        assert self.S is not None
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
        past = self._flat(W).unsqueeze(-2)
        every = every + (past if scalars.gamma is None else scalars.gamma.unsqueeze(-1) * past)
        if S is not None and scalars.carry is not None:
            every = every + scalars.carry.unsqueeze(-1) * self._flat(S).unsqueeze(-2)
        self.every = every.reshape(*lead, *shape)

    def _flat(self, w: Tensor) -> Tensor:
        return w.reshape(*w.shape[: w.ndim - len(self.shape)], -1)

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
