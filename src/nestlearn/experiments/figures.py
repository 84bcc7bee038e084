"""Pictures of tables: accuracy of models as a grid of colours, or lines along a dial."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestlearn.evals import Record, grouped
from nestlearn.train.plots import COLOURS, MARKERS, new_figure, write_figure

DASHES = ("-", "--", ":")
Values = Mapping[str, Sequence[float]]  # of the seeds, by column
Along = tuple[Sequence[float], Sequence[float]]  # where, and what was there
Lines = Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]  # where, and what seeds had


def grid(
    values: Mapping[str, Values],
    path: str | Path,
    *,
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """A coloured cell for each model and column: the mean of its seeds, half their range if over 1.

    values: accuracies by model's title, then column; paper: likewise, in a row below the model's
    own. ValueError without any.
    """
    if not values:
        raise ValueError("grid was given no values: run at least one model")
    columns = list(dict.fromkeys(c for row in values.values() for c in row))
    rows: list[tuple[str, Values]] = []
    for name, row in values.items():
        rows.append((name, row))
        if told := (paper or {}).get(name):
            rows.append(("in the paper", {c: [value] for c, value in told.items()}))
    means = [
        [statistics.mean(row[c]) if c in row else math.nan for c in columns] for _, row in rows
    ]
    figure, (axes,) = new_figure("", "")
    figure.set_size_inches(3.2 + 0.72 * len(columns), 1.4 + 0.34 * len(rows))
    image = axes.imshow(means, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i, (_, row) in enumerate(rows):
        for j, c in enumerate(columns):
            if c not in row:
                continue
            text = f"{means[i][j]:.1f}".removesuffix(".0")
            if (spread := (max(row[c]) - min(row[c])) / 2) > 1:
                text += f" ±{spread:.0f}"
            colour = "white" if means[i][j] > 60 else "#222222"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    for tick, (name, _) in zip(axes.get_yticklabels(), rows):
        tick.set_style("italic" if name == "in the paper" else "normal")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="Accuracy (%)", fraction=0.03, pad=0.01)
    write_figure(figure, path)


@dataclass(frozen=True)
class Panel:
    """title, labels of the axes, and a line for each name."""

    title: str
    x: str
    y: str
    lines: Lines


def lines(
    records: Iterable[Record],
    along: Callable[[Record], Along],
    name: Callable[[Record], str] = lambda r: r.model,
) -> Lines:
    """A line for each name, of what its records say; a place is the mean of theirs."""
    drawn: dict[str, tuple[list[float], list[Sequence[float]]]] = {}
    for title, own in grouped(records, name).items():
        x, y = zip(*map(along, own))
        drawn[title] = (list(map(statistics.mean, zip(*x))), list(y))
    return drawn


def points(
    records: Iterable[Record],
    at: Callable[[Record], float],
    name: Callable[[Record], str] = lambda r: r.model,
) -> Lines:
    """A line for each name, of records that are a point each, of the seeds that have all points."""
    found: dict[str, dict[int, dict[float, list[float]]]] = {}
    for r in records:
        found.setdefault(name(r), {}).setdefault(r.seed, {}).setdefault(at(r), []).append(r.value)
    drawn: dict[str, tuple[list[float], list[list[float]]]] = {}
    for title, seeds in found.items():
        places = sorted(set().union(*seeds.values()))
        whole = [own for _, own in sorted(seeds.items()) if len(own) == len(places)]
        if whole:
            drawn[title] = (places, [[statistics.fmean(own[x]) for x in places] for own in whole])
    return drawn


def curves(
    panels: Sequence[Panel],
    path: str | Path,
    *,
    log: str = "",
    marker: bool = False,
    ylim: tuple[float, float] | None = None,
) -> None:
    """Panels side by side: each line the mean of its seeds, their range shaded.

    log: axes with powers of ten ("x", "y", "xy"); "2": x with powers of two, a tick for each point.
    ValueError without any.
    """
    if not panels:
        raise ValueError("curves was given no values: run at least one model")
    figure, every = new_figure(*(label for panel in panels for label in (panel.x, panel.y)))
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    for axes, panel in zip(every, panels):
        for name, (x, seeds) in panel.lines.items():
            i = names.index(name)
            style = {"color": COLOURS[i % len(COLOURS)], "ls": DASHES[i // len(COLOURS)]}
            mark = {"marker": MARKERS[i % len(MARKERS)], "ms": 5} if marker else {}
            columns = list(zip(*seeds))
            axes.plot(x, list(map(statistics.mean, columns)), lw=1.6, label=name, **style, **mark)
            if len(seeds) > 1:
                low, high = list(map(min, columns)), list(map(max, columns))
                axes.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0)
        if log == "2":
            axes.set_xscale("log", base=2)
            ticks = sorted({at for x, _ in panel.lines.values() for at in x})
            axes.set_xticks(ticks, [str(at) for at in ticks])
        for axis in set(log) & {"x", "y"}:
            getattr(axes, f"set_{axis}scale")("log")
        if ylim:
            axes.set_ylim(*ylim)
        axes.set_title(panel.title, loc="left", fontsize=12)
    shown = {name: line for axes in every for line, name in zip(*axes.get_legend_handles_labels())}
    fit = int(14 * figure.get_figwidth()) // (7 + max(map(len, shown)))  # letters of an inch
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center",
        ncols=max(1, min(4, len(shown), fit)), frameon=False, fontsize=9,
    )  # fmt: skip
    write_figure(figure, path)
