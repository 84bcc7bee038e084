"""Repeats: a string twice, far apart, and nothing else of it between; without its first time."""

import random

import pytest

from nestlearn.evals.cloze import LEAD, PREFIX, repeats

LINE = b"they say that Heathcliff"  # the last 12 bytes before the word are b"ey say that "
draw = random.Random(0)
FILL = [b" ".join(b"%d" % draw.randrange(10**6) for _ in range(90)) for _ in range(9)]  # 600 bytes


def book(*between, before=FILL[0]):
    return before + b"\n" + LINE + b" " + b" ".join(between) + b" " + LINE + b" is away."


def test_both_times_are_found_and_the_first_is_taken_away():
    text = book(FILL[1])
    (one,) = repeats(text, 500, 2000, 10)
    assert one.word == b"Heathcliff"
    assert one.distance == len(LINE) + len(FILL[1]) + 2
    assert one.text == text[text.index(LINE) + len(LINE) - PREFIX - 10 - LEAD : text.rindex(b"Hea")]
    assert len(one.without) == len(one.text)
    assert one.text.count(b"Heathcliff") == 1
    assert b"Heathcliff" not in one.without
    differ = [a != b for a, b in zip(one.text, one.without)]
    assert not any(differ[:LEAD])
    assert not any(differ[LEAD + PREFIX + 10 :])  # and the second prefix stands


@pytest.mark.parametrize(
    "text",
    [
        book(FILL[1], b"a letter of Heathcliff's", FILL[2]),  # the word between
        book(FILL[1], b"they say that you", FILL[2]),  # the prefix between
        book(FILL[1], before=b"Heathcliff " + FILL[0][:LEAD]),  # the word in the lead
        book(FILL[1], before=b"short"),
        book(FILL[1]).replace(b"Heathcliff is", b"Heathcliffs"),  # another word
        book(FILL[1] + b"\f" + FILL[2]),  # two books
        book(b"near"),
        book(*FILL[1:5]),  # far
    ],
)
def test_what_is_no_repeat(text):
    assert repeats(text, 500, 2000, 10) == []


def test_what_stands_between_does_not_matter():
    assert len(repeats(book(FILL[1], b"a letter of his", FILL[2]), 500, 2000, 10)) == 1


def test_the_edges_and_even_places():
    text = book(FILL[1])
    (one,) = repeats(text, 0, 10**6, 10)
    assert repeats(text, one.distance, one.distance + 1, 10) == [one]
    assert repeats(text, one.distance + 1, 10**6, 10) == []
    words = [b"Abcd", b"Efgh", b"Ijkl", b"Mnop"]
    many = b"\f".join(book(FILL[1]).replace(b"Heathcliff", word) for word in words)
    assert [one.word for one in repeats(many, 500, 2000, 9)] == words
    assert [one.word for one in repeats(many, 500, 2000, 2)] == words[::2]
