"""What goes over the wire: JSON that is checked, errors in OpenAI's shape, events."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "invalid_request_error", 405: "invalid_request_error", 408: "timeout_error",
    409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    421: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false",
          list: "a list", dict: "an object"}  # fmt: skip
ABSENT: Any = object()


class Refused(Exception):
    """A request that is answered with an error: its status, words, code and parameter."""

    def __init__(
        self, status: int, message: str, code: str | None = None, *, param: str | None = None,
        after: int | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if after is None else {"Retry-After": str(after)}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error")
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> Response:
        return reply(self.body(), self.status, self.headers)


def dumps(data: Any) -> bytes:
    """JSON in ASCII; a number that is none becomes null."""
    return json.dumps(_plain(data), allow_nan=False, separators=(",", ":")).encode()


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(dumps(data), status, headers, media_type="application/json")


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(data) + b"\n\n"


async def read(request: Request) -> Fields:
    """The fields of a request's JSON object; Refused for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = await request.body()
    if not raw:
        return Fields({})
    if kind != "application/json":  # a page elsewhere cannot send this without being asked
        raise Refused(415, "send JSON, with the header Content-Type: application/json")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error)[:200]}", "invalid_json") from error
    if not isinstance(data, dict):
        raise Refused(400, "the body is no JSON object: send {...}", "invalid_json")
    return Fields(data)


class Fields:
    """A JSON object whose fields are checked as they are taken."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    def take(
        self, name: str, kind: type, default: Any = ABSENT, *, low: float | None = None,
        high: float | None = None, among: tuple[Any, ...] | None = None,
    ) -> Any:  # fmt: skip
        """The field; null counts as left out. Refused for another type, or out of its range."""
        value: Any = self.data.get(name)
        if value is None:
            if default is ABSENT:
                raise self.wrong(name, f"{name} is missing: give {_WORDS[kind]}")
            return default
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if not _is(value, kind):
            raise self.wrong(name, f"{name} is {_shown(value)}: give {_WORDS[kind]}")
        if kind is str and any("\ud800" <= c <= "\udfff" for c in value):
            raise self.wrong(name, f"{name} holds half a character (a lone surrogate)")
        size = len(value) if kind in (str, list) else value
        if low is not None and not size >= low:
            raise self.wrong(name, f"{name} is {_shown(value)}: give {low} or more")
        if high is not None and not size <= high:
            raise self.wrong(name, f"{name} is {_shown(value)}: give {high} or less")
        if among is not None and value not in among:
            raise self.wrong(name, f"{name} is {_shown(value)}: use one of {list(among)}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refused where a field that is not supported asks for something."""
        value = self.data.get(name)
        if value is not None and not any(type(value) is type(x) and value == x for x in allowed):
            raise self.wrong(name, f"{name} is not supported: leave it out", "unsupported")

    @staticmethod
    def wrong(name: str, message: str, code: str = "invalid_value") -> Refused:
        return Refused(400, message, code, param=name)


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind  # true is no number


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "..."
