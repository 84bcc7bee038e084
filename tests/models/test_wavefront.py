"""Blocks side by side compute what blocks one after the other do."""

from dataclasses import replace

import pytest
import torch

from nestlearn import HopeConfig, HopeLM, Level, state
from nestlearn.layers import SelfModifyingTitans, continuum
from nestlearn.models.hope import HopeState
from nestlearn.models.wavefront import PART, _plain, fits, wavefront
from nestlearn.options import Continuum, DeltaNet, SwiGLU, Titans
from nestlearn.scan import generated, spans

SMALL = HopeConfig(
    vocab_size=16, dim=8, layers=3, heads=2, mixer=Titans(chunk=4),
    channel=Continuum((Level(chunk=2), Level(chunk=8))),
)  # fmt: skip


def _read(read, x, lm):
    for p in lm.parameters():
        p.grad = None
    x = x.clone().requires_grad_()
    y, after = read(x)
    (y.sin().sum() + sum(s.double().sum() for _, s in state.leaves(after) if _float(s))).backward()
    return [y, *(s for _, s in state.leaves(after) if _float(s)), x.grad] + [
        p.grad for p in lm.blocks.parameters()
    ]


def _float(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _equals_the_whole(lm, part, x, groups=None):
    begin = lm.init_state(len(x))

    def whole(x):
        states = []
        for block, before in zip(lm.blocks, begin.blocks):
            x, after = block(x, before)
            states.append(after)
        return x, states

    found = _read(lambda x: wavefront(lm.blocks, x, begin.blocks, part, groups), x, lm)
    for mine, expected in zip(found, _read(whole, x, lm), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("part", "groups"), [(1, 2), (5, 1), (5, 3), (8, 2), (40, 1)])
def test_parts_in_turn_equal_the_whole(part, groups):
    torch.manual_seed(0)
    _equals_the_whole(HopeLM(SMALL).double(), part, torch.randn(2, 13, 8).double(), groups)


CHANNELS = {
    "sequential": Continuum((Level(chunk=2), Level(chunk=8, rule="gd", objective="dot"), Level())),
    "independent": Continuum((Level(chunk=2, half_life=20), Level(chunk=4)), "independent"),
    "nested": Continuum((Level(chunk=2), Level(chunk=8)), "nested"),
    "all matrices": Continuum((Level(chunk=4, learns="all"),)),
    "momentum": Continuum((Level(chunk=4, rule="momentum"),)),
    "static": SwiGLU(),
}


MIXERS = [Titans(chunk=4, half_life=None), Titans(chunk=4, half_life=64), DeltaNet()]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("channel", CHANNELS)
def test_blocks_of_a_wave_run_as_one(channel, mixer, monkeypatch):
    """As many samples at a time as blocks, where their chunks can be joined."""
    monkeypatch.setattr(continuum, "SELDOM", 8)
    torch.manual_seed(0)
    lm = HopeLM(replace(SMALL, mixer=mixer, channel=CHANNELS[channel])).double()
    rows: dict = {"levels": set(), "memories": set()}

    def seen(kind, f):
        def call(*args, **options):
            rows[kind].add(len(args[3]))
            return f(*args, **options)

        return call

    monkeypatch.setattr(spans.Spans, "apply", seen("levels", spans.Spans.apply))
    monkeypatch.setattr(generated, "run", seen("memories", generated.run))
    _equals_the_whole(lm, 16, torch.randn(2, 2 * 16 + 5, 8).double())
    if isinstance(mixer, Titans):
        assert rows["memories"] == {2, 4}
    if channel in ("sequential", "independent"):
        assert rows["levels"] == {2, 4}


def test_what_parts_need_of_parameters_is_made_once(monkeypatch):
    lm, made = HopeLM(SMALL).double(), []
    before = SelfModifyingTitans._starts
    monkeypatch.setattr(
        SelfModifyingTitans, "_starts", lambda self, *a: made.append(self) or before(self, *a)
    )
    for _ in range(2):  # of a call: the next one has other weights
        wavefront(lm.blocks, torch.randn(1, 24, 8).double(), lm.init_state(1).blocks, 8)
    assert made == 2 * [block.mixer for block in lm.blocks]


def test_what_cannot_be_joined_runs_alone(monkeypatch):
    """A cut gradient, a stream that begins inside a chunk."""
    monkeypatch.setattr(continuum, "SELDOM", 8)
    torch.manual_seed(0)
    _equals_the_whole(
        HopeLM(replace(SMALL, truncate=8)).double(), 16, torch.randn(1, 37, 8).double()
    )
    lm = HopeLM(SMALL).double()
    x = torch.randn(1, 3 + 37, 8).double()
    begun = [state.detach(block(x[:, :3])[1]) for block in lm.blocks]
    monkeypatch.setattr(lm, "init_state", lambda _: HopeState(tuple(begun)))
    _equals_the_whole(lm, 16, x[:, 3:].detach())


def test_what_hooks_on_to_a_block_is_seen():
    lm = HopeLM(SMALL)
    assert all(map(_plain, lm.blocks))
    lm.blocks[0].register_forward_pre_hook(lambda *_: None)
    lm.blocks[1].forward = lm.blocks[1].forward  # as offloading does
    assert list(map(_plain, lm.blocks)) == [False, False, True]
    lm.blocks[2].channel.mlps[1].register_forward_hook(lambda *_: None)
    assert not _plain(lm.blocks[2])
    assert not fits(lm.blocks, torch.zeros(1, 3 * PART, 8), 2)  # not on a card


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_a_captured_step_of_one_long_sample_equals_one_that_is_not():
    torch.manual_seed(0)
    lm = HopeLM(HopeConfig(vocab_size=16, dim=64, layers=3, heads=2)).cuda()
    ids = torch.randint(16, (1, 2 * PART + 100), device="cuda")

    def step():
        lm.zero_grad()
        lm(ids)[0].square().mean().backward()
        return [p.grad for p in lm.parameters()]

    expected = [g.clone() for g in step()]  # block after block
    lm.side_by_side = True
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):  # memory that was given away too soon shows from the second on
        graph.replay()
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
