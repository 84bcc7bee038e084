"""Who may use the model: one thread at a time, in the order of asking."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that is handed on in the order in which it was asked for.

    A model's own switches (evaluation mode, the memory it is lent) are of one use at a time; and
    what is computed alone is the same bit for bit, whoever else is served.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._waiting.append(ticket)
        ticket.acquire()  # until it is handed on

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def pause(self) -> None:
        """Let all who wait have their turn; for the one whose turn it is."""
        if self._waiting:
            self.__exit__()
            self.__enter__()
