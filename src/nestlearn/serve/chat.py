"""/v1/models, /v1/chat/completions and /v1/completions, as OpenAI's clients expect them.

Which memory answers: `"model": "NAME:memory"`, or the field `"memory"` beside a bare model name.
Without one the model answers as it was before it learned anything.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from nestlearn.learn import conversation

from .answers import Answer, Asked, Said
from .desk import Desk, sleepless
from .users import User
from .wire import Fields, Refused, event, read, reply

ROLES = ("system", "developer", "user", "assistant")
DEFAULT = 256  # tokens of an answer, unless said otherwise
LEARN = ("nothing", "user", "assistant", "both")


class Question(NamedTuple):
    """A request that was understood: what to read, how to answer, and what to do afterwards."""

    user: User
    model: str
    memory: str | None
    ids: list[int]
    asked: Asked
    stream: bool
    usage: bool
    learn: str
    turns: list[dict[str, str]]


async def models(request: Request, desk: Desk, user: User) -> Response:
    """The model, and the model with each of the user's memories."""
    base = desk.engine.name
    names = [base, *(f"{base}:{memory}" for memory in await desk.do(user.shelf.names))]
    about = {"object": "model", "created": desk.began, "owned_by": "nestlearn"}
    return reply({"object": "list", "data": [{"id": name, **about} for name in names]})


async def chat(request: Request, desk: Desk, user: User) -> Response:
    """An answer to a conversation."""
    fields = await read(request)
    return await _answered(request, desk, user, fields, _turns(fields))


async def complete(request: Request, desk: Desk, user: User) -> Response:
    """A text that goes on."""
    return await _answered(request, desk, user, await read(request), [])


# ------------------------------------------------------------------------- what is asked for


def _turns(fields: Fields) -> list[dict[str, str]]:
    found = []
    for n, message in enumerate(fields.take("messages", list, low=1, high=1000)):
        if not isinstance(message, dict):
            raise fields.wrong("messages", f"messages[{n}] is no object")
        one = Fields(message)
        role = one.take("role", str, among=ROLES)
        content = message.get("content")
        if isinstance(content, list):
            parts = [Fields(part if isinstance(part, dict) else {}) for part in content]
            for part in parts:
                part.take("type", str, among=("text",))
            content = "".join(part.take("text", str) for part in parts)
        text = Fields({"content": content}).take("content", str)
        found.append({"role": "system" if role == "developer" else role, "content": text})
    return found


def _understood(desk: Desk, user: User, fields: Fields, turns: list[dict[str, str]]) -> Question:
    model, memory = _who(desk, fields)
    if memory is not None:
        user.shelf.folder(memory)
    for name, allowed in (
        ("n", (1,)), ("logprobs", (False, 0)), ("tools", ([],)), ("functions", ([],)),
        ("best_of", (1,)), ("echo", (False,)), ("suffix", ("",)), ("logit_bias", ({},)),
        ("presence_penalty", (0, 0.0)), ("frequency_penalty", (0, 0.0)),
        ("response_format", ({"type": "text"},)),
    ):  # fmt: skip
        fields.only(name, *allowed)
    ids = _prompt(desk, fields, turns)
    learn = fields.take("learn", str, "nothing", among=LEARN)
    if learn != "nothing" and (memory is None or not turns):
        raise fields.wrong("learn", "learn needs a chat with a memory: name one")
    if learn not in ("nothing", "both") and not desk.engine.masks:
        raise fields.wrong("learn", "a Hope learns from all that it reads: say 'both'")
    extra = fields.take("stream_options", dict, {})
    return Question(
        user, model, memory, ids, _asked(desk, fields, len(ids)),
        fields.take("stream", bool, False), Fields(extra).take("include_usage", bool, False),
        learn, turns,
    )  # fmt: skip


def _who(desk: Desk, fields: Fields) -> tuple[str, str | None]:
    model = fields.take("model", str, desk.engine.name)
    name, _, after = model.partition(":")
    if name != desk.engine.name:
        text = f"no model {name[:80]!r}: this is {desk.engine.name!r}"
        raise Refused(404, text, "model_not_found", param="model")
    memory = fields.take("memory", str, after or None)
    if after and memory != after:
        raise fields.wrong("memory", "model and memory name two memories: leave one out")
    return model, memory


def _prompt(desk: Desk, fields: Fields, turns: list[dict[str, str]]) -> list[int]:
    engine = desk.engine
    if turns:
        try:
            return engine.prompt(turns)
        except Exception as error:  # a template's own kind: roles that it does not take
            raise fields.wrong("messages", f"the model's chat template refuses: {error}") from error
    given = fields.data.get("prompt")
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], (str, list)):
        given = given[0]
    if isinstance(given, list):
        if not given or any(type(x) is not int or not 0 <= x < desk.vocabulary for x in given):
            raise fields.wrong("prompt", f"prompt: give token ids below {desk.vocabulary}")
        return given
    ids = engine.encode(Fields({"prompt": given}).take("prompt", str))
    if not ids:
        raise fields.wrong("prompt", "the prompt is empty: give at least one character")
    return ids


def _asked(desk: Desk, fields: Fields, length: int) -> Asked:
    limit = min(desk.limits.tokens, desk.engine.room or desk.limits.tokens)
    name = "max_completion_tokens" if "max_completion_tokens" in fields.data else "max_tokens"
    tokens = fields.take(name, int, min(DEFAULT, max(1, limit - length)), low=1)
    if length + tokens > limit:
        raise Refused(
            400, f"a prompt of {length} tokens and {tokens} new ones are more than {limit}: "
            "shorten the prompt, or ask for less", "context_length_exceeded",
            param="messages" if "messages" in fields.data else "prompt",
        )  # fmt: skip
    stop = fields.data.get("stop")
    stop = [stop] if isinstance(stop, str) else fields.take("stop", list, [], high=8)
    if any(not isinstance(text, str) or not 0 < len(text) <= 100 for text in stop):
        raise fields.wrong("stop", "stop: give up to 8 texts of 1 to 100 letters")
    return Asked(
        tokens,
        fields.take("temperature", float, 1.0, low=0, high=2),
        fields.take("top_p", float, 1.0, low=1e-6, high=1),
        tuple(stop),
        fields.take("seed", int, secrets.randbits(62), low=-(2**63), high=2**63 - 1) % 2**63,
    )


# --------------------------------------------------------------------------- what is answered


async def _answered(
    request: Request, desk: Desk, user: User, fields: Fields, turns: list[dict[str, str]]
) -> Response:
    question = await desk.do(_understood, desk, user, fields, turns)
    answer, heard = await _begin(desk, question)
    written = _Written(desk, question, answer)
    if not question.stream:
        text, ended = await sleepless(request, _all(heard), answer)
        return reply(await written.whole(text, ended))
    try:
        first = await anext(heard)
    except BaseException:
        answer.given_up = True
        raise
    return StreamingResponse(
        written.events(first, heard), media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )  # fmt: skip


async def _begin(desk: Desk, question: Question) -> tuple[Answer, AsyncIterator[Said]]:
    """The answer in the making, and what is heard of it; there the error that ends it is raised."""
    memory = None
    if question.memory is not None:
        memory = (await desk.do(question.user.shelf.open, question.memory)).memory
    inbox: asyncio.Queue[Said] = asyncio.Queue()  # as long as an answer, which is bounded
    loop = asyncio.get_running_loop()

    def hear(said: Said) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(inbox.put_nowait, said)

    answer = Answer(
        desk.engine, question.user.name, memory, question.ids, question.asked, hear,
        time.monotonic() + desk.limits.seconds * 0.9,
    )  # fmt: skip

    async def heard() -> AsyncIterator[Said]:
        ended = None
        while ended is None:
            said = await inbox.get()
            if said.error:
                raise said.error
            ended = said.ended
            yield said

    desk.answering.add(answer)
    return answer, heard()


async def _all(heard: AsyncIterator[Said]) -> tuple[str, str]:
    text, ended = "", ""
    async for said in heard:
        text, ended = text + said.text, said.ended or ""
    return text, ended


class _Written:
    """An answer as it goes over the wire: a chat's is a message, a completion's a text."""

    def __init__(self, desk: Desk, question: Question, answer: Answer):
        self.desk, self.question, self.answer = desk, question, answer
        self.talks = bool(question.turns)
        kind = "chat.completion" if self.talks else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if self.talks else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if self.talks and question.stream else kind,
            "created": round(time.time()), "model": question.model,
        }  # fmt: skip

    async def whole(self, text: str, ended: str) -> dict[str, Any]:
        """All of it, once it is learned from."""
        extra = await self._learned()
        message = {"role": "assistant", "content": text}
        body = self._choice({"message": message} if self.talks else {"text": text}, ended)
        return body | {"usage": self._usage()} | extra

    async def events(self, first: Said, heard: AsyncIterator[Said]) -> AsyncIterator[bytes]:
        """As it is made. Who does not read these events stops reading its own answer only."""
        try:
            if self.talks:
                yield event(self._part({"role": "assistant", "content": ""}))
            said: Said | None = first
            ended = ""
            while said is not None:
                if said.text:
                    yield event(self._part({"content": said.text}))
                ended = said.ended or ""
                said = await anext(heard, None)
            extra = await self._learned()
            yield event(self._part({}, ended) | extra)
            if self.question.usage:
                yield event(self.head | {"choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        except Refused as error:
            yield event(error.body())
        finally:
            self.answer.given_up = True

    def _choice(self, said: dict[str, Any], ended: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ended}
        return self.head | {"choices": [choice]}

    def _part(self, delta: dict[str, str], ended: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.talks else {"text": delta.get("content", "")}
        return self._choice(said, ended) | ({"usage": None} if self.question.usage else {})

    def _usage(self) -> dict[str, int]:
        read, made = len(self.question.ids), len(self.answer.made)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    async def _learned(self) -> dict[str, Any]:
        """Learn from the chosen side of the exchange, and save; what to say of it."""
        desk, question, made = self.desk, self.question, self.answer.made
        if question.learn == "nothing":
            return {}
        turns: Any = question.turns
        try:
            new, _ = await desk.do(conversation.heard, desk.engine.words, turns, None)
            ids = [*new, *made]
            mask = [float(question.learn in ("user", "both"))] * len(new)
            mask += [float(question.learn in ("assistant", "both"))] * len(made)
            learn = desk.lessons.learn
            job = await desk.do(learn, question.user, question.memory, ids, "chat", mask)
            async for _ in desk.follow(job):
                pass
        except Refused as error:  # the answer stands
            return {"learned": error.body()}
        failed = next((e for e in job.events if e["event"] == "error"), None)
        return {"learned": {"error": failed} if failed else {"tokens": len(ids), "job": job.id}}
