"""What is written: memories, as pure functions of their weights.

Weights are a tuple of tensors with any leading axes (usually [B, H]). Matrices stand in order of
application, `W[0]` reads the key. A memory of matrices knows each matrix's own input x and error
δ, so the gradient of one token is the rank-one δ xᵀ, never formed by the parallel path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .objectives import Objective

Weights = tuple[Tensor, ...]
Apply = Callable[[int, Tensor], Tensor]


class Factors(NamedTuple):
    """Per matrix W the inputs x [*b, T, in], outputs W x and errors δ [*b, T, out] of each token.

    The gradient of W is δ xᵀ.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]


class Activation(NamedTuple):
    """An element-wise non-linearity: value(a) = φ(a), pull(e, a) = e φ'(a), curve(a) = φ''(a)."""

    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]
    curve: Callable[[Tensor], Tensor]


def _silu_curve(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s) * (2 + a * (1 - 2 * s))


def _gelu_curve(a: Tensor) -> Tensor:
    square = a.square()
    return (2 - square) * torch.exp(-0.5 * square) / math.sqrt(2 * math.pi)


def _tanh_curve(a: Tensor) -> Tensor:
    t = torch.tanh(a)
    return -2 * t * (1 - t.square())


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward, _silu_curve),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, _gelu_curve),
    "relu": Activation(F.relu, lambda e, a: e * (a > 0), torch.zeros_like),
    "tanh": Activation(torch.tanh, lambda e, a: e * (1 - torch.tanh(a).square()), _tanh_curve),
}


class _Pull(torch.autograd.Function):
    """e φ'(a) of same-shaped e and a: torch's fused kernels have no derivative of their own."""

    @staticmethod
    def forward(ctx: Any, activation: str, e: Tensor, a: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(e, a)
        return ACTIVATIONS[activation].pull(e, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        e, a = ctx.saved_tensors
        phi = ACTIVATIONS[ctx.activation]
        return None, phi.pull(grad, a), phi.curve(a).mul_(e).mul_(grad)


@runtime_checkable
class Memory(Protocol):
    """An associative memory (eq. 6): a map from keys to values with weights W."""

    def init(self, *lead: int, generator: torch.Generator | None = None) -> Weights: ...

    def read(self, W: Weights, q: Tensor) -> Tensor: ...

    def grad(self, W: Weights, k: Tensor, v: Tensor, objective: Objective) -> Weights: ...


class MatrixMemory:
    """What `Matrix` and `ResidualMLP` share: reading and the closed-form gradient."""

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each matrix, in order of application."""
        raise NotImplementedError

    def run(self, apply: Apply, z: Tensor) -> Tensor:
        """The memory's output at z, where `apply(i, x)` multiplies x by matrix i."""
        raise NotImplementedError

    def factors(self, W: Weights, k: Tensor, v: Tensor, objective: Objective) -> Factors:
        """Inputs and errors of every matrix at each token, in closed form."""
        raise NotImplementedError

    def read(self, W: Weights, q: Float[Tensor, "*c T K"]) -> Float[Tensor, "*b T V"]:
        """M(q) for each token."""
        return self.run(lambda i, x: x @ W[i].mT, q)

    def inputs(self, W: Weights, k: Float[Tensor, "*c T K"]) -> tuple[Tensor, ...]:
        """What each matrix is applied to when the memory reads k."""
        seen: list[Tensor] = []

        def apply(i: int, x: Tensor) -> Tensor:
            seen.append(x)
            return x @ W[i].mT

        self.run(apply, k)
        return tuple(seen)

    def grad(self, W: Weights, k: Tensor, v: Tensor, objective: Objective) -> Weights:
        """∂L/∂W of each token on its own: per matrix [*b, T, out, in]."""
        inputs, _, errors = self.factors(W, k, v, objective)
        return tuple(d.unsqueeze(-1) * x.unsqueeze(-2) for x, d in zip(inputs, errors))

    def init(self, *lead: int, generator: torch.Generator | None = None) -> Weights:
        """Random start weights, N(0, 1/in): [*lead, out, in] for each matrix."""
        return tuple(
            torch.randn(*lead, *shape, generator=generator) / math.sqrt(shape[-1])
            for shape in self.shapes()
        )


@dataclass(frozen=True)
class Matrix(MatrixMemory):
    """The linear memory M(k) = W k, W of [value_dim, key_dim] (the state of linear attention)."""

    key_dim: int
    value_dim: int

    def shapes(self) -> tuple[tuple[int, int], ...]:
        return ((self.value_dim, self.key_dim),)

    def run(self, apply: Apply, z: Tensor) -> Tensor:
        return apply(0, z)

    def factors(self, W: Weights, k: Tensor, v: Tensor, objective: Objective) -> Factors:
        y = self.read(W, k)
        return Factors((k,), (y,), (objective.error(y, v),))


@dataclass(frozen=True)
class ResidualMLP(MatrixMemory):
    """M(z) = z + W_n σ(… σ(W_1 z)) (eqs. 89, 91; the paper's W2 is our first matrix).

    `dim` is the width of keys and values, `hidden` that of the layers between, `depth` ≥ 2 the
    number of matrices. The non-linearity is σ(a) = φ(gain · a) / gain, φ the named activation: a
    gain of √hidden keeps unit inputs in φ's bent part while pre-activations have unit norm.
    `residual=False` leaves out the skip, for a caller whose own skip carries the unnormalised
    stream.
    """

    dim: int
    hidden: int
    depth: int = 2
    activation: str = "silu"
    gain: float = 1.0
    residual: bool = True

    def __post_init__(self) -> None:
        if self.dim < 1 or self.hidden < 1:
            raise ValueError(f"dim={self.dim}, hidden={self.hidden}: give widths of 1 or more")
        if self.depth < 2:
            raise ValueError(f"depth={self.depth}: an MLP has 2 matrices or more; or use Matrix")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: use one of {sorted(ACTIVATIONS)}")

    def shapes(self) -> tuple[tuple[int, int], ...]:
        middle = ((self.hidden, self.hidden),) * (self.depth - 2)
        return ((self.hidden, self.dim), *middle, (self.dim, self.hidden))

    def run(self, apply: Apply, z: Tensor) -> Tensor:
        phi, gain = ACTIVATIONS[self.activation].value, self.gain
        h = apply(0, z)
        for i in range(1, self.depth):
            h = apply(i, phi(gain * h) / gain)
        return z + h if self.residual else h

    def factors(self, W: Weights, k: Tensor, v: Tensor, objective: Objective) -> Factors:
        phi, gain = ACTIVATIONS[self.activation].value, self.gain
        inputs, outputs = [k], [k @ W[0].mT]
        for w in W[1:]:
            inputs.append(phi(gain * outputs[-1]) / gain)
            outputs.append(inputs[-1] @ w.mT)
        y = outputs[-1]
        errors = [objective.error(k + y if self.residual else y, v)]
        for w, a in zip(W[:0:-1], outputs[-2::-1]):
            errors.insert(0, _Pull.apply(self.activation, errors[0] @ w, gain * a))
        return Factors(tuple(inputs), tuple(outputs), tuple(errors))


@dataclass(frozen=True)
class FunctionMemory:
    """Any differentiable f(W, x): [K] → [V] as a memory; gradients by torch.func.

    `start()` returns one set of weights without leading axes. Costs one dense gradient for each
    token, and no delta rule, which needs each matrix's input: prefer the closed forms above.
    """

    f: Callable[[Weights, Tensor], Tensor]
    start: Callable[[], Weights]

    def init(self, *lead: int, generator: torch.Generator | None = None) -> Weights:
        """`start()`, the same for every leading index: [*lead, *shape]."""
        return tuple(w.expand(*lead, *w.shape) for w in self.start())

    def read(self, W: Weights, q: Float[Tensor, "*b T K"]) -> Float[Tensor, "*b T V"]:
        """f(W, q) for each token."""
        over_tokens = torch.func.vmap(self.f, in_dims=(None, 0))
        return self._over_lead(over_tokens, q.ndim - 2)(W, q)

    def grad(self, W: Weights, k: Tensor, v: Tensor, objective: Objective) -> Weights:
        """∂L/∂W of each token on its own: per weight [*b, T, *shape]."""

        def loss(W: Weights, k: Tensor, v: Tensor) -> Tensor:
            return objective.value(self.f(W, k), v)

        k = k.expand(*v.shape[:-1], k.shape[-1])
        over_tokens = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        return self._over_lead(over_tokens, k.ndim - 2)(W, k, v)

    @staticmethod
    def _over_lead(f: Callable, axes: int) -> Callable:
        for _ in range(axes):
            f = torch.func.vmap(f)
        return f
