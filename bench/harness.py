"""How it is timed: warm-up, then rounds in which all contestants run, each round in another order.

A machine's speed drifts (heat, neighbours). So what is compared runs close together, in orders
that are balanced over the rounds, and a ratio is the median of the ratios within the rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST = 0.2  # seconds for which a run is repeated in a round, so that the clock's grain is nothing
REPEATS = 20

FLAT = "flat: "  # prefix of the kinds of run that compare one length with another

Measured = dict[str, Any]
Tick = Callable[[str, float], Any]  # what was done, and how much of the phase it was


@dataclass
class Task:
    """One contestant in one kind of run at one length.

    run: does it once. amount: what one run does, in the unit's terms: tokens or FLOPs, of which so
    many per second are reported (rate), or the factor from seconds to the unit (not rate).
    group: the tasks that are compared, so that run after another. length: T in tokens, or a
    position. lenient: an error drops the contestant (a peer, or the compiler) and not the
    whole run.
    """

    contestant: str
    kind: str
    length: int | None
    run: Callable[[], Any]
    amount: float
    unit: str
    group: str
    rate: bool = True
    metric: str = "speed"
    lenient: bool = False
    facts: Measured = field(default_factory=dict)
    seconds: float | None = None  # of one run, from the warm-up; None: dropped
    dropped: str = ""
    values: list[float] = field(default_factory=list)

    def time(self, repeats: int = 1) -> float:
        """Seconds of one run, the mean over the repeats."""
        began = time.perf_counter()
        for _ in range(repeats):
            self.run()
        return (time.perf_counter() - began) / repeats

    def repeats(self) -> int:
        """How often it runs in a round."""
        assert self.seconds is not None
        return min(REPEATS, max(1, math.ceil(LEAST / max(self.seconds, 1e-6))))

    def record(self) -> Measured:
        """As JSON data: median, lowest and highest of the rounds; None where it was dropped."""
        return {
            "contestant": self.contestant,
            "kind": self.kind,
            "T": self.length,
            "metric": self.metric,
            "unit": self.unit,
            **summary(self.values),
            "dropped": self.dropped,
            **self.facts,
        }


def summary(values: Sequence[float]) -> Measured:
    """Median, lowest and highest (None without values), how many, and the values."""
    return {
        "median": statistics.median(values) if values else None,
        "low": min(values, default=None),
        "high": max(values, default=None),
        "rounds": len(values),
        "values": list(values),
    }


def order(n: int, turn: int) -> list[int]:
    """The order in which n contestants run in round `turn`.

    Each odd round is the mirror of the one before it, so in any even number of rounds all have the
    same mean place and a steady drift cancels. Over 2n rounds all have every place twice and
    follow each other equally often (Williams' design).
    """
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]
    row = [(i + turn // 2) % n for i in zigzag]
    return row[::-1] if turn % 2 else row


def warm_up(tasks: Sequence[Task], limit: float, tick: Tick) -> None:
    """Run every task, short lengths first, to know its time; drop those of more than `limit` s.

    One that is dropped at a length is dropped at the longer ones, without being run.
    """
    before: dict[tuple[str, str], Task] = {}
    for task in sorted(tasks, key=lambda t: t.length or 0):
        key = (task.contestant, task.kind)
        shorter = before.get(key)
        if shorter is not None and shorter.seconds is None:
            task.dropped = shorter.dropped
        else:
            _try(task, _foretold(task, shorter), limit)
        before[key] = task
        tick(task.contestant, task.length or 1)


def _foretold(task: Task, shorter: Task | None) -> float | None:
    """The least that it can take, from a shorter length: no layer is faster than linear."""
    if shorter is None or not shorter.seconds or not shorter.length or not task.length:
        return None
    return shorter.seconds * (task.length / shorter.length if task.rate else 1)


def _try(task: Task, foretold: float | None, limit: float) -> None:
    too_slow = f"more than {limit:g} s per run"
    if foretold is not None and foretold > limit:
        task.dropped = too_slow
        return
    try:
        took = task.time()
        if foretold is None or took > 3 * foretold:  # it may have compiled, or filled caches
            took = task.time()
    except (RuntimeError, MemoryError) as error:
        if not (task.lenient or is_memory(error)):
            raise
        task.dropped = "out of memory" if is_memory(error) else f"{error}".splitlines()[0]
        return
    task.seconds, task.dropped = (took, "") if took <= limit else (None, too_slow)


def is_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def expected(tasks: Sequence[Task]) -> float:
    """Seconds of one round."""
    return sum(t.seconds * t.repeats() for t in tasks if t.seconds is not None)


def run_rounds(tasks: Sequence[Task], rounds: int, tick: Tick, after: Callable[[int], Any]) -> None:
    """Time every task once in each round; `after(rounds done)` is called when one has ended."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        if task.seconds is not None:
            groups.setdefault(task.group, []).append(task)
    for turn in range(rounds):
        for group in groups.values():
            gc.collect()
            for i in order(len(group), turn):
                task = group[i]
                seconds = task.time(task.repeats())
                task.values.append(task.amount / seconds if task.rate else task.amount * seconds)
                tick(f"round {turn + 1}: {task.contestant}", (task.seconds or 0) * task.repeats())
        after(turn + 1)
