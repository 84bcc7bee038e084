"""Generalised gradient descent and momentum (eqs. 59, 60): every step is a small optimisation.

    GGD   W ← argmin L(W x, u) + ‖W − W_t‖² / 2η,  u = f_W(x) made by the layer itself
    GM    m ← argmin L(m; g) + ‖m − α m_t‖² / 2η,  W ← W + m

Descent, delta descent, momentum and delta momentum are cases of them, in closed form; any other
objective is solved by inner gradient steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from .base import ChainOptimizer, Check, Checks, Group, Steps, given
from .chain import At, Memory, State, Transform, Updates, stateless
from .delta import DGD, Tap, delta_step, inputs, mean_square, taps

PairLoss = Callable[[Tensor, Tensor], Tensor]  # (y, u), each [N, out] -> the loss of each [N]
MemoryLoss = Callable[[Tensor, Tensor], Tensor]  # (m, g), of one parameter -> a number
_INNER: Check = (lambda x: isinstance(x, int) and x >= 1, "1 or more inner steps")


class GM(ChainOptimizer):
    """Generalised momentum (eq. 60): m ← argmin L(m; g) + ‖m − α m_t‖² / 2η, W ← W + m.

    objective: "dot", L = ⟨m, g⟩: momentum, m = α m_t − η g (eq. 33). "l2", L = ½‖m gᵀ + P‖² of each
    matrix, P = I: m = (α m_t − η g)(I + η gᵀg)⁻¹, delta momentum with an implicit step, which
    cannot blow up. Or a function L(m, g) of one parameter's memory and gradient.
    solve: "exact" for the two named; "explicit", one gradient step of size η at m_t,
    m = α m_t − η ∇L(m_t; g), is eqs. 48, 49; a number of inner gradient steps approaches the
    argmin of any L that is less curved than 2/η.

    lr: η, inside the memory as printed: a change of lr reaches older gradients late.
    """

    row_rules = True
    steps: ClassVar[Steps] = {"matrix": "W ← W + m"}
    checks: ClassVar[Checks] = {
        "solve": (lambda x: x in ("exact", "explicit") or _INNER[0](x), _INNER[1])
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        *,
        objective: Literal["dot", "l2"] | MemoryLoss = "dot",
        solve: Literal["exact", "explicit"] | int = "exact",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if not callable(objective) and objective not in _MEMORY_LOSSES:
            raise ValueError(f"objective={objective!r}: use dot, l2 or a function L(m, g)")
        if callable(objective) and solve == "exact":
            raise ValueError("solve='exact' knows dot and l2: give explicit or a number of steps")
        self.objective = objective
        super().__init__(**given(locals(), "objective"))

    def chain(self, group: Group, rule: str) -> Transform:
        """The memory, whose value is added to the weights."""
        alpha, solve = group["momentum"], group["solve"]

        def update(u: Updates, states: list[State], at: At) -> Updates:
            m = [s["momentum"] for s in states]

            def write(ms: list[Tensor], gs: list[Tensor]) -> list[Tensor]:
                return [written(self.objective, solve, *mg, alpha, at.lr) for mg in zip(ms, gs)]

            torch._foreach_copy_(m, at.on_matrices(write, m, u))
            return list(torch._foreach_neg(m))

        name = self.objective if isinstance(self.objective, str) else "L(m; g)"
        form = {"dot": "⟨m, g⟩", "l2": "½‖m gᵀ + P‖²"}.get(name, name)
        memory = Memory("momentum", form, f"m ← argmin L + ‖m − {alpha:g} m‖² / 2η")
        return Transform(lambda slot: {"momentum": slot.zeros()}, update, (memory,), sized=True)


def written(
    objective: str | MemoryLoss, solve: str | int, m: Tensor, g: Tensor, alpha: float, lr: float
) -> Tensor:
    """The memory m [k, m, n] after the gradient g, by eq. 60."""
    if solve == "exact":
        return alpha * m - lr * g if objective == "dot" else _implicit(alpha * m, g, lr)
    loss = objective if callable(objective) else _MEMORY_LOSSES[objective]
    slope = torch.func.grad(loss)
    if solve == "explicit":
        return alpha * m - lr * slope(m, g)
    assert isinstance(solve, int)
    return _nearby(lambda x: slope(x, g), alpha * m, lr, solve)


def _nearby(slope: Callable[[Tensor], Tensor], anchor: Tensor, lr: float, steps: int) -> Tensor:
    """argmin L(x) + ‖x − anchor‖² / 2η by gradient steps of half the size, from the anchor."""
    x = anchor
    for _ in range(steps):
        x = x - 0.5 * (lr * slope(x) + x - anchor)
    return x


def _implicit(m: Tensor, g: Tensor, lr: float) -> Tensor:
    """(m − η g)(I + η gᵀg)⁻¹ by the singular values of g; NaN where g is not finite.

    gᵀg itself has no digit left for the I beside a large gradient, and a difference of large terms
    has none for a small memory.
    """
    finite = g.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    known = torch.where(finite, g, 0)
    exact = g.dtype if g.device.type == "mps" else torch.float64  # Apple's has no float64
    U, s, Vh = torch.linalg.svd(known.to(exact), full_matrices=False)
    m = m.to(exact)
    held, fading = m @ Vh.mT, 1 + lr * s.square()[..., None, :]
    inside = held / fading - U * (lr * s[..., None, :] / fading)
    written = m - held @ Vh + inside @ Vh
    return torch.where(finite, written.to(g.dtype), torch.nan)


def _l2_memory(m: Tensor, g: Tensor) -> Tensor:
    """½‖m gᵀ + I‖² without its constant: ½‖m gᵀ‖² + ⟨m, g⟩, defined for any shape."""
    return 0.5 * (m @ g.mT).square().sum() + (m * g).sum()


_MEMORY_LOSSES: dict[str, MemoryLoss] = {"dot": lambda m, g: (m * g).sum(), "l2": _l2_memory}


class GGD(DGD):
    """Generalised gradient descent (eq. 59): W ← argmin mean L(W x, u) + ‖W − W_t‖² / 2η.

    u, made by the layer itself, is −δ, the direction that the loss wants its output to move in
    (δ of an input's own loss: ∂(mean loss)/∂y times the number of inputs), or `value(y, δ)`.
    objective: "dot", L = −⟨W x, u⟩, is gradient descent; "l2", L = ½‖W x − u‖², is `DGD`; both
    closed. Or a function L(y, u) -> [N] of outputs and targets [N, out], solved by `inner_steps`
    gradient steps; then every input of an update is kept until it, which is for small models, and
    convolutions with groups and sharded layers are refused.

    Layers and other parameters as in `DGD`, `lr` is η.
    """

    checks: ClassVar[Checks] = {**DGD.checks, "inner_steps": _INNER}
    steps: ClassVar[Steps] = {
        "watched": "W ← argmin L(W x, u) + ‖W − W_t‖² / 2η",
        "plain": "W ← W − lr g",
    }

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        objective: Literal["dot", "l2"] | PairLoss = "l2",
        value: Callable[[Tensor, Tensor], Tensor] | None = None,
        inner_steps: int = 30,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if not callable(objective) and objective not in _PAIR_LOSSES:
            raise ValueError(f"objective={objective!r}: use dot, l2 or a function L(y, u)")
        if value is not None and not callable(value):
            raise ValueError(f"value={value!r}: give a function u(y, delta), or None")
        self.closed = value is None and not callable(objective)
        self.loss = objective if callable(objective) else _PAIR_LOSSES[objective]
        self.value = value or (lambda y, delta: -delta)
        options = given(locals(), "objective", "value", "inner_steps")
        super().__init__(**options, forget=0.0 if objective == "dot" else 1.0)
        for group in self.param_groups:
            group["inner_steps"] = inner_steps
            self._check(group)
        if not self.closed:
            for tap in self.taps:
                tap.keep = True

    def chain(self, group: Group, rule: str) -> Transform:
        """The argmin's step, as a gradient: (W_t − W) / η."""
        if self.closed:
            return super().chain(group, rule)
        by_weight = {id(tap.module.weight): tap for tap in self.taps}

        def update(u: Updates, at: At) -> Updates:
            found = []
            for g, slot in zip(u, at.slots):
                tap = by_weight.get(id(slot.source))
                if tap is None or not tap.pairs or not at.lr:
                    found.append(g)
                    continue
                if isinstance(slot.source, DTensor):
                    raise ValueError(
                        "a general objective needs every input in one process: use "
                        "objective='l2' or 'dot' for a sharded model"
                    )
                w = slot.value.to(g.dtype)
                sign = -1 if group["maximize"] else 1
                x, delta = _pairs(tap, g.dtype)
                new = self._argmin(w.reshape(w.shape[0], -1), x, sign * delta, at.lr, group)
                found.append((w - new.reshape(w.shape)) / at.lr)
            return found

        return stateless(update)

    def _argmin(self, w: Tensor, x: Tensor, delta: Tensor, lr: float, group: Group) -> Tensor:
        target = self.value(x @ w.mT, delta)

        def mean(W: Tensor) -> Tensor:
            return self.loss(x @ W.mT, target).mean()

        return _nearby(torch.func.grad(mean), w, lr, group["inner_steps"])


_PAIR_LOSSES: dict[str, PairLoss] = {
    "dot": lambda y, u: -(y * u).sum(-1),
    "l2": lambda y, u: 0.5 * (y - u).square().sum(-1),
}


def _pairs(tap: Tap, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every input [N, K] of the update and its own δ [N, out]."""
    module = tap.module
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"a general objective is solved for nn.Linear only, not for {type(module).__name__}: "
            "use objective='l2' or 'dot', or freeze that layer"
        )
    x = torch.cat([r[0] for x, _ in tap.pairs for r in inputs(module, x)]).to(dtype)
    delta = torch.cat([d.reshape(-1, d.shape[-1]) for _, d in tap.pairs]).to(dtype)
    return x, delta * len(x)


__all__ = ["GGD", "GM", "delta_step", "mean_square", "taps", "written"]
