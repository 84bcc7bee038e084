"""Formal languages: the strings, what is asked of them, and how they are split."""

import numpy as np
import pytest
import torch

from nestlearn.evals import IGNORED, accuracy, formal, predict

SMALL = {"train": 300, "test": 60}


def strings(examples):
    return [tuple(row[:n].tolist()) for row, n in zip(examples.inputs, examples.lengths)]


def target(name, text):
    letters = {c: i for i, c in enumerate("()[]" if name == "shuffle2" else "abc")}
    x = np.array([letters.get(c, int(c) if c.isdigit() else 0) for c in text])
    return "".join(map(str, formal.LANGUAGES[name].target(x)))


@pytest.mark.parametrize(
    ("name", "text", "asked"),
    [
        ("parity", "0110110", "1011011"),
        ("aa", "aaaaaa", "010101"),
        ("abab", "abababab", "00010001"),
        ("anbn", "aaabbb", "000112"),
        ("anbn", "ab", "02"),
        ("anbncn", "aabbcc", "001223"),
        ("anbncn", "abc", "023"),
        # bits: some ( is open, some [ is open
        ("shuffle2", "([)]", "2310"),
        ("shuffle2", "(())[[]]", "22201110"),
    ],
)
def test_targets_by_hand(name, text, asked):
    assert target(name, text) == asked


def belongs(name, string):
    x = np.array(string)
    n = len(x)
    if name == "parity":
        return x.sum() % 2 == 0
    if name in ("aa", "abab"):
        block = [0, 0] if name == "aa" else [0, 1, 0, 1]
        return n % len(block) == 0 and list(x) == block * (n // len(block))
    if name in ("anbn", "anbncn"):
        k = len(name) // 2
        return list(x) == [letter for letter in range(k) for _ in range(n // k)]
    return all(
        ((x == 2 * i) * 1 - (x == 2 * i + 1)).cumsum().min() >= 0
        and (x == 2 * i).sum() == (x == 2 * i + 1).sum()
        for i in range(2)
    )


@pytest.mark.parametrize("name", formal.LANGUAGES)
def test_every_string_is_in_the_language_and_in_its_range(name):
    task, language = formal.task(name, **SMALL), formal.LANGUAGES[name]
    for part, (low, high) in (
        (task.train, language.lengths),
        (task.tests["bin0"], language.lengths),
        (task.tests["bin1"], language.longer),
    ):
        assert all(belongs(name, s) for s in strings(part))
        assert low <= int(part.lengths.min())
        assert int(part.lengths.max()) <= high
        assert torch.equal(
            part.targets == IGNORED, torch.arange(part.inputs.shape[1]) >= part.lengths[:, None]
        )
        if part is not task.train:
            assert len(set(strings(part))) == len(part)
    assert task.metric == "sequence"
    if name in ("parity", "shuffle2"):
        assert len(task.train) == 300
        assert len(set(strings(task.train)) | set(strings(task.tests["bin0"]))) == 360
        assert len(task.tests["bin1"]) == 60


def test_sizes_are_the_papers():
    sizes = {
        "aa": (250, 250, 50),
        "abab": (125, 125, 25),
        "anbn": (50, 50, 50),
        "anbncn": (50, 50, 50),
    }
    for name, expected in sizes.items():
        task = formal.task(name)
        assert (len(task.train), *map(len, task.tests.values())) == expected
    assert sorted(formal.task("aa").tests["bin1"].lengths.tolist()) == list(range(502, 601, 2))
    for name in ("parity", "shuffle2"):
        language = formal.LANGUAGES[name]
        assert (language.train, language.test) == (10_000, 2_000)
        assert (language.lengths, language.longer) == ((2, 50), (52, 100))


@pytest.mark.parametrize("name", formal.LANGUAGES)
def test_the_seed_alone_decides(name):
    one, same, other = (formal.task(name, **SMALL, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert strings(one.tests["bin1"]) == strings(same.tests["bin1"])
    assert strings(one.train) != strings(other.train)


def test_parity_strings_are_as_long_as_the_construction_makes_them():
    lengths = formal.task("parity", train=4000, test=1).train.lengths.double()
    assert 24 < lengths.mean() < 31  # the mean of a geometric law of mean 26, cut to [2, 50]
    bits = torch.tensor(
        [b for s in strings(formal.task("parity", train=2000, test=1).train) for b in s]
    )
    assert 0.48 < bits.double().mean() < 0.55  # the 1 appended to odd strings


class Rule:
    """A model that knows the language: an automaton in place of a network."""

    def __init__(self, name, wrong_at=None):
        self.language, self.wrong_at = formal.LANGUAGES[name], wrong_at

    def logits(self, ids):
        said = torch.stack([torch.from_numpy(self.language.target(row.numpy())) for row in ids])
        if self.wrong_at is not None:
            said[:, self.wrong_at] = (said[:, self.wrong_at] + 1) % self.language.classes
        return torch.nn.functional.one_hot(said, self.language.classes).float()


@pytest.mark.parametrize("name", ["parity", "aa", "abab", "shuffle2"])
def test_a_perfect_model_scores_100_and_one_slip_costs_the_string(name):
    test = formal.task(name, **SMALL).tests["bin0"]

    def scored(model):
        return accuracy(
            predict(model, test.inputs, model.language.classes), test.targets, "sequence"
        )

    assert scored(Rule(name)) == 100
    assert scored(Rule(name, wrong_at=1)) == 0


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="'dyck' is unknown: use one of"):
        formal.task("dyck")
    with pytest.raises(ValueError, match="test=0: give 1"):
        formal.task("parity", test=0)


@pytest.mark.parametrize("name", formal.LANGUAGES)
def test_validation_strings_are_of_another_draw(name):
    """None of bin0's is trained on or tested, where the language has others."""
    task = formal.task(name, train=40, test=10)
    assert task.validation.keys() == task.tests.keys()

    def strings(examples):
        return {tuple(row[:n].tolist()) for row, n in zip(examples.inputs, examples.lengths)}

    if formal.LANGUAGES[name].repeats:
        assert len(strings(task.validation["bin0"])) == 10
    else:
        assert not strings(task.validation["bin0"]) & strings(task.train)
        assert strings(task.validation["bin1"]) != strings(task.tests["bin1"])
        assert not strings(task.validation["bin0"]) & strings(task.tests["bin0"])
