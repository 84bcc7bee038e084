"""How one write happens. A rule is a pair of pure functions, `init(W) -> S` and one `step`.

The gradient rules compose: `every(4, momentum(decay(delta())))`. `step` is the definition, one
token at a time; `nestlearn.scan.chunk` runs the same algebra in parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .memories import Weights


class Gates(NamedTuple):
    """What the input says about each write; every gate is [*b, T].

    eta: step size η_t ≥ 0. log_alpha: log of the retention α_t in (0, 1], for rules with decay.
    log_theta: log of the momentum θ_t in (0, 1], for rules with momentum.
    """

    eta: Tensor
    log_alpha: Tensor | None = None
    log_theta: Tensor | None = None

    def at(self, t: int) -> Gates:
        """The gates of token t, each [*b]."""
        return self.map(lambda g: g[..., t])

    def map(self, f: Callable[[Tensor], Tensor]) -> Gates:
        """f of every gate that is given."""
        alpha, theta = (None if g is None else f(g) for g in self[1:])
        return Gates(f(self.eta), alpha, theta)


def step_sizes(logits: Tensor, steps: tuple[float, float], log_alpha: Tensor | None) -> Tensor:
    """η below the upper of `steps`, and 0 below the lower; beyond 1 and with a retention α, times
    (1 + α) / 2.

    Then α − η, the smallest eigenvalue of a transition, stays above −1: where it does not, a memory
    that is to alternate grows without end. The gradient passes the lower limit as if it were not
    there: a gate that is shut may open again.
    """
    eta_min, eta_max = steps
    eta = eta_max * torch.sigmoid(logits)
    if eta_min > 0:
        eta = eta - torch.where(eta < eta_min, eta, 0.0).detach()
    if eta_max <= 1 or log_alpha is None:
        return eta
    return eta * (1 + log_alpha.exp()) / 2


def through_step_sizes(
    logits: Tensor, steps: tuple[float, float], log_alpha: Tensor | None, deta: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and, where η depends on it, of log α."""
    eta_min, eta_max = steps
    p, dlog = torch.sigmoid(logits), None
    if eta_max > 1 and log_alpha is not None:
        eta, alpha = eta_max * p, log_alpha.exp()
        if eta_min > 0:
            eta = torch.where(eta < eta_min, 0.0, eta)
        dlog, deta = 0.5 * alpha * eta * deta, (0.5 + 0.5 * alpha) * deta
    return deta * eta_max * p * (1 - p), dlog


class Gradient(NamedTuple):
    """The inner gradient of one token and, for memories of matrices, each matrix's input."""

    dW: Weights
    inputs: tuple[Tensor, ...] | None


Grad = Callable[[Tensor, Tensor], Gradient]  # (k, v) of one token -> gradient at the chunk's start


class RuleState(NamedTuple):
    """momentum: S of each matrix. ahead: W with the writes that the period still holds back."""

    momentum: Weights | None = None
    ahead: Weights | None = None


def shrunk(eta: Tensor, x: Tensor) -> Tensor:
    """The step size for inputs of any length, η / max(1, ‖x‖²): eta [*b], x [*b, in] -> [*b].

    As in eq. 57 the step shrinks for long inputs; this one is eq. 88 at ‖x‖ = 1, where the paper's
    η / (1 + η ‖x‖²) is η / (1 + η). With it the retention α I − η' x xᵀ keeps its eigenvalues in
    [α − η, α], and a short input fades what it finds as little as it writes: retention along the
    unit input at full strength would let an MLP's matrices fade together to zero.
    """
    return eta / x.square().sum(-1).clamp(min=1.0)


@dataclass(frozen=True)
class GradientRule:
    """W ← W (α_t I − η_t x xᵀ) + S_t,  S_t = θ_t S_{t−1} − η_t ∇L  (eq. 88; momentum of Titans).

    delta: the retention term −η' x xᵀ with x the input of *that* matrix and η' `shrunk` (DGD,
    eq. 57).
    decay: α_t from the gates, else 1. momentum: θ_t from the gates, else S_t = −η_t ∇L.
    period: writes become visible every so many tokens (eq. 71), counted from the chunk's start.
    normalize: take the shrunk step for ∇L too.
    """

    delta: bool = False
    decay: bool = False
    momentum: bool = False
    period: int = 1
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period={self.period}: a rule writes every 1 or more tokens")

    def init(self, W: Weights) -> RuleState:
        """The state before the first write."""
        return RuleState(
            momentum=tuple(torch.zeros_like(w) for w in W) if self.momentum else None,
            ahead=W if self.period > 1 else None,
        )

    def step(
        self, W: Weights, S: RuleState, grad: Grad, k: Tensor, v: Tensor, gates: Gates, due: bool
    ) -> tuple[Weights, RuleState]:
        """One token's write; `due` says whether the period ends here."""
        dW, inputs = grad(k, v)
        written, speeds = [], []
        for i, (w, g) in enumerate(zip(W if S.ahead is None else S.ahead, dW)):
            eta = _over(gates.eta, w)
            kept = _retained(w, gates)
            if self.delta or self.normalize:
                assert inputs is not None  # `scan.update` refuses other memories
                x = inputs[i]
                r = _over(shrunk(gates.eta, x), w)
                eta = r if self.normalize else eta
                if self.delta:
                    kept = kept - r * (w @ x.unsqueeze(-1)) * x.unsqueeze(-2)
            force = -eta * g
            if S.momentum is not None:
                assert gates.log_theta is not None
                force = _over(gates.log_theta.exp(), w) * S.momentum[i] + force
            written.append(kept + force)
            speeds.append(force)
        ahead = tuple(written)
        return (ahead if due or S.ahead is None else W), RuleState(
            momentum=tuple(speeds) if self.momentum else None,
            ahead=None if S.ahead is None else ahead,
        )


def hebbian(normalize: bool = False) -> GradientRule:
    """Plain gradient descent, W ← W − η ∇L: with the dot product, Hebb's rule."""
    return GradientRule(normalize=normalize)


def delta(normalize: bool = True) -> GradientRule:
    """Delta gradient descent (DGD, eq. 57): W ← W (I − η x xᵀ) − η ∇L."""
    return GradientRule(delta=True, normalize=normalize)


def decay(rule: GradientRule) -> GradientRule:
    """The rule with retention α_t of what was there (weight decay)."""
    return replace(rule, decay=True)


def momentum(rule: GradientRule) -> GradientRule:
    """The rule with input-gated momentum, S ← θ_t S − η_t ∇L."""
    return replace(rule, momentum=True)


def every(period: int, rule: GradientRule) -> GradientRule:
    """The rule with writes that show only after every `period` tokens (eq. 71)."""
    return replace(rule, period=period)


@dataclass(frozen=True)
class Oja:
    """Oja's rule with a given value: W ← α W + η v (k − Wᵀ v)ᵀ. For `Matrix`, reference form."""

    decay: bool = False

    def init(self, W: Weights) -> None:
        """Oja's rule keeps nothing beside W."""

    def step(
        self, W: Weights, S: None, grad: Grad, k: Tensor, v: Tensor, gates: Gates, due: bool
    ) -> tuple[Weights, None]:
        """One token's write."""
        (w,) = W
        surprise = k - (w.mT @ v.unsqueeze(-1)).squeeze(-1)
        force = gates.eta[..., None, None] * v.unsqueeze(-1) * surprise.unsqueeze(-2)
        return (_retained(w, gates) + force,), None


class OmegaState(NamedTuple):
    """The last c pairs, oldest first, and their step sizes (0 where nothing was seen yet)."""

    keys: Tensor
    values: Tensor
    eta: Tensor


@dataclass(frozen=True)
class Omega:
    """Omega rule: each write descends on the last `window` pairs, all at the chunk's first weights.

    W ← α_t W − Σ_{i = t−c+1..t} η_i ∇L(W; k_i, v_i). Window 1 is `hebbian()`. A `Matrix` in the
    reference form.
    """

    window: int
    decay: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"window={self.window}: the Omega rule looks back over 1 or more pairs"
            )

    def init(self, W: Weights) -> OmegaState:
        """A window of `window` empty pairs."""
        (w,) = W
        lead, (values, keys) = w.shape[:-2], w.shape[-2:]
        sizes = ((self.window, keys), (self.window, values), (self.window,))
        return OmegaState(*(w.new_zeros(*lead, *size) for size in sizes))

    def step(
        self, W: Weights, S: OmegaState, grad: Grad, k: Tensor, v: Tensor, gates: Gates, due: bool
    ) -> tuple[Weights, OmegaState]:
        """One token's write."""
        (w,) = W
        lead = w.shape[:-2]
        S = OmegaState(
            torch.cat([S.keys[..., 1:, :], k.expand(*lead, -1).unsqueeze(-2)], -2),
            torch.cat([S.values[..., 1:, :], v.expand(*lead, -1).unsqueeze(-2)], -2),
            torch.cat([S.eta[..., 1:], gates.eta.expand(lead).unsqueeze(-1)], -1),
        )
        force = torch.zeros_like(w)
        for i in range(self.window):
            ((g,), _) = grad(S.keys[..., i, :], S.values[..., i, :])
            force = force - S.eta[..., i, None, None] * g
        return (_retained(w, gates) + force,), S


Rule = GradientRule | Oja | Omega


def _over(gate: Tensor, w: Tensor) -> Tensor:
    """The gate [*b] with axes appended, to scale weights [*b, ...]."""
    return gate.reshape(gate.shape + (1,) * (w.ndim - gate.ndim))


def _retained(w: Tensor, gates: Gates) -> Tensor:
    return w if gates.log_alpha is None else _over(gates.log_alpha.exp(), w) * w
