"""MQAR, multi-query associative recall (Arora et al., "Zoology", 2023; "Based", 2024).

Pairs of a key and a value; then, among fillers, every key once more, at which its value is asked.
"""

from __future__ import annotations

import numpy as np

from .tasks import IGNORED, VALIDATION, Examples, Task, examples, stream

POWER = 0.01  # of the law by which queries come soon rather than late


def task(
    length: int, pairs: int, *, vocab: int = 8192, train: int = 100_000, test: int = 3_000,
    random_fillers: bool = False, seed: int = 0,
) -> Task:  # fmt: skip
    """`pairs` different keys with different values in sequences of `length` tokens.

    Ids: 0 the filler, keys [1, vocab / 2), values [vocab / 2, vocab). The 2 · pairs tokens of the
    context are followed by slots of two tokens; each key stands first in a slot of its own, the
    s-th drawn in proportion to s^(POWER − 1). random_fillers: random ids instead of 0, as Zoology's
    `random_non_queries`. Metric: the share of queries answered. ValueError where 4 · pairs > length
    or there are too few ids.
    """
    if pairs < 1 or 4 * pairs > length:
        raise ValueError(f"pairs={pairs}: give 1 to length / 4 = {length // 4}")
    if pairs > vocab // 2 - 1:
        raise ValueError(f"vocab={vocab}: {pairs} different keys need {2 * pairs + 2} ids or more")
    if train < 1 or test < 1:
        raise ValueError(f"train={train}, test={test}: give 1 sequence or more of each")

    def make(number: int, part: str, other: int = 0) -> Examples:
        rng = stream(seed + other, "mqar", length, pairs, vocab, part)
        inputs, targets = _make(rng, number, length, pairs, vocab)
        if random_fillers:
            empty = inputs == 0
            inputs[empty] = rng.integers(0, vocab, int(empty.sum()))
        return examples(inputs, targets)

    return Task(
        "mqar", f"L={length},K={pairs}", vocab, vocab, make(train, "train"),
        {"test": make(test, "test")}, "token", validation={"test": make(test, "test", VALIDATION)},
    )  # fmt: skip


def _make(
    rng: np.random.Generator, n: int, length: int, pairs: int, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    keys = 1 + _distinct(rng, n, pairs, vocab // 2 - 1)
    values = vocab // 2 + _distinct(rng, n, pairs, vocab - vocab // 2)
    inputs = np.zeros((n, length), np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    at = 2 * pairs + 2 * _slots(rng, n, pairs, (length - 2 * pairs) // 2)
    targets = np.full((n, length), IGNORED, np.int64)
    np.put_along_axis(inputs, at, keys, 1)
    np.put_along_axis(targets, at, values, 1)
    return inputs, targets


def _distinct(rng: np.random.Generator, n: int, k: int, below: int) -> np.ndarray:
    """n times k different numbers below `below`, in random order: Floyd's sampling, n at once."""
    found = np.empty((n, k), np.int64)
    for i, top in enumerate(range(below - k, below)):
        x = rng.integers(0, top + 1, n)
        taken = (found[:, :i] == x[:, None]).any(1)
        found[:, i] = np.where(taken, top, x)
    return rng.permuted(found, axis=1)


def _slots(rng: np.random.Generator, n: int, k: int, slots: int) -> np.ndarray:
    """n times k different slots, drawn one after another in proportion to (s + 1)^(POWER − 1).

    The k largest of log-weight + Gumbel noise are such a draw, in its order.
    """
    weight = (POWER - 1) * np.log(np.arange(1, slots + 1))
    parts = [
        np.argsort(-(weight + rng.gumbel(size=(min(4096, n - a), slots))), 1)[:, :k]
        for a in range(0, n, 4096)  # in parts, for the memory's sake
    ]
    return np.concatenate(parts)
