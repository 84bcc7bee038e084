"""The picture: tokens/s against the length, both logarithmic, each line named at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.disk import atomic_write

from .harness import FLAT, Measured

# Ours in Okabe and Ito's palette, told apart with any colour vision, with two dark ones for its
# pale yellow and black; peers dashed, in greys.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5E3C99")
_GREYS = ("#000000", "#666666", "#8F8F8F")
_MARKERS = "os^DvPX"
_ROW = 0.052  # of the panel's height: the least distance between two names


def draw(document: dict[str, Any], path: Path) -> None:
    """One panel for each kind of run that is measured in tokens/s, at its commonest batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = drawn(document)
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    styles = _styles(records)
    figure = Figure(
        figsize=(7.4 * len(kinds), 4.8), dpi=150, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        of_kind = [r for r in records if r["kind"] == kind]
        batches = [r["batch"] for r in of_kind]
        batch = max(set(batches), key=batches.count)
        _panel(axes, [r for r in of_kind if r["batch"] == batch], styles)
        axes.set_title(kind[0].upper() + kind[1:], loc="left", fontsize=12)
    m = document["machine"]
    where = f"{m['cpu']}, {m['threads']} threads"
    figure.supxlabel(f"{where}; marks: medians, bars: ranges of the rounds", fontsize=9)
    atomic_write(path, lambda temp: figure.savefig(temp, format="png", facecolor="white"))


def drawn(document: dict[str, Any]) -> list[Measured]:
    """The records that the picture shows: measured speeds, without the flatness's two lengths."""
    return [
        r
        for r in document["records"]
        if r["unit"] == "tokens/s" and r["values"] and not r["kind"].startswith(FLAT)
    ]


def _styles(records: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker by contestant, the same in all panels."""
    ours = {r["contestant"]: bool(r["ours"]) for r in records}
    styles = {}
    for own, colours, dashes in ((True, _COLOURS, "-"), (False, _GREYS, (0, (4, 2)))):
        for i, name in enumerate(n for n, is_ours in ours.items() if is_ours == own):
            marker = _MARKERS[i % len(_MARKERS)]
            styles[name] = {"color": colours[i % len(colours)], "ls": dashes, "marker": marker}
    return styles


def _panel(axes: Any, records: Sequence[Measured], styles: dict[str, dict[str, Any]]) -> None:
    ends = []
    for name in dict.fromkeys(r["contestant"] for r in records):
        points = sorted((r for r in records if r["contestant"] == name), key=lambda r: r["T"])
        x, y = [p["T"] for p in points], [p["median"] for p in points]
        below = [p["median"] - p["low"] for p in points]
        above = [p["high"] - p["median"] for p in points]
        axes.errorbar(x, y, yerr=[below, above], lw=1.8, ms=5, capsize=2, **styles[name])
        ends.append((x[-1], y[-1], name, styles[name]["color"]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({r["T"] for r in records})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("Length (tokens)", fontsize=11)
    axes.set_ylabel("Tokens per second", fontsize=11)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(_ticks())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    _names(axes, ends)


def _ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def _names(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the panel, in the order of the lines' ends, never over one another."""
    axes.figure.canvas.draw()  # fixes the limits
    to_panel = axes.transData + axes.transAxes.inverted()
    rows = sorted(
        ((to_panel.transform((x, y))[1], (x, y), name, colour) for x, y, name, colour in ends),
        key=lambda row: row[0],
    )
    heights = [row[0] for row in rows]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _ROW)
    top = 1.0  # what stands above the panel sinks
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top)
        top = heights[i] - _ROW
    for height, (_, end, name, colour) in zip(heights, rows):
        axes.annotate(
            name, end, xytext=(1.04, height), textcoords="axes fraction", color=colour,
            fontsize=8.5, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6,
                        "shrinkA": 1, "relpos": (0, 0.5), "shrinkB": 3},
        )  # fmt: skip
