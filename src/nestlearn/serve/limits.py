"""What a request, a user and the whole server may take."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """body, upload: bytes of a request, and of a memory's file. tokens: of a prompt with its
    answer. text: tokens of a text to learn. requests: a minute, of one user. waiting: requests
    that wait for an answer, of all users. beside: answers that are made in turns, half of them of
    one user at most. learners: that learn at once; jobs: of one user, running or waiting.
    memories: of one user; points: earlier states that each keeps. seconds: of any request.
    save_seconds: between two saves of a text that is being learned.
    """

    body: int = 2**20
    upload: int = 2**28
    tokens: int = 4096
    text: int = 200_000
    requests: int = 240
    waiting: int = 256
    beside: int = 32
    learners: int = 1
    jobs: int = 4
    memories: int = 100
    points: int = 20
    seconds: float = 300.0
    save_seconds: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), "seconds" not in field.name
            if not (value >= 1 if whole else value >= 0):
                raise ValueError(
                    f"{field.name}={value}: give {int(whole)} or more, or leave it out"
                )
