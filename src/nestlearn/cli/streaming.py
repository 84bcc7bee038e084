"""`nestlearn eval stream`: bits per byte of a text that is read as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from nestlearn.cli.options import Device

if TYPE_CHECKING:
    from nestlearn.evals.streams import Text
    from nestlearn.experiments.readers import Opened

ASIS = ("windows", "carried")  # with nothing to choose, they read at temperature 1


def stream(
    model: Annotated[
        Path, Option(help="A run's folder, a saved Hope, a stack, or a pretrained model.")
    ],
    text: Annotated[
        list[Path], Option(help="A text, read as one stream; repeat the option for more.")
    ],
    rows: Annotated[
        list[str] | None,
        Option(
            help="windows, carried, levels, calibration, cache, knn or dynamic; repeat the option "
            "for more (default: all that the model has)."
        ),
    ] = None,
    choose: Annotated[
        list[Path] | None,
        Option(help="Another text, by which each row's dial is chosen among three values."),
    ] = None,
    tokens: Annotated[
        int | None, Option(min=2, help="Read so many tokens of each text only.")
    ] = None,
    window: Annotated[
        int | None, Option(min=2, help="Tokens of a window (default: as it was trained).")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[
        Path | None, Option("--json", help="Write the figures to this file, too.")
    ] = None,
) -> None:
    """Read a text with a trained model, and print its bits per byte, by what learns on the way.

    Every token is scored before anything learns it. Rows: the model as it is, in windows of its
    trained length; its state carried; levels that learn; and controls: calibration, a unigram
    cache, the nearest hidden vectors, dynamic evaluation.

    Example:  nestlearn eval stream --model runs/first --text book.txt
    """
    from nestlearn.cli.commands import show
    from nestlearn.cli.stacked import quiet
    from nestlearn.experiments import readers
    from nestlearn.experiments.experiment import chosen
    from nestlearn.train.run import resolve_device

    quiet()
    opened = readers.opened(model, str(resolve_device(device)), window)
    asked = chosen(rows or (), opened.rows, "row")
    read = opened.text(_joined(text), tokens)
    held = opened.text(_joined(choose), tokens) if choose else None
    found = _read(opened, asked, read, held)
    size = int(read.sizes.sum())
    if as_json is not None:
        said = {"model": str(model), "text": [str(path) for path in text], "bytes": size,
                "tokens": len(read.ids), "window": opened.window, "rows": found}  # fmt: skip
        as_json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    show(_table(found, f"{size:,} bytes, {len(read.ids):,} tokens, windows of {opened.window:,}."))


def _joined(paths: list[Path]) -> str:
    from nestlearn.train.texts import read_texts

    return b"\n".join(read_texts(paths)[0]).decode("utf-8")


def _read(
    opened: Opened, rows: tuple[str, ...], text: Text, held: Text | None
) -> list[dict[str, Any]]:
    """What each row came to, those before a Ctrl-C, if any; with progress on stderr."""
    from nestlearn.cli.reading import progress
    from nestlearn.experiments.readers import ROWS

    found: list[dict[str, Any]] = []
    of = len(text.ids) + (3 * len(held.ids) if held else 0)
    with progress("tokens", measured=False) as board:
        task = board.add_task("", total=of * len(rows), rate="")
        try:
            for row in rows:
                board.update(task, description=ROWS[row].title)
                done, began = len(found) * of, time.perf_counter()

                def told(read: int) -> None:
                    rate = read / (time.perf_counter() - began)  # noqa: B023
                    board.update(task, completed=done + read, rate=f"{rate:,.0f} tokens/s")  # noqa: B023

                found.append(_measured(opened, row, text, held, told))
        except KeyboardInterrupt:
            if not found:
                raise
    return found


def _measured(
    opened: Opened, row: str, text: Text, held: Text | None, tell: Callable[[int], None]
) -> dict[str, Any]:
    """One row's figures, at the best of its dial's values on the held text."""
    from nestlearn.evals.streams import bits_per_byte, nats, tenths
    from nestlearn.experiments.readers import ROWS

    about, done = ROWS[row], 0

    def read(some: Text, value: float) -> Any:
        nonlocal done
        before, done = done, done + len(some.ids)
        return nats(opened.reader(row, value), some.ids, lambda now, _: tell(before + now))

    dial = 1.0 if row in ASIS else about.values[1]
    if held is not None:
        dial = min(about.values, key=lambda v: bits_per_byte(read(held, v), held.sizes))
    start = time.perf_counter()
    losses = read(text, dial)
    return {
        "row": row, "title": about.title, about.dial: dial,
        "bits_per_byte": bits_per_byte(losses, text.sizes), "tenths": tenths(losses, text.sizes),
        "tokens_per_second": len(text.ids) / (time.perf_counter() - start),
    }  # fmt: skip


def _table(found: list[dict[str, Any]], about: str) -> str:
    from nestlearn.experiments.readers import ROWS
    from nestlearn.experiments.tables import markdown

    head = ("row", "setting", "bits per byte", "first tenth", "last tenth", "tokens/s")
    rows: list[Sequence[str]] = [head]
    for row in found:
        dial = ROWS[row["row"]].dial
        bits = (row["bits_per_byte"], row["tenths"][0], row["tenths"][-1])
        told, speed = (f"{value:.4f}" for value in bits), f"{row['tokens_per_second']:,.0f}"
        rows.append((row["title"], f"{dial} {row[dial]:g}", *told, speed))
    return f"{markdown(rows)}\n\n{about}"
