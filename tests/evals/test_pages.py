"""Pages of invented facts: what they say can be asked, and what is asked is said or is not."""

import re

import pytest

from nestlearn.evals import closed_book
from nestlearn.evals.closed_book import ABSENT, DIRECT, HELD_OUT, KINDS, PARAPHRASE, TWO_STEP


def said(word, text):
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_says_what_is_asked(kind):
    for seed in range(5):
        page = closed_book.document(kind, seed)
        assert page == closed_book.document(kind, seed)
        assert page.name in page.text
        forms = [question.form for question in page.questions]
        assert (forms.count(DIRECT), forms.count(PARAPHRASE)) == (12, 12)
        assert forms.count(TWO_STEP) >= 1
        assert forms.count(ABSENT) == 4
        answers = [q.answer for q in page.questions if q.form == DIRECT]
        assert len(set(answers)) == 12
        for question in page.questions:
            if question.form == ABSENT:
                assert question.answer is None
            else:
                assert said(question.answer, page.text)
                assert not said(question.answer, question.text)
            if question.form in (DIRECT, PARAPHRASE):
                assert page.name in question.text
            if question.form == TWO_STEP:  # by another answer of the page, never by its name
                assert page.name not in question.text
                assert any(said(answer, question.text) for answer in answers)
    assert closed_book.document(kind, 0).text != closed_book.document(kind, 1).text


def test_a_later_page_changes_some_facts_and_asks_for_these():
    page = closed_book.document("town", 3)
    news = closed_book.document("town", 4, before=page, changed=3)
    changed = {key for key in page.facts if page.facts[key] != news.facts[key]}
    assert len(changed) == 3
    assert page.name == news.name
    asked = {q.answer for q in news.questions}
    assert asked == {news.facts[key] for key in changed}
    assert all(said(word, news.text) and not said(word, page.text) for word in asked)


def test_many_pages_are_of_all_kinds_and_of_different_names():
    pages = closed_book.documents(tuple(KINDS), 60)
    assert len({page.name for page in pages}) == 60
    assert [page.kind for page in pages[:5]] == list(KINDS)
    assert set(HELD_OUT) < set(KINDS)
    with pytest.raises(ValueError, match="kind 'song'"):
        closed_book.document("song", 0)


def test_an_answer_is_right_if_its_word_is_in_what_is_said():
    asked = closed_book.Question("Who?", "Bram", DIRECT)
    assert closed_book.right(asked, "The mayor is bram.")
    assert not closed_book.right(asked, "Brambles")
    absent = closed_book.Question("What does it cost?", None, ABSENT)
    assert closed_book.right(absent, "The text does not say.")
    assert not closed_book.right(absent, "It costs 40 francs.")
