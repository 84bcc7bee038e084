"""N processes compute what one does, to rounding, and go on where another number of them stopped.

Two processes on the CPU (gloo), in one start for all cases: what they did is compared with one.
"""

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import CONFIG, corpus, crash_after

from nestlearn import HopeConfig, HopeLM, Level
from nestlearn.optim import M3
from nestlearn.options import Continuum, DeltaNet, Titans
from nestlearn.train import train

BASE = dataclasses.replace(
    CONFIG, steps=4, batch=4, eval_every=4, eval_windows=3, checkpoint_every=2
)
LEVELS = Continuum((Level(chunk=2, learns="all"), Level(chunk=8, learns="all")))
MODELS = {
    "hope": {"mixer": Titans(chunk=4, half_life=None), "channel": LEVELS},
    "attention": {"mixer": "attention", "channel": "mlp"},
    "deltanet": {"mixer": DeltaNet(chunk=4), "channel": LEVELS},
}
STREAMED = ("hope", "deltanet")  # attention's cache grows, and is not carried
CASES = {
    **{f"{m} {p}": (m, {"parallel": p}) for m in MODELS for p in ("ddp", "fsdp")},
    **{
        f"{m} {p} stream": (m, {"parallel": p, "stream": 3, "accumulate": 2})
        for m in STREAMED
        for p in ("ddp", "fsdp")
    },
    "hope fsdp bfloat16": ("hope", {"parallel": "fsdp", "dtype": "bfloat16"}),
    "hope fsdp M3": ("hope", {"parallel": "fsdp", "optimizer": "M3"}),
}


def build(name: str) -> HopeLM:
    torch.manual_seed(1)
    return HopeLM(HopeConfig(32, 16, 2, 2, **MODELS[name]))


def go(case: str, out: Path | None, **kwargs):
    """The weights and the log of a run, however many processes make it."""
    name, changes = CASES[case]
    changes = dict(changes)
    if changes.pop("optimizer", None):
        kwargs["optimizer"] = lambda model, config: M3(model.parameters(), lr=config.lr)
    model = build(name)
    config = dataclasses.replace(BASE, **changes)
    log = train(model, corpus(), config, out, progress=False, **kwargs)
    from nestlearn.train.parallel import whole

    return {n: whole(t).detach().clone() for n, t in model.state_dict().items()}, log


def stopped(case: str, out: Path) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        go(case, out, on_step=crash_after(3))


def pair(rank: int, folder: str) -> None:
    """One of the two processes, through every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    here = Path(folder)
    done = {}
    for case in CASES:
        done[case] = go(case, here / case)
    for case in RESUMED:
        done[f"{case}, of one"] = go(case, here / f"{case}, of one", resume=True)
        stopped(case, here / f"{case}, of two")
    if rank == 0:
        torch.save(done, here / "done.pt")
    dist.destroy_process_group()


RESUMED = ("hope ddp stream", "deltanet fsdp stream", "hope fsdp M3")


@pytest.fixture(scope="module")
def two():
    """What two processes did, by case, and the folder where."""
    with tempfile.TemporaryDirectory() as folder:
        for case in RESUMED:
            stopped(case, Path(folder, f"{case}, of one"))
        mp.set_forkserver_preload(["torch.distributed.fsdp", "nestlearn.train"])  # loaded once
        mp.start_processes(pair, (folder,), nprocs=2, start_method="forkserver")
        yield torch.load(Path(folder, "done.pt"), weights_only=False), Path(folder)


@functools.cache
def one(case: str):
    return go(case, None)


def assert_same(a, b, near):
    (weights, log), (others, other_log) = a, b
    assert len(log) == len(other_log)
    for x, y in zip(log, other_log):
        for key in ("loss", "grad_norm", "val_loss"):
            assert x.get(key) == (y.get(key) and pytest.approx(y[key], rel=near)), (x["step"], key)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=near, atol=near)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(two, case):
    assert_same(two[0][case], one(case), 2e-2 if "bfloat16" in case else 1e-4)
