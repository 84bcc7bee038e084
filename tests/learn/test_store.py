"""Memories on disk: whole or not at all, and nothing believed that was not checked."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from people import LEVELS, base, ids, session, stacked
from safetensors.torch import load_file, save_file
from torture import damage, kill

from nestlearn import DeltaLevel, Session, stack_levels, state
from nestlearn.hf.folder import (
    fingerprint,
    from_dict,
    load_stack,
    save_rates,
    save_stack,
    to_dict,
)
from nestlearn.hf.plan import StackConfig
from nestlearn.learn import delete_memory, describe, load_memory, save_memory
from nestlearn.learn import store as store_module

SYSTEMS = {
    "sequential": {},
    "nested-rank": {"variant": "nested", "rank": 2},
    "depth": {"spread": "depth"},
    "one": {"levels": [DeltaLevel(8, rule="momentum")]},
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("length", [1, 3, 16, 39])
def test_a_memory_comes_back_bit_for_bit(tmp_path, name, length):
    model = stacked(**SYSTEMS[name])
    _, memory = model.learn(ids(length))
    save_memory(tmp_path / "a", model, memory, [{"what": "learn", "loss": float("nan")}])
    back = load_memory(tmp_path / "a", model).memory
    for (path, a), (_, b) in zip(state.leaves(memory), state.leaves(back), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path
    further = [model.learn(ids(9, seed=1), m)[1] for m in (memory, back)]
    assert torch.equal(further[0].context, further[1].context)


def test_a_memory_in_bfloat16_comes_back(tmp_path):
    model = stacked()
    model.base.to(torch.bfloat16)
    _, memory = model.learn(ids(30))
    assert memory.cache[0][0].dtype == torch.bfloat16
    assert memory.levels[0].fast[0].left.dtype == torch.float32
    save_memory(tmp_path / "a", model, memory, [])
    assert torch.equal(load_memory(tmp_path / "a", model).memory.cache[1][1], memory.cache[1][1])


def test_a_memory_belongs_to_a_base_model_in_whichever_precision(tmp_path):
    """Saved under a cast, it is read with one and without; never is another type a damage."""
    save_stack(stacked(), tmp_path / "stack")
    one = Session(load_stack(tmp_path / "stack").to(torch.bfloat16), tmp_path / "mine")
    one.learn(ids(30))
    one.save()
    save_stack(one.model, tmp_path / "cast")
    assert load_stack(tmp_path / "cast").base.dtype == torch.bfloat16
    for folder, dtype in (("stack", torch.bfloat16), ("stack", None), ("cast", None)):
        model = load_stack(tmp_path / folder).to(dtype)
        two = Session(model, tmp_path / "mine")
        assert two.memory.levels[0].fast[0].left.dtype == torch.float32
        assert (two.surprise(ids(9)) - one.surprise(ids(9)))[:, 1:].abs().max() < 0.1
        two.learn(ids(20))
    with pytest.raises(ValueError, match=r"in float32, and this one was cast to torch.bfloat16"):
        save_rates(one.model, tmp_path / "stack")

    exact = stack_levels(base().double(), list(LEVELS), window=24)
    exact.fingerprint = (exact.version(), fingerprint(stacked()))
    single = session(stacked(), tmp_path / "single")
    single.learn(ids(30))
    single.save()
    wide = load_memory(tmp_path / "single", exact).memory
    assert wide.levels[0].fast[0].left.dtype == torch.float64
    exact.learn(ids(20), wide)


def test_saves_that_are_killed_leave_the_old_or_the_new_memory(tmp_path):
    assert sum(kill(12, tmp_path / "a")) == 12


def test_damaged_files_are_refused_and_left_alone(tmp_path):
    damage(60, tmp_path)


def test_a_failing_disk_leaves_the_old_memory(tmp_path, monkeypatch):
    one = session(memory=tmp_path / "a")
    one.learn(ids(20))
    one.save()
    kept = sorted((p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir())
    one.learn(ids(20))
    for which in ("tensors", "memory.json"):

        def fail(path, write, which=which, real=store_module.atomic_write):
            if which in str(path):
                raise OSError(28, "no space")
            real(path, write)

        monkeypatch.setattr(store_module, "atomic_write", fail)
        with pytest.raises(OSError, match="no space"):
            one.save()
        monkeypatch.undo()
        now = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
        assert all(now[name] == raw for name, raw in kept)
        assert load_memory(tmp_path / "a", one.model).memory.position == 20
    one.save()
    assert load_memory(tmp_path / "a", one.model).memory.position == 40


def forge(folder, change_body=lambda body: None, change_tensors=lambda tensors: None):
    """Change a memory and give it true checksums again, as an attacker would."""
    body = json.loads((folder / "memory.json").read_bytes())["memory"]
    path = folder / body["tensors"]["file"]
    tensors = load_file(path)
    path.unlink()
    change_tensors(tensors)
    save_file(tensors, folder / "x")
    raw = (folder / "x").read_bytes()
    sha = store_module.hashlib.sha256(raw).hexdigest()
    (folder / "x").rename(folder / f"tensors-{sha[:32]}.safetensors")
    name = f"tensors-{sha[:32]}.safetensors"
    body["tensors"] = {"file": name, "bytes": len(raw), "sha256": sha}
    change_body(body)
    (folder / "memory.json").write_bytes(store_module._to_json(body))


FORGERIES = {
    "nan": (None, lambda t: t["levels.0.fast.0.left"].fill_(float("nan")), "not finite"),
    "shape": (None, lambda t: t.update({"levels.0.fast.0.left": torch.zeros(1, 2, 2)}), "2, 2"),
    "type": (None, lambda t: t.update(context=t["context"].float()), "float32"),
    "missing": (None, lambda t: t.pop("levels.1.seen"), "levels.1.seen"),
    "more": (None, lambda t: t.update(more=torch.zeros(1)), "no place in a memory"),
    "token": (None, lambda t: t["context"].fill_(999), "vocabulary"),
    "cache": (None, lambda t: [t.pop(k) for k in list(t) if "cache" in k], "context"),
    "position": (lambda b: b.update(position=5000), None, "position 5000"),
    "negative": (lambda b: b.update(position=-1), None, "position=-1"),
    "no number": (lambda b: b.update(position=True), None, "position=True"),
    "elsewhere": (lambda b: b["tensors"].update(file="../../x"), None, "names the file"),
    "version": (lambda b: b.update(version=2), None, "this nestlearn reads"),
    "format": (lambda b: b.update(format="pickle"), None, "this nestlearn reads"),
    "history": (lambda b: b.update(history="x"), None, "damaged"),
    "no base": (lambda b: b.pop("base"), None, "damaged"),
    "no entry": (lambda b: b.update(tensors={}), None, "names the file"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_memories_are_refused(tmp_path, name):
    one = session(memory=tmp_path / "a")
    one.learn(ids(37))
    one.save()
    forge(tmp_path / "a")
    one.load()  # an honest rewriting is read
    memory = one.memory
    body, tensors, message = FORGERIES[name]
    forge(tmp_path / "a", body or (lambda b: None), tensors or (lambda t: None))
    with pytest.raises(ValueError, match=message):
        one.load()
    assert one.memory is memory


def test_stacks_of_when_their_levels_were_a_layers_still_load(tmp_path):
    """With a bound of two sides, and options that did not apply."""
    old = json.loads((Path(__file__).parents[1] / "hf" / "saved" / "stack.json").read_text())
    levels = (
        DeltaLevel(4, lr=0.5, rule="gd", bound=None),
        DeltaLevel(8, lr=0.3, rule="dgd", half_life=20, meta_lr=0.2, bound=0.5),
        DeltaLevel(lr=0.3, rule="dgd"),
    )
    config = StackConfig(levels, (0, 1), variant="nested", window=16)
    assert from_dict(old) == from_dict(to_dict(config)) == config

    model = stack_levels(base(), levels, layers=(0, 1), variant="nested", window=16)
    _, memory = model.learn(ids(39))
    save_memory(tmp_path, model, memory, [])
    body = json.loads((tmp_path / "memory.json").read_text())["memory"]
    (tmp_path / "memory.json").write_bytes(store_module._to_json({**body, "stack": old}))
    assert load_memory(tmp_path, model).memory.position == 39


def test_a_low_rank_stack_of_before_says_that_it_learns_faster_now(tmp_path):
    save_stack(stacked(rank=2), tmp_path / "stack")
    file = tmp_path / "stack" / "stack.json"
    body = json.loads(file.read_text())
    del body["stack"]["cache_dtype"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_stack(tmp_path / "stack")
    file.write_text(json.dumps(body))
    with pytest.warns(UserWarning, match="step sizes of full deltas"):
        assert load_stack(tmp_path / "stack").config.rank == 2


def test_a_batch_is_not_one_memory(tmp_path):
    model = stacked()
    with pytest.raises(ValueError, match="a memory of 2 streams"):
        save_memory(tmp_path, model, model.init_memory(2), [])


def test_a_memory_is_deleted_and_nothing_else(tmp_path):
    folder, link = tmp_path / "a", tmp_path / "link"
    one = session(memory=folder)
    one.learn(ids(20))
    one.save()
    size = sum(path.stat().st_size for path in folder.iterdir())
    link.symlink_to(folder)
    (folder / "points" / "000001").mkdir(parents=True)
    (folder / "points" / "000001" / "memory.json").hardlink_to(folder / "memory.json")
    (folder / "points" / "away").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is a link, no memory"):
        delete_memory(link)
    with pytest.raises(FileNotFoundError, match=r"no memory in .*kept"):
        delete_memory(tmp_path / "kept")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'mine\.txt', no part of a memory"):
        delete_memory(folder)
    (folder / "mine.txt").unlink()
    (folder / "memory.json").write_text("damaged")  # and goes all the same
    assert 0 < delete_memory(folder) <= 2 * size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link"]
    assert (tmp_path / "kept" / "mine.txt").read_text() == "mine"


def test_what_a_memory_is_can_be_read_without_the_model(tmp_path):
    one = session(memory=tmp_path / "a")
    one.learn(ids(37), source="a book")
    one.save()
    told = describe(tmp_path / "a")
    assert told["position"] == 37
    assert told["writes"] == [9, 2]
    assert told["bytes"] == one.bytes
    assert told["history"][0]["source"] == "a book"
    with pytest.raises(FileNotFoundError, match="no memory"):
        describe(tmp_path / "b")
