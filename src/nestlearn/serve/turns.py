"""Who may use the model: one thread at a time, in the order of asking."""

from __future__ import annotations

import threading
import time
from collections import deque

IDLE = 0.005  # seconds without anybody, after which nobody is taken to want a turn


class Turns:
    """A lock that is handed on in the order in which it was asked for.

    A model's own switches (evaluation mode, the memory it is lent) are of one use at a time; and
    what is computed alone is the same bit for bit, whoever else is served.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken, self._since = False, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._taken:
                ticket = threading.Lock()
                ticket.acquire()
                self._waiting.append(ticket)
            else:
                ticket, self._taken = None, True
        if ticket is not None:
            ticket.acquire()  # until it is handed on
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def pause(self) -> None:
        """Let the others have as long as it has had itself, or less if they want less; for the one
        whose turn it is.
        """
        had = time.monotonic() - self._since
        self.__exit__()
        self.rest(had)
        self.__enter__()

    def rest(self, seconds: float) -> None:
        """Ask for no turn for so long, or until nobody else wants one."""
        now = seen = time.monotonic()
        end = now + seconds
        while now < end and now - seen < IDLE:
            time.sleep(IDLE / 5)
            now = time.monotonic()
            seen = now if self._taken else seen
