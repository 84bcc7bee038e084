"""M3: algorithm 1 to the letter, and the practical form beside Muon."""

import pytest
import torch
from test_formulas import F64, gradients, run, same
from torch import nn

from nestlearn import optim
from nestlearn.optim.orthogonal import newton_schulz


def algorithm_1(stream, lr, betas, alpha, f, eps):
    """Algorithm 1, line by line: k counts windows, t steps."""
    (b1, b2, b3), T = betas, len(stream)
    W = torch.zeros_like(stream[0])
    M1, M2, V = torch.zeros_like(W), torch.zeros_like(W), torch.zeros_like(W)
    path = [W]
    for k in range(-(-T // f)):
        M2 = M2 + b3 * sum(stream[(k - 1) * f : k * f], torch.zeros_like(W)) if k else M2
        (O2,) = newton_schulz([M2])
        for g in stream[k * f : (k + 1) * f]:
            M1 = M1 + b1 * g
            V = V + b2 * g**2
            (O1,) = newton_schulz([M1])
            W = W - lr * (O1 + alpha * O2) / (V.sqrt() + eps)
            path.append(W)
    return torch.stack(path)


@pytest.mark.parametrize(("period", "alpha"), [(1, 0.5), (7, 0.5), (10, 1.3), (60, 0.5)])
def test_the_literal_form_is_algorithm_1(period, alpha):
    stream = gradients(50, 6, 8)
    expected = algorithm_1(stream, 0.1, (0.9, 0.95, 0.8), alpha, period, 1e-6)
    got = run(
        lambda p: optim.M3(
            p, 0.1, 0.9, "literal", slow=0.8, alpha=alpha, period=period,
            betas=(0.5, 0.95), eps=1e-6, weight_decay=0.0,
        ),
        stream,
    )  # fmt: skip
    same(got, expected, 1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_the_slow_memory_it_is_muon(nesterov):
    """α = 0 and V off: orthogonalised momentum, bit for bit."""
    stream = gradients(30, 6, 8)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov}
    m3 = run(lambda p: optim.M3(p, **options, alpha=0.0), stream)
    assert torch.equal(m3, run(lambda p: optim.Muon(p, **options), stream))
    M = torch.zeros(6, 8, dtype=F64)
    W = torch.zeros(6, 8, dtype=F64)
    for g in stream:
        M = 0.9 * M + 0.1 * g
        m = 0.9 * M + 0.1 * g if nesterov else M
        W = (1 - 0.02 * 0.1) * W - 0.02 * 0.2 * 8**0.5 * newton_schulz([m])[0]
    same(m3[-1], W)


@pytest.mark.parametrize("second_moment", [False, True])
def test_the_practical_form(second_moment):
    stream, f, alpha, b1, b2, b3 = gradients(35, 6, 8), 10, 0.7, 0.9, 0.95, 0.8
    M1 = M2 = V = W = O2 = torch.zeros(6, 8, dtype=F64)
    for t, g in enumerate(stream):
        if t and t % f == 0:
            M2 = b3 * M2 + (1 - b3) * stream[t - f : t].mean(0)
            (O2,) = newton_schulz([M2])
        M1 = b1 * M1 + (1 - b1) * g
        (O1,) = newton_schulz([b1 * M1 + (1 - b1) * g])
        u = O1 + alpha * O2
        V = b2 * V + (1 - b2) * g**2
        if second_moment:
            u = u / ((V / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
        W = W - 0.01 * 0.2 * 8**0.5 * u * O1.norm() / u.norm()
    got = run(
        lambda p: optim.M3(
            p, 0.01, b1, slow=b3, alpha=alpha, period=f, betas=(0.5, b2),
            second_moment=second_moment, weight_decay=0.0,
        ),
        stream,
    )  # fmt: skip
    same(got[-1], W)


def test_the_shared_copy_is_the_two_memories():
    """In float32 M2 and O2 live in one tensor: M2 to 16 bits, O2 to 1 %, the path to 1 %."""
    stream = gradients(95, 24, 32) + gradients(1, 24, 32, seed=2)
    paths, states = {}, {}
    for exact in (True, False):
        p = nn.Parameter(torch.zeros(24, 32))
        optimizer = optim.M3([p], 0.01, period=10, exact=exact)
        for g in stream:
            p.grad = g.float()
            optimizer.step()
        paths[exact], states[exact] = p.detach(), optimizer.state[p]
    assert set(states[False]) == {"step", "fast", "slow", "slow_peak"}
    apart = states[False]["slow"] - states[True]["slow"]
    assert apart.norm() < 1e-3 * states[True]["slow"].norm()
    packed = optim.m3.Slow(0.9, 10, exact=False).directions([states[False]])[0]
    direction = states[True]["direction"]
    assert (packed - direction).norm() < 0.02 * direction.norm()
    assert (paths[True] - paths[False]).norm() < 0.01 * paths[True].norm()


def test_the_state_is_one_copy_more_than_muons():
    sizes = {}
    for build in (torch.optim.Muon, optim.Muon, optim.M3, optim.AdaMuon):
        p = nn.Parameter(torch.zeros(64, 128))
        optimizer = build([p])
        for _ in range(12):
            p.grad = torch.randn(64, 128)
            optimizer.step()
        sizes[build] = sum(t.nbytes for t in optimizer.state[p].values())
    copy = 64 * 128 * 4
    assert sizes[optim.Muon] <= sizes[torch.optim.Muon] + 8
    assert sizes[optim.M3] <= sizes[torch.optim.Muon] + copy + 8


def rms(path, lr):
    return (path[1:] - path[:-1]).square().mean((1, 2)).sqrt() / lr


def test_the_size_of_an_update():
    """Practical: Muon's, at every step. Literal: down by 1/√t. The long run is a recipe's."""
    stream = gradients(250, 16, 24)
    muon = rms(run(lambda p: optim.Muon(p, 0.1, weight_decay=0.0), stream), 0.1)
    m3 = rms(run(lambda p: optim.M3(p, 0.1, weight_decay=0.0), stream), 0.1)
    assert (m3 / muon).max() < 1.001
    assert (m3 / muon).min() > 0.999
    literal = rms(run(lambda p: optim.M3(p, 0.1, mode="literal", weight_decay=0.0), stream), 0.1)
    assert literal[-1] < 0.1 * literal[0]
    torch.testing.assert_close(
        literal[-1] / literal[60], torch.tensor(0.5).double(), rtol=0.2, atol=0
    )


def test_the_slow_memory_is_seen_when_its_window_ends_and_not_before():
    """Eq. 75: a gradient of long ago changes the update only through M2, at multiples of f."""
    stream = gradients(31, 4, 6)
    other = stream.clone()
    other[2] += 1
    options = {"momentum": 0.0, "nesterov": False, "period": 10, "weight_decay": 0.0}
    a, b = (run(lambda p: optim.M3(p, 1.0, **options), s) for s in (stream, other))
    steps = [(x[1:] - x[:-1]) for x in (a, b)]
    differs = [(x - y).norm() > 1e-9 for x, y in zip(*steps)]
    assert differs == [t == 2 or t >= 10 for t in range(31)]
