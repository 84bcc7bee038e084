"""A run survives every stop: what it resumes is, bit for bit, what it would have been."""

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    CONFIG,
    Tiny,
    assert_same_weights,
    corpus,
    crashed,
    run,
    stop_after,
    without_time,
)
from torch import nn

from nestlearn import HopeConfig, HopeLM
from nestlearn.disk import atomic_write
from nestlearn.train.checkpoint import copied_checkpoint, verify_checkpoint
from nestlearn.train.folder import RunFolder, read_log
from nestlearn.train.optimize import adamw
from servers import server


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupted."""
    model, log = run(None)
    assert not torch.equal(model.mix.weight, Tiny().mix.weight)
    return model, log


# ------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 4, 7, 12])
def test_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path, whole, step):
    crashed(tmp_path, step)
    torch.manual_seed(99)
    other = Tiny()
    if step >= 4:  # the weights come from the checkpoint; before the first they are the caller's
        nn.init.ones_(other.mix.weight)
    model, log = run(tmp_path, model=other, resume=True)
    assert_same_weights(model, whole[0])
    assert without_time(log) == without_time(whole[1])
    assert read_log(tmp_path / "log.jsonl") == log


def test_optimizer_state_is_part_of_it(tmp_path, whole):
    crashed(tmp_path, 8)
    path = tmp_path / "checkpoints/step-000008/optimizer.safetensors"
    saved = load_file(path)
    assert {"mix.weight/exp_avg", "mix.weight/exp_avg_sq", "mix.bias/step"} <= saved.keys()
    assert saved["mix.bias/step"] == 8
    assert saved["mix.weight/exp_avg"].abs().max() > 0


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    crashed(tmp_path, 7)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut short by a kill
    assert len(read_log(tmp_path / "log.jsonl")) == 7
    seen = []
    _, log = run(tmp_path, resume=True, on_step=lambda record: seen.append(record["step"]))
    assert seen == list(range(5, 13))
    assert [record["step"] for record in log] == list(range(1, 13))


def test_resuming_a_finished_run_changes_nothing_and_more_steps_go_on(tmp_path, whole):
    run(tmp_path)
    model, log = run(tmp_path, resume=True)
    assert_same_weights(model, whole[0])
    assert without_time(log) == without_time(whole[1])
    longer = dataclasses.replace(CONFIG, steps=14)
    model, log = run(tmp_path, longer, resume=True)
    assert len(log) == 14
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 14
    assert torch.equal(
        load_file(tmp_path / "model/model.safetensors")["mix.weight"], model.mix.weight
    )
    with pytest.raises(ValueError, match="stands at step 14, past steps=12"):
        run(tmp_path, resume=True)


def test_keyboard_interrupt_saves_and_says_how_to_go_on(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 5 of 12.*--resume"):
        run(tmp_path, on_step=stop_after(5))
    assert verify_checkpoint(tmp_path / "checkpoints/step-000005")["step"] == 5
    assert_same_weights(run(tmp_path, resume=True)[0], whole[0])


def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    class Interrupted(Tiny):
        calls = 0
        signals = 1

        def forward(self, ids, state=None):
            self.calls += 1
            if self.calls == 3:
                for _ in range(self.signals):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)
            return super().forward(ids, state)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        run(tmp_path / "once", model=Interrupted())
    assert (tmp_path / "once/checkpoints/step-000003").is_dir()
    twice = Interrupted()
    twice.signals = 2
    with pytest.raises(KeyboardInterrupt) as stop:
        run(tmp_path / "twice", model=twice)
    assert str(stop.value) == ""
    assert not (tmp_path / "twice/checkpoints").exists()  # a half-made step is never saved
    assert signal.getsignal(signal.SIGINT) is handler


# ----------------------------------------------------------------------------------- refusals


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    crashed(tmp_path, 5)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        run(tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()
    with pytest.raises(ValueError, match="needs out"):
        run(None, resume=True)


def test_a_run_from_before_a_model_had_options_goes_on(tmp_path):
    saved = Path(__file__).parents[1] / "models" / "saved" / "flat_configs.json"
    for flat in (case["config"] for case in json.loads(saved.read_text())):
        model = HopeLM(HopeConfig.from_dict(flat))
        started = {"train": {"steps": 3}, "corpus": {}, "model": model.config.to_dict()}
        (tmp_path / "config.json").write_text(json.dumps({**started, "model": flat}))
        assert RunFolder(tmp_path, started).resume(model, None) == (0, [])
        other = HopeLM(dataclasses.replace(model.config, channel="mlp", mixer="linear"))
        with pytest.raises(ValueError, match=r"model\.mixer was .*, now {'kind': 'Linear'"):
            RunFolder(tmp_path, {**started, "model": other.config.to_dict()}).resume(other, None)


@pytest.mark.parametrize("step", [2, 5], ids=["before the first checkpoint", "after it"])
def test_a_changed_configuration_is_refused_by_field(tmp_path, step):
    crashed(tmp_path, step)
    changed = dataclasses.replace(CONFIG, lr=1e-3, batch=3)
    with pytest.raises(ValueError, match=r"train\.batch was 2, now 3; train\.lr was 0\.003, now"):
        run(tmp_path, changed, resume=True)
    with pytest.raises(ValueError, match=r"corpus\.sha256 was"):
        run(tmp_path, resume=True, data=corpus(seed=1))
    reports = dataclasses.replace(CONFIG, eval_every=3, checkpoint_every=5, eval_windows=1)
    assert run(tmp_path, reports, resume=True)[1][-1]["step"] == 12


def test_another_model_is_refused_by_name(tmp_path):
    crashed(tmp_path, 5)
    with pytest.raises(ValueError, match=r"embed\.weight is \(32, 16\) in the .* \(32, 8\)"):
        run(tmp_path, model=Tiny(width=8), resume=True)

    class Settings:
        def to_dict(self):
            return {"width": 16}

    model = Tiny()
    model.config = Settings()
    with pytest.raises(ValueError, match=r"model\.width was None, now 16"):
        run(tmp_path, model=model, resume=True)


# ------------------------------------------------------------------------- damage and kills


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path, whole, caplog, damage, name
):
    crashed(tmp_path, 9)
    damage(tmp_path / "checkpoints/step-000008" / name)
    seen = []
    model, _ = run(tmp_path, resume=True, on_step=lambda record: seen.append(record["step"]))
    assert "step-000008" in caplog.text
    assert name in caplog.text
    assert seen[0] == 5
    assert_same_weights(model, whole[0])
    assert "damaged-step-000008" in os.listdir(tmp_path / "checkpoints")


def test_no_usable_checkpoint_is_refused_with_the_remedy(tmp_path):
    crashed(tmp_path, 9)
    for step in (4, 8):
        truncate(tmp_path / f"checkpoints/step-{step:06d}/model.safetensors")
    for _ in range(2):  # the refusal itself must not make a fresh start look right
        with pytest.raises(ValueError, match=r"no usable checkpoint.*restore one from a copy"):
            run(tmp_path, resume=True)


def written(out, step):
    """Wait for a checkpoint, which is written while the run goes on."""
    until = time.monotonic() + 60
    while not (out / f"checkpoints/step-{step:06}/meta.json").is_file():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, whole):
    """A real refusal of the kernel: RLIMIT_FSIZE ends the second checkpoint's writing."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record):
        if record["step"] == 6:
            written(tmp_path, 4)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limit[1]))

    try:
        with pytest.raises(
            OSError, match=r"cannot write .*step-000008: .*free some space"
        ) as error:
            run(tmp_path, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path / "checkpoints") == ["step-000004"]
    assert_same_weights(run(tmp_path, resume=True)[0], whole[0])


def test_a_checkpoint_is_written_while_the_run_goes_on(tmp_path, whole, monkeypatch):
    """The writing of step 4 is held until step 6, and holds step 4."""
    held, there, publish = threading.Event(), [], RunFolder._publish

    def slow(*given):
        assert held.wait(60)
        publish(*given)

    def on_step(record):
        if record["step"] == 6:
            there.append((tmp_path / "checkpoints/step-000004").exists())
            held.set()
            raise RuntimeError("crash")

    monkeypatch.setattr(RunFolder, "_publish", slow)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, on_step=on_step)
    assert there == [False]
    assert verify_checkpoint(tmp_path / "checkpoints/step-000004")["step"] == 4
    assert_same_weights(run(tmp_path, resume=True)[0], whole[0])


def test_what_ends_the_writing_ends_the_run_at_a_next_step(tmp_path, monkeypatch):
    def refused(_, path, write):
        raise OSError(errno.EIO, f"cannot write {path}")

    monkeypatch.setattr(RunFolder, "_publish", refused)
    with pytest.raises(OSError, match=r"cannot write .*step-000004"):
        run(tmp_path, on_step=lambda record: time.sleep(0.05))
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] < 8


def test_a_full_disk_under_the_log_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(record):
        if record["step"] == 5:
            written(tmp_path, 4)
            monkeypatch.setattr(Path, "open", full)

    with pytest.raises(OSError, match=r"cannot write .*log\.jsonl.*free some space"):
        run(tmp_path, on_step=fill)
    monkeypatch.undo()
    assert verify_checkpoint(tmp_path / "checkpoints/step-000004")["step"] == 4


def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(tmp_path):
    """Fork, die at the n-th disk operation of a save, and look at what is left."""
    model = Tiny()
    optimizer = adamw(model, CONFIG, torch.device("cpu"))
    old = tmp_path / "step-000004"
    atomic_write(old, copied_checkpoint(4, model, optimizer, {}))
    deaths = 0
    for nth in range(1, 50):
        folder = tmp_path / str(nth)
        shutil.copytree(old, folder / "step-000004")
        child = os.fork()
        if child == 0:
            _die_at(nth)
            atomic_write(folder / "step-000008", copied_checkpoint(8, model, optimizer, {}))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        names = [name for name in os.listdir(folder) if name.startswith("step-")]
        assert {verify_checkpoint(folder / name)["step"] for name in names} >= {4}
        if code == 0:
            assert sorted(names) == ["step-000004", "step-000008"]
            break
        assert code == 9
        deaths += 1
    assert deaths >= 6  # three files, their folder, the rename, the parent
    assert code == 0


def _die_at(nth):
    count = 0

    def dying(call):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == nth:
                os._exit(9)
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    Path.write_bytes = dying(Path.write_bytes)


KILL_CONFIG = dataclasses.replace(CONFIG, steps=300, checkpoint_every=2, eval_every=300)


def killed(out, told):
    """In a child: a run that goes on, and tells each step, until it is killed."""
    torch.set_num_threads(1)
    run(out, KILL_CONFIG, resume=out.exists(), on_step=lambda record: told.send(record["step"]))


def test_sigkill_at_random_moments(tmp_path):
    """Checkpoints every second step, killed at random, resumed: the same weights in the end."""
    seed = random.randrange(1000)
    print("seed", seed)
    dice = random.Random(seed)
    out = tmp_path / "run"
    steps = []
    for _ in range(3):
        heard, told = server().Pipe(duplex=False)
        child = server().Process(target=killed, args=(out, told))
        child.start()
        told.close()
        steps.append(heard.recv())  # EOFError if the run ended before its first step
        time.sleep(dice.uniform(0.0, 0.25))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        heard.close()
    assert steps[0] == 1
    assert steps == sorted(steps)
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "checkpoints/.step-000299.0123abcd.tmp").mkdir()
    model, log = run(out, KILL_CONFIG, resume=True)
    expected, expected_log = run(None, KILL_CONFIG)
    assert_same_weights(model, expected)
    assert without_time(log) == without_time(expected_log)
    assert not list(out.rglob("*.tmp"))
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000298", "step-000300"]
