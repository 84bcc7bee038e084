"""The supervised loop: what it learns, when it ends, what it keeps."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from nestlearn import state as tree
from nestlearn.evals import IGNORED, Task, formal
from nestlearn.evals.tasks import padded
from nestlearn.experiments import fit as module
from nestlearn.experiments.cells import settled
from nestlearn.experiments.fit import FitConfig, fit
from nestlearn.experiments.models import CONTENDERS, build, parameter_count
from nestlearn.layers import Level
from nestlearn.models.hope import HopeLM


def levels(*chunks):
    return [asdict(Level(chunk=chunk)) for chunk in chunks]


FAST = FitConfig(steps=60, batch=8, lr=3e-2, warmup=5, eval_every=20, device="cpu")
SKELETON = {
    "dim": 32, "layers": 2, "heads": 2, "conv": 0, "rotary": False, "chunk": 8,
    "levels": levels(8, None),
}  # fmt: skip


def parts(number, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 4, n) for n in rng.integers(1, longest + 1, number)]
    return padded(rows, [(row + 1) % 4 for row in rows])


def successor(train=64):
    """Each token asks for the next number: any embedding learns it."""
    tests = {"short": parts(16, 1), "long": parts(16, 2, 20)}
    held = {"short": parts(16, 3), "long": parts(16, 4, 20)}
    return Task("toy", "successor", 4, 4, parts(train), tests, "sequence", validation=held)


def table(rows=4):
    torch.manual_seed(0)
    return nn.Embedding(rows, 4)


def test_it_learns_and_stops_when_all_that_is_held_out_is_met():
    told = []
    out = fit(table(), successor(), FAST, lambda *news: told.append(news))
    best = settled(out)
    assert best["scores"] == out["checks"][-1]["scores"] == {"short": 100, "long": 100}
    assert out["steps"] < 60
    assert out["steps"] % 20 == 0
    assert best["best_step"] == out["steps"]
    assert told[-1] == (out["steps"] / 60, "short 100.0 long 100.0")
    assert out["parameters"] == 16
    assert out["diverged"] is None
    assert best["value"] == 100


def test_validation_data_choose_the_checkpoint_whatever_the_test_says(monkeypatch):
    held, tested = [(10, 30), (60, 40), (50, 50), (20, 0)], [(9, 9), (1, 2), (70, 80), (99, 99)]
    told = iter(pair for both in zip(held, tested) for pair in both)
    monkeypatch.setattr(
        module, "_test", lambda *_: dict(zip(("short", "long"), map(float, next(told))))
    )
    out = fit(table(), successor(), replace(FAST, eval_every=15))
    best = settled(out)
    assert best["best_step"] == 30  # the sooner of two equal means
    assert best["value"] == 50
    assert best["scores"] == {"short": 1, "long": 2}
    assert [check["step"] for check in out["checks"]] == [15, 30, 45, 60]
    assert out["checks"][-1]["scores"] == {"short": 99, "long": 99}


def test_every_example_comes_once_an_epoch_and_lengths_keep_company():
    task = successor(200)
    task = replace(task, train=parts(200, longest=60))
    drawn = module._batches(task, FAST)
    epochs = [[next(drawn) for _ in range(25)] for _ in range(2)]  # two pools: 16 batches and 9

    def rows(batches):
        return sorted(
            tuple(row[:n].tolist()) for b in batches for row, n in zip(b.inputs, b.lengths)
        )

    assert rows(epochs[0]) == rows(epochs[1]) == rows([task.train])
    assert [b.inputs.shape for b in epochs[0]] != [b.inputs.shape for b in epochs[1]]
    area = sum(b.inputs.numel() for b in epochs[0])
    asked = sum(int((b.targets != IGNORED).sum()) for b in epochs[0])
    assert asked / area > 0.85  # at random it would be about a half


def test_the_seed_alone_decides():
    outs = [fit(table(), successor(), replace(FAST, seed=seed, steps=12)) for seed in (0, 0, 1)]
    curves = [out["checks"] for out in outs]
    assert curves[0] == curves[1] != curves[2]


def test_the_rate_rises_then_falls_along_a_cosine_or_stays():
    config = FitConfig(steps=110, warmup=10, lr=1.0)
    rates = [module._rate(config, step) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1, 1, 0.5, 0])
    flat = replace(config, schedule="constant")
    assert [module._rate(flat, step) for step in (4, 10, 109)] == [0.5, 1, 1]


class Explodes(nn.Module):
    """Fine for three calls, then not a number; or what a layer says that was given one."""

    def __init__(self, error=None):
        super().__init__()
        self.table, self.calls, self.error = table(), 0, error

    def forward(self, ids):
        self.calls += 1
        if self.calls > 3 and self.error:
            raise ValueError(self.error)
        return self.table(ids) * (float("nan") if self.calls > 3 else 1.0)


@pytest.mark.parametrize("error", [None, "x has NaN or infinity, first in sample 0"])
def test_divergence_is_a_result_not_an_exception(error):
    model = Explodes(error)
    out = fit(model, successor(), FAST)
    assert out["diverged"] == out["steps"] == 4
    assert settled(out)["scores"] == {"short": 0, "long": 0}
    assert model.table.weight.isfinite().all()  # the update was not made


def test_other_errors_stay_errors():
    with pytest.raises(ValueError, match="something else"):
        fit(Explodes("something else"), successor(), FAST)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"warmup": -1}, {"schedule": "step"}, {"clip": 0.0}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        FitConfig(**wrong)


def test_cuda_lengths_are_few_and_waste_little():
    shapes = {n: module._shape(n) for n in range(1, 601)}
    assert all(shape >= n for n, shape in shapes.items())
    assert all(shape < 1.5 * n + 1 for n, shape in shapes.items() if n > 16)
    assert len(set(shapes.values())) == 12


# -------------------------------------------------------------------------------- the contenders


@pytest.mark.parametrize("conv", [0, 4])
def test_contenders_have_hopes_parameters(conv):
    skeleton = {**SKELETON, "dim": 64, "heads": 4, "conv": conv, "levels": levels(8, 16, None)}
    with torch.device("meta"):
        made = {name: build(name, 16, skeleton) for name in CONTENDERS}
    counts = {name: model.parameter_count() for name, model in made.items()}
    for name, model in made.items():
        if isinstance(model, HopeLM):
            assert parameter_count(model.config) == counts[name], name
    assert {n: c for n, c in counts.items() if abs(c / counts["hope"] - 1) > 0.1} == {}


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_are_causal_and_differ(name):
    torch.manual_seed(0)
    model = build(name, 4, SKELETON).eval()
    ids = torch.randint(0, 4, (2, 20))
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % 4
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    assert before.shape == (2, 20, 4)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-5)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-4


def test_without_positions_a_transformer_sees_a_constant_stream_as_one_token():
    model = build("transformer", 2, SKELETON).eval()
    out = model(torch.zeros(1, 30, dtype=torch.int64))[0]
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    placed = build("transformer", 2, {**SKELETON, "rotary": True}).eval()
    ids = torch.randint(0, 2, (1, 30))
    assert (placed(ids)[0][:, -1] - placed(ids.roll(1, 1))[0][:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "lowest"), [("deltanet", 0.0), ("deltanet-negative", -1.0), ("deltanet-gated", -1.0)]
)
def test_deltanets_turn_what_they_hold_as_far_as_their_steps_allow(name, lowest):
    """With v = 0 and the gates pushed to their ends, a write turns W k into λ W k, λ the lowest."""
    mixer = build(name, 4, SKELETON).blocks[0].mixer
    with torch.no_grad():
        mixer.qkv.weight[64:] = 0  # no values
        mixer.gates.bias[:2], mixer.gates.bias[2:] = 30.0, -30.0  # η at its bound, α (if any) at 0
        x = torch.randn(1, 1, 32)
        state = mixer.init_state(1)
        _, k, _ = mixer.qkv(x).view(1, 1, 3, 2, 16).unbind(2)
        k = torch.nn.functional.normalize(k, dim=-1).transpose(1, 2)  # [1, H, 1, K]
        W = torch.randn(1, 2, 16, 1) @ k
        held = tree.tree_map(lambda w: W.clone() if w.shape == W.shape else w, state)
        _, after = mixer(x, held)
    for w in after.memory.now:
        torch.testing.assert_close(w, lowest * W, rtol=0, atol=1e-4)


def test_an_unknown_contender_or_field_is_refused():
    with pytest.raises(ValueError, match="model 'mamba' is unknown: use one of hope,"):
        build("mamba", 4, SKELETON)
    with pytest.raises(ValueError, match=r"unknown fields \['width'\]"):
        build("hope", 4, {"width": 3})


def test_an_lstm_learns_parity_beyond_its_lengths():
    torch.manual_seed(0)
    task = formal.task("parity", train=600, test=30)
    out = fit(build("lstm", 2, SKELETON), task, FitConfig(steps=250, lr=1e-2, eval_every=50))
    assert settled(out)["scores"] == {"bin0": 100, "bin1": 100}
