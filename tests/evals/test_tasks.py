"""What all benchmarks share: examples, scores, the models' door, records."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nestlearn import HopeConfig, HopeLM
from nestlearn.evals import (
    IGNORED,
    Examples,
    Logits,
    Record,
    Task,
    accuracy,
    formal,
    read_records,
    score,
    write_records,
)
from nestlearn.evals.tasks import padded, stream
from nestlearn.options import Titans

T = torch.tensor
ONE = Record("formal", "parity", "bin0", "hope", 0, "sequence accuracy (%)", 99.5, 10, 20, 30, 1.5)


def test_accuracy_by_hand():
    targets = T([[1, 0, IGNORED], [IGNORED, 1, 1], [0, 0, 0]])
    said = T([[1, 0, 7], [7, 1, 0], [0, 0, 0]])
    assert accuracy(said, targets, "sequence") == pytest.approx(200 / 3)
    assert accuracy(said, targets, "token") == pytest.approx(600 / 7)
    with pytest.raises(ValueError, match="metric='f1'"):
        accuracy(said, targets, "f1")


def test_rows_are_cut_after_their_last_target():
    examples = padded(
        [np.array([1, 2, 3]), np.array([4])], [np.array([0, 1, IGNORED]), np.array([1])]
    )
    assert examples.inputs.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert examples.targets.tolist() == [[0, 1, IGNORED], [1, IGNORED, IGNORED]]
    assert examples.lengths.tolist() == [2, 1]
    assert examples.rows(T([1])).inputs.tolist() == [[4]]
    assert [part.inputs.tolist() for part in examples.batches(1)] == [[[4]], [[1, 2]]]


class Constant:
    def __init__(self, answer):
        self.answer = answer

    def logits(self, ids):
        return nn.functional.one_hot(torch.full_like(ids, self.answer), 9).float()


@pytest.mark.parametrize("batch", [1, 2, 100])
@pytest.mark.parametrize(("metric", "right"), [("sequence", 50.0), ("token", 75.0)])
def test_the_score_does_not_depend_on_the_batch(batch, metric, right):
    examples = padded([np.zeros(3), np.zeros(1)], [np.array([1, 1, 0]), np.array([1])])
    task = Task("b", "n", 2, 9, examples, {"test": examples}, metric)
    assert score(Constant(1), task, batch=batch) == {"test": right}


def test_only_the_classes_are_answers():
    examples = padded([np.zeros(2)], [np.array([0, 0])])
    task = Task("b", "n", 9, 1, examples, {"test": examples}, "token")
    assert score(Constant(5), task)["test"] == 100  # class 5 is an input id, no answer


def test_data_that_does_not_fit_is_refused():
    good = padded([np.zeros(2)], [np.array([0, 1])])
    with pytest.raises(ValueError, match="an example has no target"):
        padded([np.zeros(2)], [np.array([IGNORED, IGNORED])])
    with pytest.raises(ValueError, match="give both as"):
        Examples(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="train: target 1 is not in"):
        Task("b", "n", 1, 1, good, {}, "token")
    with pytest.raises(ValueError, match="long: input 4 is not in"):
        Task("b", "n", 4, 2, good, {"long": padded([T([4]).numpy()], [T([1]).numpy()])}, "token")
    with pytest.raises(ValueError, match="metric='bleu'"):
        Task("b", "n", 4, 2, good, {}, "bleu")


def test_streams_are_named_not_numbered():
    draws = {
        names: stream(7, *names).integers(1 << 60) for names in (("ab", "c"), ("a", "bc"), ("ab",))
    }
    assert len(set(draws.values())) == 3
    assert stream(7, "ab", "c").integers(1 << 60) == draws["ab", "c"]
    assert stream(8, "ab", "c").integers(1 << 60) != draws["ab", "c"]


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, ids):
        return self.what(torch.zeros(*ids.shape, 5))


@pytest.mark.parametrize(
    "what",
    [lambda x: x, lambda x: (x, "state"), lambda x: SimpleNamespace(logits=x)],
    ids=["logits", "tuple", "object"],
)
def test_models_enter_with_what_they_return(what):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert Logits(Returns(what)).logits(ids).shape == (2, 3, 5)


def test_hope_and_an_lstm_enter():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = (
                nn.Embedding(2, 4),
                nn.LSTM(4, 4, batch_first=True),
                nn.Linear(4, 2),
            )

        def forward(self, ids):
            return self.head(self.rnn(self.embed(ids))[0])

    task = formal.task("parity", train=4, test=8)
    for module in (Small(), HopeLM(HopeConfig(2, 8, 1, 2, Titans(4)))):
        assert set(score(Logits(module), task)) == {"bin0", "bin1"}


def test_what_are_no_logits_is_refused():
    with pytest.raises(ValueError, match=r"Returns returned \(2, 5\) for ids \(2, 3\)"):
        Logits(Returns(lambda x: x[:, 0])).logits(torch.zeros(2, 3, dtype=torch.int64))


def test_a_random_model_is_at_chance():
    class Coin:
        def logits(self, ids):
            return torch.rand(
                *ids.shape, 2, generator=torch.Generator().manual_seed(int(ids.sum()))
            )

    task = formal.task("parity", train=1, test=300)
    assert max(score(Coin(), task).values()) < 3  # a whole string by luck: 2^−length
    by_token = replace(task, metric="token")
    assert all(abs(value - 50) < 3 for value in score(Coin(), by_token).values())


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "results.json"
    records = [ONE, replace(ONE, model="lstm", config={"lr": 1e-3}, note="diverged at step 3")]
    write_records(path, records)
    assert read_records(path) == records
    assert json.loads(path.read_text())[0]["value"] == 99.5
    write_records(path, [])
    assert read_records(path) == []


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "results.json"
    for text, message in (
        ("[{", "is no JSON"),
        ("{}", "holds a dict"),
        ('[{"model": "hope"}]', "record 0 is damaged"),
        (json.dumps([{**vars(ONE), "colour": 1}]), "colour"),
        (
            json.dumps([vars(ONE), {**vars(ONE), "value": "high"}]),
            "record 1 is damaged.*value='high'",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_records(path)
    for wrong in ({"value": float("nan")}, {"seed": True}, {"steps": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(ONE, **wrong)
