"""Facts hidden in long texts, in bytes: what RULER's needles and BABILong have in common.

A haystack is cut to the byte, facts go in where its sentences end, and the whole has exactly the
length that was asked for. A `Row` is one sequence to train on, an `Asked` one question to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Piece(NamedTuple):
    """Something to put into a haystack. answer: the part of it, [from, to), that is asked for; or
    None. at: where in the haystack it goes, in [0, 1].
    """

    text: bytes
    at: float
    answer: tuple[int, int] | None = None


class Row(NamedTuple):
    """ids uint8 [N]: a sequence to train on. asked bool [N]: its bytes that answer a question. hay
    bool [N]: those of a haystack, of which nothing is ever asked.
    """

    ids: Bytes
    asked: NDArray[np.bool_]
    hay: NDArray[np.bool_]

    @classmethod
    def plain(cls, ids: Bytes) -> Row:
        """A haystack alone."""
        return cls(ids, np.zeros(len(ids), bool), np.ones(len(ids), bool))


class Asked(NamedTuple):
    """text: what is read, of exactly the length that was asked for. question: what follows it, up
    to where the answer begins. answers: all that is to be said. depths: where the facts stand, as
    shares of the haystack.
    """

    text: bytes
    question: bytes
    answers: tuple[str, ...]
    depths: tuple[float, ...]


def as_bytes(text: bytes) -> Bytes:
    """The bytes as an array that can be written to."""
    return np.frombuffer(bytearray(text), np.uint8)


def cut(text: Bytes, size: int, rng: np.random.Generator) -> Bytes:
    """A random part of `size` bytes, from the beginning of a word on; a short text is repeated."""
    if len(text) <= size + 64:
        text = np.tile(text, (size + 64) // max(1, len(text)) + 1)
    start = int(rng.integers(len(text) - size - 63))
    space = np.flatnonzero(text[start : start + 64] == 32)
    start += int(space[0]) + 1 if len(space) else 0
    return text[start : start + size]


def repeated(line: str, size: int) -> Bytes:
    """The line again and again, `size` bytes of it."""
    return np.resize(as_bytes(f"{line}\n".encode()), size)


def ends(text: Bytes) -> NDArray[np.int64]:
    """Where its sentences, or lines, have ended: the places at which another may stand."""
    stop = np.isin(text[:-1], np.frombuffer(b".!?", np.uint8))
    gap = (text[1:] == 32) | (text[1:] == 10)
    found = np.flatnonzero(stop & gap) + 2
    return np.concatenate([[0], found[found < len(text)]]).astype(np.int64)


def hide(hay: Bytes, pieces: Sequence[Piece]) -> tuple[Row, tuple[float, ...]]:
    """The haystack with the pieces, in the order of their places and else as given: of exactly the
    bytes of all together; and where in the haystack each piece came to stand, in that order.
    """
    marks, parts, depths, last = ends(hay), [], [], 0
    for piece in sorted(pieces, key=lambda piece: piece.at):
        place = _nearest(marks, piece.at * len(hay)) if piece.at < 1 else len(hay)
        asked = np.zeros(len(piece.text), bool)
        asked[slice(*(piece.answer or (0, 0)))] = True
        told = Row(np.frombuffer(piece.text, np.uint8), asked, np.zeros(len(asked), bool))
        parts += [Row.plain(hay[last:place]), told]
        depths.append(place / max(1, len(hay)))
        last = place
    parts.append(Row.plain(hay[last:]))
    return Row(*map(np.concatenate, zip(*parts))), tuple(depths)


def _nearest(marks: NDArray[np.int64], place: float) -> int:
    i = int(np.searchsorted(marks, place))
    near = marks[max(0, i - 1) : i + 1]
    return int(near[np.abs(near - place).argmin()])
