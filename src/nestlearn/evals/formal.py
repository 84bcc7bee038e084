"""Formal languages: parity, (aa)*, (abab)*, aⁿbⁿ, aⁿbⁿcⁿ, Shuffle-2 (paper: section 9.5, table 5).

Constructions of Bhattamishra et al. (2020), form of the task of Irie, Csordás and Schmidhuber
(EMNLP 2023): only strings of the language are shown; at every position the model says what may
follow, or whether the prefix is in the language. A string counts if *every* position is right.
Train and "bin0" have one range of lengths, "bin1" is longer. Inputs are the letters alone, without
marks of beginning or end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .tasks import VALIDATION, Examples, Task, padded, stream

Rows = list[np.ndarray]
Draw = Callable[[np.random.Generator, int, tuple[int, int]], Rows]


@dataclass(frozen=True)
class Language:
    """A language. lengths: of the train strings and bin0. longer: of bin1. train, test: how many.

    draw(rng, number, (low, high)): that many *different* strings, or all if there are fewer.
    repeats: few strings exist, so the training set is drawn from them with repeats and bin0 is all
    of them; otherwise train and bin0 are disjoint.
    """

    vocab: int
    classes: int
    target: Callable[[np.ndarray], np.ndarray]
    draw: Draw
    train: int
    test: int
    lengths: tuple[int, int]
    longer: tuple[int, int]
    repeats: bool = False


def task(name: str, *, train: int | None = None, test: int | None = None, seed: int = 0) -> Task:
    """The task of that language (see LANGUAGES); train, test: strings, where the paper's are many.

    Sizes and lengths as in `LANGUAGES`. Metric: whole sequences. Validation strings are of another
    seed; bin0's are none of the others, except where a language has no more strings than its test.
    ValueError if the language is unknown.
    """
    if name not in LANGUAGES:
        raise ValueError(f"language {name!r} is unknown: use one of {sorted(LANGUAGES)}")
    c = LANGUAGES[name]
    n, m = c.train if train is None else train, c.test if test is None else test
    if n < 1 or m < 1:
        raise ValueError(f"train={n}, test={m}: give 1 string or more of each")
    rng = stream(seed, "formal", name, "bin0")
    if c.repeats:
        every = c.draw(rng, c.lengths[1], c.lengths)
        part = [every[i] for i in rng.integers(len(every), size=n)]
        bin0 = [every[i] for i in np.sort(rng.permutation(len(every))[:m])]
    else:
        rows = c.draw(rng, n + m, c.lengths)
        rows = [rows[i] for i in rng.permutation(n + m)]  # short ones are found, and listed, first
        part, bin0 = rows[:n], rows[n:]
    used = set() if c.repeats else {row.tobytes() for row in (*part, *bin0)}
    rng = stream(seed + VALIDATION, "formal", name, "bin0")
    rows = c.draw(rng, c.lengths[1] if c.repeats else 2 * m + 100, c.lengths)
    held = [rows[i] for i in rng.permutation(len(rows)) if rows[i].tobytes() not in used][:m]

    def examples(rows: Rows) -> Examples:
        return padded(rows, [c.target(row) for row in rows])

    def bins(bin0: Rows, seed: int) -> dict[str, Examples]:
        bin1 = c.draw(stream(seed, "formal", name, "bin1"), m, c.longer)
        return {"bin0": examples(bin0), "bin1": examples(bin1)}

    return Task(
        "formal", name, c.vocab, c.classes, examples(part), bins(bin0, seed), "sequence",
        validation=bins(held, seed + VALIDATION),
    )  # fmt: skip


# ------------------------------------------------------------------------ strings of each language


def _parity(rng: np.random.Generator, number: int, lengths: tuple[int, int]) -> Rows:
    """Different strings with an even number of 1s.

    Each symbol is 0 or 1, equally likely, or with probability 1 / (1 + m) the end, m the middle of
    the range; at most `high` symbols. A 1 is appended to an odd string; where it does not fit any
    more the string is dropped.
    """
    low, high = lengths
    m = (low + high) // 2
    seen: dict[bytes, np.ndarray] = {}
    while len(seen) < number:
        size = np.minimum(rng.geometric(1 / (1 + m), number) - 1, high)
        bits = rng.integers(0, 2, (number, high))
        for row, n in zip(bits, size):
            odd = int(row[:n].sum()) % 2
            if not low <= n + odd <= high:
                continue
            string = np.append(row[:n], 1) if odd else row[:n].copy()
            seen.setdefault(string.tobytes(), string)
    return list(seen.values())[:number]


def _multiples(size: int, string: Callable[[int], np.ndarray]) -> Draw:
    """string(n), of n · size symbols, every n in the range as likely."""

    def draw(rng: np.random.Generator, number: int, lengths: tuple[int, int]) -> Rows:
        low, high = -(-lengths[0] // size), lengths[1] // size
        return [string(n) for n in np.sort(rng.permutation(np.arange(low, high + 1))[:number])]

    return draw


def _repeated(*block: int) -> Draw:
    """Strings of the block repeated."""
    return _multiples(len(block), lambda n: np.tile(block, n))


def _counted(letters: int) -> Draw:
    """n times each letter in turn."""
    return _multiples(letters, np.arange(letters).repeat)


def _shuffle(rng: np.random.Generator, number: int, lengths: tuple[int, int]) -> Rows:
    """Different strings of S → (ᵢ S )ᵢ [0.5, i uniform] | S S [0.25] | empty; kind i is 2i, 2i + 1.

    A part that starts where the limit is reached, or grows longer than it, is empty.
    """
    low, high = lengths
    dice: list[float] = []

    def grow(size: int) -> bytes:
        if size >= high:
            return b""
        if not dice:
            dice.extend(rng.random(4096).tolist())
        p = dice.pop()
        if p < 0.25:
            string = b"\0" + grow(size + 2) + b"\1"
        elif p < 0.5:
            string = b"\2" + grow(size + 2) + b"\3"
        elif p < 0.75:
            string = grow(size) + grow(size)
        else:
            return b""
        return string if len(string) <= high else b""

    seen: dict[bytes, None] = {}
    while len(seen) < number:
        string = grow(0)
        if low <= len(string) <= high:
            seen[string] = None
    return [np.frombuffer(string, np.uint8).astype(np.int64) for string in seen]


# ---------------------------------------------------------------------------------------- targets


def parity_target(x: np.ndarray) -> np.ndarray:
    """1 where the prefix has an even number of 1s."""
    return 1 - x.cumsum() % 2


def multiple_target(period: int) -> Callable[[np.ndarray], np.ndarray]:
    """1 where the prefix's length is a multiple of the period."""
    return lambda x: (np.arange(1, len(x) + 1) % period == 0).astype(np.int64)


def counted_target(letters: int) -> Callable[[np.ndarray], np.ndarray]:
    """What may follow: 0 "a or b", 1 ... the next letter's number, `letters` the end."""

    def target(x: np.ndarray) -> np.ndarray:
        n = len(x) // letters
        later = np.arange(1, letters).repeat(n)  # the second letter is due from the first one on
        return np.concatenate([np.zeros(n, np.int64), later[1:], [letters]])

    return target


def shuffle_target(x: np.ndarray) -> np.ndarray:
    """2 [a () is open] + [a [] is open]: which closing brackets may follow."""
    one = ((x == 0).astype(np.int64) - (x == 1)).cumsum() > 0
    two = ((x == 2).astype(np.int64) - (x == 3)).cumsum() > 0
    return 2 * one + two.astype(np.int64)


_MANY = (10_000, 2_000, (2, 50), (52, 100))

LANGUAGES = {
    "parity": Language(2, 2, parity_target, _parity, *_MANY),
    "aa": Language(
        1, 2, multiple_target(2), _repeated(0, 0), 250, 250, (2, 500), (502, 600), repeats=True
    ),
    "abab": Language(
        2, 2, multiple_target(4), _repeated(0, 1, 0, 1), 125, 125, (4, 500), (504, 600),
        repeats=True,
    ),
    "anbn": Language(
        2, 3, counted_target(2), _counted(2), 50, 50, (2, 100), (102, 200), repeats=True
    ),
    "anbncn": Language(
        3, 4, counted_target(3), _counted(3), 50, 50, (3, 150), (153, 300), repeats=True
    ),
    "shuffle2": Language(4, 4, shuffle_target, _shuffle, *_MANY),
}  # fmt: skip
