"""The optimizers' memories as transforms of gradients (sections 4.1–4.4, eqs. 33–52, 75).

Every transform takes a list of updates u (first the gradients g) of parameters in one group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .chain import At, Memory, State, Transform, Updates, stateless
from .orthogonal import unit

Elementwise = Callable[[Tensor], Tensor]
FEATURES: dict[str, Elementwise] = {
    "identity": lambda g: g,
    "cubic": lambda g: g + g**3,
    "sign": torch.sign,
    "sqrt": lambda g: g.sign() * g.abs().sqrt(),
    "tanh": torch.tanh,
}


def momentum(
    alpha: float, *, average: bool = False, nesterov: bool = False, name: str = "momentum"
) -> Transform:
    """The linear memory of gradients (eqs. 33, 34): m ← α m + u, trained on −⟨m, u⟩.

    average: m ← α m + (1 − α) u, whose size does not depend on α. nesterov: answers with what the
    next write of the same u would make of it.
    """

    def update(u: Updates, states: list[State], at: At) -> Updates:
        m = [s[name] for s in states]
        if average:
            torch._foreach_lerp_(m, u, 1 - alpha)
        else:
            torch._foreach_mul_(m, alpha)
            torch._foreach_add_(m, u)
        if not nesterov:
            return m
        if average:
            return list(torch._foreach_lerp(u, m, alpha))
        return list(torch._foreach_add(u, m, alpha=alpha))

    rule = f"m ← {alpha:g} m + " + (f"{1 - alpha:g} g" if average else "g")
    memory = Memory(_label(name), "−⟨m, g⟩", rule)
    return Transform(lambda slot: {name: slot.zeros()}, update, (memory,))


def _label(name: str) -> str:
    return name if "momentum" in name else f"{name} momentum"


def accumulate(beta: float, *, name: str) -> Transform:
    """The sum of algorithm 1, m ← m + β u: nothing is ever forgotten."""

    def update(u: Updates, states: list[State], at: At) -> Updates:
        m = [s[name] for s in states]
        torch._foreach_add_(m, u, alpha=beta)
        return m

    memory = Memory(_label(name), "−⟨m, g⟩", f"m ← m + {beta:g} g")
    return Transform(lambda slot: {name: slot.zeros()}, update, (memory,))


def precondition(P: Callable[[Tensor], Tensor]) -> Transform:
    """The value P of the memory (eq. 47): u ← P u; P maps a whole parameter's update.

    With sharded parameters P sees this process' part: let it be element-wise there.
    """
    return _each(P)


def feature_map(phi: str | Elementwise) -> Transform:
    """Higher-order features of the gradient (eq. 51): u ← φ(u), element-wise."""
    return _each(_named(phi, "features"))


def output(sigma: str | Elementwise) -> Transform:
    """A non-linear output (eq. 52): W ← W + σ(m(g)), element-wise.

    Newton–Schulz, the σ that makes Muon, reads whole matrices: `orthogonal.orthogonalize`.
    """
    return _each(_named(sigma, "output"))


def _each(f: Elementwise) -> Transform:
    return stateless(lambda u, at: [f(x) for x in u])


def _named(f: str | Elementwise, what: str) -> Elementwise:
    if callable(f):
        return f
    if f not in FEATURES:
        raise ValueError(f"{what}={f!r}: use one of {sorted(FEATURES)}, or a function of a tensor")
    return FEATURES[f]


def delta_momentum(
    alpha: float,
    *,
    mode: Literal["practical", "literal"] = "practical",
    delta: float = 0.5,
    eps: float = 1e-12,
    name: str = "momentum",
) -> Transform:
    """Delta momentum (eqs. 48, 49): a memory that first erases what it held for this gradient.

    literal: m ← m (α I − gᵀg) + η u, as printed with P = I (our m has the other sign); where
    ‖g‖² > 1 + α it grows without bound. practical: m ← m (α I − δ ĝᵀĝ) + u with ĝ = g / ‖g‖_F: the
    eigenvalues of the retention stay in [α − δ, α], so ‖m‖ ≤ max ‖u‖ / (1 − max(α, |α − δ|)).
    A matrix parameter is a matrix here, a vector or scalar one row 1 × n.
    """
    literal = mode == "literal"

    def update(u: Updates, states: list[State], at: At) -> Updates:
        m = [s[name] for s in states]
        seen = at.on_matrices(lambda ms, gs: _seen(ms, gs, literal, eps), m, at.gradients)
        torch._foreach_mul_(m, alpha)
        torch._foreach_sub_(m, seen, alpha=1 if literal else delta)
        torch._foreach_add_(m, u, alpha=at.lr if literal else 1)
        return m

    rule = "m ← m (α I − gᵀg) − η g" if literal else "m ← m (α I − δ ĝᵀĝ) + g"
    memory = Memory(name, "½‖m gᵀ − P‖²", rule)
    return Transform(lambda slot: {name: slot.zeros()}, update, (memory,), literal)


def _seen(ms: list[Tensor], gs: list[Tensor], literal: bool, eps: float) -> list[Tensor]:
    """m gᵀg, what the memory answers to the gradient as key, written back along it."""
    seen = []
    for m, g in zip(ms, gs):
        if not literal:
            g = unit(g, eps)
        wide = g.shape[-2] <= g.shape[-1]
        seen.append((m @ g.mT) @ g if wide else m @ (g.mT @ g))  # the smaller square between
    return seen


def second_moment(
    beta: float, *, eps: float = 1e-8, total: bool = False, name: str = "second"
) -> Transform:
    """u / (√v + ε), v the running mean of g² (of the *gradients*, whatever u is), unbiased.

    total: the growing sum v ← v + β g² of algorithm 1 instead. A gradient whose square its type
    does not hold (1e19 in float32) counts as 1e17: an infinite v would stay, and stop everything.
    """

    def update(u: Updates, states: list[State], at: At) -> Updates:
        v = [s[name] for s in states]
        g = [_with_a_square(x) for x in at.gradients]
        if total:
            torch._foreach_addcmul_(v, g, g, value=beta)
            root = list(torch._foreach_sqrt(v))
        else:
            root = _mean_root(v, g, beta, at)
        torch._foreach_add_(root, eps)
        return list(torch._foreach_div(u, root))

    rule = f"v ← v + {beta:g} g²" if total else f"v ← {beta:g} v + {1 - beta:g} g²"
    return Transform(lambda slot: {name: slot.zeros()}, update, (Memory(name, "½‖v − g²‖²", rule),))


def adaptive_direction(beta: float, *, eps: float = 1e-8, name: str = "second") -> Transform:
    """AdaMuon's modulation: u / (√v + ε), v ← β v + (1 − β) u², u the orthogonalised update."""

    def update(u: Updates, states: list[State], at: At) -> Updates:
        root = _mean_root([s[name] for s in states], u, beta)
        torch._foreach_add_(root, eps)
        return list(torch._foreach_div(u, root))

    memory = Memory("second moment of the direction", "½‖v − O²‖²", f"v ← {beta:g} v + … O²")
    return Transform(lambda slot: {name: slot.zeros()}, update, (memory,))


def _mean_root(
    v: list[Tensor], g: list[Tensor], beta: float, unbiased: At | None = None
) -> list[Tensor]:
    """√v after v ← β v + (1 − β) g²; unbiased: as a mean over the steps that there have been."""
    torch._foreach_mul_(v, beta)
    torch._foreach_addcmul_(v, g, g, value=1 - beta)
    root = list(torch._foreach_sqrt(v))
    if unbiased:
        torch._foreach_div_(root, [(1 - beta ** (s.step + 1)) ** 0.5 for s in unbiased.slots])
    return root


def _with_a_square(g: Tensor) -> Tensor:
    most = torch.finfo(g.dtype).max ** 0.45
    return g.clamp(-most, most)


def adam(betas: tuple[float, float], eps: float = 1e-8) -> Transform:
    """Adam (eqs. 101–111 say which memory it is; `ridge` computes that): m̂ / (√v̂ + ε)."""
    b1, b2 = betas

    def update(u: Updates, states: list[State], at: At) -> Updates:
        m, v = [s["first"] for s in states], [s["second"] for s in states]
        torch._foreach_lerp_(m, u, 1 - b1)
        root = _mean_root(v, u, b2, at)
        torch._foreach_add_(root, eps)
        torch._foreach_mul_(root, [1 - b1 ** (s.step + 1) for s in at.slots])
        return list(torch._foreach_div(m, root))

    memories = (
        Memory("first moment", "½‖m − g‖²", f"m ← {b1:g} m + {1 - b1:g} g"),
        Memory("second moment", "½‖v − g²‖²", f"v ← {b2:g} v + {1 - b2:g} g²"),
    )

    return Transform(lambda slot: {k: slot.zeros() for k in ("first", "second")}, update, memories)
