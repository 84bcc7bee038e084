"""The optimizer recipes: their instruments, and a small run of each."""

import json
import math

import pytest
import torch

from nestlearn import optim
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.recipes import fig4, fig11, fig12, orthogonal_tasks, tuned, update_size
from nestlearn.train import Corpus, TrainConfig, load_text, train


def written(folder):
    return json.loads((folder / "results.json").read_text())


def test_fig4_tunes_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(fig4, "METHODS", dict(list(fig4.METHODS.items())[:2]))
    monkeypatch.setattr(fig4, "LANDSCAPES", ((0.1, 0.5, 1.0),))
    text = fig4.reproduce(tmp_path, quick=True)
    results = written(tmp_path)
    assert text.count("0.1, 0.5, 1") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "table.md", "fig4.png"}
    for row in results["rows"]:
        best = row["chosen"]
        path = torch.tensor(best["path"])
        values = fig4.psi(path, row["landscape"])
        assert (values[best["steps"] :] < fig4.REACHED).all()
        assert values[best["steps"] - 1] >= fig4.REACHED
    origin = torch.zeros(2)
    assert fig4.psi(origin, (3.0, 1.0, 2.0)) == 0
    start = torch.tensor(fig4.START)
    by_hand = 3.5**2 + 3 * (-3.5 - 2 + 0.5 * math.sin(-3.5 * 2)) ** 2
    assert float(fig4.psi(start, (3.0, 0.5, 2.0))) == pytest.approx(by_hand)


def test_fig11_trains_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fig11, "GRIDS", {"M3": (1e-3, 1e-2, 3e-2, 0.1)})
    fig11.reproduce(tmp_path, quick=True, workers=0)
    results = written(tmp_path)
    (record,) = results["records"]
    assert record["name"] == "M3"
    assert len(record["results"]) == 2
    assert all(r["train_loss"] < 2.3 for r in record["results"])  # ln 10 is chance
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 4
    before = [c.stat().st_mtime_ns for c in cells]
    fig11.reproduce(tmp_path, quick=True, workers=0)
    again = written(tmp_path)
    assert [c.stat().st_mtime_ns for c in cells] == before
    assert again["records"] == results["records"]
    with pytest.raises(ValueError, match=r"torchvision"):
        fig11.load(str(tmp_path), "CIFAR10")


def test_tuning_takes_the_best_and_says_where_it_stood(tmp_path):
    def cell(name, lr, seed):
        return {"model": name, "lr": lr, "seed": seed}

    def work(cell, tell):
        if cell["lr"] > 1:
            raise FloatingPointError("diverged")
        return {"loss": abs(cell["lr"] - (0.1 if cell["model"] == "A" else 1.0)) + cell["seed"]}

    records = tuned.compare(
        {"A": (0.01, 0.1, 10.0), "B": (0.1, 1.0, 10.0), "C": (0.5,)}, cell, work, tmp_path,
        score="loss", tune_seeds=(0, 1), seeds=(2, 3), workers=0,
    )  # fmt: skip
    assert [(r["name"], r["lr"], r["edge"]) for r in records] == [
        ("A", 0.1, False), ("B", 1.0, False), ("C", 0.5, False),
    ]  # fmt: skip
    assert records[0]["tuning"][10.0] == math.inf
    text = tuned.table(records, {"loss": ("loss", 2)})
    assert "| A | 0.1 | 2 | 2.50 ± 0.71 |" in text
    with pytest.raises(ValueError, match=r"D did not end a training at any of \[10\.0, 20\.0\]"):
        tuned.compare(
            {"D": (10.0, 20.0)}, cell, work, tmp_path, score="loss", tune_seeds=(0,), seeds=(1,),
            workers=0,
        )  # fmt: skip


def test_fig12_counts_windows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(fig12, "SIZES", {"5": (16, 2)})
    fig12.reproduce(tmp_path, quick=True)
    results = written(tmp_path)
    rows = {r["optimizer"]: r for r in results["rows"]}
    assert set(rows) == set(fig12.CONTESTANTS)
    reference = rows[fig12.REFERENCE]
    assert reference["ratios"] == [1.0] * 3
    more = rows["M3"]["state_bytes_per_parameter"] - reference["state_bytes_per_parameter"]
    assert 4 <= more < 4.1  # one copy and a few numbers
    with pytest.raises(ValueError, match="use"):
        fig12.reproduce(tmp_path, only=("7",), steps=2)


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
    assert result["a_after_b"] > result["a_learnt"]
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
