"""Who asks: one local user, or those of a file of tokens; and how often they may."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import threading
import time
from collections import deque
from pathlib import Path

from .engines import Engine
from .limits import Limits
from .shelf import NAME, Shelf
from .turns import Turns
from .wire import Refused

LOCAL = "local"
SHORTEST = 16  # letters of a token
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class User:
    """One user: the memories, and when the last requests were."""

    def __init__(self, name: str, shelf: Shelf, limits: Limits):
        self.name, self.shelf, self.limits = name, shelf, limits
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def count(self) -> None:
        """Refused, 429, for more requests in a minute than are allowed."""
        now = time.monotonic()
        with self._lock:
            while self._times and self._times[0] <= now - 60:
                self._times.popleft()
            if len(self._times) >= self.limits.requests:
                wait = int(self._times[0] + 61 - now)
                text = f"more than {self.limits.requests} requests a minute: wait {wait} s"
                raise Refused(429, text, "rate_limit_exceeded", after=wait)
            self._times.append(now)


class Users:
    """All users. tokens: sha256 of each token and its user's name; None: one local user, whose
    memories lie in `root` itself. Else they lie in root/USER.
    """

    def __init__(
        self, engine: Engine, root: Path, limits: Limits, turns: Turns,
        tokens: dict[str, str] | None = None,
    ):  # fmt: skip
        self.tokens = tokens
        names = {LOCAL} if tokens is None else set(tokens.values())
        self.all = {}
        for name in sorted(names):
            place = root if tokens is None else root / name
            self.all[name] = User(name, Shelf(engine, place, limits, turns), limits)

    def who(self, header: str | None) -> User:
        """The user of an Authorization header; Refused, 401. Takes as long for every token."""
        if self.tokens is None:
            return self.all[LOCAL]
        kind, _, token = (header or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "replace")).hexdigest()
        found = None
        for digest, name in self.tokens.items():
            if hmac.compare_digest(digest, given):
                found = name
        if found is None or kind.lower() != "bearer":
            text = "no or unknown token: send the header Authorization: Bearer TOKEN"
            raise Refused(401, text, "invalid_api_key")
        return self.all[found]


def read_tokens(path: Path) -> dict[str, str]:
    """sha256 -> user, of lines `user token` or `user sha256:HEX`; # begins a comment.

    ValueError naming the line that is none, for a short token, and for one of two users.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not NAME.fullmatch(words[0]):
            raise ValueError(f"{path}, line {number}: give a user's name and a token, no more")
        name, token = words
        hashed = _HASHED.fullmatch(token)
        if hashed is None and (token.startswith("sha256:") or len(token) < SHORTEST):
            raise ValueError(
                f"{path}, line {number}: a token has at least {SHORTEST} letters; or give "
                "sha256: and its 64 hexadecimal digits"
            )
        digest = hashed[1] if hashed else hashlib.sha256(token.encode()).hexdigest()
        if found.setdefault(digest, name) != name:
            raise ValueError(f"{path}, line {number}: this is {found[digest]}'s token")
    if not found:
        raise ValueError(f"{path} holds no token: write lines of a user's name and a token")
    return found


def check_host(host: str, tokens: dict[str, str] | None) -> None:
    """ValueError for an address that others reach, without tokens."""
    if tokens is None and not loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines, and anyone could read and change "
            "the memories: give --tokens FILE, or --host 127.0.0.1"
        )


def loopback(host: str) -> bool:
    """Whether the address is this machine's own, for itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
