"""equal-time and defaults: who takes part, with what; a missing text is refused before any work."""

import pytest
import torch

from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.recipes import defaults, equal_time


@pytest.mark.parametrize("model", equal_time.FAMILIES)
def test_families_have_one_size(model):
    with torch.device("meta"):
        counts = [
            HopeLM(equal_time.config_of(name, "6M")).parameter_count() for name in ("Hope", model)
        ]
    assert abs(counts[1] / counts[0] - 1) < 0.01


def test_streams_are_said_by_the_name():
    assert equal_time._windows("Hope, streams of 8 windows") == 8
    assert equal_time._windows("Hope") == 1


@pytest.mark.parametrize("data", [None, "/nowhere"])
def test_books_are_asked_for(data, tmp_path):
    with pytest.raises(ValueError, match=r"give a folder with train-0\.txt\.xz"):
        equal_time.reproduce(tmp_path, data=data)
    assert not list(tmp_path.iterdir())


def test_the_default_is_the_best_candidate():
    """What results/defaults/table.md has first."""
    chosen = defaults.CANDIDATES["l2, 4 and 16, side by side"]
    config = HopeConfig()
    assert (config.levels, config.variant) == (chosen["levels"], chosen["variant"])
