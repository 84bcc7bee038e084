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


# ------------------------------------------------------------------------------------ memories


async def about(request: Request, desk: Desk, user: User) -> Response:
    """The model, and what it and this user may do: for the page."""
    limits = desk.limits
    return reply(
        {
            "model": desk.engine.name, "user": user.name, "studies": desk.engine.studies,
            "masks": desk.engine.masks,
            "limits": {"tokens": limits.tokens, "text": limits.text, "body": limits.body},
        }
    )  # fmt: skip


async def _shown(desk: Desk, user: User, name: str, status: int = 200) -> Response:
    return reply(await desk.do(user.shelf.about, name), status)


async def memories(request: Request, desk: Desk, user: User) -> Response:
    """GET: the user's memories. POST {name}: a new one."""
    if request.method == "POST":
        name = (await read(request)).take("name", str)
        await desk.do(user.shelf.create, name)
        return await _shown(desk, user, name, 201)
    names = await desk.do(user.shelf.names)
    return reply({"object": "list", "data": [{"id": name, "object": "memory"} for name in names]})


async def memory(request: Request, desk: Desk, user: User, name: str) -> Response:
    """GET: its position, size, history and points. DELETE: for good."""
    if request.method == "DELETE":
        await desk.do(user.shelf.delete, name)
        return reply({"id": name, "object": "memory", "deleted": True})
    return await _shown(desk, user, name)


async def fork(request: Request, desk: Desk, user: User, name: str) -> Response:
    """POST {to}: a copy under a new name."""
    to = (await read(request)).take("to", str)
    await desk.do(user.shelf.fork, name, to)
    return await _shown(desk, user, to, 201)


async def reset(request: Request, desk: Desk, user: User, name: str) -> Response:
    """POST {level?}: forget one level, or everything."""
    level = (await read(request)).take("level", int, None, low=0)
    await desk.do(user.shelf.folder, name)
    await desk.do(user.shelf.reset, name, level)
    return await _shown(desk, user, name)


async def rollback(request: Request, desk: Desk, user: User, name: str) -> Response:
    """POST {point}: as it was there."""
    point = (await read(request)).take("point", int, low=1, high=999_999)
    await desk.do(user.shelf.rollback, name, point)
    return await _shown(desk, user, name)


async def file(request: Request, desk: Desk, user: User, name: str) -> Response:
    """GET: the memory as one safetensors file. PUT: a memory of such a file (?replace=true: in
    place of one that is there).
    """
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
    return await _shown(desk, user, name, 200 if replace else 201)


async def surprise(request: Request, desk: Desk, user: User, name: str) -> Response:
    """POST {text}: −log p of each token in nats, with the memory and without."""
    _, ids = await _text(request, desk, user, name, desk.limits.tokens)

    def measure() -> dict[str, object]:
        memory, found = user.shelf.open(name).memory, dict[str, object]()
        for what, which in (("with", memory), ("without", None)):
            with desk.turns:
                losses = desk.engine.losses(which, ids)
            found[what] = rounded(losses)
        return {"object": "surprise", "words": words(desk.engine, ids), **found}

    return reply(await desk.do(measure))


# -------------------------------------------------------------------------- learning, and jobs


async def learn(request: Request, desk: Desk, user: User, name: str) -> Response:
    """POST {text, source?, stream?}: learn a text; the job, or its events."""
    fields, ids = await _text(request, desk, user, name, desk.limits.text)
    job = await desk.do(desk.lessons.learn, user, name, ids, _source(fields))
    return _told(desk, job, stream=fields.take("stream", bool, False))


async def study(request: Request, desk: Desk, user: User, name: str) -> Response:
    """POST {text, source?, questions?, stream?}: study a text; the job, or its events."""
    fields, _ = await _text(request, desk, user, name, desk.limits.tokens)
    questions = fields.take("questions", int, None, low=1, high=256)
    text, source = fields.take("text", str), _source(fields)
    job = await desk.do(desk.lessons.study, user, name, text, source, questions)
    return _told(desk, job, stream=fields.take("stream", bool, False))


async def jobs(request: Request, desk: Desk, user: User) -> Response:
    """The user's jobs, without their events."""
    found = [job.about(len(job.events)) for job in desk.lessons.of(user)]
    return reply({"object": "list", "data": found})


async def job(request: Request, desk: Desk, user: User, job: str) -> Response:
    """GET: a job, its events from ?after=N on. DELETE: stop it; what it has learned is kept."""
    found = desk.lessons.find(user, job)
    if request.method == "DELETE":
        found.stop.set()
    return reply(found.about(_after(request)))


async def events(request: Request, desk: Desk, user: User, job: str) -> Response:
    """A job's events as they come (?after=N)."""
    return _told(desk, desk.lessons.find(user, job), stream=True, after=_after(request))


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


async def _text(
    request: Request, desk: Desk, user: User, name: str, limit: int
) -> tuple[Fields, list[int]]:
    """The fields of a request for a memory that is there, and the ids of its text."""
    fields = await read(request)
    await desk.do(user.shelf.folder, name)
    return fields, await desk.do(_ids, desk, fields, limit)


def _ids(desk: Desk, fields: Fields, limit: int) -> list[int]:
    ids = desk.engine.encode(fields.take("text", str, low=1))
    if len(ids) < 2:
        raise fields.wrong("text", "the text is shorter than two tokens: there is nothing to learn")
    if len(ids) > limit:
        text = f"the text has {len(ids)} tokens, more than {limit}: send it in parts"
        raise fields.wrong("text", text, "context_length_exceeded")
    return ids


def _source(fields: Fields) -> str | None:
    return fields.take("source", str, None, high=SOURCE)
