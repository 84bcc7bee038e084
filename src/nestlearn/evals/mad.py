"""MAD: compression, three kinds of recall, copying, memorization (paper: section 9.4, table 4).

Constructions of Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (2024). Of
each task there is a baseline setting and changes of one variable at a time (`settings`); a MAD
score is the mean over all of them. Metric: the share of all targets met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .tasks import IGNORED, VALIDATION, Examples, Task, examples, stream

SEED = 12345  # the benchmark's
Sizes = dict[str, float]
Maker = Callable[[np.random.Generator, int, Sizes, bool], tuple[np.ndarray, np.ndarray]]

_VOCAB = {"vocab": (32, 64, 128)}
_TRAIN = {"train": (6400, 3200, 1600, 800)}
_LENGTH = {"length": (256, 512, 1024)}
_NOISE = 16  # ids of noise, the highest


@dataclass(frozen=True)
class _Benchmark:
    """make(rng, number, sizes, training) -> inputs, targets [number, T]. changes: other values."""

    make: Maker
    sizes: Mapping[str, float]
    changes: Mapping[str, tuple[float, ...]]
    causal: bool = True


def settings(name: str) -> dict[str, Sizes]:
    """The settings of a task: "baseline", and "vocab=32" and the like, each with all its sizes.

    Sizes: vocab (all ids), length (of the sequences drawn; recall loses one by its shift), train
    (sequences), and pairs' noise or the tokens to copy. ValueError for an unknown task.
    """
    if name not in MAD:
        raise ValueError(f"task {name!r} is unknown: use one of {', '.join(MAD)}")
    base, changes = dict(MAD[name].sizes), MAD[name].changes
    changed = {f"{k}={v:g}": {**base, k: v} for k, values in changes.items() for v in values}
    return {"baseline": base, **changed}


def task(
    name: str, setting: str = "baseline", *, train: int | None = None, test: int = 1280,
    seed: int = SEED,
) -> Task:  # fmt: skip
    """A task of MADS in one of its settings; train, test: sequences (default: the benchmark's).

    ValueError for an unknown name or setting.
    """
    every = settings(name)
    if setting not in every:
        raise ValueError(f"setting {setting!r} of {name} is unknown: use one of {list(every)}")
    sizes, c = every[setting], MAD[name]
    number = int(sizes["train"]) if train is None else train
    if number < 1 or test < 1:
        raise ValueError(f"train={number}, test={test}: give 1 sequence or more of each")

    def make(n: int, training: bool, other: int = 0) -> Examples:
        rng = stream(seed + other, "mad", name, setting, "train" if training else "test")
        # the map to memorise is one for all parts
        return examples(*c.make(rng, n, {**sizes, "seed": seed}, training))

    vocab = int(sizes["vocab"])
    return Task(
        "mad", name, vocab, vocab, make(number, True), {"test": make(test, False)}, "token",
        c.causal, {"test": make(test, False, VALIDATION)},
    )  # fmt: skip


# -------------------------------------------------------------------------------- in-context recall


def _recall(rng: np.random.Generator, n: int, sizes: Sizes, training: bool):
    """key value key value ...: each sequence has its own dictionary; the last key was seen before.

    Keys are the lower half of the ids, values the upper; with noise, the 16 highest ids are noise,
    and a pair is with that probability two of them. Trained on every next token; tested on the
    values of keys that were seen before.
    """
    vocab, length, noise = int(sizes["vocab"]), int(sizes["length"]), sizes.get("noise", 0.0)
    if length % 2 or length < 4:
        raise ValueError(f"length={length}: give an even number of 4 tokens or more")
    real = vocab - _NOISE if noise else vocab
    half, pairs = real // 2, length // 2 - 1
    rows = np.arange(n)

    keys = rng.integers(0, half, (n, pairs))
    noisy = rng.random((n, pairs)) < noise
    noisy[rows, rng.integers(0, pairs, n)] &= noise == 0  # one pair at least is none
    values = rng.integers(half, real, (n, half))  # each sequence's dictionary
    seen = np.zeros((n, half), bool)
    known = np.zeros((n, pairs), bool)
    for j in range(pairs):
        known[:, j] = seen[rows, keys[:, j]] & ~noisy[:, j]
        seen[rows, keys[:, j]] |= ~noisy[:, j]
    probe = np.where(seen, rng.random((n, half)), -1.0).argmax(1)  # uniform over those seen

    other = rng.integers(real, max(vocab, real + 1), (2, n, pairs))
    tokens = np.empty((n, length), np.int64)
    tokens[:, 0:-2:2] = np.where(noisy, other[0], keys)
    tokens[:, 1:-2:2] = np.where(noisy, other[1], np.take_along_axis(values, keys, 1))
    tokens[:, -2], tokens[:, -1] = probe, values[rows, probe]
    targets = tokens.copy()
    if not training:
        targets[:, 0::2] = IGNORED
        targets[:, 1:-2:2][~known] = IGNORED
    return tokens[:, :-1].copy(), targets[:, 1:].copy()


MOTIF = 3  # the longest key, and value, of fuzzy recall


def _fuzzy(rng: np.random.Generator, n: int, sizes: Sizes, training: bool):
    """Recall with keys and values of 1 to 3 tokens each; when tested, keys have 3.

    The highest id pads on the left. Of the others the lower half spells keys, the upper values,
    no token twice in one. A probe pair is placed somewhere (as in the benchmark, in about one
    sequence of a hundred the place drawn lies behind the last pair) and asked again at the end.
    Trained on every next token; tested on the values of keys that were seen before.
    """
    vocab, length = int(sizes["vocab"]), int(sizes["length"])
    pad = vocab - 1
    half = pad // 2
    most = length // 2  # pairs of two tokens or more
    if half < MOTIF:
        raise ValueError(f"vocab={vocab}: keys of {MOTIF} different tokens need 8 ids or more")
    if length < 5 * MOTIF:
        raise ValueError(f"length={length}: give {5 * MOTIF} tokens or more")
    keys = _motifs(rng, (n, most), 0, half)
    values = _motifs(rng, (n, most), half, pad)
    key_sizes = rng.integers(1 if training else MOTIF, MOTIF + 1, (n, most))
    value_sizes = rng.integers(1, MOTIF + 1, (n, most))
    place = rng.random(n)
    inputs = np.full((n, length + 1), pad, np.int64)
    asked = np.zeros((n, length + 1), bool)
    lists = [a.tolist() for a in (keys, values, key_sizes, value_sizes)]
    for i, (ks, vs, k_sizes, v_sizes) in enumerate(zip(*lists)):
        drawn = [(tuple(k[:a]), tuple(v[:b])) for k, v, a, b in zip(ks, vs, k_sizes, v_sizes)]
        tokens, which = _fuzzy_row(drawn, length, place[i])
        inputs[i, length + 1 - len(tokens) :] = tokens
        asked[i, length + 1 - len(tokens) :] = which
    targets = inputs if training else np.where(asked, inputs, IGNORED)
    return inputs[:, :-1].copy(), targets[:, 1:].copy()


def _fuzzy_row(
    drawn: list[tuple[tuple[int, ...], tuple[int, ...]]], length: int, place: float
) -> tuple[list[int], list[bool]]:
    """One sequence's tokens, and which of them are values of a key that was seen before.

    drawn: the probe, then pairs; a key drawn again keeps its first value. place: of the probe, as
    a share of where it may stand.
    """
    probe, value = drawn[0]
    size = len(probe) + len(value)
    first = int(place * (length - 2 * size))
    known, seen = {probe: value}, set()
    tokens: list[int] = []
    asked: list[bool] = []
    fresh = iter(drawn[1:])
    while len(tokens) < length - size - 2 * MOTIF:
        if len(tokens) >= first and probe not in seen:
            k, v = probe, value
        else:
            k, v = next(fresh)
            v = known.setdefault(k, v)
        tokens += k + v
        asked += [False] * len(k) + [k in seen] * len(v)
        seen.add(k)
    return [*tokens, *probe, *value], asked + [False] * len(probe) + [True] * len(value)


def _motifs(rng: np.random.Generator, shape: tuple[int, int], low: int, high: int) -> np.ndarray:
    """Tuples of MOTIF different ids in [low, high), uniform: [*shape, MOTIF]."""
    found = np.empty((*shape, MOTIF), np.int64)
    for i in range(MOTIF):
        x = rng.integers(low, high - i, shape)
        for earlier in np.moveaxis(np.sort(found[..., :i]), -1, 0):  # step over those in use
            x += x >= earlier
        found[..., i] = x
    return found


# ---------------------------------------------------------- copying, compression, memorization


def _copying(rng: np.random.Generator, n: int, sizes: Sizes, training: bool):
    """Tokens among blanks, the copy mark, as many blanks as tokens: there they stand, in order.

    Ids: tokens below vocab − 2, blank vocab − 2, copy mark vocab − 1.
    """
    vocab, length, copy = (int(sizes[k]) for k in ("vocab", "length", "copy"))
    blanks = length - 2 * copy - 1
    if copy < 1 or blanks < 0:
        raise ValueError(f"copy={copy}: give 1 token to {(length - 1) // 2} at length={length}")
    content = rng.integers(0, vocab - 2, (n, copy))
    before = rng.multinomial(blanks, [1 / copy] * copy, n)  # blanks in front of each token
    inputs = np.full((n, length), vocab - 2, np.int64)
    np.put_along_axis(inputs, before.cumsum(1) + np.arange(copy), content, 1)
    inputs[:, copy + blanks] = vocab - 1
    targets = np.full((n, length), IGNORED, np.int64)
    targets[:, -copy:] = content
    return inputs, targets


def _compression(rng: np.random.Generator, n: int, sizes: Sizes, training: bool):
    """Random ids below vocab − 1, then that id: from its position alone all are to be told."""
    vocab, length = int(sizes["vocab"]), int(sizes["length"])
    inputs = rng.integers(0, vocab - 1, (n, length))
    inputs[:, -1] = vocab - 1
    return inputs, inputs.copy()


def _memorization(rng: np.random.Generator, n: int, sizes: Sizes, training: bool):
    """key, blank, key, blank ...: at a blank the key's value in a map that never changes.

    The map goes one to one from the lower to the upper half of the ids below the blank, vocab − 1;
    train and test share it, and no input shows it: it must be in the weights.
    """
    vocab, length = int(sizes["vocab"]), int(sizes["length"])
    values = memorization_map(vocab, int(sizes["seed"]))
    keys = rng.integers(0, len(values), (n, length // 2))
    inputs = np.full((n, length), vocab - 1, np.int64)
    targets = np.full((n, length), IGNORED, np.int64)
    inputs[:, 0::2] = keys
    targets[:, 1::2] = values[keys]
    return inputs, targets


def memorization_map(vocab: int, seed: int = SEED) -> np.ndarray:
    """The value of each key 0, 1, ...: int64 [(vocab − 1) // 2]."""
    half = (vocab - 1) // 2
    return stream(seed, "mad", "map", vocab).permutation(np.arange(half, vocab - 1))[:half]


_BASE = {"vocab": 16, "length": 128, "train": 12_800}

MAD: dict[str, _Benchmark] = {
    "compression": _Benchmark(
        _compression, {**_BASE, "length": 32}, {**_VOCAB, "length": (64, 128, 256), **_TRAIN},
        causal=False,
    ),
    "recall": _Benchmark(_recall, _BASE, {**_VOCAB, **_LENGTH, **_TRAIN}),
    "fuzzy": _Benchmark(_fuzzy, _BASE, {**_VOCAB, **_LENGTH, **_TRAIN}),
    "copying": _Benchmark(
        _copying, {**_BASE, "length": 256, "copy": 16},
        {**_VOCAB, "length": (512, 1024), **_TRAIN, "copy": (32, 64, 96)},
    ),
    "memorization": _Benchmark(
        _memorization, {"vocab": 256, "length": 32, "train": 256},
        {"vocab": (512, 1024, 2048, 4096, 8192)},
    ),
    "noisy": _Benchmark(
        _recall, {**_BASE, "vocab": 32, "noise": 0.2},
        {"vocab": (48, 80, 144), **_LENGTH, **_TRAIN, "noise": (0.4, 0.6, 0.8)},
    ),
}  # fmt: skip
