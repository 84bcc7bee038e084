"""What a run does, writes and refuses."""

import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    CONFIG,
    Tiny,
    assert_same_weights,
    corpus,
    run,
    without_time,
)

from nestlearn.train import Corpus, TrainConfig, evaluate, train
from nestlearn.train.checkpoint import verify_checkpoint
from nestlearn.train.config import learning_rate
from nestlearn.train.folder import read_log
from nestlearn.train.optimize import adamw
from nestlearn.train.plots import loss_curves


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupted."""
    model, log = run(None)
    assert not torch.equal(model.mix.weight, Tiny().mix.weight)
    return model, log


# ----------------------------------------------------------------------------- what a run does


def test_the_run_leaves_its_folder(tmp_path, whole):
    model, log = run(tmp_path / "run", picture=True)
    out = tmp_path / "run"
    assert_same_weights(model, whole[0])
    names = {"config.json", "log.jsonl", "loss.png", "model", "checkpoints"}
    assert set(os.listdir(out)) == names
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000008", "step-000012"]
    assert read_log(out / "log.jsonl") == log
    assert [record["step"] for record in log] == list(range(1, 13))
    assert [r["step"] for r in log if "val_loss" in r] == [4, 8, 12]
    assert log[0]["bits_per_byte"] == pytest.approx(log[0]["loss"] / math.log(2))
    settings = json.loads((out / "config.json").read_text())
    assert settings["train"]["lr"] == CONFIG.lr
    assert settings["corpus"]["train_tokens"] == 400
    assert torch.equal(load_file(out / "model/model.safetensors")["mix.weight"], model.mix.weight)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_bar_reports_on_stderr(capsys):
    train(Tiny(), corpus(), CONFIG, None)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 4: validation loss" in shown.err
    assert "12/12" in shown.err
    assert "tokens/s" in shown.err


def test_it_learns():
    repeating = Corpus(torch.arange(400) % 8, torch.arange(100) % 8, 32)
    config = dataclasses.replace(CONFIG, steps=150, lr=3e-2, eval_every=150)
    _, log = run(None, config, data=repeating)
    assert log[0]["loss"] > 2
    assert log[-1]["val_loss"] < 0.1
    assert log[-1]["bits_per_byte"] is None


def test_the_callers_random_state_is_untouched(whole):
    model = Tiny()
    before = torch.get_rng_state()
    torch.rand(7)  # the run's own draws depend on the config's seed alone
    run(None, model=model)
    torch.set_rng_state(before)
    assert_same_weights(model, whole[0])
    run(None, model=model)
    assert torch.equal(before, torch.get_rng_state())


def test_the_schedule_rises_and_falls_to_the_share():
    config = TrainConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.55)


def test_decay_is_for_matrices_alone():
    model = Tiny()
    model.embed.weight.no_decay = True
    groups = adamw(model, CONFIG, torch.device("cpu")).param_groups
    decayed, plain = ({id(p) for p in group["params"]} for group in groups)
    assert decayed == {id(model.mix.weight)}
    assert plain == {id(model.mix.bias), id(model.embed.weight)}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    with pytest.raises(ValueError, match="no trainable"):
        adamw(Tiny().requires_grad_(False), CONFIG, torch.device("cpu"))


def test_evaluate_agrees_with_the_definition_and_restores_modes():
    model = Tiny().train()
    model.mix.eval()
    windows = corpus().val_windows(5, 8)
    mean, by_position = evaluate(model, windows, batch=2)
    assert (model.training, model.drop.training, model.mix.training) == (True, True, False)
    logits, _ = model.eval()(windows[:, :-1])
    nats = -logits.detach().log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(by_position, nats.mean(0))
    assert mean == pytest.approx(float(nats.mean()), rel=1e-6)
    with pytest.raises(ValueError, match="windows has shape"):
        evaluate(model, windows[0])


def test_bfloat16_autocast_keeps_float32_weights():
    model, log = run(None, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert model.mix.weight.dtype == torch.float32
    assert all(math.isfinite(record["loss"]) for record in log)
    assert without_time(log) != without_time(run(None)[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 1.5),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("warmup", 501),
        ("final_lr", 2.0),
        ("betas", (0.9, 1.0)),
        ("clip", 0.0),
        ("weight_decay", -1.0),
        ("dtype", "float16"),
    ],
)
def test_config_names_value_and_remedy(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*: choose"):
        TrainConfig(**{field: value})


def test_an_unusable_device_is_named():
    with pytest.raises(ValueError, match="device='tpu9' is not usable"):
        run(None, dataclasses.replace(CONFIG, device="tpu9"))


def test_a_short_text_is_refused_before_anything_is_written(tmp_path):
    short = Corpus(torch.arange(5), torch.arange(30), 32)
    with pytest.raises(ValueError, match="shorter than one window"):
        run(tmp_path / "run", data=short)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = Tiny()

    def poison(record):
        if record["step"] == 6:
            model.mix.weight.data.fill_(math.inf)

    with pytest.raises(FloatingPointError, match=r"nan.*at step 7: lower lr \(now 0\.003\)"):
        run(tmp_path, model=model, on_step=poison)
    assert verify_checkpoint(tmp_path / "checkpoints/step-000004")["step"] == 4
    assert len(read_log(tmp_path / "log.jsonl")) == 6


# --------------------------------------------------------------------------------------- plots


def test_plots(tmp_path, whole):
    for name in ("curves.png", "curves.svg"):
        loss_curves({"a": whole[1], "b": whole[1][:5]}, tmp_path / name)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "curves.svg"]
    with pytest.raises(ValueError, match="no records"):
        loss_curves({}, tmp_path / "x.png")
