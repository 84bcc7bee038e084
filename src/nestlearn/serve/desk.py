"""What every handler needs: the engine, the users, threads for what would hold up the others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request

from .answers import Answer, Answering
from .engines import Engine, Entry
from .lessons import Job, Lessons
from .limits import Limits
from .turns import Turns
from .users import User, Users
from .wire import Refused

T = TypeVar("T")
THREADS = 8  # for files, and for texts that become tokens
BEAT = 15.0  # seconds after which a silent stream says that it is there


class Desk:
    """Everything that one server has. root: the folder of memories; tokens: see `Users`."""

    def __init__(
        self, engine: Engine, root: Path, limits: Limits, tokens: dict[str, str] | None = None
    ):
        self.engine, self.limits = engine, limits
        self.turns = Turns()
        self.users = Users(engine, root, limits, self.turns, tokens)
        self.answering = Answering(limits, self.turns)
        self.lessons = Lessons(engine, limits, self.turns)
        self.began = round(time.time())
        with self.turns:
            self.vocabulary = len(engine.reader(None)(engine.encode("a")))
        self._threads = ThreadPoolExecutor(THREADS, "desk")

    def user(self, request: Request) -> User:
        """Who asks; Refused, 401 or 429."""
        user = self.users.who(request.headers.get("authorization"))
        user.count()
        return user

    async def do(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Do it in a thread; what the library foresees becomes a `Refused`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **options))

    async def follow(self, job: Job, after: int = 0) -> AsyncIterator[Entry | None]:
        """The job's events as they come, from number `after` on; None where none came for long."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(woken.set)

        end = job.listen(wake)
        try:
            while True:
                woken.clear()
                over = job.over
                for told in job.events[after:]:
                    after = told["n"] + 1
                    yield told
                if over and after >= len(job.events):
                    return
                try:
                    async with asyncio.timeout(BEAT):
                        await woken.wait()
                except TimeoutError:
                    yield None
        finally:
            end()

    def close(self) -> None:
        """Stop the threads; what is being learned is saved."""
        self.lessons.close()
        self.answering.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


async def sleepless(request: Request, work: Awaitable[T], answer: Answer) -> T:
    """Wait for an answer, but give it up when the one who asked has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(408, "the one who asked has gone", "gone")
        return task.result()
    finally:
        answer.given_up = True
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refused):
                await each


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
