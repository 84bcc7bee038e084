"""The pictures of runs: loss over steps, over the position in the sequence, and both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.disk import atomic_write

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
_BINS = 8  # points of a comparison over the context: few windows are read, so fewer are steadier


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw training loss (thin, smoothed over 1/50 of the run) and validation loss (dots) by step.

    logs: the records of one or more runs by name. ValueError without any record.
    """
    if not any(logs.values()):
        raise ValueError("loss_curves was given no records; train for at least one step")
    figure, axes = new_figure(_STEP, _LOSS)
    for i, (name, log) in enumerate(logs.items()):
        run = [(r["step"], float(r["loss"]), r.get("val_loss")) for r in log]
        _draw_runs(axes[0], i, name, [run], legend=("training", "validation"))
    axes[0].legend(frameon=False, fontsize=10)
    write_figure(figure, path)


def comparison(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw models side by side: loss over the training, and over the position in the context.

    records: dicts with model, seed, log, value_at, loss_by_position, one for each model and seed;
    of several seeds the mean is drawn and their range shaded. On the left training loss (thin)
    and validation loss (marks); on the right the mean loss in every eighth of the context, with a
    line at the length that the models were trained on. ValueError without records, or where their
    contexts differ in length.
    """
    models = {r["model"]: [s for s in records if s["model"] == r["model"]] for r in records}
    lengths = {(min(map(int, r["value_at"])), len(r["loss_by_position"])) for r in records}
    if len(lengths) != 1:
        raise ValueError(
            f"comparison was given records of (trained length, context) {sorted(lengths)}; pass "
            "one or more, all of the same lengths"
        )
    ((trained, context),) = lengths
    figure, (left, right) = new_figure(_STEP, _LOSS, _POSITION, _LOSS)
    for i, (name, runs) in enumerate(models.items()):
        _draw_runs(left, i, name, [run["log"] for run in runs])
        curves = torch.tensor([run["loss_by_position"] for run in runs])
        where = [(j + 0.5) * context / _BINS for j in range(_BINS)]
        means = torch.stack([part.mean(1) for part in curves.tensor_split(_BINS, 1)], 1)
        _line(right, i, where, means, marker=MARKERS[i % len(MARKERS)], ms=5, label=_label(name))
    _fit(left, skip=0.125)  # the steep beginning
    _fit(right, room=0.16)
    right.set_xlim(0, context)
    right.set_xticks([trained * i for i in range(context // trained + 1)])
    right.axvline(trained, color="#555555", lw=1, ls=(0, (4, 3)), zorder=1)
    mark = {"xy": (trained, 0.985), "xycoords": right.get_xaxis_transform(), "va": "top"}
    right.annotate("trained length", **mark, xytext=(4, 0), textcoords="offset points", fontsize=9)
    left.set_title("While training", loc="left", fontsize=12)
    right.set_title("Within the context", loc="left", fontsize=12)
    style = {"frameon": False, "fontsize": 10.5}
    lines = right.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=min(4, len(models)), **style)
    write_figure(figure, path)


_STEP = "Optimizer step"
_POSITION = "Position in the context (tokens)"
_LOSS = "Loss (nats per token)"


def _label(name: str) -> str:
    """A name as it is: matplotlib reads $ as mathematics, and hides what begins with _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _draw_runs(
    axes: Any,
    i: int,
    name: str,
    runs: Sequence[Sequence[Sequence[Any]]],
    legend: tuple[str, str] | None = None,
) -> None:
    """The i-th model's runs, one for each seed: rows of (step, training loss, validation loss)."""
    labels = [_label(f"{name}, {what}") for what in legend] if legend else [None, None]
    length = min(map(len, runs))
    steps = [row[0] for row in runs[0][:length]]
    smooth = [_smoothed(torch.tensor([row[1] for row in run]), len(run) // 50) for run in runs]
    losses = torch.tensor([curve[:length] for curve in smooth]).mean(0).tolist()
    axes.plot(steps, losses, color=COLOURS[i % len(COLOURS)], lw=1, alpha=0.5, label=labels[0])
    at = [j for j in range(length) if all(run[j][2] is not None for run in runs)]
    if at:
        val = torch.tensor([[run[j][2] for j in at] for run in runs])
        mark = MARKERS[i % len(MARKERS)]
        _line(axes, i, [steps[j] for j in at], val, marker=mark, ms=5, label=labels[1])


def _line(axes: Any, i: int, x: Sequence[float], seeds: torch.Tensor, **style: Any) -> None:
    """The i-th model's mean of seeds [S, N], and the range of several as a band."""
    colour = COLOURS[i % len(COLOURS)]
    axes.plot(x, seeds.mean(0).tolist(), color=colour, lw=1.9, **style)
    if len(seeds) > 1:
        low, high = seeds.amin(0).tolist(), seeds.amax(0).tolist()
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _smoothed(values: torch.Tensor, window: int) -> list[float]:
    """A centred running mean; the window shrinks at the two ends instead of inventing values."""
    window = max(1, window)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    at = torch.arange(len(values))
    low = (at - window // 2).clamp(min=0)
    high = (at + (window + 1) // 2).clamp(max=len(values))
    return ((total[high] - total[low]) / (high - low)).tolist()


def _fit(axes: Any, skip: float = 0.0, room: float = 0.06) -> None:
    """Limit the loss to what the curves show after a share of their points, with room above."""
    curves = [torch.tensor(line.get_ydata()) for line in axes.lines]
    shown = torch.cat([curve[int(skip * len(curve)) :] for curve in curves])
    low, high = float(shown.min()), float(shown.max())
    axes.set_ylim(low - 0.06 * (high - low), high + room * (high - low) + 1e-6)


def new_figure(*labels: str) -> tuple[Any, Sequence[Any]]:
    """A figure with one panel for each pair of labels (x, y), side by side."""
    # The objects, not pyplot: no display, no global state, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(labels) // 2
    size = (7.2, 4.2) if panels == 1 else (5.2 * panels, 4.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes, x_label, y_label in zip(all_axes, labels[::2], labels[1::2]):
        axes.set_xlabel(x_label, fontsize=11)
        axes.set_ylabel(y_label, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.8)
        axes.set_axisbelow(True)
    return figure, all_axes


def write_figure(figure: Any, path: str | Path) -> None:
    kind = Path(path).suffix.removeprefix(".") or "png"
    atomic_write(path, lambda temp: figure.savefig(temp, format=kind, facecolor="white"))
