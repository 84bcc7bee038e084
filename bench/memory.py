"""Peak memory, each number in a fresh process: a peak never falls, and freed memory is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .contestants import HOPE, OURS, TRAIN, Contestant, Shape, contestants, far_contestants
from .harness import Measured, Tick, is_memory
from .machine import ROOT, forget_peak, limit_memory, peak_bytes
from .tasks import Settings, facts, pass_through

STEP_MEMORY, STREAM_MEMORY = "memory of a training step", "memory of a stream"
PIECE = 4096  # tokens that a stream is read at a time
SETTLE = 16 * PIECE
START = 120.0  # seconds that a child may take besides its work

Job = dict[str, Any]
Measure = Callable[[Job, float | None], Measured]


def memory_jobs(entrants: Sequence[Contestant], settings: Settings) -> list[Job]:
    """What the children do, short lengths first."""
    common = {"shape": list(settings.shape), "threads": torch.get_num_threads()}
    jobs: list[Job] = []
    if settings.memory:
        jobs += [
            {"kind": STEP_MEMORY, "contestant": c.name, "length": n,
             "batch": settings.batch if c.batch is None else c.batch, **common}
            for c in entrants if c.memory for n in sorted(settings.lengths) if c.wants(n)
        ]  # fmt: skip
    if settings.flat:
        jobs += [
            {"kind": STREAM_MEMORY, "contestant": name, "length": n, "batch": 1, **common}
            for name in (OURS, HOPE)
            for n in sorted(settings.stream_tokens)
        ]
    return jobs


def memory_records(
    jobs: Sequence[Job], limit: float, tick: Tick, measure: Measure | None = None
) -> list[Measured]:
    """One record for each job. A contestant that fails at a length is dropped at longer ones."""
    records: list[Measured] = []
    dropped: dict[tuple[str, str], str] = {}
    for job in jobs:
        key = (job["kind"], job["contestant"])
        seconds = None if job["kind"] == STREAM_MEMORY else START + 3 * limit
        got = {"dropped": dropped[key]} if key in dropped else (measure or in_child)(job, seconds)
        if got["dropped"]:
            dropped[key] = got["dropped"]
        value = got.pop("mib", None)
        records.append(
            {"contestant": job["contestant"], "kind": job["kind"], "T": job["length"],
             "metric": "peak memory", "unit": "MiB", "median": value, "low": value, "high": value,
             "rounds": int(value is not None), "values": [] if value is None else [value],
             "batch": job["batch"], **got}
        )  # fmt: skip
        tick(f"{job['kind']}: {job['contestant']}", job["length"] + PIECE)
    return records


def in_child(job: Job, seconds: float | None) -> Measured:
    """Do the job in a fresh process, within so many seconds: {"dropped": why, "mib": peak}."""
    command = [sys.executable, "-m", "bench", "child", json.dumps(job)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds,
            env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"dropped": f"more than {seconds:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:  # killed, and nobody but the kernel kills it
        return {"dropped": "out of memory"}
    return {"dropped": (done.stderr.strip().splitlines() or ["failed"])[-1]}


def do(job: Job) -> Measured:
    """The job itself, in the child."""
    limit_memory()
    torch.set_num_threads(job["threads"])
    shape = Shape(*job["shape"])
    c = next(c for c in [*contestants(), *far_contestants()] if c.name == job["contestant"])
    layer = c.make(shape)
    began = time.perf_counter()
    try:
        used = (_step if job["kind"] == STEP_MEMORY else _stream)(c, layer, job, shape)
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        return {"dropped": "out of memory"}
    took = time.perf_counter() - began
    return {"dropped": "", "mib": round(used / 2**20, 1), "seconds": round(took, 2),
            **facts(c, layer, job["batch"], shape)}  # fmt: skip


def _step(c: Contestant, layer: Any, job: Job, shape: Shape) -> int:
    """Bytes of one forward + backward, after one over a single chunk: libraries allocate once."""
    if c.prepare is not None:
        c.prepare(job["length"])
    pass_through(c, layer, TRAIN, shape.chunk, job["batch"], shape)()
    run = pass_through(c, layer, TRAIN, job["length"], job["batch"], shape)
    forget_peak()
    before = peak_bytes()
    run()
    return peak_bytes() - before


@torch.no_grad()
def _stream(c: Contestant, layer: Any, job: Job, shape: Shape) -> int:
    """Bytes of reading so many tokens, piece after piece through the state.

    After another stream of SETTLE tokens: the allocator's pools grow over the first ten calls or
    so and then stay, while the bytes in tensors are the same from the first call on.
    """
    generator = torch.Generator().manual_seed(0)

    def read(length: int) -> None:
        state = None
        for start in range(0, length, PIECE):
            tokens = min(PIECE, length - start)
            x = torch.randn(job["batch"], tokens, shape.width, generator=generator)
            _, state = c.step(layer, x, state)

    forget_peak()
    before = peak_bytes()
    read(SETTLE)
    forget_peak()
    read(job["length"])
    return peak_bytes() - before
