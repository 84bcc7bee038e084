"""100,000 tokens: no memory vanishes, explodes or turns into NaN."""

import math
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nestlearn import HopeConfig, HopeLM, Level, SelfModifyingTitans, state
from nestlearn.options import Continuum, Titans

pytestmark = pytest.mark.usefixtures("unchecked")
N, PIECE = 100_352, 3584  # tokens: multiples of 512, where every bound has just acted
ROUNDING = 1e-2  # of a norm in bfloat16
CONFIG = HopeConfig(
    256,
    16,
    layers=1,
    heads=2,
    mixer=Titans(64),
    channel=Continuum((Level(chunk=16), Level(chunk=64), Level())),
)


@pytest.fixture(scope="module")
def text():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = b"".join(f.read_bytes() for f in files)[:N]
    assert len(data) == N
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


@pytest.fixture(scope="module")
def trained(text):
    """A few dozen steps at a high rate, from which the gates have moved."""
    torch.manual_seed(0)
    model = HopeLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for step in range(60):
        at = torch.randint(0, N - 129, (8,), generator=torch.Generator().manual_seed(step))
        ids = torch.stack([text[i : i + 129] for i in at])
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        first = first or float(loss.detach())
    assert float(loss.detach()) < 0.6 * first
    return model


def norms(states):
    """Frobenius norm of every memory matrix, by path: [B, ...]."""
    return {
        path: leaf.float().norm(dim=(-2, -1))
        for path, leaf in state.leaves(states)
        if isinstance(leaf, torch.Tensor) and ".start." in f".{path}."
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["untrained", "trained", "two rules, both matrices"])
def test_memories_keep_their_size(kind, dtype, text, trained):
    torch.manual_seed(0)
    config, groups, matrices = CONFIG, 1, 1
    if kind == "two rules, both matrices":
        levels = tuple(replace(level, learns="all") for level in CONFIG.channel.levels)
        mixer = Titans(64, depth=2, dgd=0.5, eta_max=2.0)
        config, groups, matrices = replace(CONFIG, mixer=mixer, channel=Continuum(levels)), 2, 2
    model = HopeLM(config)
    if kind == "trained":
        model.load_state_dict(trained.state_dict())
    model = model.to(dtype).eval()
    noise = torch.randint(0, 256, (N,), generator=torch.Generator().manual_seed(1))
    ids = torch.stack([text, noise])
    first = norms(tuple((b.mixer.init_state(2), b.channel.init_state(2)) for b in model.blocks))
    assert len(first) == matrices * (
        groups + len(config.channel.levels) - 1
    )  # of each stack and level
    carried = None
    with torch.inference_mode():
        for a in range(0, N, PIECE):
            logits, carried = model(ids[:, a : a + PIECE], carried)
            assert torch.isfinite(logits).all(), a
            for path, norm in norms(carried.blocks).items():
                ratio, high = norm / first[path], 1.0 if path.startswith("0.0.") else 2.0
                assert ratio.min() > 0.25 * (1 - ROUNDING), (path, a, ratio.min())
                assert ratio.max() < high * (1 + ROUNDING), (path, a, ratio.max())


def trace(retention):
    """How much the answer after 64 chunks still depends on the first chunk; Titans alone."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(
        32,
        2,
        Titans(depth=2, half_life=None, bound=None),  # a shell would hide the fading
    ).double()
    if retention is not None:
        torch.nn.init.constant_(layer.alpha.bias, math.log(retention / (1 - retention)))
        torch.nn.init.zeros_(layer.alpha.weight)
    rest = torch.randn(1, 64 * 64, 32, dtype=torch.float64)
    with torch.no_grad():
        first, second = (
            layer(torch.cat([torch.randn(1, 64, 32, dtype=torch.float64), rest], 1))[0][:, -1]
            for _ in range(2)
        )
    return float((first - second).norm() / first.norm())


def test_an_untrained_memory_still_remembers_after_many_chunks():
    assert trace(None) > 1e-3
    assert trace(0.98) < 1e-6  # the measure would see a memory that fades


@pytest.mark.parametrize("length", [128, 1024])
def test_the_outer_gradient_does_not_explode_with_length(length):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 2, Titans(16, depth=2, half_life=None))
    y, _ = layer(torch.randn(2, length, 32))
    (y * torch.randn_like(y)).sum().div(length**0.5).backward()
    norms = {n: float(p.grad.norm()) for n, p in layer.named_parameters()}
    assert max(norms.values()) < 1e3, norms
