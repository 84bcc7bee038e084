"""A training run and its terminal: Ctrl-C, and what is shown."""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nestlearn.train.checkpoint import Record
from nestlearn.train.config import TrainConfig


class Interrupt:
    """Holds Ctrl-C until a step is whole; a second one does not wait."""

    def __init__(self) -> None:
        self.asked = self.forced = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # only there signals arrive
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.forced = self.asked
        self.asked = True
        if self.forced:
            raise KeyboardInterrupt

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


class Display:
    """A progress bar on stderr, and a line for every validation."""

    def __init__(self, config: TrainConfig, step: int, shown: bool) -> None:
        self._bar: Progress | None = None
        if shown:
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "", total=config.steps, completed=step, loss="–", rate="–"
            )

    def __enter__(self) -> Display:
        (self._bar or nullcontext()).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.__exit__(*error)

    def show(self, record: Record) -> None:
        if self._bar is None:
            return
        rate = f"{record['tokens_per_second']:,.0f}"
        loss = f"{record['loss']:.3f}"
        self._bar.update(self._task, completed=record["step"], loss=loss, rate=rate)
        if "val_loss" in record:
            bits = record["val_bits_per_byte"]
            more = f" ({bits:.3f} bits per byte)" if bits is not None else ""
            text = f"step {record['step']}: validation loss {record['val_loss']:.3f} nats{more}"
            self._bar.console.print(text, highlight=False)
