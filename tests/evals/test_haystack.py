"""Facts in haystacks of bytes: exact lengths, facts in their places, nothing shared with tests."""

import re

import numpy as np
import pytest

from nestlearn.evals import babilong, needles, ruler
from nestlearn.evals.haystack import as_bytes, cut, ends, hide, repeated

WORDS = needles.Words(tuple(f"adj{i}" for i in range(20)), tuple(f"noun{i}" for i in range(30)))
TEXT = as_bytes(" ".join(f"Sentence {n} is told here, on page {n}." for n in range(9000)).encode())
STORY = babilong.parsed(
    "1 Mary moved to the garden.\n2 John went to the office.\n3 Where is Mary? \tgarden\t1\n"
    "4 Mary went to the kitchen.\n5 Where is Mary? \tkitchen\t4\n"
    "1 Sandra moved to the bedroom.\n2 Where is Sandra? \tbedroom\t1\n"
)
LONG = 1_048_576


@pytest.mark.parametrize("name", ruler.NAMES)
@pytest.mark.parametrize("length", [1500, 4096, 20_001])
@pytest.mark.parametrize("ahead", [False, True])
def test_needles_are_there_once_at_exact_length(name, length, ahead):
    found = ruler.sample(name, length, WORDS, TEXT, 3, ahead=ahead)
    task = needles.TASKS[name]
    assert len(found.text) == length
    assert found == ruler.sample(name, length, WORDS, TEXT, 3, ahead=ahead)
    assert found != ruler.sample(name, length, WORDS, TEXT, 4, ahead=ahead)
    text, asked = found.text.decode(), found.question.decode()
    assert text.count("One of the special magic") == task.keys * task.values
    assert len(found.answers) == task.queries * task.values
    for answer in found.answers:
        assert text.count(answer) == 1
        key = text[: text.index(answer)].split(" for ")[-1].removesuffix(" is: ")
        assert key in asked
        assert (text.startswith("What") and key in text.split("?")[0]) == ahead
    assert ruler.score(found, ruler.said(found.answers)) == 1
    assert ruler.score(found, " none.") == 0


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["S-NIAH-1", "S-NIAH-3", "MK-NIAH-1"])
def test_the_needle_stands_at_its_depth(name, depth):
    found = ruler.sample(name, 20_000, WORDS, TEXT, 0, depth=depth)
    assert found.text.index(found.answers[0].encode()) / 20_000 == pytest.approx(depth, abs=0.02)


def test_a_million_bytes_are_made_in_a_second():
    assert len(ruler.sample("MK-NIAH-1", LONG, WORDS, TEXT, 0, depth=0.5).text) == LONG


def test_words_to_train_on_are_none_to_test_on():
    one, two = ruler.parted(WORDS)
    for own, other, whole in zip(one, two, WORDS):
        assert not set(own) & set(other)
        assert sorted(own + other) == sorted(whole)
        assert other


@pytest.mark.parametrize("length", [193, 257, 385, 640, 4097])
@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_rows_have_exact_lengths_and_mark_answers_that_were_told(length, dense):
    rng = np.random.default_rng(length)
    for _ in range(60):
        row = ruler.row(length, WORDS, TEXT, rng, dense)
        assert row.ids.shape == row.asked.shape == row.hay.shape == (length,)
        assert row.asked.any()
        assert not (row.asked & row.hay).any()
        told = bytes(row.ids[~row.hay]).decode(errors="ignore")
        for begin, end in _spans(row.asked):
            said = bytes(row.ids[begin:end]).decode()
            assert row.ids[begin - 1] == ord(" ")
            assert said.endswith(".")
            for value in said[:-1].replace("and ", "").split(", "):
                assert f"is: {value}." in bytes(row.ids[:begin]).decode(errors="ignore")
                assert f"is: {value}." in told


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_rows_to_train_on_have_numbers_in_the_haystack(dense):
    plain, rng = as_bytes(b"No digit is told here, on any page. " * 999), np.random.default_rng(0)
    rows = [bytes(ruler.row(4097, WORDS, plain, rng, dense).ids) for _ in range(20)]
    # in a word of the book, where neither a needle nor a question has one
    assert sum(bool(re.search(rb"No \d|digit \d|told \d|on any \d", row)) for row in rows) > 8


def test_questions_have_none():
    plain, rng = as_bytes(b"No digit is told here, on any page. " * 999), np.random.default_rng(0)
    held = [ruler.numbered(plain[:4096], rng) for _ in range(20)]
    numbers = [(hay >= 48) & (hay < 58) for hay in held]
    assert all(((hay != plain[:4096]) == there).all() for hay, there in zip(held, numbers))
    counts = [int(there.sum()) for there in numbers]
    assert min(counts) < 20 < 150 < max(counts) <= 64 * 7
    asked = ruler.sample("S-NIAH-2", 4096, WORDS, plain, 0)
    told = asked.text.decode().replace(asked.answers[0], "").split("number")
    assert not any(c.isdigit() for part in told for c in part[40:])  # beyond a key of the tests


def test_a_drill_asks_for_what_stands_there_again():
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = ruler.drill(257, WORDS, rng)
        assert row.ids.shape == row.asked.shape == (257,)
        for begin, end in _spans(row.asked):
            said = bytes(row.ids[begin:end])
            assert said in bytes(row.ids[:begin])


def _spans(asked):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], asked.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2]))


def test_pieces_go_where_sentences_end_in_their_order():
    hay = as_bytes(b"One. Two. Three. Four.")
    assert ends(hay).tolist() == [0, 5, 10, 17]
    row, depths = hide(
        hay, [ruler.Piece(b"B. ", 0.5), ruler.Piece(b"A. ", 0.4, (0, 1)), ruler.Piece(b" C.", 1.0)]
    )
    assert bytes(row.ids) == b"One. Two. A. B. Three. Four. C."
    assert np.flatnonzero(row.asked).tolist() == [10]
    assert bytes(row.ids[row.hay]) == bytes(hay)
    assert depths[2] == 1.0
    assert len(repeated("a b.", 33)) == 33
    assert len(cut(as_bytes(b"tiny text"), 500, np.random.default_rng(0))) == 500


def test_stories_are_hidden_in_order_and_asked():
    assert [len(story) for story in STORY] == [5, 2]
    for seed in range(20):
        found = babilong.sample("qa1", 3000, STORY, TEXT, seed, ahead=bool(seed % 2))
        text = found.text.decode()
        assert len(found.text) == 3000
        asked = found.question.decode().strip().removesuffix(" Answer:")
        story = next(s for s in STORY if any(line.text == asked for line in s))
        at = next(i for i, line in enumerate(story) if line == (asked, *found.answers))
        facts = [line.text for line in story[:at] if line.answer is None]
        places = [text.index(fact) for fact in facts]
        assert places == sorted(places)
        assert all(text.count(fact) == 1 for fact in facts)
        assert babilong.score(found, f" {found.answers[0]}.\nOther", "qa1") == 1
        assert babilong.score(found, " office or garden", "qa1") == 0
    with pytest.raises(ValueError, match="no story of qa1 fits"):
        babilong.sample("qa1", 10, STORY, TEXT, 0)


@pytest.mark.parametrize("hay", [0.02, 0.8])
def test_rows_of_stories_have_exact_lengths(hay):
    rng = np.random.default_rng(1)
    asked = 0
    for _ in range(20):
        row = babilong.row(1025, STORY, TEXT, rng, hay)
        assert row.ids.shape == row.asked.shape == (1025,)
        asked += row.asked.any()
        for begin, end in _spans(row.asked):
            assert bytes(row.ids[begin - 9 : begin]) == b" Answer: "
            assert bytes(row.ids[begin:end]) in (b"ga", b"ki", b"be")
    assert asked == 20
