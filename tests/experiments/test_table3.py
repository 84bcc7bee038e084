"""Table 3 end to end, tiny: it trains, asks, and goes on with what an earlier call has left."""

import lzma
import random
import sys
from pathlib import Path

import pytest
import torch

from nestlearn.evals import harness, read_records
from nestlearn.experiments import asked, books, runner, table3
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Attention

sys.path.insert(0, str(Path(__file__).parents[1] / "evals"))
from test_harness import written

SMALL = {"quick": True, "workers": 0, "progress": False, "device": "cpu", "only": ["10M"]}
ROWS = ["Hope", "Transformer++", table3.CHANCE]


@pytest.fixture
def folder(tmp_path):
    """Books of made-up words, the test book with a repeat, and four questions of each set."""
    draw = random.Random(0)
    (tmp_path / "gutenberg").mkdir()
    for name in books.BOOKS:
        words = ["".join(draw.choices("abcdefgé", k=draw.randint(2, 6))) for _ in range(1500)]
        words[100:104] = words[300:304] = ["they", "say", "that", "Heathcliff"]
        (tmp_path / "gutenberg" / name).write_bytes(lzma.compress(" ".join(words).encode()))
    written(tmp_path)
    harness.text_of.cache_clear()
    books.read.cache_clear()
    table3.asked_of.cache_clear()
    return tmp_path


@pytest.mark.parametrize("change", [{}, {"mixer": Attention()}])
def test_scores_are_sums_of_log_softmax(change, monkeypatch):
    """Of texts of many lengths, padded, read in pieces."""
    monkeypatch.setattr(asked, "PIECE", 16)
    monkeypatch.setattr(asked, "ROWS", 3)
    torch.manual_seed(0)
    lm = HopeLM(HopeConfig(256, dim=16, layers=1, heads=2, **change)).eval()
    pairs = [(b"a" * n + b"bc", b" word"[: 1 + n % 5]) for n in (40, 3, 0, 17, 61, 16)]
    with torch.no_grad():
        said = bytes(lm.generate(torch.tensor([[97, 98, 99]]), 3, temperature=0)[0, 3:].tolist())
        pairs += [(b"abc", said[:2] + b"!"), (b"abc", said)]
    found = asked.scored(lm, pairs)
    for (before, after), (nats, right) in zip(pairs, found):
        ids = torch.tensor([list(before + after)])
        with torch.no_grad():
            logits = lm(ids[:, :-1])[0][0, len(before) - 1 :]
        logp = logits.log_softmax(-1)[range(len(after)), list(after)]
        assert nats == pytest.approx(float(logp.sum()), rel=1e-4)
        assert right == (logits.argmax(-1).tolist() == list(after))
    assert [right for _, right in found[-2:]] == [False, True]
    with pytest.raises(ValueError, match="a text is empty"):
        asked.scored(lm, [(b"", b"a")])


def test_one_call_trains_and_asks_and_another_counts(folder, tmp_path, monkeypatch):
    """The first one where there is no harness, the second with no more than what was said."""
    options = {"data": str(folder), "models": ROWS[:2], **SMALL}

    def said(lm, pairs):  # as by a reader who remembers every word
        found = asked.scored(lm, pairs)
        return [(nats, word in text) for (nats, _), (text, word) in zip(found, pairs)]

    monkeypatch.setattr(table3, "scored", said)
    monkeypatch.setattr(harness, "version", lambda: "")
    text = runner.run("table3", tmp_path / "out", **options)
    assert 'pip install "nestlearn[harness]"' in text
    first = read_records(tmp_path / "out" / "results.json")
    assert list(dict.fromkeys(r.model for r in first)) == ROWS
    again = [r for r in first if r.metric.startswith("again after 500–2,000")]
    assert [(r.model, r.value) for r in again] == [(m, v) for m in ROWS[:2] for v in (100.0, 0.0)]
    for weights in (tmp_path / "out" / "models").rglob("model.safetensors"):
        weights.unlink()

    def counted(score, quizzes):
        pairs = [pair for some in quizzes.values() for one in some for pair in one.pairs]
        nats = [nats for nats, _ in score(pairs)]
        assert len(set(nats)) > 1
        return {name: {"acc": 40.0, "acc_bytes": max(nats)} for name in quizzes}

    monkeypatch.setattr(harness, "version", lambda: "1")
    monkeypatch.setattr(harness, "accuracy", counted)
    text = runner.run("table3", tmp_path / "out", **options)
    assert "not counted yet" not in text
    second = read_records(tmp_path / "out" / "results.json")
    for model in ROWS[:2]:
        own = [{r.metric: r.value for r in rs if r.model == model} for rs in (first, second)]
        assert own[1].items() > own[0].items()
        assert own[1]["PIQA"] == 40.0
        assert own[1]["PIQA, by bytes"] < 0
    assert str(folder) not in (tmp_path / "out" / "results.json").read_text()
    # other questions need the weights again
    monkeypatch.setattr(harness, "version", lambda: "2")
    monkeypatch.setattr(table3.cloze, "LEAD", 128)
    table3.asked_of.cache_clear()
    runner.run("table3", tmp_path / "out", **options)
    failed = [path.read_text() for path in (tmp_path / "out" / "cells" / "failed").iterdir()]
    assert len(failed) == 2
    assert all("FileNotFoundError" in text for text in failed)


def test_the_model_of_the_package_is_asked_without_a_training(folder, tmp_path, monkeypatch):
    def said(lm, pairs):
        assert lm.parameter_count() == 844_644
        return [(-1.0, True)] * len(pairs)

    monkeypatch.setattr(table3, "scored", said)
    monkeypatch.setattr(harness, "version", lambda: "")
    options = {"data": str(folder), **SMALL, "only": [table3.SMALL]}
    about = table3.EXPERIMENT
    asks = runner.ask(about, tmp_path, data=str(folder), models=["Hope"], device="cpu")
    assert {cell["task"] for cell in about.grid(asks)} == {"10M", "50M"}
    runner.run("table3", tmp_path / "out", **options)
    found = read_records(tmp_path / "out" / "results.json")
    assert list(dict.fromkeys(r.model for r in found)) == [table3.PACKAGE, table3.CHANCE]
    own = next(r for r in found if r.model == table3.PACKAGE)
    assert (own.parameters, own.steps) == (844_644, 1500)
    assert not {"batch", "length", "lr"} & own.config.keys()
    assert own.metric.startswith("again after")


def test_the_harness_itself_counts(folder, tmp_path):
    pytest.importorskip("lm_eval")
    text = runner.run("table3", tmp_path / "out", data=str(folder), models=["DeltaNet"], **SMALL)
    (row,) = (line.split(" | ") for line in text.splitlines() if "DeltaNet" in line)
    shares = [float(share) for cell in row[6:-1] for share in cell.split(" / ")]
    assert len(shares) == 11
    assert {share % 25 for share in shares} == {0.0}  # of four questions
    assert "| 10M | chance | 0 | – | 1 | – | 0 | 25 / 25 | 50 / 50 |" in text


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "lm_eval" / "piqa.jsonl.gz").unlink()
    for data, match in (
        (folder, "lm_eval/piqa"),
        (tmp_path / "none", "train-0"),
        (None, "train-0"),
    ):
        with pytest.raises(ValueError, match=match):
            runner.run("table3", tmp_path / "out", data=data and str(data), **SMALL)


def test_words_are_counted_with_and_without():
    one = table3.cloze.Again(b"", b"", b"", 0)
    found = table3.recalled({"x": [one] * 2, "y": [], "z": [one]}, [1, 0, 1, 1, 0, 0])
    assert found == {"x": 100.0, "x, without": 50.0, "z": 0.0, "z, without": 0.0}
