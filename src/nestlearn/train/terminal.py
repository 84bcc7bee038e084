"""A training run and its terminal: Ctrl-C, and what is shown."""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext
from typing import Any

from rich import progress
from rich.console import Console

from nestlearn.train.checkpoint import Record
from nestlearn.train.config import TrainConfig
from nestlearn.train.meters import Meters
from nestlearn.train.ranks import ALONE, Ranks


class Interrupt:
    """Holds Ctrl-C until a step is whole; a second one does not wait.

    With several ranks all stop after the same step, at SIGTERM (a scheduler's) as at Ctrl-C; a
    second signal forces nothing: the launcher repeats what the terminal sent.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.asked = self.forced = False
        self._ranks = ranks
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # only there signals arrive
            several = [signal.SIGTERM] if self._ranks.size > 1 else []
            for number in (signal.SIGINT, *several):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, *_: object) -> None:
        self.forced = self.asked and self._ranks.size == 1
        self.asked = True
        if self.forced:
            raise KeyboardInterrupt

    def check(self, also: bool = False) -> None:
        """Stop all ranks if one was asked to, or has another reason."""
        if any(self._ranks.gather(self.asked or also)):
            raise KeyboardInterrupt


class Display:
    """A progress bar on stderr, and a line for every validation."""

    def __init__(self, config: TrainConfig, step: int, shown: bool, meters: Meters) -> None:
        self._bar: progress.Progress | None = None
        self._meters = meters
        if shown:
            self._bar = progress.Progress(
                progress.TextColumn("[bold]train"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]}"),
                progress.TextColumn("{task.fields[rate]} tokens/s"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
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
            text += f"; {self._meters.report()}"
            self._bar.console.print(text, highlight=False, soft_wrap=True)
