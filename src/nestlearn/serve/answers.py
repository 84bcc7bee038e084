"""Answers, made token by token, those of several requests in turns.

One thread makes them all. In each round every answer that is being made takes one step: it reads
a piece of its prompt, or says a token. So a long answer does not hold up a short one; and what an
answer is does not depend on who else is answered, bit for bit, because each step is computed alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engines import Engine, Reader
from .limits import Limits
from .turns import Turns
from .wire import Refused

PIECE = 128  # tokens of a prompt that are read in one step
HELD = 16  # tokens that may wait for the rest of a letter


@dataclass(frozen=True)
class Asked:
    """How an answer is to be: at most `tokens`, drawn with a seed, until one of `stop` is said."""

    tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Said(NamedTuple):
    """What was said since the last time; once it has ended why ("stop", "length"), or its error."""

    text: str
    ended: str | None = None
    error: Refused | None = None


class Answer:
    """One answer in the making. hear: called with what is said, in the thread that makes it."""

    def __init__(
        self, engine: Engine, user: str, memory: Any, ids: list[int], asked: Asked,
        hear: Callable[[Said], None], deadline: float,
    ):  # fmt: skip
        self.engine, self.user, self.memory, self.ids, self.asked = engine, user, memory, ids, asked
        self.hear, self.deadline = hear, deadline
        self.given_up = False  # nobody listens any more
        self.made: list[int] = []
        self.ended = False
        self._spoken = Spoken(engine.decode, asked.stop)
        self._draw = torch.Generator().manual_seed(asked.seed)
        self._reader: Reader | None = None
        self._read = 0

    def step(self) -> None:
        """Read a piece of the prompt, or say a token."""
        if self._reader is None:
            self._reader = self.engine.reader(self.memory)
        if self._read < len(self.ids):
            piece = self.ids[self._read : self._read + PIECE]
            self._read += len(piece)
        else:
            piece = self.made[-1:]
        scores = self._reader(piece)
        if self._read < len(self.ids):
            return
        token = draw(scores, self.asked, self._draw)
        if token in self.engine.ends:
            self._end("stop")
            return
        self.made.append(token)
        text = self._spoken.add(token)
        if self._spoken.stopped:
            self._end("stop", text)
        elif len(self.made) >= self.asked.tokens or time.monotonic() > self.deadline:
            self._end("length", text)
        elif text:
            self.hear(Said(text))

    def _end(self, why: str, text: str = "") -> None:
        self.ended = True
        self.hear(Said(text + self._spoken.end(), why))

    def fail(self, error: Refused) -> None:
        """End it with an error."""
        self.ended = True
        self.hear(Said("", error=error))


def draw(scores: Tensor, asked: Asked, generator: torch.Generator) -> int:
    """A token of scores [V]: the likeliest at temperature 0, else of those that make up `top_p`."""
    if asked.temperature == 0:
        return int(scores.argmax())
    scores = scores.cpu() - scores.max().cpu()  # a tiny temperature must not overflow
    chances = (scores / asked.temperature).softmax(-1)
    if asked.top_p < 1:
        ordered, order = chances.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        chances = chances.index_fill(0, order[before >= asked.top_p], 0.0)
    return int(torch.multinomial(chances, 1, generator=generator))


class Spoken:
    """Tokens as text, as soon as it is certain: no half letters, nothing that may begin a stop."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...]):
        self.decode, self.stops = decode, stops
        self.stopped = False
        self._ids: list[int] = []
        self._from, self._to = 0, 0  # the tokens that were given out last
        self._text, self._sent = "", 0

    def add(self, token: int) -> str:
        """What is certain now."""
        self._ids.append(token)
        return self._give() if self._decoded() else ""

    def end(self) -> str:
        """The rest."""
        if self.stopped:
            return ""
        self._decoded(all_of_it=True)
        return self._give(all_of_it=True)

    def _decoded(self, *, all_of_it: bool = False) -> bool:
        known = self.decode(self._ids[self._from : self._to])
        now = self.decode(self._ids[self._from :])
        half = now.endswith("\ufffd") and len(self._ids) - self._to < HELD and not all_of_it
        if half or len(now) <= len(known):
            return False
        self._text += now[len(known) :]
        self._from, self._to = self._to, len(self._ids)
        return True

    def _give(self, *, all_of_it: bool = False) -> str:
        begin = max(0, self._sent - max(map(len, self.stops), default=0))
        ends = [at for stop in self.stops if (at := self._text.find(stop, begin)) >= 0]
        to = len(self._text)
        if ends:
            self.stopped, to = True, min(ends)
        elif not all_of_it:
            to -= max((_overlap(self._text, stop) for stop in self.stops), default=0)
        text = self._text[self._sent : to]
        self._sent = max(to, self._sent)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of the text begin the stop."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answering:
    """The thread that makes the answers; `close` ends it."""

    def __init__(self, limits: Limits, turns: Turns):
        self.limits, self.turns = limits, turns
        self._waiting: list[Answer] = []
        self._active: list[Answer] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def add(self, answer: Answer) -> None:
        """Make it when it is its turn; Refused, 429, where too many wait."""
        with self._wake:
            if len(self._waiting) >= self.limits.waiting:
                raise Refused(429, "too many requests wait: try again soon", "busy", after=2)
            self._waiting.append(answer)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while self._admit():
            for answer in self._active:
                self._step(answer)
            self._active = [a for a in self._active if not (a.ended or a.given_up)]

    def _step(self, answer: Answer) -> None:
        if answer.given_up:
            return
        try:
            with self.turns:
                answer.step()
        except Exception as error:  # one answer's error is that answer's
            answer.fail(refusal(error))

    def _admit(self) -> bool:
        """Let in those for whom there is room, users with the fewest first; False at the end."""
        with self._wake:
            while not (self._waiting or self._active or self._closed):
                self._wake.wait()
            now = time.monotonic()
            for late in [a for a in self._waiting if now > a.deadline and not a.given_up]:
                late.given_up = True
                late.fail(Refused(429, "it took too long for its turn to come", "busy", after=5))
            self._waiting = [a for a in self._waiting if not a.given_up]
            mine, most = Counter(a.user for a in self._active), max(1, self.limits.beside // 2)
            while len(self._active) < self.limits.beside:
                first = min(self._waiting, key=lambda a: mine[a.user], default=None)
                if first is None or mine[first.user] >= most:  # there is room for other users
                    break
                self._waiting.remove(first)
                self._active.append(first)
                mine[first.user] += 1
            return not self._closed


def refusal(error: Exception) -> Refused:
    """What to tell the one who asked: what the library foresees is the request's fault."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, FileNotFoundError):
        return Refused(404, "no such memory", "memory_not_found")
    if isinstance(error, ValueError):
        return Refused(400, str(error), "invalid_value")
    if isinstance(error, OSError):
        return Refused(507, f"the disk refuses: {error.strerror or error}", "disk")
    return Refused(500, f"something went wrong ({type(error).__name__})", "internal")
