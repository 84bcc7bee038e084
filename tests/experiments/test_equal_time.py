"""equal-time and defaults: who takes part, with what; a missing text is refused before any work."""

import functools
import lzma
from dataclasses import asdict, replace

import pytest
import torch

from nestlearn.evals import read_records
from nestlearn.experiments import books, defaults, equal_time, runner, stability, switching
from nestlearn.models.hope import HopeConfig, HopeLM


@functools.cache
def counted(config):
    """The values of a model that is made, whose memory is not."""
    with torch.device("meta"):
        return HopeLM(config).parameter_count()


@pytest.mark.parametrize("model", equal_time.FAMILIES)
def test_families_have_one_size(model):
    counts = [counted(equal_time.config_of(name, "6M")) for name in ("Hope", model)]
    assert abs(counts[1] / counts[0] - 1) < 0.01


def test_streams_are_said_by_the_name():
    assert books.windows("Hope, streams of 8 windows") == 8
    assert books.windows("Hope") == 1


@pytest.mark.parametrize(
    ("data", "given"), [(None, "--data is not given"), ("/nowhere", "--data /nowhere")]
)
def test_books_are_asked_for(data, given, tmp_path):
    files = r"train-0\.txt\.xz, valid\.txt\.xz, test\.txt\.xz"
    with pytest.raises(ValueError, match=rf"^{given}: give a folder with {files}.*gutenberg\.org"):
        runner.run("equal-time", tmp_path, data=data)
    assert not list(tmp_path.iterdir())


def test_stability_shows_every_rate_and_no_place_of_the_machine(tmp_path):
    data = tmp_path / "books"
    data.mkdir()
    for name in books.BOOKS:
        (data / name).write_bytes(lzma.compress(bytes(range(32, 127)) * 40))
    out, models = tmp_path / "out", ["Hope-Attention"]
    text = runner.run(
        "stability", out, quick=True, only=["512"], models=models, data=str(data), workers=0,
        device="cpu", progress=False,
    )  # fmt: skip
    assert "Every setting is shown." in text
    records = read_records(out / "results.json")
    assert str(tmp_path) not in (out / "results.json").read_text()
    found = {r.metric: r.value for r in records}
    norms = records[0].detail["norms"]
    assert len(norms) == 3
    assert found[stability.LARGEST] == pytest.approx(max(norms[1:]), abs=1e-4)  # one is warm-up
    assert found[stability.MEDIAN] == pytest.approx(sum(norms[1:]) / 2, abs=1e-4)
    assert stability.EXPERIMENT.trials({}, quick=False)[1] == 2 * max(equal_time.EXPERIMENT.rates)


def test_the_default_is_the_best_candidate():
    """What results/defaults/table.md has first, but for the half-life, which came later."""
    chosen = defaults.CANDIDATES["l2, 4 and 16, side by side"]
    channel = HopeConfig().channel
    levels = [asdict(replace(level, half_life=None)) for level in channel.levels]
    assert (levels, channel.variant) == (chosen["levels"], chosen["variant"])


# ----------------------------------------------------------------------------------- switching


@pytest.mark.parametrize("model", switching.MODELS)
def test_rows_of_a_channel_have_one_size(model):
    channel = model.split("; ")[1]
    counts = [counted(switching.config_of(name)) for name in (f"Hope; {channel}", model)]
    assert abs(counts[1] / counts[0] - 1) < 0.01


def test_a_walk_follows_its_table_until_that_changes():
    """Frequencies of long-lived tables are their probabilities: the surprise is what it says."""
    walks = switching.walks(64, 0)
    assert torch.equal(walks.ids, switching.walks(64, 0).ids)
    assert 0 < walks.changed.float().mean() < 1
    changes = walks.since[:, 1:] <= walks.since[:, :-1]
    assert torch.equal(
        walks.since[:, 1:][changes], torch.zeros(int(changes.sum()), dtype=torch.int64)
    )
    pairs = torch.zeros(32, 32)
    row = int((~walks.changed).sum(1).argmax())  # the row whose first table lasts longest
    ids = walks.ids[row][: int((~walks.changed[row]).sum())]
    pairs.index_put_((ids[:-1], ids[1:]), torch.ones(()), accumulate=True)
    # few successors of each symbol: of 32 equally likely ones most would be met once or twice
    assert pairs.amax(1).sum() > 0.4 * pairs.sum()
    assert walks.surprise[:, 1:].mean() < 1.6 < torch.tensor(32.0).log()
