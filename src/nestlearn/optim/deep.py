"""Deep momentum (eq. 50): the memory of gradients is an MLP with its own objective and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nestlearn.memory import ResidualMLP, Weights, dot_product, l2

from .chain import At, Memory, Slot, State, Transform, Updates
from .orthogonal import near
from .sharded import greatest, own_part, reduced, whole_of

Tokens = Literal["element", "row"]
OBJECTIVES = {"l2": l2, "dot": dot_product}
_AT_ONCE = 2**20  # activations of one pass


@dataclass(frozen=True)
class DeepMemory:
    """The MLP m of each parameter, and what it reads.

    tokens: "element", every value of the gradient is a token of width 1; "row", every row of its
    matrix is one, of the matrix' width (vectors stay element-wise). Either way the MLP's matrices
    are [hidden, width], …, [width, hidden]: none is [width, width], and one MLP serves all tokens
    of a parameter. depth: its number of matrices.
    """

    tokens: Tokens = "row"
    hidden: int = 8
    depth: int = 2
    objective: str = "l2"
    residual: bool = True

    def mlp(self, shape: torch.Size, stacked: bool) -> ResidualMLP:
        by_row = self.tokens == "row" and len(shape) >= 2
        width = (shape[-1] if stacked else shape[1:].numel()) if by_row else 1
        return ResidualMLP(width, self.hidden, self.depth, "tanh", residual=self.residual)

    def start(self, slot: Slot, quiet: bool) -> State:
        """Random weights, the same on every process; `quiet`: the last matrix is zero, m(z) = z."""
        mlp = self.mlp(slot.shape, slot.layout.stacked)
        W = list(mlp.init(1, generator=torch.Generator().manual_seed(0)))
        if quiet:
            W[-1].zero_()
        like = slot.zeros().new_empty(())
        return {f"deep_{i}": w.to(like) for i, w in enumerate(W)}

    def weights(self, state: State) -> Weights:
        return tuple(state[f"deep_{i}"] for i in range(self.depth))

    def read(self, mlp: ResidualMLP, W: Weights, whole: Tensor) -> Tensor:
        """m of a whole parameter's values."""
        return torch.cat([mlp.read(W, z) for z in _tokens(mlp, whole)], 1).reshape(whole.shape)

    def gradient(
        self, mlp: ResidualMLP, W: Weights, key: Tensor, value: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """∂/∂W of the sum over tokens of L(m(k); v), and Σ ‖x‖² of each matrix' inputs x."""
        sums = [torch.zeros_like(w) for w in W]
        squares = [w.new_zeros(()) for w in W]
        for k, v in zip(_tokens(mlp, key), _tokens(mlp, value)):
            inputs, _, errors = mlp.factors(W, k, v, OBJECTIVES[self.objective])
            for i, (x, d) in enumerate(zip(inputs, errors)):
                sums[i] += d.mT @ x
                squares[i] += x.square().sum()
        return sums, squares


def _tokens(mlp: ResidualMLP, whole: Tensor) -> tuple[Tensor, ...]:
    """A parameter's values as tokens [1, N, width], in parts of bounded size."""
    at_once = max(1, _AT_ONCE // max(mlp.hidden, mlp.dim))
    return whole.reshape(1, -1, mlp.dim).split(at_once, 1)


def deep_momentum(
    memory: DeepMemory, *, alpha: float = 0.9, retention: float = 0.99, inner_lr: float = 0.1
) -> Transform:
    """The practical form: an MLP over a linear memory that learns which gradient comes next.

    μ ← α μ + (1 − α) g is the linear memory of eq. 33. Before it is written the MLP is trained on
    the pair (μ, g), objective ½‖m(μ) − g‖² or −⟨m(μ), g⟩: what of the momentum persists. Then
    u = m(μ). Keys and values are in units of the gradient's running rms. A matrix steps by
    inner_lr / (1 + mean ‖x‖²) of the mean gradient, x its inputs, keeps the share `retention` of
    its weights (so without news m fades to the identity, and u to momentum), and its norm is at
    most √min(its sides). inner_lr = 0 is momentum, exactly.
    """

    def init(slot: Slot) -> State:
        rms = slot.zeros().new_zeros(())
        return {"momentum": slot.zeros(), "rms": rms, **memory.start(slot, quiet=True)}

    def update(u: Updates, states: list[State], at: At) -> Updates:
        return [one(g, s, slot) for g, s, slot in zip(u, states, at.slots)]

    def one(g: Tensor, state: State, slot: Slot) -> Tensor:
        mlp = memory.mlp(slot.shape, slot.layout.stacked)
        W, mu = memory.weights(state), state["momentum"]
        rms = state["rms"]
        rms.copy_(torch.hypot(alpha**0.5 * rms, (1 - alpha) ** 0.5 * _rms(g, slot)))
        unit = rms / (1 - alpha ** (slot.step + 1)) ** 0.5 + 1e-30
        whole = whole_of(g, slot.source) / unit
        if slot.step and inner_lr:
            before = whole_of(mu, slot.source) / unit
            tokens = before.numel() // mlp.dim
            for w, d, q in zip(W, *memory.gradient(mlp, W, before, whole)):
                w.mul_(retention).sub_(d * (inner_lr / (tokens + q)))
                w.mul_((min(w.shape[-2:]) ** 0.5 / (w.norm() + 1e-30)).clamp(max=1))
        mu.lerp_(g, 1 - alpha)
        return own_part(memory.read(mlp, W, whole_of(mu, slot.source) / unit) * unit, slot.source)

    form = "½‖m(μ) − g‖²" if memory.objective == "l2" else "−⟨m(μ), g⟩"
    memories = (
        Memory("momentum μ", "−⟨μ, g⟩", f"μ ← {alpha:g} μ + {1 - alpha:g} g"),
        Memory(f"deep momentum m, {memory.depth} matrices", form, "m ← a m − η ∇L"),
    )
    return Transform(init, update, memories)


def _rms(g: Tensor, slot: Slot) -> Tensor:
    """The root mean square of the whole gradient, a tensor without axes."""
    scale = near(greatest(g, slot.source))
    squares = reduced((g / scale).square().sum(), slot.source)
    return scale * (squares / slot.shape.numel()).sqrt()


def take_roots(group: dict[str, Any], states: list[State]) -> None:
    """Of states of before, which hold the mean square, make such as hold its root."""
    for state in states:
        if "size" in state:
            state["rms"] = state.pop("size").sqrt()


def literal_deep_momentum(memory: DeepMemory, *, alpha: float) -> Transform:
    """Eq. 50 as printed: m ← α m − η ∇⟨m(g), 1⟩, W ← W + m(g).

    The value 1 does not tie the output's sign to the gradient's, so this need not descend: it is
    here to be looked at. The objective is a sum over all values, η the learning rate.
    """

    def update(u: Updates, states: list[State], at: At) -> Updates:
        return [one(g, s, slot, at.lr) for g, s, slot in zip(u, states, at.slots)]

    def one(g: Tensor, state: State, slot: Slot, lr: float) -> Tensor:
        mlp = memory.mlp(slot.shape, slot.layout.stacked)
        W, whole = memory.weights(state), whole_of(g, slot.source)
        minus_ones = -torch.ones_like(whole)  # −⟨m, v⟩ with v = −1
        for w, d in zip(W, memory.gradient(mlp, W, whole, minus_ones)[0]):
            w.mul_(alpha).sub_(d, alpha=lr)
        return own_part(memory.read(mlp, W, whole).neg_(), slot.source)

    memories = (Memory("deep momentum m", "⟨m(g), 1⟩", f"m ← {alpha:g} m − η ∇L"),)
    return Transform(lambda slot: memory.start(slot, quiet=False), update, memories, sized=True)
