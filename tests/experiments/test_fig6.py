"""Classes that arrive in groups: the sets, and every row through the runner."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

from nestlearn import state as tree
from nestlearn.evals import classes
from nestlearn.experiments import fig6, runner
from nestlearn.learn.answers import mean

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import DATA, pretrained


@pytest.fixture
def folder(tmp_path):
    """A model of random weights, and two dozen classes as CLINC150 ships them."""
    pretrained(tmp_path / "model")
    (tmp_path / "clinc150").mkdir()
    pairs = [
        [f"text {n} of {c}", f"class_{c}"] for c in "abcdefghijklmnopqrstuvwx" for n in range(6)
    ]
    with gzip.open(tmp_path / "clinc150" / "data_full.json.gz", "wt", encoding="utf-8") as file:
        json.dump({"train": pairs, "test": pairs}, file)
    return tmp_path


def test_classes_are_dealt_in_an_order_and_texts_are_not_shared(folder):
    small = {"train": 4, "validation": 1, "test": 2}
    every = classes.groups(folder, "CLINC150", 0, **small)
    labels = [label for group in every for label in group.labels]
    assert len(every) == 15
    assert sorted(labels) == sorted(f"class {c}" for c in "abcdefghijklmnopqrstuvwx")
    assert labels != [x for g in classes.groups(folder, "CLINC150", 1, **small) for x in g.labels]
    assert every == classes.groups(folder, "CLINC150", 0, **small)
    for group in every:
        assert len(group.train) == 4 * len(group.labels)
        assert not set(group.train) & set(group.validation)
        assert {t.label for t in group.test} == set(group.labels)
    with pytest.raises(ValueError, match="ask for fewer"):
        classes.groups(folder, "CLINC150", 0)


@pytest.mark.skipif(not (DATA / "clinc150").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(("name", "count"), [("CLINC150", 150), ("Banking77", 77), ("DBpedia", 14)])
def test_the_published_sets_are_read(name, count):
    every = classes.groups(DATA, name, 0, train=20)
    assert sum(len(group.labels) for group in every) == count
    assert all("_" not in label and label == label.lower() for g in every for label in g.labels)


def test_every_row_learns_and_is_measured_after_every_group(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fig6.Reader, "longest", 3)
    monkeypatch.setattr(fig6.OfBytes, "longest", 3)
    monkeypatch.setattr(fig6.Trained, "epochs", 1)
    text = runner.run(
        "fig6", tmp_path / "out", data=str(folder), quick=True, workers=0, progress=False,
        device="cpu", only=["CLINC150"],
    )  # fmt: skip
    for row in fig6.ROWS:
        assert f"| CLINC150 | {row} | " in text
    records = runner.read_records(tmp_path / "out" / "results.json")
    assert all([len(row) for row in r.detail["matrix"]] == [1, 2] for r in records)
    assert (tmp_path / "out" / "fig6.png").is_file()


@pytest.mark.parametrize(
    "how", ["adam", "ewc", "replay", "study", "unread", "levels", "depth", "joint"]
)
def test_what_learns_says_the_class_of_what_it_learned(folder, how):
    """Random weights and a large rate: the class of the last texts comes to stand first."""
    torch.manual_seed(0)
    learner = fig6.Learner(folder, "cpu", how, 0.5 if how in ("levels", "depth") else 3e-2, 0)
    every = classes.groups(folder, "CLINC150", 0, train=4, validation=1, test=2, most=2)
    group = every[0]
    with torch.no_grad():
        told = [learner._example(text) for text in group.train]
        before = mean(learner.stacked, {}, told)
    for _ in range(6):
        learner.learn(group)
    with torch.no_grad():
        after = mean(learner.stacked, learner.stacked.weights(learner.memory), told)
    assert after < 0.9 * before
    assert learner.bytes > 0


@pytest.mark.parametrize(("kind", "dial"), [(fig6.Cosine, 1.0), (fig6.Probe, 0.1)])
def test_frozen_classifiers_tell_classes_apart_that_differ(folder, kind, dial, monkeypatch):
    monkeypatch.setattr(fig6, "EPOCHS", 30)
    group = classes.groups(folder, "CLINC150", 0, train=4, validation=1, test=2, most=2)[1]
    learner = kind(folder, "cpu", "", dial, 0)
    learner.learn(group)
    said = learner.said([text.text for text in group.train])
    assert [text.label for text in group.train] == said


@pytest.mark.parametrize("how", ["adam", "ewc", "replay"])
def test_a_small_hope_learns_the_classes_of_a_group(folder, how, monkeypatch):
    monkeypatch.setattr(fig6.Trained, "epochs", 3)
    monkeypatch.setattr(fig6.Trained, "longest", 12)  # bytes: a label and the line's end
    torch.manual_seed(0)
    learner = fig6.Trained(folder, "cpu", how, 3e-3, 0)
    one, two = classes.groups(folder, "CLINC150", 0, train=4, validation=1, test=2, most=2)
    before = learner._run(*learner._laid(two.train, len(two.train)))
    gradients = [w.grad for w in learner.weights]
    filled = learner._run(*learner._laid(two.train, len(two.train) + 3))  # as on a card
    assert float(filled) == pytest.approx(float(before), rel=1e-5)
    torch.testing.assert_close([w.grad for w in learner.weights], gradients, rtol=1e-3, atol=1e-6)
    learner.learn(one)
    assert learner.said([one.test[0].text])[0] in one.labels
    learner.learn(two)
    assert learner._run(*learner._laid(two.train, len(two.train))) < 0.3 * before
    assert {t.label for t in learner.kept} == {*one.labels, *two.labels}
    assert learner.bytes > 4 * learner.base.parameter_count() - 1


def test_a_small_hopes_hidden_states_tell_classes_apart(folder):
    group = classes.groups(folder, "CLINC150", 0, train=4, validation=1, test=2, most=2)[1]
    learner = fig6.HopeCosine(folder, "cpu", "", 1.0, 0)
    learner.learn(group)
    said = learner.said([text.text for text in group.train])
    assert [text.label for text in group.train] == said


def test_a_carried_state_is_asked_and_not_changed(folder, monkeypatch):
    monkeypatch.setattr(fig6.OfBytes, "longest", 6)
    learner = fig6.Carried(folder, "cpu", "", 2, 0)
    group = classes.groups(folder, "CLINC150", 0, train=4, validation=1, test=2, most=2)[0]
    learner.learn(group)
    before = tree.tree_map(torch.clone, learner.state)
    first = learner.said([text.text for text in group.test])
    tree.tree_map(torch.testing.assert_close, before, learner.state)
    assert learner.said([text.text for text in group.test]) == first
    mixed = [group.test[0].text, "long " * 30, *(t.text for t in group.test)]
    assert learner.said(mixed)[2:] == first  # whatever is asked beside it
    learner.state = None
    assert learner.said([text.text for text in group.test]) != first
