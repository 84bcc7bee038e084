"""MAD: each task's sequences, what is asked at which place, and what can be known of it."""

import numpy as np
import pytest
import torch

from nestlearn.evals import IGNORED, mad, score
from nestlearn.evals.mad import _fuzzy_row

SMALL = {"train": 200, "test": 200}


def rows(examples):
    return zip(examples.inputs.tolist(), examples.targets.tolist())


def recall_answers(inputs, key_ids, noise_from):
    """The value of every key seen before, read off the sequence itself: at the key's place."""
    known, answers = {}, {}
    for at in range(0, len(inputs), 2):
        key = inputs[at]
        if key >= noise_from:
            continue
        assert key < key_ids
        if key in known:
            answers[at] = known[key]
        if at + 1 < len(inputs):
            assert known.setdefault(key, inputs[at + 1]) == inputs[at + 1]  # one value a sequence
    return answers


@pytest.mark.parametrize(
    ("name", "setting", "keys", "noise"),
    [
        ("recall", "baseline", 8, 16),
        ("recall", "vocab=32", 16, 32),
        ("recall", "length=256", 8, 16),
        ("noisy", "baseline", 8, 16),
        ("noisy", "noise=0.8", 8, 16),
    ],
)
def test_recall_asks_what_the_sequence_has_told(name, setting, keys, noise):
    task = mad.task(name, setting, **SMALL)
    for inputs, targets in rows(task.tests["test"]):
        answers = recall_answers(inputs, keys, noise)
        assert {t: y for t, y in enumerate(targets) if y != IGNORED} == answers
        assert len(inputs) - 1 in answers  # the last key was seen before
    for inputs, targets in rows(task.train):
        assert targets[:-1] == inputs[1:]  # trained on every next token
        assert targets[-1] == recall_answers(inputs, keys, noise)[len(inputs) - 1]


def test_recall_by_hand():
    class Fixed:
        """A generator whose draws stand here."""

        def __init__(self, *draws):
            self.draws = list(draws)

        def integers(self, low, high=None, size=None):
            return np.array(self.draws.pop(0)).reshape(size)

        def random(self, size):
            return np.array(self.draws.pop(0), float).reshape(size)

    def rng():
        keys, noise, one_real, values, other = [1, 0, 1], [1, 1, 1], [0], [6, 7, 5, 4], [0] * 6
        return Fixed(keys, noise, one_real, values, [0.9, 0.1, 1, 1], other)

    sizes = {"vocab": 8, "length": 8}
    made = mad._recall(rng(), 1, sizes, False), mad._recall(rng(), 1, sizes, True)
    (inputs, tested), (_, trained) = made
    assert inputs.tolist() == [[1, 7, 0, 6, 1, 7, 0]]
    assert tested.tolist() == [[-100, -100, -100, -100, 7, -100, 6]]
    assert trained.tolist() == [[7, 0, 6, 1, 7, 0, 6]]


def test_noise_is_as_frequent_as_said_and_never_all():
    for setting, share in (("baseline", 0.2), ("noise=0.8", 0.8)):
        inputs = mad.task("noisy", setting, train=1000, test=10).train.inputs[:, :-1]
        pairs = inputs.reshape(1000, -1, 2)
        noisy = pairs >= 16
        assert torch.equal(noisy[..., 0], noisy[..., 1])
        assert abs(noisy.double().mean() - share) < 0.03
        assert not noisy.all(2).all(1).any()


def test_fuzzy_by_hand():
    probe, a, b = ((0, 1), (8,)), ((2,), (9, 10)), ((3, 4, 5), (11,))
    again = ((2,), (13,))  # a key drawn again keeps its first value
    drawn = [probe, a, again, b, probe, a, a, a, a, a]
    tokens, asked = _fuzzy_row(drawn, 27, 0.2)  # the probe's place: 0.2 · (27 − 6) = 4
    told = [2, 9, 10, 2, 9, 10, 0, 1, 8, 3, 4, 5, 11, 0, 1, 8, 2, 9, 10, 0, 1, 8]
    assert tokens == told
    assert [i for i, there in enumerate(asked) if there] == [4, 5, 15, 17, 18, 21]


def fuzzy_pairs(tokens, pad, half):
    """The (key, value) pairs of a sequence and where each value begins; pads come first."""
    at, pairs = 0, []
    while tokens[at] == pad:
        at += 1
    while at < len(tokens):
        first = at
        while at < len(tokens) and tokens[at] < half:
            at += 1
        middle = at
        while at < len(tokens) and tokens[at] >= half:
            at += 1
        pairs.append((tuple(tokens[first:middle]), tuple(tokens[middle:at]), middle))
    return pairs


@pytest.mark.parametrize("setting", ["baseline", "vocab=64", "length=256"])
def test_fuzzy_recall_is_consistent(setting):
    task = mad.task("fuzzy", setting, **SMALL)
    pad = task.vocab - 1
    half = pad // 2
    probes_shown = 0
    for examples, testing in ((task.train, False), (task.tests["test"], True)):
        for inputs, targets in rows(examples):
            tokens = [*inputs, targets[-1]]
            assert len(tokens) == len(inputs) + 1
            asked = {t + 1: y for t, y in enumerate(targets) if y != IGNORED}
            known, expected = {}, {}
            pairs = fuzzy_pairs(tokens, pad, half)
            for key, value, at in pairs:
                assert len(set(key)) == len(key) <= 3  # no token twice in one motif
                assert len(set(value)) == len(value) <= 3
                assert not testing or len(key) == 3
                if key in known or at == pairs[-1][2]:
                    expected |= {at + i: v for i, v in enumerate(value)}
                assert known.setdefault(key, value) == value
            if testing:
                assert asked == expected
                probes_shown += pairs[-1][0] in [p[0] for p in pairs[:-1]]
            else:
                assert asked == dict(enumerate(tokens[1:], 1))
    assert probes_shown >= 194  # of 200: about one in a hundred has no place for it


def test_motifs_are_uniform_over_ordered_tuples():
    found = mad._motifs(np.random.default_rng(0), (6000, 4), 5, 9)
    codes, counts = np.unique(found.reshape(-1, 3) @ [100, 10, 1], return_counts=True)
    assert len(codes) == 24
    assert abs(counts / 1000 - 1).max() < 0.15
    assert found.min() == 5


@pytest.mark.parametrize("setting", ["baseline", "copy=96", "vocab=32"])
def test_copying_answers_with_the_tokens_in_their_order(setting):
    task, sizes = mad.task("copying", setting, **SMALL), mad.settings("copying")[setting]
    copy, blank, mark = int(sizes["copy"]), task.vocab - 2, task.vocab - 1
    for inputs, targets in rows(task.train):
        assert len(inputs) == 256
        assert inputs[-copy - 1] == mark
        assert inputs[-copy:] == [blank] * copy
        body = inputs[: -copy - 1]
        assert body[-1] < blank  # no blank after the last token
        assert [y for y in body if y != blank] == targets[-copy:]
        assert set(targets[:-copy]) == {IGNORED}


def test_copying_spreads_its_blanks_evenly():
    inputs = mad.task("copying", train=2000, test=1).train.inputs[:, :239]
    first = (inputs < 14).int().argmax(1).double()
    assert abs(first.mean() - 223 / 16) < 0.5


def test_compression_asks_for_the_input():
    task = mad.task("compression", "length=64", **SMALL)
    assert task.train.inputs.shape == (200, 64)
    assert torch.equal(task.train.inputs, task.train.targets)
    assert (task.train.inputs[:, -1] == 15).all()
    assert (task.train.inputs[:, :-1] < 15).all()
    assert not task.causal
    assert mad.task("recall", **SMALL).causal


def test_memorization_has_one_map_for_train_and_test():
    task = mad.task("memorization")
    assert task.train.inputs.shape == (256, 32)
    assert len(task.tests["test"]) == 1280
    seen = [{}, {}]
    for known, part in zip(seen, (task.train, task.tests["test"])):
        assert (part.inputs[:, 1::2] == 255).all()
        assert (part.targets[:, 0::2] == IGNORED).all()
        for inputs, targets in rows(part):
            for key, value in zip(inputs[0::2], targets[1::2]):
                assert known.setdefault(key, value) == value
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == list(range(127))
    assert len(set(seen[0].values())) == 127  # one to one
    assert min(seen[0].values()) >= 127
    other = mad.task("memorization", seed=1)
    assert mad.memorization_map(256).tolist() != mad.memorization_map(256, 1).tolist()
    assert not torch.equal(other.train.inputs, task.train.inputs)


@pytest.mark.parametrize("name", mad.MAD)
def test_the_seed_alone_decides_and_train_and_test_differ(name):
    one, same, other = (mad.task(name, train=20, test=20, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert torch.equal(one.tests["test"].targets, same.tests["test"].targets)
    assert not torch.equal(one.train.inputs, other.train.inputs)
    assert not torch.equal(one.train.inputs, one.tests["test"].inputs)
    fewer = mad.task(name, train=20, test=3, seed=5)  # the test's size leaves the training set
    assert torch.equal(fewer.train.inputs, one.train.inputs)


def test_settings_are_the_benchmarks():
    assert {name: len(mad.settings(name)) for name in mad.MAD} == {
        "compression": 11,
        "recall": 11,
        "fuzzy": 11,
        "copying": 13,
        "memorization": 6,
        "noisy": 14,
    }
    assert mad.settings("copying")["copy=32"] == {
        "vocab": 16, "length": 256, "train": 12_800, "copy": 32
    }  # fmt: skip
    with pytest.raises(ValueError, match="'vocab=9' of recall is unknown"):
        mad.task("recall", "vocab=9")
    with pytest.raises(ValueError, match="'sorting' is unknown"):
        mad.task("sorting")


class Noise:
    def logits(self, ids):
        return torch.rand(*ids.shape, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in mad.MAD if name != "memorization"])
def test_chance_is_one_in_the_classes(name):
    task = mad.task(name, train=1, test=400)
    assert score(Noise(), task)["test"] == pytest.approx(100 / task.classes, rel=0.2, abs=0.3)


class Reader:
    """A perfect recaller: looks the key up in what it has read."""

    def logits(self, ids):
        said = torch.zeros(*ids.shape, dtype=torch.int64)
        for row, out in zip(ids.tolist(), said):
            known = {}
            for at, token in enumerate(row):
                out[at] = known.get(token, 0)
                if at % 2:
                    known[row[at - 1]] = token
        return torch.nn.functional.one_hot(said, 16).float()


def test_a_perfect_recaller_scores_100():
    task = mad.task("recall", **SMALL)
    assert score(Reader(), task)["test"] == 100


@pytest.mark.parametrize("name", mad.MAD)
def test_validation_sequences_are_of_another_draw_of_one_map(name):
    task = mad.task(name, train=8, test=8)
    held, tested = task.validation["test"], task.tests["test"]
    assert held.inputs.shape == tested.inputs.shape
    assert not torch.equal(held.inputs, tested.inputs)
    if name == "memorization":
        values = mad.memorization_map(task.vocab)
        asked = held.targets[:, 1::2]
        assert torch.equal(asked, torch.from_numpy(values)[held.inputs[:, 0::2]])
