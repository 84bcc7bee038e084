"""What each CMS variant does, by hand and by identity (eqs. 70-74)."""

import pytest
import torch
import torch.nn.functional as F

from nestlearn import ContinuumMemory, Level
from nestlearn.layers.continuum import LevelMLP
from nestlearn.options import LEARNS

D, B, T = 8, 2, 13
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def build(levels, variant="sequential", **options):
    torch.manual_seed(1)
    return ContinuumMemory(D, levels, variant, **options).double()


def x(T=T):
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def mlp_by_hand(mlp: LevelMLP, x, weights=None):
    """s √D W_2 φ(g W_1 z)/g with z the unit norm(x), written out."""
    W1, W2 = weights or tuple(mlp.start)
    z = F.normalize(mlp.norm(x), dim=-1)
    g = W1.shape[-2] ** 0.5
    return mlp.scale * D**0.5 * (F.silu(g * z @ W1.mT) / g) @ W2.mT


def test_levels_that_never_update_are_an_mlp():
    layer = build([Level(), Level(hidden=12)])
    y = x()
    for mlp in layer.mlps:
        y = y + mlp_by_hand(mlp, y)
    torch.testing.assert_close(layer(x())[0], y, **TOLERANCE)


def test_step_size_zero_is_an_mlp():
    moving = build([Level(chunk=3, lr=0.0)])
    torch.testing.assert_close(moving(x())[0], x() + mlp_by_hand(moving.mlps[0], x()), **TOLERANCE)


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize(("chunk", "due"), [(64, 512), (96, 576)])
def test_by_default_a_level_fades_after_512_tokens_and_is_as_it_was_before(learns, chunk, due):
    """W ← W₀ + 2^(−due/2048) (W − W₀) at the end of that chunk, and nothing within it."""
    kind = {"chunk": chunk, "learns": learns, "bound": None, "lr": 0.05}
    fading, lasting = build([Level(**kind)]), build([Level(half_life=None, **kind)])
    assert torch.equal(fading(x(due))[0], lasting(x(due))[0])
    for short in (due - 1, due):
        own, other = (layer(x(short))[1].levels[0].fast.now for layer in (fading, lasting))
        for w, free, w0 in zip(own, other, fading.mlps[0].learning, strict=True):
            kept = 1.0 if short < due else 2 ** (-due / 2048)
            assert (free - w0).abs().max() > 1e-3
            torch.testing.assert_close(w, w0 + kept * (free - w0), **TOLERANCE)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_scale_is_a_learned_factor_of_the_output_alone(chunk):
    """What a level writes does not depend on it, and it learns."""
    plain, scaled = (build([Level(chunk=chunk, scale=s)]) for s in (None, 0.25))
    (y, learned), (small, same) = plain(x()), scaled(x())
    torch.testing.assert_close(small - x(), 0.25 * (y - x()), **TOLERANCE)
    for before, after in zip(learned.levels, same.levels, strict=True):
        if before is not None:
            for a, b in zip(before.fast.now, after.fast.now, strict=True):
                assert torch.equal(a, b)
    small.square().sum().backward()
    expected = (2 * small * (y - x())).sum()
    torch.testing.assert_close(scaled.mlps[0].scale.grad[0], expected.detach(), **TOLERANCE)
    assert all(float(w.grad.abs().max()) > 0 for w in scaled.mlps[0].start)


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("rule", ["gd", "dgd", "momentum"])
def test_a_level_by_hand(rule, learns):
    """Eq. 71 with autograd: weights move only every C tokens, by the sum of the chunk's errors."""
    C, lr = 4, 0.2
    layer = build([Level(chunk=C, lr=lr, rule=rule, bound=None, learns=learns)])
    mlp = layer.mlps[0]
    with torch.no_grad():
        mlp.gate.normal_()
    inputs = x()
    y, _ = layer(inputs)
    z = F.normalize(mlp.norm(inputs), dim=-1)
    v = mlp.value(z)
    eta = mlp.lr * 2 * torch.sigmoid(z @ mlp.gate * D**0.5)
    for b in range(B):
        W = [w.detach().clone() for w in mlp.start]
        S = [torch.zeros_like(w) for w in W]
        g = W[0].shape[0] ** 0.5
        for first in range(0, T, C):
            part = inputs[b : b + 1, first : first + C]
            expected = part + mlp_by_hand(mlp, part, W)
            torch.testing.assert_close(y[b : b + 1, first : first + C], expected, **TOLERANCE)
            start = [w.clone().requires_grad_() for w in W]
            for t in range(first, min(first + C, T)):
                if t == 0:
                    if rule == "momentum":
                        S = [0.5 * s for s in S]
                    continue
                k = z[b, t - 1].detach()
                h = F.silu(g * start[0] @ k) / g
                loss = 0.5 * (start[1] @ h - v[b, t].detach()).square().sum()
                grads = torch.autograd.grad(loss, start)
                for i, (grad, into) in enumerate(zip(grads, (k, h.detach()))):
                    if i == 0 and learns == "out":
                        continue
                    step = eta[b, t].detach() / into.square().sum().clamp(min=1)
                    force = -step * grad
                    if rule == "momentum":
                        S[i] = force = 0.5 * S[i] + force
                    if rule == "dgd":
                        force = force - step * torch.outer(W[i] @ into, into)
                    W[i] = W[i] + force


def test_the_three_variants_differ_and_share_their_start():
    levels = [Level(chunk=2), Level(chunk=4), Level(chunk=8)]
    outputs = {v: build(levels, v)(x(17))[0] for v in ("sequential", "nested", "independent")}
    sequential, nested, independent = outputs.values()
    torch.testing.assert_close(sequential[:, :4], nested[:, :4], **TOLERANCE)  # no context ended
    assert (sequential[:, 4:] - nested[:, 4:]).abs().max() > 1e-3
    assert (sequential[:, 0] - independent[:, 0]).abs().max() > 1e-3
    assert (nested[:, -1] - independent[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("meta_lr", [0.0, 0.25, 1.0])
def test_nested_starts_again_when_the_slower_context_ends(meta_lr, learns):
    """Eq. 72: θ_fast ← Φ with Φ ← Φ + meta_lr (θ_fast − Φ), at the end of the slower chunk."""
    levels = [Level(chunk=2, meta_lr=meta_lr, learns=learns), Level(chunk=6, learns=learns)]
    nested, sequential = build(levels, "nested"), build(levels)
    start = [w.detach() for w in nested.mlps[0].learning]
    _, before = sequential(x()[:, :6])  # what the fast level has learned in the first context
    _, after = nested(x()[:, :6])
    for w0, learned, now in zip(start, before.levels[0].fast.now, after.levels[0].fast.now):
        torch.testing.assert_close(now, w0 + meta_lr * (learned - w0), **TOLERANCE)
        assert (learned - w0).abs().max() > 1e-3
    for a, b in zip(before.levels[1].fast.now, after.levels[1].fast.now):
        torch.testing.assert_close(a, b, **TOLERANCE)  # the slowest level has no slower one
    if meta_lr == 1.0:
        torch.testing.assert_close(nested(x())[0], sequential(x())[0], **TOLERANCE)


def test_independent_is_a_weighted_sum():
    layer = build([Level(), Level(hidden=12)], "independent")
    with torch.no_grad():
        layer.mix.copy_(torch.tensor([0.5, -2.0]))
    parts = [mlp_by_hand(mlp, x()) for mlp in layer.mlps]
    torch.testing.assert_close(layer(x())[0], x() + 0.5 * parts[0] - 2.0 * parts[1], **TOLERANCE)


def test_only_levels_that_are_due_move():
    layer = build([Level(chunk=2), Level(chunk=6), Level()])
    states = []
    state = None
    for t in range(T):
        _, state = layer(x()[:, t : t + 1], state)
        states.append(state)
    assert state.levels[2] is None
    for i, chunk in enumerate((2, 6)):
        for t in range(1, T):
            one, two = states[t - 1].levels[i].fast.start, states[t].levels[i].fast.start
            moved = any((a - b).abs().max() > 0 for a, b in zip(one, two))
            assert moved == ((t + 1) % chunk == 0), (chunk, t)


@pytest.mark.parametrize("learns", LEARNS)
def test_meta_gradients_differ_and_truncation_cuts(learns):
    """The start value's gradient: full ≠ first-order ≠ truncated, with the same forward pass."""
    gradients = {}
    level = Level(chunk=2, learns=learns)
    for name, options in {
        "full": {},
        "first-order": {"meta_gradient": "first-order"},
        "truncated": {"truncate": 4},
        "remat": {"remat": True},
    }.items():
        layer = build([level], **options)
        y, _ = layer(x())
        (y * torch.arange(T, dtype=y.dtype).view(1, T, 1)).sum().backward()
        gradients[name] = (y.detach(), layer.mlps[0].start[-1].grad)
    full = gradients["full"]
    for name, (y, grad) in gradients.items():
        torch.testing.assert_close(y, full[0], **TOLERANCE)
        if name == "remat":
            torch.testing.assert_close(grad, full[1], **TOLERANCE)
        elif name != "full":
            assert (grad - full[1]).abs().max() > 1e-3
    layer = build([level], truncate=4)
    layer(x())[0][:, 4:].sum().backward()  # nothing before token 4 reaches what follows it
    grad = layer.mlps[0].start[-1].grad
    assert grad is None or grad.abs().sum() == 0


def test_what_learns_is_said():
    """ "out": the second matrix alone is in the state, and no write moves what makes its keys."""
    for learns, matrices in (("out", 1), ("all", 2)):
        layer = build([Level(chunk=2, learns=learns)])
        state = layer(x())[1].levels[0]
        assert len(state.fast.now) == matrices
        assert state.last.shape[-1] == (32 if learns == "out" else D)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build([]), "levels is empty"),
        (lambda: ContinuumMemory(8, [4, 16]), "4 is no level"),
        (lambda: build([Level()], "stacked"), "'stacked'"),
        (lambda: build([Level()], meta_gradient="second"), "'second'"),
        (lambda: build([Level(chunk=4), Level(chunk=6)], "nested"), "chunks 4 and 6"),
        (lambda: Level(chunk=0), "chunk=0"),
        (lambda: Level(lr=1.5), r"lr=1\.5"),
        (lambda: Level(scale=float("nan")), "scale=nan"),
        (lambda: Level(rule="adam"), "'adam'"),
        (lambda: Level(learns="in"), "learns='in'"),
        (lambda: Level(meta_lr=-1.0), r"meta_lr=-1\.0"),
        (lambda: build([Level(chunk=2, bound=(2.0, 1.0))]), r"bound=\(2\.0, 1\.0\)"),
        (lambda: build([Level(chunk=2, objective="l1")])(x()), "'l1'"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
