"""The frontier: its line by hand, and every kind of reading on the pretrained model."""

import pytest
import torch
from safetensors.torch import save_file

from nestlearn.recipes import frontier
from nestlearn.recipes.frontier_table import at_cost, front, table


def test_the_front_by_hand():
    points = [(1.0, 4.0), (1.2, 3.0), (1.1, 3.5), (1.3, 3.2), (1.6, 2.0)]
    assert front(points) == [(1.0, 4.0), (1.1, 3.5), (1.2, 3.0), (1.6, 2.0)]
    assert at_cost(points, 1.15) == pytest.approx(3.25)
    assert at_cost(points, 1.4) == pytest.approx(2.5)
    assert at_cost(points, 9.0) == 2.0  # beyond its end: the end
    assert at_cost(points, 0.5) == 4.0


def test_the_table_puts_the_better_line_first():
    records = [
        {"model": m, "seed": s, "lr": 1.0, "dial": 0.0, "own": 1.5, "later": later + 0.1 * s,
         "before": [4.0, 1.0], "seconds": 2.0}
        for m, later in (("sgd", 3.0), ("two", 2.0)) for s in (0, 1)
    ]  # fmt: skip
    text = table(records, {"sgd": "SGD", "two": "Two levels"})
    assert text.index("Two levels") < text.index("SGD")
    assert "4.000 ± 0.000 at 1.000" in text
    assert "2.440 ± 0.057" in text  # 4 + (2.05 − 4) · 0.4 / 0.5


def test_every_method_has_eight_settings():
    for name, method in frontier.METHODS.items():
        assert len(set(frontier.settings(method))) == 8, name


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
    _, dial = frontier.settings(frontier.METHODS[name])[0]
    cell = {"task": "novel", "model": name, "lr": 0.1, "dial": dial, "seed": 0}
    said = []
    found = frontier.work(cell, lambda *a: said.append(a), data=shared_data, out=tmp_path)
    frontier.text.cache_clear()
    assert said
    assert found["later"] < found["before"][0] - 0.05
    assert found["own"] != found["before"][1]
