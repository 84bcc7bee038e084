"""Needles in long texts: what is hidden, how long it gets, what counts as an answer."""

import re

import pytest

from nestlearn.evals import needles

WORDS = needles.Words(("blue", "old", "tiny", "loud"), ("fox", "lamp", "river", "stone", "cart"))
TEXT = " ".join(f"This is sentence number {n} of a tale." for n in range(300))


def count(text):
    return len(text.split())


def made(name, length=600, seed=0):
    return needles.sample(name, length, WORDS, count, seed, TEXT)


@pytest.mark.parametrize("name", needles.TASKS)
def test_every_needle_is_there_once_and_the_length_is_kept(name):
    task = needles.TASKS[name]
    for length in (300, 600, 4000):
        found = made(name, length)
        assert length - 40 <= count(found.prompt) + needles.ROOM <= length
        assert len(found.answers) == task.queries * task.values
        for answer in found.answers:
            assert found.context.count(answer) == 1
            assert answer not in found.question
            sentence = next(s for s in re.split(r"(?<=\.)\s", found.context) if answer in s)
            key = sentence.split(" for ")[1].split(" is: ")[0]
            assert key in found.question
        hidden = len(re.findall("One of the special magic", found.context))
        wanted = task.keys * task.values
        assert hidden == wanted if task.haystack != "needles" else hidden > wanted
        assert len(found.depths) == wanted


def test_a_seed_is_a_sample_and_keys_differ():
    assert made("MQ-NIAH") == made("MQ-NIAH")
    assert made("MQ-NIAH") != made("MQ-NIAH", seed=1)
    asked = made("MQ-NIAH").question
    keys = {f"{a}-{n}" for a in WORDS.adjectives for n in WORDS.nouns}
    assert sum(f"{key}," in asked or f" {key} mentioned" in asked for key in keys) == 4


def test_the_words_say_whether_one_or_several_are_asked_for():
    assert made("S-NIAH-1").question.startswith("What is the special magic number for ")
    assert made("S-NIAH-3").before.startswith("A special magic uuid is hidden")
    assert made("MV-NIAH").question.startswith("What are all the special magic numbers for ")
    assert made("MV-NIAH").question.endswith("mentioned in the provided text are")


def test_places_of_needles_cover_the_haystack():
    depths = [d for seed in range(60) for d in made("S-NIAH-2", seed=seed).depths]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_the_score_is_the_share_of_answers_in_what_was_said():
    asked = made("MV-NIAH")
    assert needles.score(asked, " ".join(asked.answers)) == 1
    assert needles.score(asked, f"It is {asked.answers[0]}.") == 0.25
    one = made("S-NIAH-3")
    assert needles.score(one, one.answers[0].upper()) == 1
    assert needles.score(one, "") == 0


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use one of S-NIAH-1"):
        made("NIAH")
    with pytest.raises(ValueError, match="hides its needles in a text"):
        needles.sample("S-NIAH-2", 600, WORDS, count, 0)
    with pytest.raises(ValueError, match=r"length=150: no room"):
        made("MK-NIAH-1", 150)
    with pytest.raises(FileNotFoundError):
        needles.Words.read(tmp_path)
