"""Learning and studying: jobs, of which everybody who asks is told how far they are.

A job belongs to one memory, which nobody else changes meanwhile. What is told as "saved" is on
the disk. A job that is stopped keeps what it has learned until then.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from .answers import refusal
from .engines import Engine, Entry, Kept, Measure
from .limits import Limits
from .shelf import entry_of
from .turns import Turns
from .users import User
from .wire import Refused

PIECES = 24  # of a short text, so that there is a curve
FINISHED = 50  # jobs of a user that are remembered once they have ended
RUNNING = ("waiting", "running")


class Job:
    """One text that is learned or studied. events: what was told so far, numbered from 0."""

    def __init__(self, user: str, memory: str, kind: str):
        self.id = f"job-{secrets.token_hex(8)}"
        self.user, self.memory, self.kind = user, memory, kind
        self.state, self.created = "waiting", round(time.time())
        self.events: list[Entry] = []
        self.stop = threading.Event()
        self._told = threading.Condition()
        self._heard: list[Callable[[], None]] = []

    def tell(self, what: str, *, end: bool = False, **facts: Any) -> None:
        """Add an event, and wake those who listen. end: it is the last, and the job's state."""
        with self._told:
            self.state = what if end else self.state
            self.events.append({"n": len(self.events), "event": what, **facts})
            heard = list(self._heard)
        for wake in heard:
            wake()

    def listen(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after each event; returns what ends that."""
        with self._told:
            self._heard.append(wake)
        return lambda: self._heard.remove(wake)

    def about(self, after: int = 0) -> Entry:
        """The job as JSON, with its events from number `after` on."""
        return {
            "id": self.id, "object": "job", "kind": self.kind, "memory": self.memory,
            "state": self.state, "created": self.created, "events": self.events[after:],
        }  # fmt: skip

    @property
    def over(self) -> bool:
        return self.state not in RUNNING


class Lessons:
    """All jobs; so many at once as there are learners."""

    def __init__(self, engine: Engine, limits: Limits, turns: Turns):
        self.engine, self.limits, self.turns = engine, limits, turns
        self.jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(limits.learners, "learner")

    def find(self, user: User, job: str) -> Job:
        """The user's job; Refused, 404, also for another user's."""
        found = self.jobs.get(job)
        if found is None or found.user != user.name:
            raise Refused(404, f"no job {job[:80]!r}", "job_not_found")
        return found

    def of(self, user: User) -> list[Job]:
        """The user's jobs, the newest last."""
        return [job for job in list(self.jobs.values()) if job.user == user.name]

    def learn(
        self, user: User, memory: str, ids: list[int], source: str | None,
        mask: list[float] | None = None,
    ) -> Job:  # fmt: skip
        """Begin to learn a text's tokens. source: its name. mask: the weight of each (None: 1)."""
        return self._begin(user, memory, "learn", partial(self._learn, user, ids, source, mask))

    def study(
        self, user: User, memory: str, text: str, source: str | None, questions: int | None
    ) -> Job:
        """Begin to study a text."""
        if not self.engine.studies:
            raise Refused(
                400, "this model cannot study: that needs a stacked model that follows "
                "instructions (its tokenizer has a chat template); let it learn the text",
                "unsupported",
            )  # fmt: skip
        work = partial(self._study, user, text, source, questions)
        return self._begin(user, memory, "study", work)

    def close(self) -> None:
        """Stop all; what was learned is saved."""
        for job in list(self.jobs.values()):
            job.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ---------------------------------------------------------------------------------- inside

    def _begin(self, user: User, memory: str, kind: str, work: Callable[[Job], None]) -> Job:
        user.shelf.folder(memory)
        held = ExitStack()
        with self._lock:
            mine = self.of(user)
            if sum(not job.over for job in mine) >= self.limits.jobs:
                text = f"{self.limits.jobs} of your jobs run or wait: let one end"
                raise Refused(429, text, "busy", after=10)
            held.enter_context(user.shelf.changing(memory))
            for old in [job for job in mine if job.over][: -FINISHED or None]:
                del self.jobs[old.id]
            job = Job(user.name, memory, kind)
            self.jobs[job.id] = job
        self._pool.submit(self._run, job, held, work)
        return job

    def _run(self, job: Job, held: ExitStack, work: Callable[[Job], None]) -> None:
        job.state, state = "running", "failed"
        try:
            with held:
                work(job)
            state = "stopped" if job.stop.is_set() else "done"
        except Exception as error:  # a job's error is that job's
            told = refusal(error)
            job.tell("error", message=told.message, code=told.code)
        job.tell(state, end=True)

    def _learn(
        self, user: User, ids: list[int], source: str | None, mask: list[float] | None, job: Job
    ) -> None:
        shelf, engine = user.shelf, self.engine
        kept = shelf.open(job.memory)
        shelf.keep(job.memory)
        lesson, before = Lesson(engine, kept.memory, len(ids)), kept.history
        entry = entry_of("learn", source=source, begin=kept.memory.position)
        saved = time.monotonic()

        def save() -> None:
            nonlocal kept, saved
            history = [*before, {**entry, **lesson.facts()}]
            kept = shelf.save(job.memory, Kept(lesson.memory, history, kept.digest))
            saved = time.monotonic()
            job.tell("saved", position=kept.memory.position, tokens=lesson.done)

        with self.turns:
            begin = engine.measures(kept.memory, kept.memory)
        job.tell("begin", tokens=len(ids), levels=_levels(begin))
        for a in range(0, len(ids), lesson.piece):
            if job.stop.is_set():
                break
            some = slice(a, a + lesson.piece)
            with self.turns:
                begun = time.monotonic()
                told = lesson.read(ids[some], None if mask is None else mask[some])
                took = time.monotonic() - begun
            job.tell("piece", **told)
            self.turns.rest(took)  # who asks something has half of the time
            if time.monotonic() - saved >= self.limits.save_seconds:
                save()
        if lesson.done:
            save()

    def _study(
        self, user: User, text: str, source: str | None, questions: int | None, job: Job
    ) -> None:
        def tell(what: str, done: int, count: int) -> None:
            if job.stop.is_set():
                raise KeyboardInterrupt  # what a study that is stopped expects
            job.tell("study", doing=what, done=done, of=count)
            self.turns.pause()

        user.shelf.keep(job.memory)
        folder = user.shelf.folder(job.memory)
        with self.turns:
            studied = self.engine.study(folder, text, source, questions, tell)
        if studied.stopped:
            job.stop.set()
        job.tell("saved", **studied._asdict())


class Lesson:
    """A text that is read in pieces; how far the memory moves with each."""

    def __init__(self, engine: Engine, memory: Any, tokens: int):
        self.engine, self.memory, self.done = engine, memory, 0
        self.piece = max(4, min(engine.piece, math.ceil(tokens / PIECES)))
        self._sum, self._count = 0.0, 0

    def read(self, ids: list[int], mask: list[float] | None = None) -> Entry:
        """Learn the next piece; what there is to tell of it. ValueError where numbers become
        infinite: the piece is not kept.
        """
        losses, memory = self.engine.learn(self.memory, ids, mask)
        now = self.engine.measures(memory, self.memory)
        if not all(math.isfinite(measure.norm) for measure in now) or bool(losses.isinf().any()):
            raise ValueError("the memory became infinite: what it knew is kept, lower the rates")
        self.memory, self.done = memory, self.done + len(ids)
        known = losses[~losses.isnan()]
        self._sum, self._count = self._sum + float(known.sum()), self._count + len(known)
        return {
            "tokens": self.done, "position": memory.position,
            "loss": float(known.mean()) if len(known) else None, "levels": _levels(now),
            "words": words(self.engine, ids), "surprise": rounded(losses),
        }  # fmt: skip

    def facts(self) -> Entry:
        """What the history says of it."""
        return {
            "tokens": self.done, "learned": self._count,
            "loss": self._sum / max(self._count, 1), "held_out": None, "rolled_back": None,
        }  # fmt: skip


def words(engine: Engine, ids: list[int]) -> list[str]:
    """Each token's text; a letter of several tokens stands with its last one."""
    found, held = [], 0
    for n in range(len(ids)):
        text = engine.decode(ids[held : n + 1])
        if text.endswith("\ufffd") and n - held < 4:
            found.append("")
            continue
        found.append(text)
        held = n + 1
    return found


def rounded(losses: Tensor) -> list[float | None]:
    """Losses for JSON, None where there is none."""
    return [None if math.isnan(x) else round(x, 4) for x in losses.tolist()]


def _levels(measures: list[Measure]) -> list[Entry]:
    return [measure._asdict() for measure in measures]
