"""The four laws, for every layer, variant and model: causality, streaming, isolation, state."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from nestlearn import HopeConfig, HopeLM, Level, options, state
from nestlearn.layers import (
    Attention,
    ContinuumMemory,
    SelfModifyingTitans,
    gated_deltanet,
    linear_attention,
    static_titans,
)

D, H, B, T = 16, 2, 3, 21
FAST = [Level(chunk=2), Level(chunk=6), Level()]
ALL = [replace(level, learns="all") for level in FAST]


def titans(backend="auto", remat=False, **changes):
    own = options.Titans(**{"chunk": 4, "depth": 2, "half_life": None, **changes})
    return SelfModifyingTitans(D, H, own, backend=backend, remat=remat)


def cms(variant="sequential", levels=FAST, **options):
    return ContinuumMemory(D, levels, variant, **options)


def hope(**changes):
    config = HopeConfig(11, D, 2, H, options.Titans(4), options.Continuum(tuple(FAST)))
    return HopeLM(replace(config, **changes))


def block(**changes):
    """A model of one block: that one hears another is held by the others."""
    return hope(layers=1, **changes)


LAYERS = {
    "titans": titans,
    "titans-l2": lambda: titans(objective="l2"),
    "titans-boundary": lambda: titans(read="boundary"),
    "titans-momentum": lambda: titans(momentum=True),
    "titans-matrix": lambda: titans(depth=1),
    "titans-deep": lambda: titans(depth=3, hidden=5),
    "titans-gd": lambda: titans(dgd=False, weight_decay=False),
    "titans-half-gd": lambda: titans(dgd=0.5, projection_chunk=6),
    "titans-eta2": lambda: titans(eta_max=2.0, objective="l2"),
    "titans-two-chunks": lambda: titans(projection_chunk=6),
    "titans-fast-projections": lambda: titans(chunk=8, projection_chunk=1),
    "titans-chunk-1": lambda: titans(chunk=1),
    "titans-all-adapt": lambda: titans(adapt=("k", "v", "eta", "alpha", "q")),
    "titans-none-adapts": lambda: titans(adapt=()),
    "titans-only-v": lambda: titans(adapt=("v",), conv=0),
    "titans-free": lambda: titans(bound=None),
    "titans-half-life": lambda: titans(half_life=10, projection_chunk=6),
    "titans-half-life-seldom": lambda: titans(half_life=32, depth=1),
    "cms-half-life": lambda: cms(levels=[Level(chunk=2, half_life=5), Level(chunk=6)]),
    "titans-naive": lambda: titans(backend="naive"),
    "titans-remat": lambda: titans(remat=True),
    "cms-sequential": cms,
    "cms-all": lambda: cms(levels=ALL),
    "cms-all-nested": lambda: cms("nested", ALL),
    "cms-all-momentum": lambda: cms(levels=[replace(ALL[0], rule="momentum", lr=0.05)]),
    "cms-half-life-momentum": lambda: cms(
        levels=[Level(chunk=2, half_life=5, rule="momentum", lr=0.05)]
    ),
    "cms-nested": lambda: cms("nested"),
    "cms-nested-momentum": lambda: cms(
        "nested", [Level(chunk=2, rule="momentum", lr=0.05), Level(chunk=6)]
    ),
    "cms-independent": lambda: cms("independent"),
    "cms-gd": lambda: cms(levels=[Level(chunk=4, rule="gd", lr=0.05)]),
    "cms-momentum": lambda: cms(levels=[Level(chunk=4, rule="momentum", lr=0.05)]),
    "cms-dot": lambda: cms(levels=[Level(chunk=4, objective="dot")]),
    "cms-chunk-1": lambda: cms(levels=[Level(chunk=1)]),
    "cms-first-order": lambda: cms(meta_gradient="first-order"),
    "cms-remat": lambda: cms(remat=True),
    "attention": lambda: Attention(D, H),
    "attention-window": lambda: Attention(D, H, window=5),
    "attention-sinks": lambda: Attention(D, H, conv=4, gate=True, window=5, sinks=3),
    "attention-skeleton": lambda: Attention(D, H, conv=4, gate=True, rotary=False),
    "static-titans": lambda: static_titans(D, H, options.StaticTitans(4)),
    "deltanet": lambda: gated_deltanet(D, H, options.DeltaNet(4)),
    "deltanet-eta2": lambda: gated_deltanet(D, H, options.DeltaNet(4, eta_max=2.0)),
    "linear": lambda: linear_attention(D, H, options.Linear(4)),
    "hope": hope,
    "hope-attention": lambda: hope(mixer="attention"),
    "lm-attention": lambda: hope(mixer="attention", channel="mlp"),
    "hope-nested": lambda: block(channel=options.Continuum(tuple(FAST), "nested")),
    "lm-titans": lambda: block(mixer=options.StaticTitans(4), channel="mlp"),
    "lm-deltanet": lambda: block(mixer=options.DeltaNet(4)),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def make(build):
    """The layer in float64 with its steps made large, so that writes matter; and its input."""
    torch.manual_seed(0)
    layer = build().double()
    for name, p in layer.named_parameters():
        if name.endswith("eta.bias"):
            torch.nn.init.constant_(p, 0.0)
        if name.endswith(("gate", "meta_lr")) and p.ndim < 2:
            torch.nn.init.normal_(p, 0.3, 0.1)
    if isinstance(layer, HopeLM):
        return layer, torch.randint(0, 11, (B, T))
    return layer, torch.randn(B, T, D, dtype=torch.float64)


def build_id(build):
    return next(name for name, b in LAYERS.items() if b is build)


def changed(x, t):
    """x with another token at position t."""
    y = x.clone()
    y[:, t] = (y[:, t] + 1) % 11 if x.dtype == torch.int64 else y[:, t] + 1.0
    return y


def equal_states(a, b, tolerance=TOLERANCE):
    pairs = list(zip(state.leaves(a), state.leaves(b), strict=True))
    for (path, x), (other, y) in pairs:
        assert path == other
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, **tolerance, msg=lambda m, p=path: f"{p}: {m}")
        else:
            assert x == y, path


@every_layer
def test_causality(build):
    """Streams changed at different places are rows of one batch, which do not know each other."""
    layer, x = make(build)
    y, _ = layer(x)
    places = range(0, T, 5)
    rows, _ = layer(torch.cat([changed(x, t) for t in places]))
    for t, z in zip(places, rows.split(B), strict=True):
        torch.testing.assert_close(z[:, :t], y[:, :t], **TOLERANCE)
        assert (z[:, t] - y[:, t]).abs().max() > 1e-6  # and it does read its own token


@every_layer
def test_streaming(build):
    layer, x = make(build)
    y, final = layer(x)
    splits = [[T // 2], range(1, T)]
    splits += [sorted(random.Random(i).sample(range(1, T), 3)) for i in range(3)]
    for cuts in splits:
        carried, pieces = None, []
        for a, b in itertools.pairwise([0, *cuts, T]):
            out, carried = layer(x[:, a:b], carried)
            pieces.append(out)
        torch.testing.assert_close(torch.cat(pieces, 1), y, **TOLERANCE)
        equal_states(carried, final)


@every_layer
def test_isolation(build):
    layer, x = make(build)
    y, final = layer(x)
    alone, one = layer(x[1:2])
    torch.testing.assert_close(y[1:2], alone, **TOLERANCE)
    equal_states(state.select(final, [1]), one)
    poisoned = changed(x, 3)
    poisoned[1] = x[1]
    torch.testing.assert_close(layer(poisoned)[0][1], y[1], rtol=0, atol=0)


@every_layer
def test_state_is_data(build, tmp_path):
    layer, x = make(build)
    _, half = layer(x[:, :10])
    expected, end = layer(x[:, 10:], half)
    state.save(half, tmp_path / "state.safetensors")
    loaded = state.load(tmp_path / "state.safetensors", like=half)
    if "attention" not in build_id(build):  # a cache has no fixed shape
        template = layer.init_state(B)
        equal_states(state.load(tmp_path / "state.safetensors", like=template), loaded)
    out, after = layer(x[:, 10:], loaded)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    equal_states(after, end, {"rtol": 0, "atol": 0})

    rows = [2, 0, 0]
    out, _ = layer(x[rows, 10:], state.select(half, rows))
    torch.testing.assert_close(out, expected[rows], **TOLERANCE)
    joined = state.concat([state.select(half, [0]), state.select(half, [1, 2])])
    torch.testing.assert_close(layer(x[:, 10:], joined)[0], expected, **TOLERANCE)
    assert not any(
        leaf.requires_grad
        for _, leaf in state.leaves(state.detach(half))
        if isinstance(leaf, torch.Tensor)
    )


@every_layer
def test_the_outer_gradient_reaches_every_parameter(build):
    layer, x = make(build)
    y, _ = layer(x)
    loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum()
    loss.backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(p.grad).all(), name
        if name.endswith("embed.weight"):
            continue
        if ".start." in name or name.startswith("start."):  # every head of every memory
            parts = p.grad.flatten(1 if p.ndim == 3 else 0).abs().sum(-1)
            assert (parts > 0).all(), f"{name} has a zero gradient"
        assert p.grad.abs().sum() > 0, f"{name} has a zero gradient"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "cms-first-order"])  # by definition
def test_gradients_are_those_of_finite_differences(name):
    """Nothing is detached on the way: every parameter, in a random direction. Of a model's two
    blocks those of the first, whose gradients come through the second.
    """
    build = LAYERS[name]
    layer, x = make(build)
    x = x[:2, :13]  # past 12, where chunks of all sizes and the half-lives' pauses have ended
    weight = torch.randn(layer(x)[0].shape, dtype=torch.float64)

    def loss():
        return (layer(x)[0] * weight).sum()

    named = [(n, p) for n, p in layer.named_parameters() if not n.startswith("blocks.1.")]
    names, parameters = zip(*named)
    here, step = loss(), 1e-7  # one-sided: of float64's digits enough are left, at half the work
    for name, p, grad in zip(names, parameters, torch.autograd.grad(here, parameters)):
        direction = torch.randn_like(p)
        with torch.no_grad():
            before = p.clone()
            p.add_(step * direction)
            numeric = (loss() - here) / step
            p.copy_(before)
        exact = (grad * direction).sum()
        torch.testing.assert_close(
            numeric, exact, rtol=1e-4, atol=1e-5, msg=f"{name}: {numeric}, {exact}"
        )


@every_layer
def test_a_state_does_not_hang_on_the_parameters(build):
    """An optimizer's step between two calls leaves what was learned alone."""
    layer, x = make(build)
    _, short = layer(x[:, :1])
    short = state.detach(short)
    before = [t.clone() for _, t in state.leaves(short) if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    after = [t for _, t in state.leaves(short) if isinstance(t, torch.Tensor)]
    for a, b in zip(before, after):
        assert torch.equal(a, b)


@every_layer
def test_a_state_of_another_shape_is_refused(build):
    layer, x = make(build)
    _, mine = layer(x)
    with pytest.raises(ValueError, match="state is"):
        layer(x, 3)
    with pytest.raises(ValueError, match=r"has 2 rows for 3 samples.*select"):
        layer(x, state.select(mine, [0, 1]))
    foreign = layer.init_state(B)
    if isinstance(layer, HopeLM):
        foreign = foreign._replace(blocks=foreign.blocks[:-1])
    else:
        foreign = {
            "position": lambda s: s._replace(conv=torch.zeros(B, D, 9)),
            "levels": lambda s: s._replace(levels=s.levels[:-1]),
        }["levels" if "levels" in foreign._fields else "position"](foreign)
    with pytest.raises(ValueError, match="another"):
        layer(x, foreign)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (titans(adapt=("k", "v")), titans(adapt=("v",))),
        (titans(depth=3), titans(depth=2)),
        (titans(depth=2), titans(depth=1)),
        (titans(momentum=True), titans()),
        (titans(), titans(momentum=True)),
        (titans(conv=0), titans()),
        (cms(), cms("nested")),
        (cms(), cms(levels=FAST[:1])),
        (cms(), titans()),
        (titans(), static_titans(D, H)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_state_of_another_configuration_is_refused(one, other):
    x = torch.randn(B, 5, D)
    with pytest.raises(ValueError, match="another layer or configuration"):
        other(x, one(x)[1])


@pytest.mark.parametrize(
    "build", [titans, cms, lambda: static_titans(D, H), lambda: gated_deltanet(D, H)]
)
def test_truncation_changes_gradients_only_and_zero_tokens_are_finite_in_float16(build):
    x, gradients = torch.randn(B, T, D, dtype=torch.float64), []
    for reach in (None, 4):
        torch.manual_seed(0)
        layer = build().double()
        for module in layer.modules():
            if hasattr(module, "truncate"):
                module.truncate = reach
        y, _ = layer(x)
        y.square().sum().backward()
        gradients.append((y.detach(), torch.cat([p.grad.flatten() for p in layer.parameters()])))
    (y, full), (z, cut) = gradients
    torch.testing.assert_close(y, z, **TOLERANCE)
    assert (full - cut).abs().max() > 1e-6
    assert torch.isfinite(build().half()(torch.zeros(1, 9, D, dtype=torch.float16))[0]).all()


@every_layer
def test_bad_input_is_refused_by_name(build):
    layer, x = make(build)
    if isinstance(layer, HopeLM):
        with pytest.raises(ValueError, match="token id 11 is outside the vocabulary of 11"):
            layer(torch.full((1, 3), 11))
        with pytest.raises(ValueError, match="token id -1"):
            layer(torch.full((1, 3), -1))
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            layer(x[0, :3])
    else:
        with pytest.raises(ValueError, match=r"\(3, 21, 15\)"):
            layer(x[..., :-1])
        with pytest.raises(ValueError, match=r"dtype torch\.int64"):
            layer(x.long())
        with pytest.raises(ValueError, match=r"float64 and the .* torch\.float32: give x\.to"):
            layer.float()(x.double())
        layer.double()
        broken = x.clone()
        broken[1, 5, 0] = float("nan")
        with pytest.raises(ValueError, match=r"NaN.*sample 1.*token 5"):
            layer(broken)
    with pytest.raises(ValueError, match=r"T = 0|tokens ≥ 1"):
        layer(x[:, :0])


def test_a_window_that_reaches_all_is_no_window():
    torch.manual_seed(0)
    plain = Attention(D, H, conv=4, gate=True)
    x = torch.randn(2, T, D)
    for sinks in (0, 3):
        wide = Attention(D, H, conv=4, gate=True, window=T, sinks=sinks)
        wide.load_state_dict(plain.state_dict())
        torch.testing.assert_close(wide(x)[0], plain(x)[0], atol=1e-5, rtol=1e-5)


def test_a_window_sees_so_many_and_the_sinks_and_keeps_no_more():
    torch.manual_seed(0)
    layer = Attention(D, H, window=4, sinks=2)
    x = torch.randn(1, 40, D)
    y, state = layer(x)
    assert state.k.shape[2] == 2 + 3
    for place, seen in ((0, True), (1, True), (10, False), (35, False), (36, True), (39, True)):
        other = x.clone()
        other[:, place] += 1
        assert bool((layer(other)[0][:, 39] - y[:, 39]).abs().max() > 1e-6) == seen
