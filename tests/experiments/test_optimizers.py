"""The experiments with optimizers: their instruments, and a small run of each."""

import math

import pytest
import torch

from nestlearn import optim
from nestlearn.evals import read_records
from nestlearn.experiments import fig4, fig11, fig12, orthogonal_tasks, runner, update_size
from nestlearn.experiments.experiment import Experiment
from nestlearn.experiments.tables import RATE, SEEDS, mean, metric, model
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.train import Corpus, TrainConfig, load_text, train


def written(folder):
    return read_records(folder / "results.json")


def test_fig4_tunes_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(fig4, "METHODS", dict(list(fig4.METHODS.items())[:2]))
    monkeypatch.setattr(fig4, "LANDSCAPES", ((0.1, 0.5, 1.0),))
    text = runner.run("fig4", tmp_path, quick=True, workers=0)
    assert text.count("0.1, 0.5, 1") == 2
    names = {"results.json", "table.md", "fig4.png", "cells"}
    assert {p.name for p in tmp_path.iterdir()} == names
    for record in written(tmp_path):
        best = record.detail["chosen"]
        path = torch.tensor(best["path"])
        values = fig4.psi(path, record.config["landscape"])
        assert (values[best["steps"] :] < fig4.REACHED).all()
        assert values[best["steps"] - 1] >= fig4.REACHED
    origin = torch.zeros(2)
    assert fig4.psi(origin, (3.0, 1.0, 2.0)) == 0
    start = torch.tensor(fig4.START)
    by_hand = 3.5**2 + 3 * (-3.5 - 2 + 0.5 * math.sin(-3.5 * 2)) ** 2
    assert float(fig4.psi(start, (3.0, 0.5, 2.0))) == pytest.approx(by_hand)


def test_fig11_trains_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fig11, "GRIDS", {"M3": (1e-3, 1e-2, 3e-2, 0.1)})
    runner.run("fig11", tmp_path, quick=True, workers=0)
    records = written(tmp_path)
    assert {r.model for r in records} == {"M3"}
    left = [r.detail for r in records if r.detail]
    assert len(left) == 2
    assert all(detail["train_loss"] < 2.3 for detail in left)  # ln 10 is chance
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 4
    before = [c.stat().st_mtime_ns for c in cells]
    runner.run("fig11", tmp_path, quick=True, workers=0)
    assert [c.stat().st_mtime_ns for c in cells] == before
    assert written(tmp_path) == records
    with pytest.raises(ValueError, match=r"torchvision"):
        fig11.load(str(tmp_path), "CIFAR10")


def test_tuning_takes_the_best_and_says_where_it_stood(tmp_path):
    grids = {"A": (0.01, 0.1, 10.0), "B": (0.1, 1.0, 10.0)}

    def work(cell, tell):
        if cell["lr"] > 1:
            raise FloatingPointError("diverged")
        loss = abs(cell["lr"] - (0.1 if cell["model"] == "A" else 0.03)) + cell["seed"]
        return {"value": -loss, "scores": {"loss": loss}}

    def tuned(name, grids, out):
        about = Experiment(
            name=name, shows="", price=("", ""), work=work, rates=lambda cell: grids[cell["model"]],
            grid=lambda asked: [{"task": "t", "model": m} for m in grids], search=(0, 1), seeds=3,
            columns=lambda _: [model(), RATE, SEEDS, mean("loss", metric("loss"), digits=2)],
        )  # fmt: skip
        return runner.run(about, out, workers=0)

    text = tuned("fig4", grids, tmp_path)
    assert "| A | 0.1 | 3 | 1.00 ± 1.00 |" in text
    assert "| B | 0.1 (end of grid) | 3 | 1.07 ± 1.00 |" in text
    assert "the best of 3 by validation data (seed 0, 1)" in text
    with pytest.raises(ValueError, match=r"D did not end a training at \[10\.0, 20\.0\]"):
        tuned("fig4", {"D": (10.0, 20.0)}, tmp_path)


def test_fig12_counts_windows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(fig12, "SIZES", {"5": (16, 2)})
    runner.run("fig12", tmp_path, quick=True)
    rows = {r.model: r.detail for r in written(tmp_path)}
    assert set(rows) == set(fig12.CONTESTANTS)
    reference = rows[fig12.REFERENCE]
    assert reference["ratios"] == [1.0] * 3
    more = rows["M3"]["state_bytes_per_parameter"] - reference["state_bytes_per_parameter"]
    assert 4 <= more < 4.1  # one copy and a few numbers
    with pytest.raises(ValueError, match="use"):
        runner.run("fig12", tmp_path, only=("7",), steps=2)


def test_the_trace_of_momentum_is_its_power():
    curve = orthogonal_tasks.trace("Momentum 0.9", steps=40, noise=0.0)
    for t, value in enumerate(curve):  # a Aᵗ beside what B has added
        a, b = 10 * 0.9 ** (t + 1), 10 * (1 - 0.9 ** (t + 1))
        assert value == pytest.approx(a / math.hypot(a, b), abs=0.02)
    assert orthogonal_tasks.steps_to([1.0, 0.5, 0.2, 0.05, 0.01]) == 3
    slow = orthogonal_tasks.trace("M3, α = 1", steps=60, noise=0.05)
    fast = orthogonal_tasks.trace("Muon", steps=60, noise=0.05)
    assert slow[-1] > fast[-1]


def test_orthogonal_tasks_run(tmp_path):
    cell = {"model": "M3", "lr": 0.01, "seed": 0, "steps": 40}
    result = orthogonal_tasks.work(cell, lambda share, text: None)
    assert result["scores"]["of A after B"] > result["scores"]["loss of A, learnt"]
    assert 0 < result["relearn"] <= 40


def test_update_sizes_of_normal_gradients():
    muon, m3, literal = (
        update_size.sizes(name, 60, "normal gradients") for name in ("Muon", "M3", "M3, literal")
    )
    assert all(0.99 < a / b < 1.01 for a, b in zip(m3, muon))
    assert literal[-1] < 0.01 * literal[0]


def test_training_takes_an_optimizer_and_resumes_with_it(tmp_path):
    """`train` with M3 stopped after 3 of 6 steps goes on bit for bit, and not with another."""
    path = tmp_path / "text.txt"
    path.write_text("what follows what, and what follows that?\n" * 60)
    corpus: Corpus = load_text([path])
    base = {"batch": 2, "length": 16, "warmup": 1, "eval_every": 3, "eval_windows": 1}

    def run(out, steps, resume=False, build=None):
        torch.manual_seed(0)
        config = HopeConfig(
            corpus.vocab_size, 16, layers=1, heads=2, mixer="attention", channel="mlp"
        )
        model = HopeLM(config)
        settings = TrainConfig(steps=steps, checkpoint_every=3, final_lr=1.0, **base)
        build = build or (lambda m, c: optim.M3(optim.groups(m), c.lr, period=2))
        log = train(model, corpus, settings, out, resume=resume, progress=False, optimizer=build)
        return [r["loss"] for r in log]

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert run(tmp_path / "parts", 6, resume=True) == whole
    with pytest.raises(ValueError, match=r"train\.optimizer was .M3\("):
        run(
            tmp_path / "parts", 7, resume=True, build=lambda m, c: optim.Muon(optim.groups(m), c.lr)
        )
