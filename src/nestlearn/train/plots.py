"""The two pictures of a run: loss over steps, and loss over the position in the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.disk import atomic_write

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw training loss (thin, smoothed over 1/50 of the run) and validation loss (dots) by step.

    logs: the records of one or more runs by name. ValueError without any record.
    """
    if not any(logs.values()):
        raise ValueError("loss_curves was given no records; train for at least one step")
    figure, axes = _figure("Optimizer step", "Loss (nats per token)")
    for i, (name, log) in enumerate(logs.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        steps = [record["step"] for record in log]
        losses = torch.tensor([float(record["loss"]) for record in log])
        smooth = _smoothed(losses, max(1, len(log) // 50))
        axes.plot(steps, smooth, color=colour, lw=1.2, alpha=0.55, label=f"{name}, training")
        val = [(record["step"], record["val_loss"]) for record in log if "val_loss" in record]
        if val:
            label = f"{name}, validation"
            axes.plot(*zip(*val), "o-", color=colour, lw=2, ms=4, label=label)
    _write(figure, axes, path)


def loss_by_position(curves: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Draw the mean loss at each position of a window, smoothed over 1/32 of it.

    curves: nats per token [T] by name, as `evaluate` returns them. ValueError without curves.
    """
    if not curves:
        raise ValueError("loss_by_position was given no curves; pass evaluate()'s second result")
    figure, axes = _figure("Position in the sequence (tokens)", "Loss (nats per token)")
    for i, (name, curve) in enumerate(curves.items()):
        smooth = _smoothed(curve.detach().float().cpu(), max(1, len(curve) // 32))
        style = _DASHES[i % len(_DASHES)]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(range(1, len(smooth) + 1), smooth, color=colour, ls=style, lw=1.8, label=name)
    _write(figure, axes, path)


def _smoothed(values: torch.Tensor, window: int) -> list[float]:
    """A centred running mean; the window shrinks at the two ends instead of inventing values."""
    total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    at = torch.arange(len(values))
    low = (at - window // 2).clamp(min=0)
    high = (at + (window + 1) // 2).clamp(max=len(values))
    return ((total[high] - total[low]) / (high - low)).tolist()


def _figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    # The objects, not pyplot: no display, no global state, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _write(figure: Any, axes: Any, path: str | Path) -> None:
    axes.legend(frameon=False, fontsize=10)
    kind = Path(path).suffix.removeprefix(".") or "png"
    atomic_write(path, lambda temp: figure.savefig(temp, format=kind, facecolor="white"))
