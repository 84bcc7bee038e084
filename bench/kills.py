"""python -m bench.kills: a run on two processes whose ranks are killed at random moments.

torchrun starts the processes again, and they go on from the newest checkpoint. In the end weights
and losses are compared, bit for bit, with those of a run that nothing disturbed. With --out the
same command goes on where it was stopped itself.
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

from bench.agent import ranks_of

SETTINGS = "--length 16 --batch 4 --checkpoint-every 5 --device cpu"
EARLY = 0.25  # the share of kills within seconds of a start; the others come amid steps


def launch(out: Path, steps: int, more: str = "", restarts: int = 0) -> subprocess.Popen[str]:
    """A run of two processes in `out`, on text that it makes itself; see `said_by`."""
    data = out.parent / "text.txt"
    if not data.exists():
        data.write_text("the key is under the mat. " * 200)
    more += " --resume" * (out / "config.json").exists()
    train = f"train --data {data} --out {out} --steps {steps} {SETTINGS} {more}".split()
    agent = str(Path(__file__).with_name("agent.py"))
    command = [sys.executable, agent, str(restarts), *train]
    with out.with_suffix(".err").open("a") as err:
        return subprocess.Popen(
            command, stderr=err, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def said_by(run: subprocess.Popen[str], out: Path) -> str:
    """What the run printed, once it has ended."""
    run.wait()
    return out.with_suffix(".err").read_text()


def kill_ranks(run: subprocess.Popen[str], out: Path, kills: int, dice: random.Random) -> None:
    """Kill one of the run's processes at a time, until the run ends; see `killed`."""
    before: list[int] = []
    while kills > 0 and run.poll() is None:
        now = ranks_of(run.pid)
        if len(now) < 2 or now == before:
            time.sleep(0.05)
            continue
        early = dice.random() < EARLY
        longest = 5.0 if early else _wait_for_steps(run, out / "log.jsonl", dice.randint(1, 10))
        time.sleep(dice.uniform(0, longest))
        if run.poll() is None:
            chosen = dice.choice(now)
            os.kill(chosen, signal.SIGKILL)
            kills, before = kills - 1, now
            with out.with_suffix(".kills").open("a") as kept:
                kept.write(f"{chosen}\n")


def killed(out: Path) -> int:
    """How many kills there were in all."""
    file = out.with_suffix(".kills")
    return len(file.read_text().splitlines()) if file.exists() else 0


def _wait_for_steps(run: subprocess.Popen[str], log: Path, count: int) -> float:
    """Wait until a start has made so many steps; returns the seconds that the last one took."""
    stamp = lambda: log.stat().st_mtime_ns if log.exists() else 0  # noqa: E731
    began = time.monotonic()
    for _ in range(count + 1):  # the first change is the cut back to a checkpoint
        before, began = stamp(), time.monotonic()
        while run.poll() is None and stamp() == before:
            time.sleep(0.01)
    return time.monotonic() - began


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
    parser.add_argument("--out", type=Path, help="keep both runs here; else they are removed")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        good, said = compared(asked, asked.out or Path(folder))
    print(f"{said} in {time.monotonic() - began:.0f} s")
    return 0 if good else 1


def compared(asked: argparse.Namespace, folder: Path) -> tuple[bool, str]:
    """Make both runs in the folder, as far as they are not made; and what there is to say."""
    steps = 20 + 4 * asked.kills  # more than the kills let it make
    more = f"--parallel {asked.parallel}"
    folder.mkdir(parents=True, exist_ok=True)
    calm, out = folder / "calm", folder / "killed"
    if not (calm / "model").exists():
        launch(calm, steps, more).wait()
    left = asked.kills - killed(out)
    run = launch(out, steps, more, restarts=left)
    kill_ranks(run, out, left, random.Random(asked.seed + left))
    named = said_by(run, out).count("was killed or hangs")
    good = run.returncode == 0 and same(out, calm)
    return good, (
        f"{killed(out)} kills, {named} of them named; exit code {run.returncode}; weights and "
        f"losses {'equal' if good else 'DIFFER'}"
    )


if __name__ == "__main__":
    sys.exit(main())
