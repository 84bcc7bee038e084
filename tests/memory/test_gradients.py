"""Closed-form inner gradients against autograd, in float64."""

import pytest
import torch

from nestlearn.memory import FunctionMemory, Matrix, ResidualMLP, dot_product, l2, objective
from nestlearn.scan.naive import inner_gradient

MEMORIES = {
    "matrix": Matrix(5, 4),
    "mlp": ResidualMLP(4, 6),
    "mlp-gelu": ResidualMLP(4, 6, activation="gelu"),
    "mlp-relu": ResidualMLP(4, 6, activation="relu"),
    "mlp-tanh": ResidualMLP(4, 6, activation="tanh"),
    "mlp-3": ResidualMLP(4, 6, depth=3),
    "mlp-gain": ResidualMLP(4, 6, gain=2.5),
    "mlp-4-no-skip": ResidualMLP(4, 3, depth=4, residual=False),
    "function": FunctionMemory(
        lambda W, x: torch.sin(W[0] @ x) + W[1], lambda: (torch.ones(4, 5), torch.zeros(4))
    ),
}


def weights(memory, *lead):
    return tuple(torch.randn(*w.shape, dtype=torch.float64) for w in memory.init(*lead))


@pytest.mark.parametrize("objective", [dot_product, l2], ids=lambda o: o.name)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_closed_form_equals_autograd(memory, objective):
    torch.manual_seed(0)
    W = weights(memory, 2, 3)
    k = torch.randn(2, 3, 7, getattr(memory, "key_dim", getattr(memory, "dim", 5))).double()
    v = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    closed = memory.grad(W, k, v, objective)
    for t in range(7):
        dW = inner_gradient(memory, W, k[..., t, :], v[..., t, :], objective).dW
        for a, b in zip(closed, dW):
            torch.testing.assert_close(a[:, :, t], b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [dot_product, l2], ids=lambda o: o.name)
def test_error_is_the_derivative_of_the_value(objective):
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(objective.value(y, v).sum(), y)
    torch.testing.assert_close(objective.error(y, v), expected)


def test_the_target_is_a_constant_of_the_inner_gradient():
    """v̂ = M(v) comes from the same weights; the inner gradient must not see that."""
    memory = ResidualMLP(4, 6)
    W = tuple(w.requires_grad_() for w in weights(memory))
    k, z = torch.randn(2, 1, 4, dtype=torch.float64)
    v = memory.read(W, z)
    dW = inner_gradient(memory, W, k[0], v[0], l2).dW
    fixed = inner_gradient(memory, W, k[0], v[0].detach(), l2).dW
    for a, b in zip(dW, fixed):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert any(g.abs().sum() > 0 for g in torch.autograd.grad(dW[0].sum(), W))


def test_unknown_names_and_depths_are_refused():
    with pytest.raises(ValueError, match="'l3'"):
        objective("l3")
    with pytest.raises(ValueError, match="depth=1"):
        ResidualMLP(4, 6, depth=1)
    with pytest.raises(ValueError, match="swish"):
        ResidualMLP(4, 6, activation="swish")
