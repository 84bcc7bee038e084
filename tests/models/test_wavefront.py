"""Blocks side by side compute what blocks one after the other do."""

import pytest
import torch

from nestlearn import HopeConfig, HopeLM, Level, state
from nestlearn.models.wavefront import PART, _plain, fits, wavefront
from nestlearn.options import Continuum, Titans

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


@pytest.mark.parametrize("part", [1, 5, 8, 40])
def test_parts_in_turn_equal_the_whole(part):
    torch.manual_seed(0)
    lm = HopeLM(SMALL).double()
    x, begin = torch.randn(2, 21, 8).double(), lm.init_state(2)

    def whole(x):
        states = []
        for block, before in zip(lm.blocks, begin.blocks):
            x, after = block(x, before)
            states.append(after)
        return x, states

    found = _read(lambda x: wavefront(lm.blocks, x, begin.blocks, part), x, lm)
    for mine, expected in zip(found, _read(whole, x, lm), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_what_hooks_on_to_a_block_is_seen():
    lm = HopeLM(SMALL)
    assert all(map(_plain, lm.blocks))
    lm.blocks[0].register_forward_pre_hook(lambda *_: None)
    lm.blocks[1].forward = lm.blocks[1].forward  # as offloading does
    assert list(map(_plain, lm.blocks)) == [False, False, True]
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
