"""The measuring instruments of the language models."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nestlearn import HopeConfig, HopeLM, Level, TrainConfig, load_text
from nestlearn.evals import Record
from nestlearn.experiments.language import all_models, columns, eval_tokens, measure
from nestlearn.experiments.models import with_parameters
from nestlearn.experiments.stream import stream_loss
from nestlearn.experiments.tables import table
from nestlearn.options import Continuum, Titans

SMALL = HopeConfig(256, 16, 1, 2, Titans(4), Continuum((Level(chunk=4), Level())))


@pytest.fixture
def corpus(tmp_path):
    text = "".join(f"line {i * i % 97} of a text\n" for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    return load_text([tmp_path / "a.txt"])


def model():
    torch.manual_seed(0)
    return HopeLM(SMALL).eval()


def test_every_model_has_the_parameters_of_the_first():
    counts = {}
    for entry in all_models(256):
        config = entry.config
        if entry.matched:
            config = with_parameters(config, HopeLM(all_models(256)[0].config).parameter_count())
        counts[entry.name] = HopeLM(config).parameter_count()
    assert len(counts) == 7
    for name, count in counts.items():
        assert abs(count / counts["Hope"] - 1) < 0.05, (name, count)


def test_a_budget_below_the_rest_of_the_model_is_refused():
    with pytest.raises(ValueError, match="1,000 parameters are too few"):
        with_parameters(replace(SMALL, channel="mlp"), 1000)


def test_both_lengths_are_measured_on_the_same_text(corpus):
    settings = TrainConfig(steps=20, batch=2, length=16, warmup=1)
    losses, by_position = measure(model(), corpus, settings)
    assert eval_tokens(settings) == 64
    windows = corpus.val_windows(1, 64)
    with torch.no_grad():
        nats = F.cross_entropy(model()(windows[:, :-1])[0].mT, windows[:, 1:], reduction="none")
        short = F.cross_entropy(
            model()(windows[:, :-1].reshape(-1, 16))[0].mT,
            windows[:, 1:].reshape(-1, 16),
        )
    torch.testing.assert_close(by_position, nats.mean(0))
    assert losses[64] == pytest.approx(float(nats.mean()), abs=1e-5)
    assert losses[16] == pytest.approx(float(short), abs=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_stream_loss_is_that_of_one_call(corpus):
    ids = corpus.train[:2501].long()
    with torch.no_grad():
        whole = F.cross_entropy(model()(ids[None, :-1])[0][0], ids[1:], reduction="none")
    torch.testing.assert_close(stream_loss(model(), ids), whole, rtol=0, atol=1e-4)
    anew = stream_loss(model(), ids, restart=1024)
    torch.testing.assert_close(anew[:1024], whole[:1024], rtol=0, atol=1e-4)
    assert (anew[1024:] - whole[1024:]).abs().max() > 1e-3


def test_table_shows_mean_and_half_the_range():
    rows = [
        Record(
            "language", "text", "", "A", seed, "loss", 1.0, 1000, 1, 1, 1.0,
            detail={
                "tokens_per_second": 10.0, "value_at": {"8": 0, "32": 0},
                "bits_per_byte": {"8": 2.0 + d, "32": 1.0 + d},
            },
        )
        for seed, d in enumerate((0.0, 0.5))
    ]  # fmt: skip
    shown = columns(rows)
    assert "| A | 1,000 | 2.250 ± 0.250 | 1.250 ± 0.250 | 10 ± 0 |" in table(rows, shown)
    assert "| A | 1,000 | 2.000 | 1.000 | 10 |" in table(rows[:1], shown)
