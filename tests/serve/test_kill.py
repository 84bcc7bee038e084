"""kill -9 while it learns: everything that was told as saved is there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
from served import TEXT, Bytes, stacked

from nestlearn import Session

CODE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from served import LIMITS, engine
from dataclasses import replace
from nestlearn.serve.app import run
run(engine(), Path(sys.argv[2]), port=0, limits=replace(LIMITS, save_seconds=0),
    ready=lambda url: print(url, flush=True))
"""


def start(root):
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(here), str(root)], stdout=subprocess.PIPE, text=True
    )


def test_what_was_saved_survives_a_kill(tmp_path):
    server = start(tmp_path)
    try:
        with httpx.Client(base_url=server.stdout.readline().strip(), timeout=30) as asks:
            asks.post("/v1/memories", json={"name": "mine"}).raise_for_status()
            saved = []
            body = {"text": TEXT * 40, "stream": True}
            try:
                with asks.stream("POST", "/v1/memories/mine/learn", json=body) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: ") and '"saved"' in line:
                            saved.append(json.loads(line[6:])["position"])
                        if len(saved) == 5:
                            os.kill(server.pid, signal.SIGKILL)
            except httpx.HTTPError:
                pass
    finally:
        server.kill()
        server.wait()
    assert len(saved) >= 5
    there = Session(stacked(), tmp_path / "mine", Bytes(), read_only=True)
    position = there.memory.position
    assert saved[-1] <= position < len(TEXT * 40)
    once = Session(stacked(), None, Bytes())
    once.learn((TEXT * 40)[:position])
    assert all(d.distance <= 1e-5 * d.norm for d in once.diff(there))
    assert there.history[-1]["tokens"] == position
    assert not (tmp_path / "mine" / "points").is_dir() or list((tmp_path / "mine/points").iterdir())


def test_a_signal_to_end_saves_what_is_learned(tmp_path):
    server = start(tmp_path)
    try:
        with httpx.Client(base_url=server.stdout.readline().strip(), timeout=30) as asks:
            asks.post("/v1/memories", json={"name": "mine"}).raise_for_status()
            asks.post("/v1/memories/mine/learn", json={"text": TEXT * 200}).raise_for_status()
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
    there = Session(stacked(), tmp_path / "mine", Bytes(), read_only=True)
    assert there.memory.position < len(TEXT * 200)
