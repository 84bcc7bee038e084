"""The picture of a comparison: what is drawn, and what is refused."""

import os

import pytest
from matplotlib.figure import Figure

from nestlearn.train import plots


def record(name, seed, offset, trained=8, context=32):
    log = [[s, 3.0 - 0.1 * s + offset, 2.0 + offset if s % 5 == 0 else None] for s in range(1, 11)]
    curve = [offset + i / context for i in range(context)]
    lengths = {str(trained): 0.0, str(context): 0.0}
    return {
        "model": name, "seed": seed, "log": log, "loss_by_position": curve, "value_at": lengths
    }  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """The figure that `comparison` writes."""
    kept = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        kept.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_a_comparison_shows_every_model_on_both_sides(tmp_path, drawn):
    records = [record("a", 0, 0.0), record("b", 0, 1.0)]
    plots.comparison(records, tmp_path / "comparison.png")
    assert os.listdir(tmp_path) == ["comparison.png"]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    left, right = drawn[0].axes
    training, validation = left.lines[:2]
    assert list(training.get_xdata()) == list(range(1, 11))
    assert training.get_ydata()[4] == pytest.approx(2.5)
    assert list(validation.get_xdata()) == [5, 10]
    assert list(validation.get_ydata()) == [2.0, 2.0]
    a, b, mark = right.lines
    assert list(a.get_xdata()) == [2 + 4 * i for i in range(8)]
    assert a.get_ydata()[0] == pytest.approx(1.5 / 32)
    assert [y - 1 for y in b.get_ydata()] == pytest.approx(list(a.get_ydata()))
    assert list(mark.get_xdata()) == [8, 8]  # the trained length
    assert right.get_xlim() == (0, 32)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
    assert not right.collections  # one seed has no range


def test_names_are_shown_as_they_are(tmp_path, drawn):
    log = [{"step": 1, "loss": 1.0}]
    plots.loss_curves({"_a$b$_[c": log, "$": log}, tmp_path / "x.png")
    shown = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert shown == [r" _a\$b\$_[c, training", r"\$, training"]  # what matplotlib draws as a $


def test_seeds_are_a_mean_and_a_range(tmp_path, drawn):
    records = [record("a", seed, offset) for seed, offset in enumerate((0.0, 1.0, 5.0))]
    plots.comparison(records, tmp_path / "comparison.svg")
    left, right = drawn[0].axes
    assert left.lines[1].get_ydata()[0] == pytest.approx(4.0)
    assert right.lines[0].get_ydata()[0] == pytest.approx(2 + 1.5 / 32)
    for axes, low in ((left, 2.0), (right, 1.5 / 32)):
        (band,) = axes.collections
        at = band.get_paths()[0].vertices
        first = at[at[:, 0] == at[:, 0].min()][:, 1]
        assert (first.min(), first.max()) == pytest.approx((low, low + 5))


def test_a_comparison_needs_records_of_one_length(tmp_path):
    with pytest.raises(ValueError, match=r"records of .* \[\]; pass one or more"):
        plots.comparison([], tmp_path / "x.png")
    records = [record("a", 0, 0.0), record("b", 0, 0.0, trained=4)]
    with pytest.raises(ValueError, match=r"\[\(4, 32\), \(8, 32\)\].*the same"):
        plots.comparison(records, tmp_path / "x.png")
    assert not os.listdir(tmp_path)
