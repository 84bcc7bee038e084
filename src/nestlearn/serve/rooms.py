"""/v1/memories and /v1/jobs: what a user's memories are, and how they change."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .desk import Desk
from .lessons import Job, rounded, words
from .users import User
from .wire import Fields, Refused, event, read, reply

SOURCE = 200  # letters of what a text is called


def _of(request: Request) -> tuple[Desk, User]:
    desk: Desk = request.app.state.desk
    return desk, desk.user(request)


def _named(request: Request) -> tuple[Desk, User, str]:
    desk, user = _of(request)
    name = request.path_params["name"]
    return desk, user, name


# ------------------------------------------------------------------------------------ memories


async def about(request: Request) -> Response:
    """The model, and what it and this user may do: for the page."""
    desk, user = _of(request)
    limits = desk.limits
    return reply(
        {
            "model": desk.engine.name, "user": user.name, "studies": desk.engine.studies,
            "masks": desk.engine.masks,
            "limits": {"tokens": limits.tokens, "text": limits.text, "body": limits.body},
        }
    )  # fmt: skip


async def memories(request: Request) -> Response:
    """GET: the user's memories. POST {name}: a new one."""
    desk, user = _of(request)
    if request.method == "POST":
        name = (await read(request)).take("name", str)
        await desk.do(user.shelf.create, name)
        return reply(await desk.do(user.shelf.about, name), 201)
    names = await desk.do(user.shelf.names)
    return reply({"object": "list", "data": [{"id": name, "object": "memory"} for name in names]})


async def memory(request: Request) -> Response:
    """GET: its position, size, history and points. DELETE: for good."""
    desk, user, name = _named(request)
    if request.method == "DELETE":
        await desk.do(user.shelf.delete, name)
        return reply({"id": name, "object": "memory", "deleted": True})
    return reply(await desk.do(user.shelf.about, name))


async def fork(request: Request) -> Response:
    """POST {to}: a copy under a new name."""
    desk, user, name = _named(request)
    to = (await read(request)).take("to", str)
    await desk.do(user.shelf.fork, name, to)
    return reply(await desk.do(user.shelf.about, to), 201)


async def reset(request: Request) -> Response:
    """POST {level?}: forget one level, or everything."""
    desk, user, name = _named(request)
    level = (await read(request)).take("level", int, None, low=0)
    await desk.do(user.shelf.folder, name)
    await desk.do(user.shelf.reset, name, level)
    return reply(await desk.do(user.shelf.about, name))


async def rollback(request: Request) -> Response:
    """POST {point}: as it was there."""
    desk, user, name = _named(request)
    point = (await read(request)).take("point", int, low=1, high=999_999)
    await desk.do(user.shelf.rollback, name, point)
    return reply(await desk.do(user.shelf.about, name))


async def file(request: Request) -> Response:
    """GET: the memory as one safetensors file. PUT: a memory of such a file (?replace=true: in
    place of one that is there).
    """
    desk, user, name = _named(request)
    if request.method == "GET":
        raw = await desk.do(user.shelf.pack, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(raw, media_type="application/octet-stream", headers=headers)
    replace = request.query_params.get("replace") == "true"
    with tempfile.TemporaryDirectory(prefix="nestlearn-") as place:
        path = Path(place, "upload.safetensors")
        with path.open("wb") as out:
            async for part in request.stream():
                await desk.do(out.write, part)
        await desk.do(user.shelf.unpack, name, path, replace=replace)
    return reply(await desk.do(user.shelf.about, name), 200 if replace else 201)


async def surprise(request: Request) -> Response:
    """POST {text}: −log p of each token in nats, with the memory and without."""
    desk, user, name = _named(request)
    fields = await read(request)
    await desk.do(user.shelf.folder, name)
    ids = await desk.do(_ids, desk, fields, desk.limits.tokens)

    def measure() -> dict[str, object]:
        memory, found = user.shelf.open(name).memory, dict[str, object]()
        for what, which in (("with", memory), ("without", None)):
            with desk.turns:
                losses = desk.engine.losses(which, ids)
            found[what] = rounded(losses)
        return {"object": "surprise", "words": words(desk.engine, ids), **found}

    return reply(await desk.do(measure))


# -------------------------------------------------------------------------- learning, and jobs


async def learn(request: Request) -> Response:
    """POST {text, source?, stream?}: learn a text; the job, or its events."""
    desk, user, name = _named(request)
    fields = await read(request)
    await desk.do(user.shelf.folder, name)
    ids = await desk.do(_ids, desk, fields, desk.limits.text)
    job = await desk.do(desk.lessons.learn, user, name, ids, _source(fields))
    return _told(desk, job, stream=fields.take("stream", bool, False))


async def study(request: Request) -> Response:
    """POST {text, source?, questions?, stream?}: study a text; the job, or its events."""
    desk, user, name = _named(request)
    fields = await read(request)
    await desk.do(user.shelf.folder, name)
    await desk.do(_ids, desk, fields, desk.limits.tokens)
    text = fields.take("text", str, low=1)
    questions = fields.take("questions", int, None, low=1, high=256)
    job = await desk.do(desk.lessons.study, user, name, text, _source(fields), questions)
    return _told(desk, job, stream=fields.take("stream", bool, False))


async def jobs(request: Request) -> Response:
    """The user's jobs, without their events."""
    desk, user = _of(request)
    found = [job.about(len(job.events)) for job in desk.lessons.of(user)]
    return reply({"object": "list", "data": found})


async def job(request: Request) -> Response:
    """GET: a job, with its events (?after=N: from number N on). DELETE: stop it; what it has
    learned until then is kept.
    """
    desk, user = _of(request)
    found = desk.lessons.find(user, request.path_params["job"])
    if request.method == "DELETE":
        found.stop.set()
    return reply(found.about(_after(request)))


async def events(request: Request) -> Response:
    """A job's events as they come (?after=N)."""
    desk, user = _of(request)
    return _told(
        desk, desk.lessons.find(user, request.path_params["job"]), stream=True,
        after=_after(request),
    )  # fmt: skip


def _after(request: Request) -> int:
    text = request.query_params.get("after", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Refused(400, "after: give a whole number", "invalid_value", param="after")
    return int(text)


def _told(desk: Desk, job: Job, *, stream: bool, after: int = 0) -> Response:
    if not stream:
        return reply(job.about(), 202)
    return StreamingResponse(
        _stream(desk, job, after), media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no", "X-Job": job.id},
    )  # fmt: skip


async def _stream(desk: Desk, job: Job, after: int) -> AsyncIterator[bytes]:
    yield event({"event": "job", "id": job.id, "memory": job.memory, "kind": job.kind})
    async for told in desk.follow(job, after):
        yield b": still here\n\n" if told is None else event(told)
    yield b"data: [DONE]\n\n"


def _ids(desk: Desk, fields: Fields, limit: int) -> list[int]:
    ids = desk.engine.encode(fields.take("text", str, low=1))
    if len(ids) < 2:
        raise fields.wrong("text", "the text is shorter than two tokens: there is nothing to learn")
    if len(ids) > limit:
        raise fields.wrong(
            "text", f"the text has {len(ids)} tokens, more than {limit}: send it in parts",
            "context_length_exceeded",
        )  # fmt: skip
    return ids


def _source(fields: Fields) -> str | None:
    return fields.take("source", str, None, high=SOURCE)
