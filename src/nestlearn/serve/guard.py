"""What every request passes before anything is done: host, origin, size, time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from .limits import Limits
from .users import loopback
from .wire import Refused

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_RAW = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """ASGI around the application. local: without tokens, so only this machine may ask, and only
    under a name of its own: a page elsewhere that gave its name this address is refused.
    """

    def __init__(self, app: Any, limits: Limits, *, local: bool):
        self.app, self.limits, self.local = app, limits, local

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def sending(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *_RAW]}
            await send(message)

        try:
            async with asyncio.timeout(self.limits.seconds):
                limit = self._passed(scope)
                await self.app(scope, _counted(receive, limit), sending)
        except Refused as refused:
            await refused.response()(scope, receive, sending)
        except TimeoutError:
            if started:
                raise  # the connection is closed: what was sent is known to be a part
            late = Refused(408, f"this took longer than {self.limits.seconds:g} s", "timeout")
            await late.response()(scope, receive, sending)

    def _passed(self, scope: Any) -> int:
        """The bytes that the body may have; Refused."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        host = urlsplit(f"//{headers.get('host', '')}")
        if self.local and not loopback(host.hostname or ""):
            raise Refused(421, "this server answers to localhost only", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host.netloc:
            raise Refused(403, "a page of another host may not ask this server", "wrong_origin")
        upload = scope["method"] == "PUT" and scope["path"].endswith("/file")
        limit = self.limits.upload if upload else self.limits.body
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        return limit


def _counted(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counted() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        return message

    return counted


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body is larger than {limit} bytes: send less", "too_large")
