"""MQAR: keys, values, queries and their places."""

import numpy as np
import pytest
import torch

from nestlearn.evals import IGNORED, mqar, score

SMALL = {"vocab": 64, "train": 300, "test": 100}


def check(examples, length, pairs, vocab):
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist()):
        assert len(inputs) == length
        keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert min(keys) >= 1
        assert max(keys) < vocab // 2 <= min(values)
        assert max(values) < vocab
        asked = {t: y for t, y in enumerate(targets) if y != IGNORED}
        assert len(asked) == pairs
        assert {inputs[t]: y for t, y in asked.items()} == dict(zip(keys, values))
        assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)  # first of a slot of two
        fillers = set(range(2 * pairs, length)) - set(asked)
        assert all(inputs[t] == 0 for t in fillers)


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (24, 4)])
def test_every_key_is_asked_once_in_a_slot_of_its_own(length, pairs):
    task = mqar.task(length, pairs, **SMALL)
    for part in (task.train, task.tests["test"]):
        check(part, length, pairs, 64)
    assert task.metric == "token"


def test_keys_and_slots_have_their_laws():
    task = mqar.task(64, 4, vocab=16, train=8000, test=1)
    keys = torch.bincount(task.train.inputs[:, 0], minlength=16)[1:8].double() / 8000
    assert (keys * 7 - 1).abs().max() < 0.12  # uniform over 7 keys
    slots = mqar._slots(np.random.default_rng(0), 20_000, 1, 28)[:, 0]
    law = np.arange(1, 29) ** (mqar.POWER - 1)
    law /= law.sum()
    found = np.bincount(slots, minlength=28) / 20_000
    assert abs(found - law).max() < 0.01


def test_all_slots_can_be_taken():
    task = mqar.task(16, 4, **SMALL)  # 4 pairs leave 4 slots
    check(task.train, 16, 4, 64)
    assert (task.train.inputs[:, 8::2] > 0).all()


def test_random_fillers_leave_pairs_and_answers():
    plain, filled = mqar.task(64, 4, **SMALL), mqar.task(64, 4, **SMALL, random_fillers=True)
    assert torch.equal(plain.train.targets, filled.train.targets)
    there = plain.train.inputs != 0
    assert torch.equal(plain.train.inputs[there], filled.train.inputs[there])
    assert (filled.train.inputs != 0).double().mean() > 0.95


def test_the_seed_alone_decides():
    one, same, other = (mqar.task(64, 4, **SMALL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert not torch.equal(one.train.inputs, other.train.inputs)
    assert not torch.equal(one.train.inputs[:100], one.tests["test"].inputs)


class Reader:
    """Looks up what followed the same token first."""

    def logits(self, ids):
        said = torch.zeros_like(ids)
        for row, out in zip(ids.tolist(), said):
            first = {}
            for at, token in enumerate(row):
                if token in first:
                    out[at] = row[first[token] + 1]
                first.setdefault(token, at)
        return torch.nn.functional.one_hot(said, 64).float()


class Noise:
    def logits(self, ids):
        return torch.rand(*ids.shape, 64, generator=torch.Generator().manual_seed(0))


def test_a_perfect_reader_scores_100_and_noise_is_at_chance():
    task = mqar.task(64, 8, **{**SMALL, "test": 1000})
    assert score(Reader(), task)["test"] == 100
    assert 0.8 < score(Noise(), task)["test"] < 2.4  # of 64 ids


@pytest.mark.parametrize(
    ("length", "pairs", "vocab", "message"),
    [(64, 17, 64, "give 1 to length / 4 = 16"), (256, 40, 64, "40 different keys need 82 ids")],
)
def test_what_does_not_fit_is_refused(length, pairs, vocab, message):
    with pytest.raises(ValueError, match=message):
        mqar.task(length, pairs, vocab=vocab)


def test_validation_sequences_are_of_another_draw():
    task = mqar.task(64, 4, **SMALL)
    check(task.validation["test"], 64, 4, 64)
    assert not torch.equal(task.validation["test"].inputs, task.tests["test"].inputs)
