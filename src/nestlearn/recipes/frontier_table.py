"""The frontier's table and picture: later loss at equal cost, method by method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nestlearn.recipes.suite import markdown
from nestlearn.recipes.tuned import spread
from nestlearn.train.plots import new_figure, write_figure

COSTS = (0.05, 0.15, 0.4)  # nats on the model's own kind of text
MARKS = "os^vDP*X<>hd|"  # 13 of them and 20 colours: no pair comes twice
Point = tuple[float, float]  # loss on the own kind, on the later part
Record = dict[str, Any]


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


def table(records: list[Record], titles: Mapping[str, str]) -> str:
    """Later loss at three costs, mean ± standard deviation over excerpts, best first."""
    rows: list[tuple[float, list[str]]] = []
    for name in dict.fromkeys(r["model"] for r in records):
        mine = [r for r in records if r["model"] == name]
        found: list[list[float]] = []
        for seed in sorted({r["seed"] for r in mine}):
            some = [r for r in mine if r["seed"] == seed]
            later, own = untouched(records, seed)
            points = [(own, later), *((r["own"], r["later"]) for r in some)]
            found.append([at_cost(points, own + cost) for cost in COSTS])
        columns = [[row[i] for row in found] for i in range(len(COSTS))]
        seconds = statistics.median(r["seconds"] for r in mine)
        row = [titles[name], *(spread(c, 3) for c in columns), f"{seconds:.0f}"]
        rows.append((statistics.mean(columns[1]), row))
    start = [untouched(records, seed) for seed in sorted({r["seed"] for r in records})]
    before, at = [p[0] for p in start], [p[1] for p in start]
    head = ["method", *(f"at +{cost:g}" for cost in COSTS), "seconds to read"]
    first = ["base model", f"{spread(before, 3)} at {statistics.mean(at):.3f}", "", "", ""]
    return markdown([head, first, *(row for _, row in sorted(rows))])


def untouched(records: list[Record], seed: int) -> tuple[float, float]:
    """(later, own) of the base model; of a method without start values of its own."""
    plain = [r for r in records if r["seed"] == seed and r["model"] != "meta-starts"]
    later, own = (plain or [r for r in records if r["seed"] == seed])[0]["before"]
    return later, own


def draw(records: list[Record], titles: Mapping[str, str], path: Path) -> None:
    """Each method's front, mean over excerpts of each setting."""
    from matplotlib import colormaps

    figure, (axes,) = new_figure("Loss on its own kind of text (nats)", "Loss on later text (nats)")
    figure.set_size_inches(9.6, 5.6)
    colours = colormaps["tab20"]
    for i, name in enumerate(dict.fromkeys(r["model"] for r in records)):
        mine = [r for r in records if r["model"] == name]
        places = {(r["lr"], r["dial"]) for r in mine}
        means = [
            tuple(statistics.mean(r[k] for r in mine if (r["lr"], r["dial"]) == p) for k in
                  ("own", "later"))
            for p in places
        ]  # fmt: skip
        first = i == 0  # what all others are measured by
        axes.plot(
            *zip(*front(means)), lw=2.4 if first else 1.1, ms=4, label=titles[name],
            color="black" if first else colours(i % 20), marker=MARKS[i % len(MARKS)],
        )  # fmt: skip
    _, own = untouched(records, records[0]["seed"])
    axes.set_xlim(own - 0.02, own + 0.8)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    write_figure(figure, path)
