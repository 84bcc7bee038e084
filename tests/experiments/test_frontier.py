"""The frontier: its line by hand, and every kind of reading on the pretrained model."""

import pytest
import torch
from safetensors.torch import save_file

from nestlearn.evals import Record
from nestlearn.experiments import frontier, runner
from nestlearn.experiments.frontier import at_cost, front
from nestlearn.experiments.methods import METHODS, rates


def test_the_front_by_hand():
    points = [(1.0, 4.0), (1.2, 3.0), (1.1, 3.5), (1.3, 3.2), (1.6, 2.0)]
    assert front(points) == [(1.0, 4.0), (1.1, 3.5), (1.2, 3.0), (1.6, 2.0)]
    assert at_cost(points, 1.15) == pytest.approx(3.25)
    assert at_cost(points, 1.4) == pytest.approx(2.5)
    assert at_cost(points, 9.0) == 2.0  # beyond its end: the end
    assert at_cost(points, 0.5) == 4.0


def test_the_table_puts_the_better_line_first():
    records = [
        Record(
            "frontier", "novel", "", m, s, "later loss", later + 0.1 * s, 1, 1, 1, 2.0,
            detail={"own": 1.5, "before": [4.0, 1.0]},
        )
        for m, later in (("sgd", 3.0), ("two", 2.0)) for s in (0, 1)
    ]  # fmt: skip
    text = runner.report(frontier.EXPERIMENT, frontier.best_first(records))
    assert text.index(METHODS["two"].title) < text.index("SGD")
    assert "4.000 ± 0.000 at 1.000" in text
    assert "2.440 ± 0.040" in text  # 4 + (2.05 − 4) · 0.4 / 0.5, half the range of 2.40 and 2.48


def test_every_method_has_eight_settings():
    for name, method in METHODS.items():
        pairs = {(lr, dial) for lr in rates(method) for dial in method.dial or (0.0,)}
        assert len(pairs) == 8, name


@pytest.mark.parametrize(
    "name", ["sgd", "pull", "ewc", "fading", "last", "rank", "gate", "scaled", "replay", "anchor"]
)
def test_methods_read(name, shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "READ", 1024)
    monkeypatch.setattr(frontier, "LATER", 256)
    frontier.text.cache_clear()
    torch.manual_seed(0)
    save_file(
        {n: torch.randint(3, 500, (3, 256)) for n in ("measured", "replayed", "kept")},
        tmp_path / "own.safetensors",
    )
    dial = (*METHODS[name].dial, 0.0)[0]
    cell = {
        "task": "novel", "model": name, "lr": 0.1, "dial": dial, "seed": 0,
        "folder": str(shared_data), "out": str(tmp_path),
    }  # fmt: skip
    said = []
    found = frontier.work(cell, lambda *a: said.append(a))
    frontier.text.cache_clear()
    assert said
    assert found["scores"]["later loss"] < found["before"][0] - 0.05
    assert found["own"] != found["before"][1]
