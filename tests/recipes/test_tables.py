"""The tables: from cells to records, Markdown and figures; what is done stays done."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from nestlearn import HopeConfig, HopeLM
from nestlearn.evals import Record, mad, read_records
from nestlearn.recipes import figures, mqar, reproduce, suite, table4, table5

ONE = Record(
    "formal", "parity", "bin0", "hope", 0, "sequence accuracy (%)", 90.0, 1000, 20, 30, 1.5,
    config={"lr": 1e-3},
)  # fmt: skip
SMALL = {"quick": True, "steps": 2, "workers": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("experiment", "options", "settings"),
    [
        (table5, {"only": ["parity"], "models": ["hope", "lstm"]}, {"bin0", "bin1"}),
        (table4, {"only": ["compression"], "models": ["hope", "lstm"]}, {"baseline"}),
        (table4, {"only": ["recall/vocab=32"], "models": ["transformer"]}, {"vocab=32"}),
        (mqar, {"only": ["K=4"], "models": ["hope", "deltanet"]}, {"128 KiB"}),
    ],
)
def test_a_quick_cell_of_each_table(tmp_path, experiment, options, settings):
    text = experiment.reproduce(tmp_path, **options, **SMALL)
    records = read_records(tmp_path / "results.json")
    assert {r.setting for r in records} == settings
    assert {r.model for r in records} == set(options["models"])
    assert {r.steps for r in records} == {2}
    assert all(r.commit and r.versions and r.config["lr"] for r in records)
    assert (tmp_path / "table.md").read_text() == text + "\n"
    assert len(list(tmp_path.glob("*.png"))) == 1
    cells = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*.json")}
    assert len(cells) == len(options["models"])
    assert experiment.reproduce(tmp_path, **options, **SMALL) == text
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*.json")} == cells


def test_a_grid_says_means_ranges_and_the_papers_figures(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, _: shown.append(figure))
    values = {"A": {"x": [90.0, 100.0], "y": [0.5]}, "B": {"x": [33.0, 34.0]}}
    figures.grid(values, "grid.png", paper={"A": {"x": 98.2}})
    axes = shown[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["95 ±5", "0.5", "98.2", "33.5"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["A", "in the paper", "B"]
    with pytest.raises(ValueError, match="no values"):
        figures.grid({}, "grid.png")


def test_others_stay_in_the_table(tmp_path):
    first = table5.reproduce(tmp_path, only=["anbn"], models=["lstm"], **SMALL)
    both = table5.reproduce(tmp_path, only=["anbn"], models=["transformer"], **SMALL)
    assert "LSTM" in first
    assert "Transformer" not in first
    assert "LSTM" in both
    assert "Transformer" in both
    assert "100 / 100" in both  # the paper's row


def result(value, step=10, diverged=None):
    return {
        "best": {"bin0": value, "bin1": value}, "last": {"bin0": 0.0}, "best_step": step,
        "value": value, "metric": "m", "parameters": 5, "steps": 20, "tokens": 9, "seconds": 0.1,
        "diverged": diverged,
    }  # fmt: skip


def scripted(cell, tell):
    """Results that are known: the rate 0.3 is best, 0.1 fails for "titans"."""
    if cell["model"] == "titans" and cell["lr"] == 0.1:
        raise RuntimeError("no")
    value = {0.1: 50.0, 0.3: 80.0, 1.0: 80.0}[cell["lr"]] + cell["seed"]
    return result(value, step=int(10 * cell["lr"]), diverged=7 if cell["seed"] == 2 else None)


def plan(**changes):
    entries = [{"benchmark": "b", "task": "parity", "model": m} for m in ("hope", "titans")]
    return suite.Plan(**{"name": "p", "work": scripted, "entries": entries, "lrs": (0.1, 0.3, 1.0),
                         "seeds": 3, **changes})  # fmt: skip


def test_the_best_rate_goes_on_to_the_other_seeds(tmp_path):
    records = suite.run_plan(plan(), tmp_path, workers=0)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2 * 3 - 1 + 2 * 2
    assert {r.config["lr"] for r in records} == {0.3}  # of two equal ones the sooner
    hope = [r for r in records if r.model == "hope" and r.setting == "bin0"]
    assert [(r.seed, r.value, r.note) for r in hope] == [
        (0, 80, ""), (1, 81, ""), (2, 82, "diverged at step 7"),
    ]  # fmt: skip
    assert len(records) == 2 * 3 * 2


def test_when_all_fail_the_reason_is_named(tmp_path):
    entries = [{"benchmark": "b", "task": "parity", "model": "titans"}]
    with pytest.raises(ValueError, match=r"every cell failed .*RuntimeError: no"):
        suite.run_plan(plan(entries=entries, lrs=(0.1,)), tmp_path, workers=0)
    with pytest.raises(ValueError, match="seeds=0"):
        plan(seeds=0)


def test_the_table_has_means_half_ranges_the_paper_and_marks():
    seeds = [ONE, replace(ONE, seed=1, value=95.0)]
    other = replace(ONE, setting="bin1", value=12.34, note="diverged at step 3")
    columns = [("P", [("parity", "bin0"), ("parity", "bin1")]), ("absent", [("aa", "bin0")])]
    text = suite.table([*seeds, other], columns, {"Hope": {("parity", "bin0"): 100.0}})
    assert "| model | P |" in text
    assert "| Hope | 92.5 ± 2.5 / 12.3* |" in text
    assert "| *Hope, paper* | 100 / – |" in text
    assert "absent" not in text
    assert "| Hope | 1,000 | 0.001 |" in text


def test_means_are_of_models_that_have_every_task(tmp_path):
    def of(model, *values):
        at = {"benchmark": "mad", "setting": "baseline", "model": model}
        return [
            replace(ONE, task=t, value=v, **at) for t, v in zip(table4.TASKS, values, strict=False)
        ]

    records = of("lstm", 10.0, 20.0, 30.0, 40.0, 50.0) + of("hope", 50.0, 60.0, 70.0, 80.0, 90.0)
    records += [replace(r, seed=1, value=r.value + 20) for r in records if r.model == "hope"]
    text = table4.report(records + of("titans", 100.0), tmp_path)
    assert "Mean over the baselines of all five: Hope 80.0, LSTM 30.0." in text
    assert "none has run them all" in table4.report(of("titans", 100.0), tmp_path)


def test_the_papers_rows_are_those_of_its_tables():
    assert table5.PAPER["DeltaNet"]["parity", "bin1"] == 10.1
    assert table5.PAPER["DeltaNet"]["abab", "bin1"] == 0
    assert table5.PAPER["Transformer"]["anbn", "bin0"] == 100
    assert table4.PAPER["Hope"]["fuzzy", "baseline"] == 52.1
    assert table4.PAPER["Titans"]["memorization", "baseline"] == 83.4


def test_the_auto_encoder_tells_all_from_the_last_vector():
    class Encoder(nn.Module):
        def forward(self, ids):
            x = torch.zeros(*ids.shape, 8)
            x[:, :, 0] = ids.float()  # no position knows of another
            return x, None

    torch.manual_seed(0)
    model = table4.AutoEncoder(Encoder(), 8, 5)
    ids = torch.tensor([[1, 2, 3, 4]])
    out = model(ids)
    assert out.shape == (1, 4, 5)
    torch.testing.assert_close(model(torch.tensor([[3, 1, 1, 4]])), out)
    assert (model(torch.tensor([[1, 2, 3, 0]])) - out).abs().amin(0).max() > 0
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3  # it knows where it is
    wave = table4.sinusoid(6, torch.zeros(7))
    assert wave.shape == (6, 7)
    torch.testing.assert_close(wave[:, 0], torch.arange(6).float().sin())


def test_hope_as_an_encoder_gives_its_last_vectors():
    torch.manual_seed(0)
    lm = HopeLM(HopeConfig(16, 16, 1, 2, chunk=4))
    task = mad.task("compression", train=4, test=4)
    module = table4.auto_encoder(lm, task)
    assert module(task.train.inputs).shape == (4, 32, 16)
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == {"encoder", "decoder"}
    assert not any("head" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("kib", mqar.STATES)
def test_states_are_of_equal_size(kib):
    for model in mqar.MODELS:
        size = mqar.state_bytes(model, mqar.sized(model, kib))
        assert abs(size / (1024 * kib) - 1) < 0.1, model


def test_a_state_that_cannot_be_sized_is_refused():
    with pytest.raises(ValueError, match="transformer has no memory of a size to choose: use hope"):
        mqar.sized("transformer", 128)
    with pytest.raises(ValueError, match=r"hope at 1 KiB: the nearest state has"):
        mqar.sized("hope", 1)


def test_names_are_checked_before_anything_runs(tmp_path):
    for module, options, message in (
        (table5, {"only": ["dyck"]}, "language 'dyck' is unknown: use parity, aa"),
        (table5, {"models": ["rwkv"]}, "model 'rwkv' is unknown"),
        (table4, {"only": ["recall/vocab=3"]}, "setting 'vocab=3' is unknown"),
        (mqar, {"only": ["K=5"]}, "task 'K=5' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            module.reproduce(tmp_path, **options, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_experiments_take_the_options_that_they_have(monkeypatch, tmp_path):
    def figure(out, *, quick=False, seeds=1):
        return f"{out.name} {quick} {seeds}"

    monkeypatch.setattr(reproduce, "experiment", lambda name: figure)
    assert reproduce.run("fig", tmp_path / "a", quick=True, seeds=2, steps=None) == "a True 2"
    assert reproduce.run("fig") == "fig False 1"
    with pytest.raises(ValueError, match="fig takes no --models"):
        reproduce.run("fig", models=("hope",))


def test_every_experiment_is_there():
    for name in reproduce.EXPERIMENTS:
        assert callable(reproduce.experiment(name))
    assert set(reproduce.SUITES.values()) <= set(reproduce.EXPERIMENTS)
    with pytest.raises(ValueError, match="experiment 'table9' is unknown: use one of table4"):
        reproduce.experiment("table9")


def test_records_hold_what_made_them(tmp_path):
    table5.reproduce(tmp_path, only=["anbn"], models=["lstm"], **SMALL)
    record = read_records(tmp_path / "results.json")[0]
    assert record.config["skeleton"]["heads"] == table5.SKELETON["heads"]
    assert record.config["fit"]["batch"] == 4
    assert record.metric == "sequence accuracy (%)"
    (cell,) = (tmp_path / "cells").glob("*.json")
    assert len(json.loads(cell.read_text())["result"]["curve"]) == 2
