"""N processes compute what one does, to rounding, and go on where another number of them stopped.

Two processes on the CPU (gloo), in one start for all cases: what they did is compared with one.
"""

import dataclasses
import functools
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import CONFIG, corpus, crash_after

from nestlearn import HopeConfig, HopeLM, Level
from nestlearn.optim import M3
from nestlearn.options import Continuum, DeltaNet, Titans
from nestlearn.train import train
from nestlearn.train.checkpoint import verify_checkpoint
from nestlearn.train.folder import read_log, weights
from nestlearn.train.meters import device_peak, flops_per_token
from nestlearn.train.parallel import shares, whole
from nestlearn.train.ranks import Ranks
from pairs import pair

BASE = dataclasses.replace(
    CONFIG, steps=4, batch=4, eval_every=4, eval_windows=3, checkpoint_every=2
)
LEVELS = Continuum(tuple(Level(n, learns="all", half_life=None) for n in (2, 8)))
MODELS = {  # several blocks where they are quick: to share them out is the same for all
    "hope": {"layers": 1, "mixer": Titans(chunk=4, half_life=None), "channel": LEVELS},
    "attention": {"layers": 2, "mixer": "attention", "channel": "mlp"},
    "deltanet": {"layers": 1, "mixer": DeltaNet(chunk=4), "channel": LEVELS},
}
STREAM = {"stream": 3, "accumulate": 2}  # attention's cache grows, and is not carried
CASES = {
    **{
        f"{model} {parallel}": (model, {"parallel": parallel, **more})
        for model, more in (("hope", STREAM), ("attention", {}), ("deltanet", STREAM))
        for parallel in ("ddp", "fsdp")
    },
    "hope fsdp bfloat16": ("hope", {"parallel": "fsdp", "dtype": "bfloat16"}),
    "attention fsdp M3": ("attention", {"parallel": "fsdp", "optimizer": "M3"}),
}
FILES = {"config.json", "log.jsonl", "loss.png", "model", "checkpoints"}
RESUMED = ("hope ddp", "deltanet fsdp", "attention fsdp M3")
DRAWN = ("attention ddp", "hope fsdp")  # whose losses are: a picture takes longer than a run


def build(name: str) -> HopeLM:
    torch.manual_seed(1)
    return HopeLM(HopeConfig(32, 16, heads=2, **MODELS[name]))


def go(case: str, out: Path | None, picture: bool = False, **kwargs):
    """The weights and the log of a run, however many processes make it."""
    name, changes = CASES[case]
    changes = dict(changes)
    if changes.pop("optimizer", None):
        kwargs["optimizer"] = lambda model, config: M3(model.parameters(), lr=config.lr)
    model = build(name)
    config = dataclasses.replace(BASE, **changes)
    with pytest.MonkeyPatch.context() as patch:
        if not picture:
            patch.setattr("nestlearn.train.run.loss_curves", lambda *_: None)
        log = train(model, corpus(), config, out, progress=False, **kwargs)
    return {n: whole(t).detach().clone() for n, t in model.state_dict().items()}, log


def stopped(case: str, out: Path) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        go(case, out, on_step=crash_after(3))


def poisoned(rank: int, out: Path) -> str:
    """What both say when one of them computes a loss that is no number."""

    def poison(record):
        if record["step"] == 3 and rank == 1:
            spoil = lambda module, given, result: (result[0] * float("nan"), result[1])  # noqa: E731
            nn.modules.module.register_module_forward_hook(
                lambda m, *a: spoil(m, *a) if isinstance(m, HopeLM) else None
            )

    with pytest.raises(FloatingPointError) as error:
        go("attention ddp", out, on_step=poison)
    nn.modules.module._global_forward_hooks.clear()
    return str(error.value)


def full(rank: int, out: Path) -> tuple[str, int]:
    """What both say when the disk of the one that writes is full, and whose it is."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record):
        if record["step"] == 3 and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limit[1]))

    with pytest.raises(OSError, match="free some space") as error:
        go("attention fsdp", out, on_step=fill)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return str(error.value), error.value.rank


def interrupted(rank: int, out: Path) -> str:
    """What both say when a scheduler ends one of them by SIGTERM."""
    ask = lambda record: rank == 1 and record["step"] == 3 and signal.raise_signal(signal.SIGTERM)  # noqa: E731
    with pytest.raises(KeyboardInterrupt) as stop:
        go("attention ddp", out, on_step=ask)
    return str(stop.value)


def both(rank: int, here: Path) -> None:
    """One of the two processes, through every case."""
    done: dict = {case: go(case, here / case, case in DRAWN) for case in CASES}
    for case in RESUMED:
        done[f"{case}, of one"] = go(case, here / f"{case}, of one", resume=True)
        stopped(case, here / f"{case}, of two")
    done["poisoned"] = poisoned(rank, here / "poisoned")
    done["full"] = full(rank, here / "full")
    done["interrupted"] = interrupted(rank, here / "interrupted")
    torch.save(done, here / f"done-{rank}.pt")


def of_one(here: Path) -> None:
    for case in RESUMED:
        stopped(case, here / f"{case}, of one")


@pytest.fixture(scope="module")
def two():
    """What two processes did, by case, and the folder where."""
    with pair(both, before=of_one) as folder:
        yield *(torch.load(folder / f"done-{r}.pt", weights_only=False) for r in range(2)), folder


@functools.cache
def one(case: str):
    return go(case, None)


def assert_same(a, b, tolerance):
    (tensors, log), (others, other_log) = a, b
    assert len(log) == len(other_log)
    for x, y in zip(log, other_log):
        for key in ("loss", "grad_norm", "val_loss"):
            assert x.get(key) == (y.get(key) and pytest.approx(y[key], rel=tolerance)), (
                x["step"],
                key,
            )
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=tolerance, atol=tolerance)


def near(case: str) -> float:
    return 2e-2 if "bfloat16" in case else 1e-4


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(two, case):
    assert_same(two[0][case], one(case), near(case))
    assert_same(two[1][case], two[0][case], 1e-9)


def test_the_first_alone_writes_what_one_process_writes(two):
    for case in DRAWN:
        folder = two[2] / case
        assert {p.name for p in folder.iterdir()} == FILES
        assert len(read_log(folder / "log.jsonl")) == BASE.steps
        model = HopeLM.from_pretrained(folder / "model")
        assert_same((model.state_dict(), []), (two[0][case][0], []), 1e-9)


@pytest.mark.parametrize("case", RESUMED)
def test_two_go_on_where_one_stopped_and_one_where_two_did(two, case):
    assert_same(two[0][f"{case}, of one"], one(case), near(case))
    stopped_at = two[2] / f"{case}, of two"
    assert verify_checkpoint(stopped_at / "checkpoints/step-000002")["step"] == 2
    assert_same(go(case, stopped_at, resume=True), one(case), near(case))


def test_a_loss_that_is_no_number_names_its_rank(two):
    for said in two[:2]:
        assert re.search(r"the loss is nan on rank 1 .* at step 4", said["poisoned"])
    assert verify_checkpoint(two[2] / "poisoned/checkpoints/step-000002")


def test_a_full_disk_is_told_to_all(two):
    for said in two[:2]:
        assert re.search(r"cannot write .*step-000004", said["full"][0])
        assert said["full"][1] == 0
    assert [p.name for p in (two[2] / "full/checkpoints").iterdir()] == ["step-000002"]
    assert_same(go("attention fsdp", two[2] / "full", resume=True), one("attention fsdp"), 1e-4)


def test_a_signal_to_one_stops_all_after_the_same_step(two):
    for said in two[:2]:
        assert said["interrupted"].startswith("stopped after step 3 of 4, saved as ")
    again = go("attention ddp", two[2] / "interrupted", resume=True)
    assert_same(again, one("attention ddp"), 1e-4)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    model, device = build("hope"), torch.device("cpu")
    with pytest.raises(ValueError, match=r"batch=4: choose a multiple of 3, .*processes \(3\)"):
        shares(model, BASE, device, Ranks(0, 3))
    with pytest.raises(ValueError, match="batch=4: choose a multiple of accumulate=3"):
        dataclasses.replace(BASE, accumulate=3)
    assert shares(model, dataclasses.replace(BASE, parallel="fsdp"), device, Ranks(0, 2))
    assert not shares(model, BASE, device, Ranks(0, 2))


# ---------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("case", ["hope ddp", "attention ddp"])
def test_a_batch_in_parts_is_the_same_batch(case):
    name, changes = CASES[case]
    CASES["in parts"] = (name, {**changes, "accumulate": 4})
    try:
        assert_same(go("in parts", None), one(case), 1e-4)
    finally:
        del CASES["in parts"]


def test_flops_are_those_of_the_matrix_products():
    model = build("attention")
    linear = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    scores = 2 * 2 * 2 * 16 * 16  # layers, two products, FLOPs, tokens, width
    counted = flops_per_token(model, 16)
    assert counted == pytest.approx(3 * (2 * linear + scores), rel=1e-3)
    hope = build("hope")  # over a span of its levels, which differentiate inside
    assert flops_per_token(hope, 256) > 6 * sum(p.numel() for p in hope.blocks.parameters())
    assert device_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert device_peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert device_peak("an unknown one", "bfloat16") is None


def test_a_trace_is_written(tmp_path):
    train(build("attention"), corpus(), dataclasses.replace(BASE, steps=6, profile=True), tmp_path)
    assert "traceEvents" in json.loads((tmp_path / "profile/rank-0.json").read_text())


def test_a_checkpoint_becomes_a_model(tmp_path, call):
    stopped("attention ddp", tmp_path / "run")
    code, _, said = call("export", tmp_path / "run", "--out", tmp_path / "model")
    assert (code, "step 2" in said) == (0, True), said
    saved = weights(tmp_path / "run/checkpoints/step-000002")
    assert_same((HopeLM.from_pretrained(tmp_path / "model").state_dict(), []), (saved, []), 1e-9)
    code, _, said = call("export", tmp_path / "run", "--out", tmp_path / "model")
    assert (code, "is there already" in said) == (2, True)


# ------------------------------------------------------------------------------------- torchrun


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from bench.agent import ranks_of
    from bench.kills import launch, said_by

    out = tmp_path / "run"
    run = launch(out, 12, "--length 8", restarts=1)
    log = out / "log.jsonl"
    while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 6):
        time.sleep(0.02)
    os.kill(ranks_of(run.pid)[1], signal.SIGKILL)
    said = said_by(run, out)
    assert run.returncode == 0, said
    assert said.count("Error: ") == 1
    assert "rank 1 was killed or hangs; the checkpoints are kept" in said
    assert [record["step"] for record in read_log(log)] == list(range(1, 13))
