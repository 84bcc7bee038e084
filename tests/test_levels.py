"""The nested-learning view: what it says of a model is what the model does."""

import json
from math import gcd

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from nestlearn import optim
from nestlearn.layers import (
    Attention,
    ContinuumMemory,
    SelfModifyingTitans,
    StaticProjections,
    gated_deltanet,
    linear_attention,
    static_titans,
)
from nestlearn.levels import OPTIMIZERS, SYMBOLS, Component, levels, render, to_json
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Continuum, DeltaNet, Linear, StaticTitans, SwiGLU, Titans
from nestlearn.options import Level as Mlp

SMALL = {"vocab_size": 16, "dim": 16, "layers": 2, "heads": 2}
CMS = (Mlp(2), Mlp(8), Mlp())


def hope(**changes):
    torch.manual_seed(0)
    own = {"mixer": Titans(4), "channel": Continuum(CMS)}
    return HopeLM(HopeConfig(**{**SMALL, **own, **changes}))


def titans(chunk=4, **changes):
    return SelfModifyingTitans(16, 2, Titans(chunk, **{"depth": 2, "half_life": None, **changes}))


def parts(found):
    return {c.name: c for level in found for c in level.components}


def kinds(found):
    return [(level.period, {c.kind for c in level.components}) for level in found]


# ----------------------------------------------------------------------------- definitions


def test_hope_in_training():
    found = levels(hope(), tokens_per_step=64)
    assert [level.number for level in found] == [1, 2, 3, 4, 5, 6]
    assert [level.period for level in found] == [1, 2, 4, 8, 64, 64]
    named = [[c.name for c in level.components] for level in found]
    assert named[:5] == [
        ["M_mem", "convolution inputs", "CMS previous inputs"],
        ["CMS MLP 1"],
        ["M_k", "M_v", "M_η", "M_α"],
        ["CMS MLP 2"],
        ["AdamW: first moment m", "AdamW: second moment v"],
    ]
    assert "CMS MLP 3, never written" in named[5]
    assert "memory start values" in named[5]
    mem = parts(found)["M_mem"]
    assert (mem.period, mem.gradient_period, mem.blocks) == (1, 4, (0, 1))
    assert mem.frequency == 1
    assert parts(found)["CMS MLP 2"].frequency == 1 / 8


@pytest.mark.parametrize(
    ("optimizer", "memories"), [("AdamW", 2), ("momentum", 1), ("SGD", 0)], ids=str
)
def test_the_optimizers_memories_are_faster_than_the_weights(optimizer, memories):
    model = hope()
    found = levels(model, tokens_per_step=64, optimizer=optimizer)
    own = [c for c in parts(found).values() if c.kind == "optimizer"]
    assert len(own) == memories
    assert all(c.parameters == model.parameter_count() for c in own)
    slow = [(64, {"optimizer"}), (64, {"weights"})]
    assert kinds(found)[4:] == (slow if memories else slow[1:])


def test_a_model_in_use_has_no_optimizer_and_its_weights_never_change():
    found = levels(hope())
    assert kinds(found)[-1] == (None, {"weights"})
    assert not any(c.kind == "optimizer" for c in parts(found).values())
    assert parts(found)["embedding"].frequency == 0
    assert levels(nn.Linear(2, 2))[0].components[0].period is None


def test_frozen_parameters_are_never_updated():
    model = hope()
    model.embed.requires_grad_(False)
    found = levels(model, tokens_per_step=64)
    assert [c.name for c in found[-1].components] == ["embedding"]
    assert found[-1].period is None
    moment = parts(found)["AdamW: first moment m"]
    assert moment.parameters == model.parameter_count() - model.embed.weight.numel()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert kinds(levels(model, tokens_per_step=64))[-1] == (None, {"weights"})
    assert "AdamW: first moment m" not in parts(levels(model, tokens_per_step=64))


def test_a_momentum_is_faster_than_the_memory_that_needs_it():
    found = levels(static_titans(16, 2, StaticTitans(4)))
    assert kinds(found)[:2] == [(1, {"momentum"}), (1, {"memory", "buffer"})]
    found = levels(hope(mixer=Titans(4, momentum=True, read="boundary")))
    names = [c.name for c in found[0].components if c.kind == "momentum"]
    assert names == [f"momentum of {m}" for m in ("M_k", "M_v", "M_η", "M_α", "M_mem")]


def test_gradients_of_a_linear_memory_with_dot_product_are_never_old():
    for layer in (gated_deltanet(16, 2, DeltaNet(8)), linear_attention(16, 2, Linear(8))):
        memory = parts(levels(layer))["M"]
        assert (memory.period, memory.gradient_period) == (1, 1)
    assert parts(levels(static_titans(16, 2, StaticTitans(8))))["M"].gradient_period == 8
    matrices = titans(chunk=8, depth=1)  # v̂ is read at the chunk's start
    assert parts(levels(matrices))["M_mem"].gradient_period == 8


def test_what_does_not_adapt_belongs_to_pretraining():
    found = parts(levels(titans(chunk=64, adapt=("k", "q")), tokens_per_step=64))
    assert found["M_v, never written"].kind == "weights"
    assert {"M_k", "M_q", "M_mem"} <= found.keys()
    assert not {"M_v", "M_η", "M_α"} & found.keys()


def test_a_nested_start_value_moves_when_the_slower_context_ends():
    found = parts(levels(ContinuumMemory(16, CMS, "nested")))
    assert found["start of CMS MLP 1"].period == 8
    assert "start of CMS MLP 2" not in found


def test_the_rules_are_named():
    found = parts(levels(hope(mixer=Titans(4, objective="l2"))))
    assert found["M_k"].objective == "½‖M(k) − v̂‖²"
    assert found["M_k"].rule == "delta rule (DGD), retention α"
    assert parts(levels(hope(mixer=Titans(4, objective="dot"))))["M_k"].objective == "−⟨M(k), v̂⟩"
    assert parts(levels(linear_attention(16, 2)))["M"].rule == "gradient descent"


# ------------------------------------------------------------------- what the model really does


def observed_periods(model, tokens=16):
    """The greatest common divisor of the times at which each component's readers see a change."""
    seen: dict[str, list[torch.Tensor]] = {}
    x, state = torch.randn(2, tokens, 16), None
    for t in range(tokens):
        with torch.no_grad():
            _, state = model(x[:, t : t + 1], state)
        for name, value in answering(model, state).items():
            seen.setdefault(name, []).append(value.clone())
    changes = {
        name: [t + 1 for t in range(1, tokens) if not torch.equal(values[t], values[t - 1])]
        for name, values in seen.items()
    }
    return {name: gcd(*times) for name, times in changes.items()}


def answering(layer, state):
    """The weights that each memory of the layer answers with."""
    if isinstance(layer, ContinuumMemory):
        known = {f"CMS MLP {i}": s.fast.start[0] for i, s in enumerate(state.levels, 1) if s}
        nested = {f"start of CMS MLP {i}": s for i, s in enumerate(state.levels, 1) if s}
        starts = {name: s.start[0] for name, s in nested.items() if s.start is not None}
        return known | starts
    if isinstance(layer, StaticProjections):
        read = layer.writer.read
        return {"M": (state.memory.now if read == "token" else state.memory.start)[0]}
    found = {}
    for (names, writer, _), fast in zip(layer.groups, state.memories):
        for g, name in enumerate(names):
            now = name == "mem" and writer.read == "token"
            found[SYMBOLS[name]] = (fast.now if now else fast.start)[0][:, :, g]
    return found


@pytest.mark.parametrize(
    "build",
    [
        titans,
        lambda: titans(chunk=2, projection_chunk=8, objective="l2"),
        lambda: titans(read="boundary", momentum=True),
        lambda: titans(adapt=("v", "q")),
        lambda: ContinuumMemory(16, CMS),
        lambda: ContinuumMemory(16, CMS, "nested"),
        lambda: static_titans(16, 2, StaticTitans(4)),
        lambda: gated_deltanet(16, 2, DeltaNet(4)),
    ],
    ids=["titans", "two-chunks", "boundary", "v-q", "cms", "nested", "static", "deltanet"],
)
def test_periods_are_those_of_the_stream(build):
    torch.manual_seed(0)
    layer = build()
    claimed = {
        c.name: c.period for c in parts(levels(layer)).values() if c.kind in ("memory", "start")
    }
    assert observed_periods(layer) == claimed


def values_of(node):
    """Values of a state that are not kept twice: of fast weights, those after the last token."""
    if isinstance(node, torch.Tensor):
        return node.numel()
    if hasattr(node, "now"):
        return values_of(node.now) + values_of(node.rule.momentum)
    return sum(map(values_of, node)) if isinstance(node, tuple) else 0


@pytest.mark.parametrize(
    "channel", [Continuum(CMS), Continuum(CMS, "nested"), SwiGLU()], ids=["cms", "nested", "mlp"]
)
@pytest.mark.parametrize(
    "mixer",
    [
        Titans(4),
        Titans(4, momentum=True),
        Titans(4, dgd=0.5),
        "attention",
        StaticTitans(4),
        DeltaNet(4),
        Linear(4),
    ],
    ids=["hope", "momentum", "half-dgd", "attention", "titans", "deltanet", "linear"],
)
def test_every_value_is_counted_once(mixer, channel):
    model = hope(mixer=mixer, channel=channel)
    found = parts(levels(model, tokens_per_step=64)).values()
    weights = [c for c in found if c.kind == "weights"]
    assert sum(c.parameters for c in weights) == model.parameter_count()
    assert "other weights" not in {c.name for c in weights}
    with torch.no_grad():
        _, state = model(torch.zeros(3, 5, dtype=torch.int64))
    held = sum(c.state_per_sample + 5 * c.state_per_token for c in found)
    assert 3 * held == values_of(state)


# ------------------------------------------------------------------------------------ showing


def shown(found, width=110):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render(found))
    return capture.get()


def test_the_table():
    text = shown(levels(hope(), tokens_per_step=64))
    assert "Level 1 · every token · of each sample" in text
    assert "Level 5 · every 64 tokens, an optimizer step · shared by all samples" in text
    row = next(line for line in text.splitlines() if line.startswith("M_k"))
    assert row.startswith("M_k, M_v, M_η, M_α ")
    size = sum(c.state_per_sample for c in parts(levels(hope())).values() if c.period == 4)
    assert f"{size:,}" in row
    assert "0–1" in row
    assert "∇ every 4 tokens" in " ".join(text.split())
    assert "never updated" in shown(levels(hope()))
    narrow = shown(levels(hope(), tokens_per_step=64), 80).splitlines()
    assert max(map(cell_len, narrow)) <= 80


def test_json_is_the_same():
    found = levels(hope(), tokens_per_step=64)
    data = json.loads(json.dumps(to_json(found)))
    assert [level["number"] for level in data] == [level.number for level in found]
    for level, read in zip(found, data):
        for component, fields in zip(level.components, read["components"], strict=True):
            assert fields.pop("frequency") == component.frequency
            assert Component(**{**fields, "blocks": tuple(fields["blocks"])}) == component


def test_attention_keeps_everything():
    cache = parts(levels(Attention(16, 2)))["keys and values"]
    assert (cache.period, cache.gradient_period, cache.state_per_token) == (1, None, 32)
    assert "32 a token" in shown(levels(Attention(16, 2)))


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match=r"optimizer='Lion': use one of .*AdamW"):
        levels(hope(), optimizer="Lion")
    with pytest.raises(ValueError, match=r"tokens_per_step=0: give batch × length"):
        levels(hope(), tokens_per_step=0)


# ------------------------------------------------------------------------------- optimizers


def test_m3_has_two_speeds():
    """Its fast momentum is faster than the weights, its slow one slower (eq. 75)."""
    model = hope()
    found = levels(model, tokens_per_step=64, optimizer=optim.M3(optim.groups(model), period=5))
    assert kinds(found)[-3:] == [(64, {"optimizer"}), (64, {"weights"}), (320, {"optimizer"})]
    own = {c.name: c for c in parts(found).values() if c.kind == "optimizer"}
    assert own.keys() == {
        "M3: fast momentum", "M3: slow momentum", "M3: first moment", "M3: second moment",
    }  # fmt: skip
    matrices, rest = own["M3: fast momentum"].parameters, own["M3: first moment"].parameters
    assert matrices + rest == model.parameter_count()
    assert own["M3: slow momentum"].gradient_period == 64
    text = shown(found)
    assert "every 320 tokens, 5 optimizer steps · shared by all samples" in text
    assert "every 64 tokens, an optimizer step" in text
    rules = {c.rule for c in found[-2].components}
    assert len(rules) == 2  # matrices, and what AdamW writes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_named_optimizer_declares_its_memories(name):
    model = hope()
    found = levels(model, tokens_per_step=64, optimizer=name)
    own = [c for c in parts(found).values() if c.kind == "optimizer"]
    assert all(c.name.startswith(f"{name}: ") and c.objective and c.rule for c in own)
    assert bool(own) == (name not in ("SGD", "DGD", "GGD"))
    weights = [c for level in found for c in level.components if c.kind == "weights"]
    assert sum(c.parameters for c in weights) == model.parameter_count()
    assert not any(m._forward_hooks for m in model.modules())  # DGD leaves none
    if name == "DGD":
        assert parts(found)["output head"].rule == "W ← W (I − η′ x xᵀ) − η′ δ xᵀ"


def test_an_optimizer_that_is_built_says_what_it_trains():
    model = hope()
    sgd = torch.optim.SGD(model.head.parameters(), momentum=0.9)
    found = parts(levels(model, tokens_per_step=64, optimizer=sgd))
    assert found["momentum: momentum m"].parameters == model.head.weight.numel()
    assert found["embedding"].period is None
    with pytest.raises(ValueError, match=r"optimizer='RMSprop': use one of .*M3"):
        levels(model, optimizer=torch.optim.RMSprop(model.parameters()))
