"""Pictures of tables: accuracy of models as bars, a grid of colours, or lines along a dial."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from nestlearn.train.plots import COLOURS, MARKERS, new_figure, write_figure

Values = Mapping[str, Sequence[float]]  # of the seeds, by column


def bars(
    values: Mapping[str, Values],
    path: str | Path,
    *,
    label: str = "Accuracy (%)",
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """A group of bars for each column, a bar for each model, its seeds' range as a whisker.

    values: by model's title, then column; paper: likewise, drawn as dashes. ValueError without any.
    """
    if not values:
        raise ValueError("bars was given no values: run at least one model")
    columns = list(dict.fromkeys(c for row in values.values() for c in row))
    figure, (axes,) = new_figure("", label)
    figure.set_size_inches(
        max(7.2, 1.0 + 0.16 * len(values) * len(columns) + 0.4 * len(columns)), 4.2
    )
    width = 0.8 / len(values)
    for i, (name, row) in enumerate(values.items()):
        at = [j - 0.4 + (i + 0.5) * width for j, c in enumerate(columns) if c in row]
        seeds = [row[c] for c in columns if c in row]
        means = [statistics.mean(s) for s in seeds]
        spans = [(m - min(s), max(s) - m) for m, s in zip(means, seeds)]
        again, colour = divmod(i, len(COLOURS))  # colours used again are hatched
        axes.bar(
            at, means, width * 0.92, yerr=list(zip(*spans)), label=name, color=COLOURS[colour],
            hatch=("", "////", "....")[again % 3], edgecolor="white", lw=0,
            error_kw={"lw": 1, "capsize": 1.5},
        )  # fmt: skip
        told = (paper or {}).get(name, {})
        marks = [(x, told[c]) for x, c in zip(at, (c for c in columns if c in row)) if c in told]
        for x, value in marks:
            axes.plot([x - width / 2, x + width / 2], [value, value], color="#222222", lw=1.6)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_ylim(0, 104)
    figure.legend(
        loc="outside lower center", ncols=min(4, len(values)), frameon=False, fontsize=9,
        title="dark dash: the paper's figure" if paper else None,
    )  # fmt: skip
    write_figure(figure, path)


def grid(
    values: Mapping[str, Values],
    path: str | Path,
    *,
    label: str = "Accuracy (%)",
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """A coloured cell for each model and column: the mean of its seeds, half their range if over 1.

    For many of both, where bars would be too thin. values: by model's title, then column; paper:
    likewise, in a row below the model's own. ValueError without any.
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
    figure.colorbar(image, ax=axes, label=label, fraction=0.03, pad=0.01)
    write_figure(figure, path)


def lines(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    path: str | Path,
    *,
    dial: str,
    label: str = "Accuracy (%)",
) -> None:
    """Panels side by side, in each a line for each model along a dial; the seeds' range is shaded.

    panels: by the panel's title, the model's title and the dial's value. ValueError without any.
    """
    if not panels:
        raise ValueError("lines was given no values: run at least one model")
    figure, every = new_figure(*[dial, label] * len(panels))
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    for axes, (title, values) in zip(every, panels.items()):
        for name, row in values.items():
            i, x = names.index(name), sorted(row)
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(x, [statistics.mean(row[at]) for at in x], lw=1.9, ms=5, label=name, **style)
            low, high = [min(row[at]) for at in x], [max(row[at]) for at in x]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0)
        ticks = sorted({at for row in values.values() for at in row})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(at) for at in ticks])
        axes.set_ylim(-2, 104)
        axes.set_title(title, loc="left", fontsize=12)
    shown = {name: line for axes in every for line, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=min(4, len(shown)),
        frameon=False, fontsize=9,
    )  # fmt: skip
    write_figure(figure, path)
