"""Adam and AdaGrad are ridge regressions of gradients (appendix B)."""

import pytest
import torch

from nestlearn.optim.ridge import (
    elementwise,
    outer_product,
    root_variance,
    two_memories,
    weights,
)

EPS = 1e-8


def stream(steps=12, shape=(3, 4)):
    torch.manual_seed(0)
    return torch.randn(steps, *shape, dtype=torch.float64)


def by_torch(optimizer, gradients, **options):
    """The last update W_t − W_{t−1} = −lr · it that torch's optimizer makes of the gradients."""
    p = torch.zeros(gradients.shape[1:], dtype=torch.float64, requires_grad=True)
    run = optimizer([p], lr=1.0, **options)
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.clone()
        run.step()
    return before - p.detach()


def memory(gradients, beta, penalty=0.0):
    w = weights(len(gradients), beta, gradients)
    return elementwise(gradients, w, root_variance(gradients, w, penalty), penalty)


def test_the_closed_form_is_the_minimum():
    g, value = stream(), torch.rand(3, 4, dtype=torch.float64)
    w = weights(len(g), 0.8, g)
    m = elementwise(g, w, value, 0.3).requires_grad_()
    loss = (w[:, None, None] * (m * g - value).square()).sum() + 0.3 * m.square().sum()
    (slope,) = torch.autograd.grad(loss, m)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_one_memory_is_adam_with_equal_betas(beta, steps):
    g = stream(steps)
    adam = by_torch(torch.optim.Adam, g, betas=(beta, beta), eps=0.0)
    torch.testing.assert_close(memory(g, beta), adam, rtol=1e-12, atol=1e-12)


def test_the_penalty_is_adams_epsilon_but_inside_the_root():
    g = 1e-3 * stream()
    adam = by_torch(torch.optim.Adam, g, betas=(0.9, 0.9), eps=1e-4)
    ridge = memory(g, 0.9, 1e-4**2)
    plain = memory(g, 0.9)
    root = root_variance(g, weights(len(g), 0.9, g))
    assert ((adam - ridge).abs() <= plain.abs() * 1e-4 / root).all()
    assert (adam - ridge).abs().max() > 0.02  # not the same, where gradients are as small as ε


def test_adam_as_it_is_run_is_two_memories():
    g = stream(300)
    adam = by_torch(torch.optim.Adam, g, betas=(0.9, 0.999), eps=EPS)
    above, below = (weights(len(g), beta, g) for beta in (0.9, 0.999))
    torch.testing.assert_close(two_memories(g, above, below, EPS), adam, rtol=1e-12, atol=1e-12)
    off = {beta: (memory(g, beta) - adam).norm() / adam.norm() for beta in (0.9, 0.999)}
    assert 0.1 < off[0.9] < 0.2  # one memory that forgets like the first moment
    assert 0.9 < off[0.999] < 1.0  # or like the second


def test_adagrad():
    g = stream()
    adagrad = by_torch(torch.optim.Adagrad, g, eps=0.0)
    newest, all_of_them = torch.zeros(len(g), dtype=g.dtype), weights(len(g), 1, g)
    newest[-1] = 1
    torch.testing.assert_close(two_memories(g, newest, all_of_them), adagrad)
    with_momentum = g.sum(0) / g.square().sum(0).sqrt()  # the paper's: nothing is forgotten
    torch.testing.assert_close(memory(g, 1), with_momentum)
    assert (with_momentum - adagrad).norm() > adagrad.norm()


def test_the_outer_product_form():
    g = stream(9, (4,))
    w = weights(9, 1, g)
    m = outer_product(g, w, 0.1)
    H = g.mT @ g + 0.1 * torch.eye(4, dtype=g.dtype)
    torch.testing.assert_close(H @ m, _root(H) @ g.sum(0))  # the minimum: H m = P Σ g
    aligned = torch.diag(torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=g.dtype))
    torch.testing.assert_close(outer_product(aligned, weights(4, 1, g)), memory(aligned, 1))


def _root(H):
    values, vectors = torch.linalg.eigh(H)
    return vectors @ torch.diag(values.sqrt()) @ vectors.mT
