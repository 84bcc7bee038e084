"""kill -9 while it learns: everything that was told as saved is there."""

import contextlib
import json
import os
import signal
from dataclasses import replace

import httpx
import pytest
import torch
from served import TEXT, Bytes, stacked

from nestlearn import Session
from servers import server as of_processes


def run_it(root, ready):
    """In a child: a server that saves after each piece, until it is killed."""
    from served import LIMITS, engine

    from nestlearn.serve.app import run

    torch.set_num_threads(1)
    run(engine(), root, port=0, limits=replace(LIMITS, save_seconds=0), ready=ready.send)


@pytest.fixture
def server(tmp_path):
    """A server's process and its URL."""
    context = of_processes()
    heard, ready = context.Pipe(duplex=False)
    child = context.Process(target=run_it, args=(tmp_path, ready), daemon=True)
    child.start()
    ready.close()
    yield child, heard.recv()
    child.kill()
    child.join()


def test_what_was_saved_survives_a_kill(tmp_path, server):
    child, url = server
    saved = []
    with httpx.Client(base_url=url, timeout=30) as asks:
        asks.post("/v1/memories", json={"name": "mine"}).raise_for_status()
        body = {"text": TEXT * 40, "stream": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            asks.stream("POST", "/v1/memories/mine/learn", json=body) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: ") and '"saved"' in line:
                    saved.append(json.loads(line[6:])["position"])
                if len(saved) == 5:
                    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(saved) >= 5
    written = [tmp_path / "mine", *(tmp_path / "mine").rglob("*")]
    assert len(written) > 3
    assert not any(path.stat().st_mode & 0o077 for path in written)  # this account's alone
    there = Session(stacked(), tmp_path / "mine", Bytes(), read_only=True)
    position = there.memory.position
    assert saved[-1] <= position < len(TEXT * 40)
    once = Session(stacked(), None, Bytes())
    once.learn((TEXT * 40)[:position])
    assert all(d.distance <= 1e-5 * d.norm for d in once.diff(there))
    assert there.history[-1]["tokens"] == position
    assert not (tmp_path / "mine" / "points").is_dir() or list((tmp_path / "mine/points").iterdir())


def test_a_signal_to_end_saves_what_is_learned(tmp_path, server):
    child, url = server
    with httpx.Client(base_url=url, timeout=30) as asks:
        asks.post("/v1/memories", json={"name": "mine"}).raise_for_status()
        asks.post("/v1/memories/mine/learn", json={"text": TEXT * 200}).raise_for_status()
        child.terminate()
    child.join(timeout=20)
    assert not child.is_alive()
    there = Session(stacked(), tmp_path / "mine", Bytes(), read_only=True)
    assert there.memory.position < len(TEXT * 200)
