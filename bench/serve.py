"""The server under load: many requests at once, of several users, for some minutes.

    python -m bench.serve --seconds 120

A server of a tiny model is started in a process of its own. Before the load each request is asked
alone; under it the same requests are asked by all clients at once, beside a user who keeps
learning and clients that do not read what they asked for. It reports statuses, answers that
differ from what was said alone (none may), the server's memory, and how long requests took; exit
code 1 if one failed or differed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

USERS = 4
TEXT = "The key of user {n} is under mat {n}. The ferry leaves at {n}. "
SERVER = """
import sys
from pathlib import Path
from bench.serve import tiny
from nestlearn.serve import Limits, engine_for
from nestlearn.serve.app import run
from nestlearn.serve.users import read_tokens
model, words = tiny()
limits = Limits(requests=10**6, waiting=4096)
run(engine_for(model, words, "tiny"), Path(sys.argv[1]), port=0, limits=limits,
    tokens=read_tokens(Path(sys.argv[2])), ready=lambda url: print(url, flush=True))
"""


class Bytes:
    """One token a byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


def tiny() -> tuple[Any, Bytes]:
    """A stacked Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nestlearn import DeltaLevel, stack_levels

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    levels = [DeltaLevel(8, lr=0.3, rule="gd"), DeltaLevel(32, lr=0.1, rule="gd")]
    return stack_levels(model, levels, window=64), Bytes()


def asked(user: int) -> list[dict[str, Any]]:
    """The requests of a user: greedy and drawn, with the memory and without, short and long."""
    base = {"temperature": 0.9, "seed": user, "max_tokens": 12}
    return [
        {**base, "model": "tiny:mine", "prompt": "The key"},
        {**base, "model": "tiny:mine", "prompt": TEXT.format(n=user), "temperature": 0},
        {**base, "model": "tiny", "prompt": "The ferry"},
        {**base, "model": "tiny:mine", "prompt": "Bob", "max_tokens": 30},
    ]


class Load:
    """What the clients share, and what they have seen."""

    def __init__(self, url: str, tokens: list[str], seconds: float):
        self.url, self.end = url, time.monotonic() + seconds
        self.heads = [{"Authorization": f"Bearer {token}"} for token in tokens]
        self.alone: dict[tuple[int, int], str] = {}
        self.statuses: Counter[Any] = Counter()
        self.times: list[float] = []
        self.differed = self.lessons = self.unread = 0

    async def client(self, api: httpx.AsyncClient, number: int) -> None:
        """One request after the other, each compared with what was said alone."""
        user, turn = number % USERS, number // USERS
        every = asked(user)
        while time.monotonic() < self.end:
            which = turn % len(every)
            turn += 1
            begin = time.monotonic()
            try:
                made = await api.post(
                    "/v1/completions", json=every[which], headers=self.heads[user]
                )
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1
                continue
            self.statuses[made.status_code] += 1
            if made.status_code == 200:
                self.times.append(time.monotonic() - begin)
                self.differed += made.json()["choices"][0]["text"] != self.alone[user, which]

    async def learner(self, api: httpx.AsyncClient) -> None:
        """The first user's other memory keeps learning."""
        head = self.heads[0]
        await api.post("/v1/memories", json={"name": "other"}, headers=head)
        while time.monotonic() < self.end:
            body = {"text": TEXT.format(n=9) * 4}
            job = await api.post("/v1/memories/other/learn", json=body, headers=head)
            self.statuses[job.status_code] += 1
            while time.monotonic() < self.end:
                told = await api.get(f"/v1/jobs/{job.json()['id']}?after=10000", headers=head)
                if told.json()["state"] in ("done", "failed"):
                    self.lessons += told.json()["state"] == "done"
                    break
                await asyncio.sleep(0.5)

    async def sleeper(self) -> None:
        """Ask for a stream, and do not read it."""
        host, port = self.url.removeprefix("http://").split(":")
        body = json.dumps({**asked(1)[3], "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
            "Content-Type: application/json\r\n"
            f"Authorization: {self.heads[1]['Authorization']}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        while time.monotonic() < self.end:
            with socket.create_connection((host, int(port))) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                one.sendall(head.encode() + body)
                self.unread += 1
                await asyncio.sleep(min(10.0, max(0.1, self.end - time.monotonic())))


async def load(
    url: str, tokens: list[str], clients: int, sleepers: int, seconds: float, pid: int
) -> tuple[Load, list[float]]:
    """Prepare, ask each alone, then all at once; what was seen, and the server's megabytes."""
    limits = httpx.Limits(max_connections=clients + 20, max_keepalive_connections=clients + 20)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as api:
        found = Load(url, tokens, seconds)
        for user, head in enumerate(found.heads):
            await api.post("/v1/memories", json={"name": "mine"}, headers=head)
            body = {"text": TEXT.format(n=user) * 3, "stream": True}
            await api.post("/v1/memories/mine/learn", json=body, headers=head)
            for which, each in enumerate(asked(user)):
                made = await api.post("/v1/completions", json=each, headers=head)
                found.alone[user, which] = made.json()["choices"][0]["text"]
        found.end, sizes = time.monotonic() + seconds, []

        async def watch() -> None:
            while time.monotonic() < found.end:
                sizes.append(resident(pid))
                await asyncio.sleep(1)

        await asyncio.gather(
            watch(), found.learner(api), *(found.sleeper() for _ in range(sleepers)),
            *(found.client(api, n) for n in range(clients)),
        )  # fmt: skip
        return found, sizes


def resident(pid: int) -> float:
    """Megabytes of a process, on Linux."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def report(found: Load, sizes: list[float], seconds: float, clients: int) -> bool:
    """Print what was seen; whether all is well."""
    times = sorted(found.times)
    at = lambda share: times[min(len(times) - 1, int(share * len(times)))]  # noqa: E731
    quarter = max(1, len(sizes) // 4)
    mean = lambda some: sum(some) / len(some)  # noqa: E731
    bad = sum(n for code, n in found.statuses.items() if not isinstance(code, int) or code >= 500)
    print(f"{clients} clients of {USERS} users for {seconds:.0f} s, {len(times)} answers "
          f"({len(times) / seconds:.0f} a second)")  # fmt: skip
    print(f"statuses: {dict(found.statuses)}; failed or 5xx: {bad}")
    print(f"answers that differ from what was said alone: {found.differed}")
    print(f"seconds an answer: p50 {at(0.5):.2f}, p95 {at(0.95):.2f}, longest {times[-1]:.2f}")
    parts = [mean(sizes[n * quarter : (n + 1) * quarter]) for n in range(4)]
    print("resident MB in each quarter:", ", ".join(f"{part:.0f}" for part in parts))
    print(f"texts learned meanwhile: {found.lessons}; streams that nobody read: {found.unread}")
    return not bad and not found.differed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--sleepers", type=int, default=10, help="clients that do not read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tokens = [secrets.token_hex(16) for _ in range(USERS)]
        file = Path(place, "tokens")
        file.write_text("".join(f"user{n} {token}\n" for n, token in enumerate(tokens)))
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, f"{place}/memories", str(file)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            found, sizes = asyncio.run(
                load(url, tokens, options.clients, options.sleepers, options.seconds, server.pid)
            )
        finally:
            server.terminate()
            server.wait(timeout=30)
    sys.exit(0 if report(found, sizes, options.seconds, options.clients) else 1)


if __name__ == "__main__":
    main()
