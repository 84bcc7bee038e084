"""The frontier's lines: the least later loss at equal cost, method by method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from nestlearn.evals import Record

Point = tuple[float, float]  # loss on the own kind, on the later part


def front(points: Sequence[Point]) -> list[Point]:
    """Of points (own, later) those that no other beats in both, by rising cost."""
    best: list[Point] = []
    for own, later in sorted(points):
        if not best or later < best[-1][1]:
            best.append((own, later))
    return best


def at_cost(points: Sequence[Point], own: float) -> float:
    """The line through the front at that loss on the own kind; beyond its end, the end."""
    line = front(points)
    for (x0, y0), (x1, y1) in pairwise(line):
        if x0 <= own <= x1:
            return y0 + (y1 - y0) * (own - x0) / (x1 - x0)
    return line[-1][1] if own > line[-1][0] else line[0][1]


def line_of(rows: Sequence[Record], every: Sequence[Record], seed: int) -> list[Point]:
    """A method's points on one excerpt, and that of the untouched model."""
    later, own = untouched(every, seed)
    return [(own, later), *((r.detail["own"], r.value) for r in rows if r.seed == seed)]


def untouched(records: Sequence[Record], seed: int) -> tuple[float, float]:
    """(later, own) of the base model; of a method without start values of its own."""
    plain = [r for r in records if r.seed == seed and r.model != "meta-starts"]
    later, own = (plain or [r for r in records if r.seed == seed])[0].detail["before"]
    return later, own


def later_at(cost: float, name: str, every: Sequence[Record]) -> list[float]:
    """A method's later loss at that cost, on each excerpt. every: all records of its text."""
    own = [r for r in every if r.model == name]
    return [
        at_cost(line_of(own, every, seed), untouched(every, seed)[1] + cost)
        for seed in sorted({r.seed for r in own})
    ]
