"""Needles in long texts (RULER; table 1, figure 7): facts hidden in a haystack, asked for after it.

A needle says "One of the special magic numbers for KEY is: VALUE." Haystacks are a passage repeated
("noise"), a text of the caller's ("text", in place of RULER's essays, which are not open), or
other needles. The construction is RULER's; `TASKS` says what each of its tasks hides where.
"""

from __future__ import annotations

import re
import uuid
from bisect import bisect_right
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from .haystack import Asked
from .tasks import stream

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS, ROOM = 40, 128  # evenly spaced places in a text; tokens kept for the answer
Count = Callable[[str], int]


class Task(NamedTuple):
    """What is hidden where: keys, values of each key, and how many keys are asked for."""

    haystack: Literal["noise", "text", "needles"]
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS = {
    "S-NIAH-1": Task("noise"),
    "S-NIAH-2": Task("text"),
    "S-NIAH-3": Task("text", "uuids"),
    "MK-NIAH-1": Task("text", keys=4),
    "MQ-NIAH": Task("text", keys=4, queries=4),
    "MV-NIAH": Task("text", values=4),
    "MK-NIAH-2": Task("needles"),
    "MK-NIAH-3": Task("needles", "uuids"),
}


class Sample(NamedTuple):
    """before: what announces the task. context: the haystack with its needles. question, with the
    beginning of its answer. answers: every value that is asked for. depths: where the needles
    stand, as shares of the haystack.
    """

    before: str
    context: str
    question: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]

    @property
    def prompt(self) -> str:
        """All of it, in RULER's order."""
        return f"{self.before}\n{self.context}\n{self.question}"


class Words(NamedTuple):
    """What keys are made of: an adjective and a noun each, of the lists of wonderwords."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Words:
        """From FOLDER/adjectivelist.txt and nounlist.txt; FileNotFoundError without."""
        lists = [(folder / f"{name}list.txt").read_text().split() for name in ("adjective", "noun")]
        return cls(*map(tuple, lists))


def sample(name: str, length: int, words: Words, count: Count, seed: int, text: str = "") -> Sample:
    """A sample of that task whose prompt and answer have at most `length` tokens, as `count` counts
    them; the largest haystack that fits.

    text: the haystack of tasks that hide needles in one, repeated if it is too short. ValueError
    for an unknown task, an empty text where one is needed, and a length without room.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown: use one of {', '.join(TASKS)}")
    task = TASKS[name]
    if task.haystack == "text" and not text.split():
        raise ValueError(f"{name} hides its needles in a text: give one")
    rng = stream(seed, "needles", name, length)
    keys = draw_keys(rng, words, task.keys)
    values = {key: [draw_value(rng, task.value) for _ in range(task.values)] for key in keys}
    needles = [sentence(task.value, key, v) for key in keys for v in values[key]]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    asked = [keys[i] for i in sorted(rng.permutation(len(keys))[: task.queries])]
    before, question = wording(task, asked)
    spare = length - ROOM - count(f"{before}\n\n{question}")
    draws = int(rng.integers(2**31))

    def built(size: int) -> tuple[str, tuple[float, ...]]:
        return _hidden(task, needles, size, text, words, np.random.default_rng(draws))

    low, high = len(needles) if task.haystack != "text" else 1, 2
    if count(built(low)[0]) > spare:
        raise ValueError(f"length={length}: no room for {name}'s needles and question")
    while count(built(high)[0]) <= spare:
        low, high = high, 2 * high
    above = bisect_right(range(high), spare, low + 1, key=lambda size: count(built(size)[0]))
    context, depths = built(above - 1)
    answers = tuple(value for key in asked for value in values[key])
    return Sample(before, context, question, answers, depths)


def score(asked: Sample | Asked, said: str) -> float:
    """The share of the answers that occur in what was said, whatever the case."""
    return sum(a.lower() in said.lower() for a in asked.answers) / len(asked.answers)


def draw_keys(rng: np.random.Generator, words: Words, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        pair = (own[int(rng.integers(len(own)))] for own in words)
        found["-".join(pair)] = None
    return list(found)


def draw_value(rng: np.random.Generator, kind: str) -> str:
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(rng.integers(1_000_000, 10_000_000))


def sentence(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def wording(task: Task, asked: list[str]) -> tuple[str, str]:
    some, is_, are, kind = "A", "is", "is", task.value[:-1]
    if len(asked) * task.values > 1:
        some, is_, are, kind = "Some", "are", "are all", task.value
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    before = (
        f"{some} special magic {kind} {is_} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards."
    )
    question = (
        f"What {are} the special magic {kind} for {query} mentioned in the provided text? The "
        f"special magic {kind} for {query} mentioned in the provided text {is_}"
    )
    return before, question


def _hidden(
    task: Task, needles: list[str], size: int, text: str, words: Words, rng: np.random.Generator
) -> tuple[str, tuple[float, ...]]:
    """The needles in a haystack of so many words (of a text) or lines."""
    if task.haystack == "text":
        told = " ".join(islice(cycle(text.split()), size))
        parts = re.split(r"(?<=[.!?])\s+", told)
        drawn = rng.choice(np.linspace(0, 1, DEPTHS), len(needles), False)
        places, joined = sorted(map(float, drawn)), " "
    else:
        parts = [NOISE] * size
        if task.haystack == "needles":
            parts = [
                sentence(task.value, draw_keys(rng, words, 1)[0], draw_value(rng, task.value))
                for _ in range(size)
            ]
        drawn = rng.choice(size, len(needles), replace=False)
        places, joined = sorted(float(line) / size for line in drawn), "\n"
    for i, (place, needle) in enumerate(zip(places, needles)):
        parts.insert(round(place * (len(parts) - i)) + i, needle)
    return joined.join(parts), tuple(places)
