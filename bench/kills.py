"""python -m bench.kills: a run on two processes whose ranks are killed at random moments.

torchrun starts the processes again, and they go on from the newest checkpoint. In the end weights
and losses are compared, bit for bit, with those of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

SETTINGS = "--length 16 --batch 4 --checkpoint-every 5 --device cpu"
EARLY = 0.25  # the share of kills within seconds of a start; the others come amid steps


def launch(out: Path, steps: int, more: str = "", restarts: int = 0) -> subprocess.Popen[str]:
    """A run of two processes in `out`, on text that it makes itself; see `said_by`."""
    data = out.parent / "text.txt"
    if not data.exists():
        data.write_text("the key is under the mat. " * 200)
    here = f"--nproc-per-node 2 --standalone --max-restarts {restarts} --monitor-interval 0.1"
    train = f"-m nestlearn train --data {data} --out {out} --steps {steps} {SETTINGS} {more}"
    command = [sys.executable, "-m", "torch.distributed.run", *here.split(), *train.split()]
    with out.with_suffix(".err").open("w") as err:
        return subprocess.Popen(
            command, stderr=err, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def said_by(run: subprocess.Popen[str], out: Path) -> str:
    """What the run printed, once it has ended."""
    run.wait()
    return out.with_suffix(".err").read_text()


def kill_ranks(run: subprocess.Popen[str], out: Path, kills: int, dice: random.Random) -> int:
    """Kill one of the run's processes at a time; returns how many, less if the run ended first."""
    done, before = 0, ""
    while done < kills and run.poll() is None:
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        now = ranks.read_text() if ranks.exists() else ""
        if len(now.split()) < 2 or now == before:
            time.sleep(0.05)
            continue
        early = dice.random() < EARLY
        if not early:
            _wait_for_a_step(run, out / "log.jsonl")
        time.sleep(dice.uniform(0, 5 if early else 1))
        if run.poll() is None:
            os.kill(int(dice.choice(now.split())), signal.SIGKILL)
            done, before = done + 1, now
    return done


def _wait_for_a_step(run: subprocess.Popen[str], log: Path) -> None:
    stamp = lambda: log.stat().st_mtime_ns if log.exists() else 0  # noqa: E731
    for _ in range(2):  # the first change is the cut back to a checkpoint
        before = stamp()
        while run.poll() is None and stamp() == before:
            time.sleep(0.01)


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs have the same weights and losses."""
    weights = [load_file(out / "model" / "model.safetensors") for out in (a, b)]
    logs = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (a, b)]
    losses = [[(record["step"], record["loss"]) for record in log] for log in logs]
    equal = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    return equal and losses[0] == losses[1] and not list(a.rglob("*.tmp"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    asked = parser.parse_args()
    steps, more = 20 * asked.kills, f"--parallel {asked.parallel}"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        launch(whole, steps, more).wait()
        run = launch(killed, steps, more, restarts=asked.kills)
        kills = kill_ranks(run, killed, asked.kills, random.Random(asked.seed))
        said = said_by(run, killed).count("was killed or hangs")
        good = run.returncode == 0 and same(killed, whole)
    print(
        f"{kills} kills in {time.monotonic() - began:.0f} s, {said} of them named; exit code "
        f"{run.returncode}; weights and losses {'equal' if good else 'DIFFER'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
