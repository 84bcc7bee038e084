"""The named optimizers: each one a chain of transforms and its options."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch.optim.optimizer import ParamsT

from . import transforms
from .base import ChainOptimizer, Check, Checks, Choices, Group, Steps, given
from .chain import Transform, chain
from .deep import OBJECTIVES, DeepMemory, Tokens, deep_momentum, literal_deep_momentum, take_roots
from .m3 import literal_m3, multiscale, say_form
from .orthogonal import QUINTIC, Adjust, Coefficients, Precision, orthogonalize, unit_rms

Mode = Literal["practical", "literal"]
_SMALL: Check = (lambda x: isinstance(x, int) and x >= 1, "an integer of 1 or more")


class Chain(ChainOptimizer):
    """Your own chain of transforms, the same for all parameters: W ← (1 − lr λ) W − lr u.

    transform: e.g. `chain(momentum(0.9), orthogonalize())`; it sees vectors as well, as one row.
    A chain is code and not in the state_dict: build it again before loading one.
    """

    row_rules = True

    def __init__(
        self,
        params: ParamsT,
        transform: Transform,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        self.transform = transform
        super().__init__(**given(locals(), "transform"))

    def chain(self, group: Group, rule: str) -> Transform:
        return self.transform


class DeltaMomentum(ChainOptimizer):
    """Delta momentum (eqs. 48, 49): before a gradient is written, what was held for it is erased.

    practical: m ← m (α I − δ ĝᵀĝ) + g with ĝ = g / ‖g‖_F, W ← W − lr m. With δ = `delta` in
    [0, 1 + α) the memory is bounded by the gradients; a vector's momentum along the gradient does
    not pile up, so the learning rate is nearer to plain descent's than to momentum's.
    literal: m ← m (α I − gᵀg) − lr g, W ← W + m, as printed with P = I: it grows without bound
    where ‖g‖² > 1 + α, so scale the loss.
    features, output: φ and σ of eqs. 51 and 52, "identity", "cubic", "sign", "sqrt", "tanh".
    """

    row_rules = True
    choices: ClassVar[Choices] = {"mode": get_args(Mode)}
    steps: ClassVar[Steps] = {"matrix": "W ← W − lr m"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        mode: Mode = "practical",
        *,
        delta: float = 0.5,
        features: str = "identity",
        output: str = "identity",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(**given(locals()))

    def _check(self, group: Group) -> None:
        super()._check(group)
        self.chain(group, "matrix")  # features and output are named there
        if group["mode"] == "practical" and group["delta"] >= 1 + group["momentum"]:
            raise ValueError(
                f"delta={group['delta']!r}: choose less than 1 + momentum, or the memory's sign "
                "flips and it grows at every step"
            )

    def chain(self, group: Group, rule: str) -> Transform:
        """φ, the memory, σ."""
        memory = transforms.delta_momentum(
            group["momentum"], mode=group["mode"], delta=group["delta"]
        )
        around = group["features"], group["output"]
        if around == ("identity", "identity"):
            return memory
        return chain(transforms.feature_map(around[0]), memory, transforms.output(around[1]))


class DeepMomentum(ChainOptimizer):
    """Deep momentum gradient descent, DMGD (eq. 50): the momentum is an MLP with its own objective.

    practical: a linear memory μ of the gradients, and over it for each parameter an MLP m that
    learns by gradient descent, step `inner_lr`, which gradient comes next; W ← W − lr m(μ)
    (`deep.deep_momentum`). literal: m ← α m − lr ∇⟨m(g), 1⟩, W ← W + m(g), as printed.
    tokens: the MLP reads the gradient by "row" or by "element"; hidden, depth: its size; either
    way it is small, [hidden, width] matrices. objective: "l2" or "dot".
    """

    row_rules = True
    steps: ClassVar[Steps] = {"matrix": "W ← W − lr m(μ)"}
    choices: ClassVar[Choices] = {
        "mode": get_args(Mode),
        "tokens": ("row", "element"),
        "objective": tuple(OBJECTIVES),
    }
    checks: ClassVar[Checks] = {
        "hidden": _SMALL,
        "depth": (lambda x: isinstance(x, int) and x >= 2, "2 or more matrices"),
        "inner_lr": (lambda x: 0 <= x < 1, "an inner step from 0 to below 1, e.g. 0.1"),
        "retention": (lambda x: 0 <= x <= 1, "a share from 0 to 1, e.g. 0.99"),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        mode: Mode = "practical",
        *,
        inner_lr: float = 0.1,
        retention: float = 0.99,
        hidden: int = 8,
        depth: int = 2,
        tokens: Tokens = "row",
        objective: Literal["l2", "dot"] = "l2",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(**given(locals()))

    upgrade = staticmethod(take_roots)

    def chain(self, group: Group, rule: str) -> Transform:
        """The deep memory alone."""
        literal = group["mode"] == "literal"
        objective = "dot" if literal else group["objective"]
        size = group["tokens"], group["hidden"], group["depth"]
        memory = DeepMemory(*size, objective, residual=not literal)
        if literal:
            return literal_deep_momentum(memory, alpha=group["momentum"])
        retention, inner_lr = group["retention"], group["inner_lr"]
        return deep_momentum(
            memory, alpha=group["momentum"], retention=retention, inner_lr=inner_lr
        )


class _Orthogonal(ChainOptimizer):
    """Matrices by Newton–Schulz, everything else by AdamW."""

    choices: ClassVar[Choices] = {"adjust": get_args(Adjust), "precision": get_args(Precision)}
    steps: ClassVar[Steps] = {**ChainOptimizer.steps, "matrix": "W ← W − lr NS(m)"}

    def chain(self, group: Group, rule: str) -> Transform:
        if rule == "auxiliary":
            return transforms.adam(group["betas"], group["eps"])
        return self.matrices(group)

    def matrices(self, group: Group) -> Transform:
        raise NotImplementedError


def _sigma(group: Group, widen: bool = True) -> Transform:
    return orthogonalize(
        group["ns_steps"],
        group["ns_coefficients"],
        precision=group["precision"],
        adjust=group["adjust"],
        widen=widen,
    )


class Muon(_Orthogonal):
    """Muon, which is eq. 52: momentum with Newton–Schulz as its output, W ← W − lr NS(m).

    Matrices (two axes or more, convolution kernels flattened, fused ones by `split`) that way, the
    rest by AdamW with `betas` and the same lr. Embeddings and the output head belong to the rest:
    `nestlearn.optim.groups(model)` makes the groups. Equals torch.optim.Muon where it applies.
    adjust: see `orthogonal.orthogonalize`; with the default an AdamW learning rate fits.
    precision: of Newton–Schulz; "auto" is bfloat16 on CUDA, float32 elsewhere.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust: Adjust = "match_rms_adamw",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = QUINTIC,
        precision: Precision = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(**given(locals()))

    def matrices(self, group: Group) -> Transform:
        """Momentum, Newton–Schulz."""
        memory = transforms.momentum(group["momentum"], average=True, nesterov=group["nesterov"])
        return chain(memory, _sigma(group, widen=False))


class AdaMuon(_Orthogonal):
    """AdaMuon (Si et al. 2025): Muon whose direction is divided by its own running root square.

    m ← α m + g; O = NS(sign m); v ← α v + (1 − α) O²; u = O / (√v + ε) scaled to rms 0.2; `sign`
    leaves the sign out. Other options as in `Muon`; one copy of the momentum more than it.
    """

    choices: ClassVar[Choices] = {"precision": get_args(Precision)}
    steps: ClassVar[Steps] = {**ChainOptimizer.steps, "matrix": "W ← W − lr NS(sign m) / (√v + ε)"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        *,
        sign: bool = True,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = QUINTIC,
        precision: Precision = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(**given(locals()))

    def matrices(self, group: Group) -> Transform:
        """Momentum, its sign, Newton–Schulz, the second moment of that, one size."""
        memory = transforms.momentum(group["momentum"])
        if group["sign"]:
            memory = chain(memory, transforms.output("sign"))
        sigma = _sigma({**group, "adjust": "none"})
        modulation = transforms.adaptive_direction(group["momentum"], eps=group["eps"])
        return chain(memory, sigma, modulation, unit_rms(0.2))


class M3(_Orthogonal):
    """M3, Multi-scale Momentum Muon (algorithm 1, eq. 75): a fast and a slow memory of gradients.

    practical (the default): M1 ← β1 M1 + (1 − β1) g at every step, M2 ← β3 M2 + (1 − β3) mean(g) of
    the last `period` steps at the end of each; W ← W − lr (O1 + α O2) ‖O1‖ / ‖O1 + α O2‖ with
    O = Newton–Schulz(M), so that an update is exactly as large as Muon's. β1 = `momentum`,
    β3 = `slow`, α = `alpha`; α = 0 is Muon. second_moment=True divides by √V of the gradients
    (exponential average β2 = `betas[1]`, unbiased) before that scaling, one copy of the parameters
    more. Matrices that way, the rest by AdamW, as in `Muon` and with its other options. State: M1
    and one more copy, which M2 and O2 share (`m3.Slow`); exact=True gives each its own.

    literal: algorithm 1 to the letter, M1 += β1 g, M2 += β3 Σ g, V += β2 g²,
    W ← W − lr (O1 + α O2) / (√V + ε), β1 = `momentum`, β2 = `betas[1]`, β3 = `slow`, no
    `nesterov`, no `adjust`. Its V only grows, and the update with it shrinks like 1/√t.
    """

    choices: ClassVar[Choices] = {**_Orthogonal.choices, "mode": get_args(Mode)}
    steps: ClassVar[Steps] = {**ChainOptimizer.steps, "matrix": "W ← W − lr (NS(M₁) + α NS(M₂))"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        mode: Mode = "practical",
        *,
        slow: float = 0.9,
        alpha: float = 0.25,
        period: int = 20,
        second_moment: bool = False,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust: Adjust = "match_rms_adamw",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = QUINTIC,
        precision: Precision = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        exact: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(**given(locals()))

    upgrade = staticmethod(say_form)

    def matrices(self, group: Group) -> Transform:
        """The two scales."""
        if group["mode"] == "literal":
            betas = (group["momentum"], group["betas"][1], group["slow"])
            sigma = _sigma({**group, "adjust": "none"})
            return literal_m3(betas, group["alpha"], group["period"], group["eps"], sigma)
        fast = transforms.momentum(
            group["momentum"], average=True, nesterov=group["nesterov"], name="fast"
        )
        modulation = transforms.second_moment(group["betas"][1], eps=group["eps"])
        return multiscale(
            fast,
            _sigma(group),
            decay=group["slow"],
            alpha=group["alpha"],
            period=group["period"],
            modulation=modulation if group["second_moment"] else None,
            exact=group["exact"],
        )
