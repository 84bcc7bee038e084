"""Every optimizer is its formula: transcriptions of the equations, step by step, in float64."""

import pytest
import torch
from torch import nn

from nestlearn import optim
from nestlearn.optim.deep import DeepMemory
from nestlearn.optim.orthogonal import CUBIC, QUINTIC, newton_schulz
from nestlearn.optim.transforms import momentum, precondition

F64 = torch.float64


def gradients(steps, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=generator, dtype=F64)


def run(build, stream, start=None, dtype=F64):
    """W after each of the gradients, [steps + 1, ...]."""
    start = torch.zeros(stream.shape[1:]) if start is None else start
    p = nn.Parameter(start.to(dtype).clone())
    optimizer = build([p])
    path = [p.detach().clone()]
    for g in stream:
        p.grad = g.to(dtype)
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------- Newton–Schulz


def test_cubic_newton_schulz_is_descent_on_orthogonality():
    """Eqs. 43, 44: X ← X − ½ ∇ ¼‖XᵀX − I‖², from the gradient over its norm."""
    G = gradients(1, 5, 7)[0]
    X = G / G.norm()
    for _ in range(4):
        X = X.detach().requires_grad_()
        loss = 0.25 * (X.mT @ X - torch.eye(7, dtype=F64)).square().sum()
        X = X - 0.5 * torch.autograd.grad(loss, X)[0]
    same(newton_schulz([G], 4, CUBIC)[0], X.detach())
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    same(newton_schulz([G], 40, CUBIC)[0], U @ V, 1e-8)


def test_quintic_newton_schulz_keeps_directions_and_levels_sizes():
    G = gradients(1, 6, 9)[0]
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    s = S / S.norm()
    for _ in range(5):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    same(newton_schulz([G])[0], U @ torch.diag(s) @ V)
    assert s.min() > 0.6
    assert s.max() < 1.25


def test_newton_schulz_of_many_is_that_of_each():
    """Batches, orientation, types and stacks do not mix."""
    shapes = [(4, 6), (6, 4), (4, 6), (3, 6, 4), (2, 2), (1, 5)]
    ms = [gradients(1, *shape, seed=i)[0].float() for i, shape in enumerate(shapes)]
    for m, o in zip(ms, newton_schulz(ms)):
        assert o.shape == m.shape
        assert o.dtype == m.dtype
        alone = [newton_schulz([x])[0] for x in (m if m.ndim == 3 else [m])]
        torch.testing.assert_close(o, torch.stack(alone).reshape(m.shape), rtol=1e-5, atol=1e-6)
    assert newton_schulz([torch.zeros(3, 3)])[0].abs().max() == 0
    half = newton_schulz([ms[0]], precision="bfloat16")[0]
    torch.testing.assert_close(half, newton_schulz([ms[0]])[0], rtol=0.1, atol=0.03)


# ------------------------------------------------------------------------------- linear memories


def test_momentum_and_its_general_form():
    """Eqs. 33, 34 and 60: GM with ⟨m, g⟩ is heavy-ball momentum, as torch has it."""
    stream = gradients(20, 3, 4)
    by_torch = run(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), stream)
    same(run(lambda p: optim.GM(p, lr=0.1, momentum=0.9), stream), by_torch)
    same(run(lambda p: optim.Chain(p, momentum(0.9), lr=0.1), stream), by_torch)
    steps = 80  # of the argmin, whose error halves
    same(run(lambda p: optim.GM(p, lr=0.1, momentum=0.9, solve=steps), stream), by_torch)


def test_nesterov_and_average():
    stream = gradients(20, 3, 4)
    sgd = run(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), stream)
    same(run(lambda p: optim.Chain(p, momentum(0.9, nesterov=True), lr=0.1), stream), sgd)
    mean = run(lambda p: optim.Chain(p, momentum(0.9, average=True, nesterov=True), lr=1.0), stream)
    same(mean, sgd)  # the same memory in units of 1 − α


def test_preconditioned_value():
    """Eq. 47: m ← α m − η P g."""
    stream, P = gradients(6, 3, 4), torch.rand(3, 1, dtype=F64)
    chain = optim.chain(precondition(lambda g: P * g), momentum(0.8))
    m = W = torch.zeros(3, 4, dtype=F64)
    for g in stream:
        m = 0.8 * m + P * g
        W = W - 0.1 * m
    same(run(lambda p: optim.Chain(p, chain, lr=0.1), stream)[-1], W)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5,), (), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("mode", ["literal", "practical"])
def test_delta_momentum(mode, shape):
    """Eqs. 48, 49, with P = I; a vector is one row, a kernel [out, in · k]."""
    stream, lr, alpha, delta = 0.3 * gradients(12, *shape), 0.1, 0.9, 0.7
    as_matrix = (shape[0], -1) if len(shape) > 1 else (1, -1)
    m = torch.zeros_like(stream[0]).reshape(as_matrix)
    W = torch.zeros_like(m)
    for g in stream.reshape(12, *m.shape):
        key = g if mode == "literal" else g / g.norm()
        eye = torch.eye(m.shape[1], dtype=F64)
        if mode == "literal":
            m = m @ (alpha * eye - key.mT @ key) - lr * g
            W = W + m
        else:
            m = m @ (alpha * eye - delta * key.mT @ key) + g
            W = W - lr * m
    got = run(lambda p: optim.DeltaMomentum(p, lr, alpha, mode, delta=delta), stream)
    same(got[-1], W.reshape(shape))


def test_delta_momentum_is_a_general_momentum():
    """Eq. 49 is one explicit step of eq. 60 on ½‖m gᵀ + P‖², the retention in units of η."""
    stream, lr = 0.3 * gradients(10, 3, 4), 0.1

    def objective(m, g):
        return 0.5 * (m @ g.mT).square().sum() / lr + (m * g).sum()

    general = run(lambda p: optim.GM(p, lr, objective=objective, solve="explicit"), stream)
    same(run(lambda p: optim.DeltaMomentum(p, lr, mode="literal"), stream), general)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4,)], ids=str)
def test_implicit_delta_momentum(shape):
    """GM with the L2 objective: m = (α m − η g)(I + η gᵀg)⁻¹, the argmin, bounded for any g."""
    stream, lr = gradients(8, *shape), 0.5
    m = torch.zeros_like(torch.atleast_2d(stream[0]))
    W = torch.zeros_like(m)
    for g in stream.reshape(8, *m.shape):
        eye = torch.eye(m.shape[1], dtype=F64)
        m = (0.9 * m - lr * g) @ torch.linalg.inv(eye + lr * g.mT @ g)
        W = W + m
    exact = run(lambda p: optim.GM(p, lr, objective="l2"), stream)
    same(exact[-1], W.reshape(shape))
    small = run(lambda p: optim.GM(p, 0.02, objective="l2"), stream)
    same(run(lambda p: optim.GM(p, 0.02, objective="l2", solve=80), stream), small, 1e-8)
    huge = run(lambda p: optim.GM(p, 1.0, objective="l2"), 1e4 * stream)
    assert huge.abs().max() < 10


def test_practical_delta_momentum_is_bounded_where_the_literal_one_is_not():
    stream = 3 * gradients(60, 4, 4)
    literal = run(lambda p: optim.DeltaMomentum(p, 0.1, mode="literal"), stream)
    assert not literal[-1].abs().max() < 1e6
    practical = run(lambda p: optim.DeltaMomentum(p, 0.1), stream)
    longest = (practical[1:] - practical[:-1]).flatten(1).norm(dim=1).max() / 0.1
    assert longest <= stream.flatten(1).norm(dim=1).max() / (1 - 0.9)


def test_features_and_output():
    """Eqs. 51, 52: m ← α m − η φ(g), W ← W + σ(m)."""
    stream = 0.1 * gradients(5, 3, 4)
    chain = optim.chain(
        optim.transforms.feature_map("cubic"), momentum(0.9), optim.transforms.output("tanh")
    )
    m = W = torch.zeros(3, 4, dtype=F64)
    for g in stream:
        m = 0.9 * m + (g + g**3)
        W = W - 0.1 * torch.tanh(m)
    same(run(lambda p: optim.Chain(p, chain, lr=0.1), stream)[-1], W)


# --------------------------------------------------------------------------------- deep momentum


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("tokens", ["row", "element"])
def test_literal_deep_momentum(tokens, depth):
    """Eq. 50: m ← α m − η ∇⟨m(g), 1⟩, W ← W + m(g); the inner gradient by autograd."""
    stream, lr = gradients(4, 5, 6), 0.01
    width = 6 if tokens == "row" else 1
    memory = DeepMemory(tokens, 3, depth, "dot", residual=False)
    mlp = memory.mlp(torch.Size((5, 6)), False)
    A = [w.double() for w in mlp.init(1, generator=torch.Generator().manual_seed(0))]
    assert all(max(w.shape) <= max(3, width) for w in A)
    W = torch.zeros(5, 6, dtype=F64)

    def read(A, g):
        z = g.reshape(-1, width).mT
        for i, w in enumerate(A):
            z = w[0] @ (torch.tanh(z) if i else z)
        return z.mT.reshape(5, 6)

    for g in stream:
        A = [w.detach().requires_grad_() for w in A]
        slopes = torch.autograd.grad(read(A, g).sum(), A)
        A = [0.9 * w - lr * s for w, s in zip(A, slopes)]
        W = W + read(A, g).detach()
    options = {"mode": "literal", "tokens": tokens, "hidden": 3, "depth": depth}
    same(run(lambda p: optim.DeepMomentum(p, lr, 0.9, **options), stream)[-1], W)


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("tokens", ["row", "element"])
def test_practical_deep_momentum(tokens, objective):
    """The pairs, the units, the step and the bound, transcribed."""
    stream, zeta, kept, alpha = gradients(6, 5, 6), 0.3, 0.9, 0.8
    memory = DeepMemory(tokens, 4, 2, objective)
    mlp = memory.mlp(torch.Size((5, 6)), False)
    A, B = (w[0].double() for w in mlp.init(1, generator=torch.Generator().manual_seed(0)))
    B = torch.zeros_like(B)
    W, mu, power = torch.zeros(5, 6, dtype=F64), torch.zeros(5, 6, dtype=F64), 0.0

    def m(A, B, z):
        z = z.reshape(-1, mlp.dim).mT
        return (z + B @ torch.tanh(A @ z)).mT.reshape(5, 6)

    for t, g in enumerate(stream):
        power = alpha * power + (1 - alpha) * g.square().mean()
        unit = (power / (1 - alpha ** (t + 1))).sqrt()
        if t:
            A, B = A.requires_grad_(), B.requires_grad_()
            y, v = m(A, B, mu / unit), g / unit
            loss = 0.5 * (y - v).square().sum() if objective == "l2" else -(y * v).sum()
            slopes = torch.autograd.grad(loss, (A, B))
            z = (mu / unit).reshape(-1, mlp.dim)
            inputs = (z, torch.tanh(z @ A.detach().mT))
            AB = []
            for w, s, x in zip((A.detach(), B.detach()), slopes, inputs):
                w = kept * w - zeta * s / len(x) / (1 + x.square().sum(1).mean())
                AB.append(w * min(1.0, float(min(w.shape) ** 0.5 / w.norm())))
            A, B = AB
        mu = alpha * mu + (1 - alpha) * g
        W = W - 0.1 * unit * m(A, B, mu / unit)
    options = {"tokens": tokens, "objective": objective, "hidden": 4, "retention": kept}
    got = run(lambda p: optim.DeepMomentum(p, 0.1, alpha, inner_lr=zeta, **options), stream)
    same(got[-1], W, 1e-8)
    plain = run(lambda p: optim.DeepMomentum(p, 0.1, alpha, inner_lr=0.0), stream)
    same(plain, run(lambda p: optim.Chain(p, momentum(alpha, average=True), lr=0.1), stream))


def test_deep_momentum_is_small():
    p = nn.Parameter(torch.zeros(300, 2000))
    p.grad = torch.randn(300, 2000)
    optimizer = optim.DeepMomentum([p])
    optimizer.step()
    extra = sum(s.numel() for k, s in optimizer.state[p].items() if k.startswith("deep"))
    assert extra == 2 * 8 * 2000


# -------------------------------------------------------------------------------- AdamW, AdaMuon


def test_the_auxiliary_rule_is_adamw():
    stream = gradients(15, 6)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    adamw = run(lambda p: torch.optim.AdamW(p, **options), stream, torch.ones(6))
    for build in (optim.Muon, optim.M3, optim.AdaMuon):
        same(run(lambda p, b=build: b(p, **options), stream, torch.ones(6)), adamw)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)], ids=str)
def test_muon_is_torchs(shape, adjust, nesterov, monkeypatch):
    """The same options, the same steps; in float64, torch's Newton–Schulz included."""
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    stream, start = gradients(20, *shape), gradients(1, *shape, seed=5)[0]

    def theirs(dtype):
        build = torch.optim.Muon
        return run(lambda p: build(p, **options, adjust_lr_fn=adjust), stream, start, dtype)

    half = run(
        lambda p: optim.Muon(p, **options, adjust=adjust, precision="bfloat16"),
        stream, start, torch.float32,
    )  # fmt: skip
    expected = theirs(torch.float32)
    moved = (expected - expected[0]).flatten(1).norm(dim=1)
    assert ((half - expected).flatten(1).norm(dim=1) <= 0.03 * moved).all()
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    same(run(lambda p: optim.Muon(p, **options, adjust=adjust), stream, start), theirs(F64))


def test_adamuon():
    stream = gradients(7, 4, 6)
    m = v = torch.zeros(4, 6, dtype=F64)
    W = torch.zeros(4, 6, dtype=F64)
    for g in stream:
        m = 0.9 * m + g
        O = newton_schulz([m.sign()])[0]  # noqa: E741
        v = 0.9 * v + 0.1 * O**2
        u = O / (v.sqrt() + 1e-8)
        W = W - 0.1 * 0.2 * u * 24**0.5 / u.norm()
    got = run(lambda p: optim.AdaMuon(p, 0.1, 0.9, weight_decay=0.0), stream)
    same(got[-1], W)


def test_kernels_stacks_and_fused_matrices():
    """A kernel is [out, in k k], a stack its matrices, a fused weight its parts."""
    options = {
        "lr": 1.0,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "adjust": "original",
    }
    g = gradients(1, 6, 2, 2, 2)
    kernel = run(lambda p: optim.Muon(p, **options), g)[-1]
    same(kernel, -newton_schulz([g[0].reshape(6, 8)])[0].reshape(6, 2, 2, 2))
    g = gradients(1, 3, 4, 5)
    stack = run(lambda p: optim.Muon([{"params": p, "stacked": True}], **options), g)[-1]
    same(stack, -torch.stack([newton_schulz([x])[0] for x in g[0]]))
    g = gradients(1, 6, 5)
    fused = run(lambda p: optim.Muon([{"params": p, "split": 3}], **options), g)[-1]
    same(fused, -torch.cat([newton_schulz([x])[0] for x in g[0].split(2)]))
    rows = run(lambda p: optim.Muon([{"params": p, "split": (4, 2)}], **options), g)[-1]
    same(rows, -torch.cat([newton_schulz([x])[0] for x in g[0].split((4, 2))]))
