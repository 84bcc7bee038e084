"""The anchor: its gradient by hand, the same however a stream is cut, each memory for itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stacks import tiny, tokens

from nestlearn import DeltaLevel
from nestlearn.hf.anchor import Anchor
from nestlearn.hf.cache import CACHE
from nestlearn.hf.learning import unroll
from nestlearn.hf.lending import kernel
from nestlearn.hf.stack import stack_levels

LR, STRENGTH = 0.3, 2.0


def anchor(rows=2):
    return Anchor(tokens(6, 9, seed=5), STRENGTH, rows)


def test_the_second_write_by_hand():
    """Δ ← Δ − η (∇ cross-entropy + strength · ∇ KL(base ‖ now)), both means over tokens."""
    plain = tiny()
    model = stack_levels(tiny(), [DeltaLevel(4, lr=LR, rule="gd", bound=None)], window=64)
    ids = tokens(1, 8)
    _, first = model.learn(ids[:, :4])
    with torch.no_grad():
        context = model.base(ids[:, :3], use_cache=True)[CACHE]  # as it was read then
    _, second = model.learn(ids[:, 4:], first, anchor=anchor())

    learner = copy.deepcopy(plain)
    mlps = [(n, p) for n, p in learner.named_parameters() if ".mlp." in n]
    with torch.no_grad():
        for (_, own), delta in zip(mlps, first.levels[0].fast, strict=True):
            own += delta.left[0]
    logits = learner(ids[:, 3:7], **{CACHE: context}).logits
    texts = anchor().samples[2:4]  # the turn of the second chunk
    target, now = plain(texts).logits.log_softmax(-1), learner(texts).logits.log_softmax(-1)
    apart = (target.exp() * (target - now)).sum(-1).mean()
    loss = F.cross_entropy(logits[0], ids[0, 4:]) + STRENGTH * apart
    grads = torch.autograd.grad(loss, [p for _, p in mlps])
    assert float(apart.detach()) > 0
    for delta, before, g in zip(second.levels[0].fast, first.levels[0].fast, grads, strict=True):
        torch.testing.assert_close(delta.left[0], before.left[0] - LR * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rank": 3}], ids=["full", "rank"])
def test_any_cut_and_any_batch_mate(options):
    levels = [DeltaLevel(4, lr=LR, rule="gd"), DeltaLevel(12, lr=0.1, rule="momentum")]
    model = stack_levels(tiny(), levels, window=16, **options)
    ids = tokens(2, 30)
    _, whole = model.learn(ids, anchor=anchor())
    memory = None
    for part in ids.split([3, 1, 9, 17], 1):
        _, memory = model.learn(part, memory, anchor=anchor())
    free = model.learn(ids)[1].levels[0].fast[0].left
    for a, b in zip(whole.levels, memory.levels, strict=True):
        for x, y in zip(a.fast, b.fast, strict=True):
            torch.testing.assert_close(x.left, y.left, rtol=0, atol=0)
    for row in range(2):
        _, alone = model.learn(ids[row : row + 1], anchor=anchor())
        for x, y in zip(whole.levels[0].fast, alone.levels[0].fast, strict=True):
            torch.testing.assert_close(x.left[row], y.left[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole.levels[0].fast[0].left, free, atol=1e-4)


def test_it_forgets_less():
    model = stack_levels(tiny(), [DeltaLevel(8, lr=LR, rule="gd")], window=64)
    kept = Anchor.sampled(model, count=8, length=12, strength=20.0, seed=3)
    assert torch.equal(kept.samples, Anchor.sampled(model, count=8, length=12, seed=3).samples)
    ids = tokens(1, 16).repeat(1, 10)

    def apart(memory):
        return float(kept.divergence(model, model.weights(memory), 0, 1))

    free, held = model.learn(ids)[1], model.learn(ids, anchor=kept)[1]
    assert apart(held) < 0.5 * apart(free)
    before, after = model.losses(ids)[:, 1:].mean(), model.losses(ids, held)[:, 1:].mean()
    assert after < 0.9 * before


def test_the_outer_gradient_goes_through_it():
    model = stack_levels(tiny(), [DeltaLevel(4, lr=LR, rule="gd")], window=64)
    model.lr[0].requires_grad_(True)
    ids = tokens(1, 16)
    with_it, _ = unroll(model, ids, anchor=anchor(), graph="first-order")
    without, _ = unroll(model, ids, graph="first-order")
    (a,) = torch.autograd.grad(with_it[:, 12:].sum(), model.lr[0])
    (b,) = torch.autograd.grad(without[:, 12:].sum(), model.lr[0])
    assert a.isfinite().all()
    assert not torch.allclose(a, b)


def test_bad_anchors():
    with pytest.raises(ValueError, match=r"samples is torch.float32 \[2, 3\]"):
        Anchor(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="strength=0"):
        Anchor(tokens(2, 3), 0.0)
    model = stack_levels(tiny(), [DeltaLevel(4, lr=0.3, rule="dgd")], objective="local")
    with pytest.raises(ValueError, match="takes no anchor"):
        model.learn(tokens(1, 8), anchor=anchor())
    assert kernel(model.layers[0]).isfinite().all()
