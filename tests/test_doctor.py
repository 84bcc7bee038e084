"""`nestlearn doctor`: the laws hold here, a broken one is seen, and a model's memory is counted."""

import time

import pytest
import torch

from nestlearn import (
    DeltaLevel,
    HopeConfig,
    HopeLM,
    Level,
    options,
    selftest,
    stack_levels,
    state,
)
from nestlearn.scan import fused


def test_it_passes_here_in_ten_seconds(call, unchecked):
    began = time.process_time()
    code, out, err = call("doctor", "--device", "cpu")
    assert code == 0, out + err
    assert time.process_time() - began < 10
    assert out.count("holds  ") == len(selftest.LAWS) == 5
    for said in ("python", "torch", "triton", "transformers", "disk", "fused         chosen"):
        assert said in out
    assert "card          no: " in out


def _late(model, ids, state=None, forward=HopeLM.forward, **more):
    """Every token reaches every answer."""
    logits, after = forward(model, ids, state, **more)
    return logits + ids.sum(1)[:, None, None].to(logits.dtype), after


def _mixed(model, ids, state=None, forward=HopeLM.forward, **more):
    """Every sample reaches all others' answers."""
    logits, after = forward(model, ids, state, **more)
    return logits + logits.mean(0), after


def _forgetful(path, like, device=None, load=state.load):
    """Half of what was saved comes back."""
    return state.tree_map(lambda x: x / 2 if x.is_floating_point() else x, load(path, like, device))


def _fused(*args, update=fused.update, **more):
    """Answers twice as large as they are."""
    o, W, S = update(*args, **more)
    return 2 * o, W, S


@pytest.mark.parametrize(
    ("owner", "name", "broken", "law"),
    [
        (HopeLM, "forward", _late, "causality"),
        (HopeLM, "forward", _late, "streaming"),
        (HopeLM, "forward", _mixed, "isolation"),
        (state, "load", _forgetful, "state is data"),
        (fused, "update", _fused, "the fast forms"),
    ],
)
def test_a_broken_law_is_seen(owner, name, broken, law, call, monkeypatch, unchecked):
    monkeypatch.setattr(owner, name, broken)
    only = {each: test for each, test in selftest.LAWS.items() if each.startswith(law)}
    monkeypatch.setattr(selftest, "LAWS", only)
    code, out, _ = call("doctor", "--device", "cpu")
    assert code == 1
    assert f"FAILS  {law}" in out


def test_the_callers_random_state_stays(call, monkeypatch):
    monkeypatch.setattr(selftest, "LAWS", {"nothing": lambda place: ""})
    before = torch.get_rng_state()
    assert call("doctor", "--device", "cpu")[0] == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_memory_of_a_hope(tmp_path, call, monkeypatch):
    monkeypatch.setattr(selftest, "LAWS", {})
    levels = options.Continuum((Level(chunk=4), Level()))
    lm = HopeLM(HopeConfig(64, 32, 1, 2, options.Titans(chunk=8), levels))
    lm.save_pretrained(tmp_path)
    said = dict(selftest.needs(tmp_path))
    reader = selftest._size(state.nbytes(lm.init_state(1)))
    assert f"{reader} of state for each reader" in said["to read"]
    assert f"{selftest._size(16 * lm.parameter_count())} with AdamW" in said["to train"]
    monkeypatch.setattr(selftest, "available", lambda: 1000)
    assert "what a window keeps" in dict(selftest.needs(tmp_path))["to train"]
    code, out, _ = call("doctor", "--device", "cpu", "--model", tmp_path)
    assert code == 0
    assert f"Memory of {tmp_path}" in out


def test_the_folder_of_a_run_holds_its_model(tmp_path):
    lm = HopeLM(HopeConfig(64, 32, 1, 2))
    lm.save_pretrained(tmp_path / "model")
    assert dict(selftest.needs(tmp_path)) == dict(selftest.needs(tmp_path / "model"))
    assert torch.equal(HopeLM.from_pretrained(tmp_path).embed.weight, lm.embed.weight)


def test_a_busy_machine_is_told(monkeypatch):
    found = {}
    for load in (0.2, 3.7):
        monkeypatch.setattr(selftest.os, "getloadavg", lambda load=load: (load, 0, 0))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(selftest.os, "cpu_count", lambda: 2)
        found[load] = dict(selftest.machine(torch.device("cpu")))
    assert "load" not in found[0.2]
    assert found[3.7]["load"].startswith("3.7: others use these cores")
    monkeypatch.setattr(selftest.os, "cpu_count", lambda: 8)  # room for both
    assert "load" not in dict(selftest.machine(torch.device("cpu")))


def test_the_memory_of_a_stack(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from nestlearn.hf.folder import save_stack

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = stack_levels(
        LlamaForCausalLM(config), levels=[DeltaLevel(chunk=16, lr=0.1, rule="dgd")]
    )
    save_stack(model, tmp_path / "stacked")
    said = dict(selftest.needs(tmp_path / "stacked"))
    assert f"{selftest._size(model.memory_bytes())} of memory" in said["to read"]
    assert "16 tokens" in said["to learn"]
    assert "nestlearn stack" in dict(selftest.needs(tmp_path / "stacked" / "base"))["to learn"]


def test_a_folder_without_a_model_is_one_line(tmp_path, call):
    code, _, err = call("doctor", "--device", "cpu", "--model", tmp_path)
    assert code == 2
    assert "no model in" in err
