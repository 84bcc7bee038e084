"""Training how a stack learns: the gradient through the writes, and that it helps."""

import pytest
import torch
from stacks import tiny, tokens

from nestlearn import DeltaLevel
from nestlearn.hf import learning, reading
from nestlearn.hf.meta import MetaConfig, add_starts, rate_parameters, train_stack
from nestlearn.hf.stack import stack_levels

SYSTEMS = {
    "sequential": {
        "levels": [DeltaLevel(3, lr=0.3, rule="dgd"), DeltaLevel(6, lr=0.2, rule="momentum")]
    },
    "nested": {
        "levels": [DeltaLevel(3, lr=0.3, rule="gd"), DeltaLevel(6, lr=0.2, rule="dgd")],
        "variant": "nested",
    },
    "depth": {
        "levels": [
            DeltaLevel(3, lr=0.3, rule="dgd"),
            DeltaLevel(5, lr=0.2, half_life=9, rule="dgd"),
        ],
        "spread": "depth",
    },
    "local": {"levels": [DeltaLevel(3, lr=0.3, rule="dgd")], "objective": "local"},
    "rank": {
        "levels": [DeltaLevel(3, lr=0.5, rule="dgd"), DeltaLevel(4, lr=0.4, rule="dgd")],
        "rank": 16,  # exact as long as nothing is left out
        "variant": "independent",
    },
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_full_meta_gradient_is_the_finite_difference(name):
    torch.manual_seed(0)
    # GPT-2 is float64 throughout; the norms of Llama and its kin compute in float32.
    base = tiny("gpt2", dtype=torch.float64, attn_implementation="eager")
    model = stack_levels(base, window=8, **SYSTEMS[name])
    add_starts(model)
    with torch.no_grad():
        for start in model.starts:
            start.add_(0.05 * torch.randn_like(start))
    ids, keep = tokens(2, 14), tokens(2, 6, seed=1)

    def outer(graph=None):
        loss, memory = learning.unroll(model, ids, graph=graph)
        with torch.set_grad_enabled(graph is not None):
            return loss[:, 1:].mean() + reading.losses(model, keep, memory)[:, 1:].mean()

    parameters = [*rate_parameters(model), *model.starts]
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = torch.autograd.grad(outer("full"), parameters)
    step = 1e-5
    for parameter, gradient in zip(parameters, found):
        way = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * step * way)
                values.append(float(outer()))
                parameter.sub_(sign * step * way)
        expected = (values[0] - values[1]) / (2 * step)
        assert float((gradient * way).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    rough = torch.autograd.grad(outer("first-order"), parameters)
    assert any(not torch.allclose(a, b) for a, b in zip(rough, found))


def test_training_finds_better_step_sizes_and_leaves_the_model_usable():
    text = tokens(1, 12, seed=3).repeat(1, 40)[0]  # it repeats itself: there is something to learn
    model = stack_levels(
        tiny(), [DeltaLevel(8, lr=0.01, rule="dgd"), DeltaLevel(16, lr=0.01, rule="dgd")], window=32
    )
    config = MetaConfig(steps=12, batch=2, length=64, reach=32, lr=0.3, start_lr=0.01, keep=0.1)
    before = [rate.clone() for rate in rate_parameters(model)]
    history = train_stack(model, text, config, keep=tokens(1, 200)[0])
    assert sum(h[0] for h in history[-3:]) < sum(h[0] for h in history[:3]) - 0.2
    assert all(not torch.equal(a, b) for a, b in zip(before, rate_parameters(model)))
    assert all(float(w.abs().max()) > 0 for w in model.starts)
    assert not any(p.requires_grad for p in (*rate_parameters(model), *model.starts))
    _, memory = model.learn(text[None, :40])
    assert not memory.levels[0].fast[0].left.requires_grad


def test_refusals():
    model = stack_levels(tiny(), [DeltaLevel(8, lr=0.3, rule="dgd")])
    with pytest.raises(ValueError, match=r"ids is \[5\]: pass one stream of 512"):
        train_stack(model, tokens(1, 5)[0])
    for wrong in ({"steps": 0}, {"length": 1}, {"graph": "none"}, {"lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MetaConfig(**wrong)
