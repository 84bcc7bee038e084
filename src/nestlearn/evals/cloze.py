"""What a book has said before, asked again: strings that stand in it twice, far apart.

A string is PREFIX bytes, with a space at their end, and a word of 4 letters or more. From its first
time to its second neither of the two stands anywhere else. What is read goes from shortly before
the first time up to the word of the second, which is to be said. Beside it stands the same text
with other bytes of the book over the first time: so much the language alone lets guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .files import evenly

PREFIX, LEAD = 12, 256  # bytes; LEAD: that are read before the first time
_WORD = re.compile(rb"(?<= )[A-Za-z]{4,}")


class Again(NamedTuple):
    """text, without: what is read, with the first time and without, of one length in bytes. word:
    what is to be said. distance: bytes from the first time to the second.
    """

    text: bytes
    without: bytes
    word: bytes
    distance: int


def repeats(text: bytes, near: int, far: int, most: int) -> list[Again]:
    """At most so many repeats, from even places of a text, from `near` to less than `far` bytes
    apart. A form feed parts the text's books.
    """
    found = [one for book in text.split(b"\f") for one in _of_book(book, near, far)]
    return evenly(found, most)


def _of_book(book: bytes, near: int, far: int) -> Iterator[Again]:
    last: dict[bytes, int] = {}
    for match in _WORD.finditer(book, PREFIX):
        word, at = match.group(), match.start() - PREFIX
        prefix, size = book[at : match.start()], PREFIX + len(word)
        first, last[prefix + word] = last.get(prefix + word), at
        if first is None or not near <= at - first < far or first < LEAD + size:
            continue
        begin = first - LEAD
        read = book[begin : match.start()]
        other = book[begin - size : begin]
        without = read[:LEAD] + other + read[LEAD + size :]
        if [t.count(part) for t in (read, without) for part in (word, prefix)] == [1, 2, 0, 1]:
            yield Again(read, without, word, at - first)
