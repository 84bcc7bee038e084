"""The application, and the server that runs it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from . import chat, rooms
from .answers import refusal
from .desk import Desk
from .engines import Engine
from .guard import Guard
from .limits import Limits
from .users import check_host
from .wire import Refused, reply

PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"), "/curves.js": ("curves.js", "text/javascript"),
}  # fmt: skip


def make_app(
    engine: Engine, root: Path, limits: Limits | None = None, tokens: dict[str, str] | None = None
) -> Starlette:
    """The ASGI application. root: of memories; tokens: see `read_tokens`; None: one local user."""
    limits = limits or Limits()
    desk = Desk(engine, root, limits, tokens)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        desk.close()

    app = Starlette(
        routes=_routes(),
        lifespan=lifespan,
        exception_handlers={
            Refused: _refused, ValueError: _refused, OSError: _refused, HTTPException: _http,
            Exception: _refused,
        },
    )  # fmt: skip
    app.router.redirect_slashes = False
    app.state.desk = desk
    app.add_middleware(Guard, limits=limits, local=tokens is None)
    return app


def _routes() -> list[Route]:
    one = "/v1/memories/{name}"
    return [
        *(Route(path, _static, methods=["GET"]) for path in FILES),
        Route("/health", _health, methods=["GET"]),
        _route("GET", "/v1/models", chat.models),
        _route("POST", "/v1/chat/completions", chat.chat),
        _route("POST", "/v1/completions", chat.complete),
        _route("GET", "/v1/about", rooms.about),
        _route("GET POST", "/v1/memories", rooms.memories),
        _route("GET DELETE", one, rooms.memory),
        _route("POST", f"{one}/fork", rooms.fork),
        _route("POST", f"{one}/reset", rooms.reset),
        _route("POST", f"{one}/rollback", rooms.rollback),
        _route("GET PUT", f"{one}/file", rooms.file),
        _route("POST", f"{one}/surprise", rooms.surprise),
        _route("POST", f"{one}/learn", rooms.learn),
        _route("POST", f"{one}/study", rooms.study),
        _route("GET", "/v1/jobs", rooms.jobs),
        _route("GET DELETE", "/v1/jobs/{job}", rooms.job),
        _route("GET", "/v1/jobs/{job}/events", rooms.events),
    ]


def _route(methods: str, path: str, handler: Callable[..., Awaitable[Response]]) -> Route:
    """The handler takes the request, the desk, the user who asks, and what the path names."""

    async def endpoint(request: Request) -> Response:
        desk: Desk = request.app.state.desk
        return await handler(request, desk, desk.user(request), **request.path_params)

    return Route(path, endpoint, methods=methods.split())


async def _static(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    return FileResponse(PAGE / name, media_type=kind)


async def _health(request: Request) -> Response:
    return reply({"ok": True})


async def _refused(request: Request, error: Exception) -> Response:
    return refusal(error).response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not for this"}
    text = told.get(error.status_code, str(error.detail))
    code = "not_found" if error.status_code == 404 else None
    return Refused(error.status_code, text, code).response()


def run(
    engine: Engine, root: Path, *, host: str = "127.0.0.1", port: int = 8000,
    limits: Limits | None = None, tokens: dict[str, str] | None = None,
    ready: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or a TERM signal. ready: called with the URL once requests are taken.
    Files that are written meanwhile belong to this account alone.

    ValueError for an address that others reach, without tokens; OSError for a port that is taken.
    """
    import socket

    import uvicorn

    check_host(host, tokens)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready(url)

    config = uvicorn.Config(
        make_app(engine, root, limits, tokens), log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=30, limit_concurrency=2048, backlog=512,
        timeout_graceful_shutdown=10, h11_max_incomplete_event_size=2**16,
    )  # fmt: skip
    usual = os.umask(0o077)  # a memory holds what was read: no other account may open its files
    try:
        with listening:
            Server(config).run([listening])
    finally:
        os.umask(usual)
