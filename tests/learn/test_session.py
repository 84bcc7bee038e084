"""Sessions: learning, guards, memories as wholes, across processes and interleavings."""

import json
import math

import pytest
import torch
from interleave import run as interleave
from people import Letters, base, ids, session, stacked

from nestlearn import DeltaLevel, Session, state, unstack
from servers import elsewhere

TEXT = "the key is under the mat. " * 6


def same(a, b):
    pairs = zip(state.leaves(a), state.leaves(b), strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for (_, x), (_, y) in pairs
    )


def test_what_was_learned_is_known_afterwards():
    one = session()
    before = one.perplexity(TEXT)
    for _ in range(6):
        learned = one.learn(TEXT, source="note")
    assert one.perplexity(TEXT) < 0.7 * before
    assert learned.tokens == len(TEXT)
    assert learned.loss < math.log(before)
    surprise = one.surprise(TEXT)
    assert surprise.shape == (1, len(TEXT) + 1)
    assert surprise[0, 0].isnan()
    assert math.exp(surprise[0, 1:].mean()) == pytest.approx(one.perplexity(TEXT))
    assert one.history[0]["source"] == "note"
    assert one.history[1]["begin"] == len(TEXT) + 1
    said = one.generate("the key", max_new_tokens=5, do_sample=False)
    assert len(said) == 5
    made = one.generate(ids(3), max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 5)


def test_generating_and_measuring_change_nothing():
    one = session()
    one.learn(TEXT)
    before = one.memory
    made = [one.generate("the", max_new_tokens=6, do_sample=False) for _ in range(2)]
    one.perplexity(TEXT)
    one.diff(session(one.model))
    assert one.memory is before
    assert made[0] == made[1]
    fresh = session(stacked())
    fresh.memory = before
    assert fresh.generate("the", max_new_tokens=6, do_sample=False) == made[0]


def remembered(memory):
    """By a session of its own."""
    one = session(memory=memory)
    return one.perplexity("the key is under the mat"), one.memory.position


def test_a_new_process_remembers(tmp_path):
    one = session(memory=tmp_path / "alice")
    one.learn(TEXT)
    one.save()
    loss, position = elsewhere(remembered, tmp_path / "alice")
    assert loss == pytest.approx(one.perplexity("the key is under the mat"), rel=1e-6)
    assert position == one.memory.position


def test_a_loaded_memory_goes_on_bit_for_bit(tmp_path):
    one = session(memory=tmp_path / "a")
    one.learn(ids(21))
    one.save()
    two = session(memory=tmp_path / "a")
    for each in (one, two):
        each.learn(ids(30, seed=1))
    assert same(one.memory, two.memory)
    two.load()
    assert two.memory.position == 21
    assert [record["what"] for record in two.history] == ["learn"]


def test_forks_go_their_own_ways(tmp_path):
    one = session(memory=tmp_path / "a")
    one.learn(ids(20))
    twin = one.fork(tmp_path / "b")
    assert same(one.memory, twin.memory)
    twin.learn(ids(20, seed=2))
    assert one.memory.position == 20
    assert [(d.level, d.distance > 0) for d in one.diff(twin)] == [(0, True), (1, True)]
    assert all(d.distance == 0 for d in one.diff(one))
    assert one.diff(tmp_path / "b")[0].distance == 0
    with pytest.raises(ValueError, match="this session has not read"):
        one.fork(tmp_path / "b")


def test_reset_forgets_one_level_or_all():
    one = session()
    one.learn(ids(40))
    both = one.memory
    one.reset(level=0)
    assert one.memory.levels[0].fast == ()
    assert one.memory.levels[1] is both.levels[1]
    assert one.memory.position == 40
    one.reset()
    assert same(one.memory, one.model.init_memory(1))
    with pytest.raises(ValueError, match="level=2: the model has the levels 0 to 1"):
        one.reset(level=2)


def test_merge_keeps_what_the_model_says_and_parts_the_memories(tmp_path):
    model = stacked()
    one, other = session(model, tmp_path / "a"), session(model, tmp_path / "b")
    for each in (one, other):
        each.learn(ids(40))
        each.save()
    said = one.surprise(TEXT)
    one.merge(0)
    one.merge(1)
    assert (one.surprise(TEXT) - said)[:, 1:].abs().max() < 1e-4
    one.save()
    with pytest.raises(ValueError, match="base model has changed"):
        other.save()
    with pytest.raises(ValueError, match="memory of another base model"):
        other.load()
    fresh = session(model, tmp_path / "a")
    assert (fresh.surprise(TEXT) - said)[:, 1:].abs().max() < 1e-4


def test_another_models_memory_is_refused(tmp_path):
    one = session(memory=tmp_path / "a")
    one.learn(ids(20))
    one.save()
    with pytest.raises(ValueError, match="memory of another base model"):
        session(stacked(seed=1), tmp_path / "a")
    with pytest.raises(ValueError, match="another stack: levels"):
        session(
            stacked(levels=[DeltaLevel(8, lr=0.3, rule="dgd"), DeltaLevel(16, lr=0.3, rule="dgd")]),
            tmp_path / "a",
        )


def test_a_base_model_that_was_trained_is_another_one(tmp_path):
    """Whichever way its weights are written; what was not learned on them is not theirs."""
    model = stacked()
    one = session(model, tmp_path / "mine")
    one.learn(ids(30))
    one.save()
    one.generate(ids(4), max_new_tokens=1)
    with torch.no_grad():
        model.base.model.layers[0].mlp.up_proj.weight.data.add_(0.05)
    for use in (one.save, lambda: one.learn(ids(4)), lambda: one.merge(0)):
        with pytest.raises(ValueError, match="base model has changed under this session"):
            use()
    with pytest.raises(ValueError, match="memory of another base model"):
        session(model, tmp_path / "mine")
    ready, fresh = one._weights(), model.weights(one.memory)
    assert all(torch.equal(ready[layer].base, fresh[layer].base) for layer in fresh)

    two = session(model, tmp_path / "new")
    with torch.no_grad():
        model.base.model.embed_tokens.weight.add_(0.05)  # nothing was learned yet
    two.learn(ids(30))
    two.save()
    again = stacked()
    again.base.load_state_dict(model.base.state_dict())
    assert session(again, tmp_path / "new").memory.position == 30
    with pytest.raises(ValueError, match="memory of another base model"):
        session(stacked(), tmp_path / "new")


def test_two_processes_cannot_overwrite_each_other(tmp_path):
    one, two = session(memory=tmp_path / "a"), session(memory=tmp_path / "a")
    one.learn(ids(20))
    one.save()
    one.save()
    two.learn(ids(20))
    with pytest.raises(ValueError, match="holds a memory that this session has not read"):
        two.save()
    two.load()
    two.save()


# -------------------------------------------------------------------------------------- guards


def test_learning_that_harms_the_held_out_text_is_taken_back():
    model = stacked(levels=[DeltaLevel(4, lr=0.9, rule="gd")])
    one = session(model, held_out="a quick brown fox jumps over it.", tolerance=0.01)
    before = one.memory
    report = one.learn("qzx." * 80)
    assert "held-out loss rose to" in report.rolled_back
    assert one.memory is before
    assert one.history[0]["rolled_back"] == report.rolled_back
    free = session(model, held_out="a quick brown fox jumps over it.", tolerance=100)
    assert free.learn("qzx." * 80).rolled_back is None
    assert free.memory is not before


def test_infinite_weights_are_taken_back():
    one = session(stacked(levels=[DeltaLevel(4, lr=0.9, rule="gd", bound=None)]))
    with torch.no_grad():
        one.model.lr[0].fill_(float("inf"))
    assert "became infinite" in one.learn(ids(20)).rolled_back
    assert one.memory.position == 0


def test_drift_is_bounded():
    one = session(drift=0.01)
    one.learn(ids(60))
    for i, level in enumerate(one.memory.levels):
        for j, delta in zip(one.model.owned[i], level.fast):
            assert float(delta.left.norm()) <= 0.01 * one.model.norms[j] * 1.0001


def test_a_read_only_session_changes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no memory in"):
        session(memory=tmp_path / "a", read_only=True)
    one = session(memory=tmp_path / "a")
    one.learn(ids(20))
    one.save()
    reader = session(memory=tmp_path / "a", read_only=True)
    assert reader.perplexity(TEXT) == one.perplexity(TEXT)
    for change in (
        lambda: reader.learn(TEXT), reader.save, reader.reset, lambda: reader.merge(0),
        lambda: reader.chat("hello"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="read-only"):
            change()


# ---------------------------------------------------------------------------------------- chat


def test_chat_learns_from_the_chosen_side():
    options = {"max_new_tokens": 6, "do_sample": False}
    learned = {}
    for side in ("user", "assistant", "both", "nothing"):
        one = session()
        one.chat("where is the key", learn=side, **options)
        reply = one.chat("say it again", learn=side, **options)
        assert [turn["role"] for turn in one.turns] == ["user", "assistant"] * 2
        assert one.turns[3]["content"] == reply
        learned[side] = [record["learned"] for record in one.history]
    assert learned["nothing"] == []
    assert learned["assistant"] == [6, 6]
    assert learned["user"][0] == len("User: where is the key\nAssistant:")
    assert learned["user"][1] == len("User: say it again\nAssistant:")
    assert learned["both"][1] == 6 + learned["user"][1]
    with pytest.raises(ValueError, match="learn='all'"):
        session().chat("hello", learn="all")


# ---------------------------------------------------------------------------------- many at once


def test_two_users_in_one_batch_are_two_separate_runs():
    model = stacked()
    users = [session(model), session(model)]
    users[0].learn(ids(50))
    users[1].learn(ids(23, seed=1))
    prompts = torch.cat([ids(9, seed=2), ids(9, seed=3)])
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        with model.using([user.memory for user in users]):
            logits = model.base(prompts).logits
            made = model.base.generate(prompts, **options)[:, 9:]
        for row, user in enumerate(users):
            alone = model(prompts[row : row + 1], user.memory).logits
            assert (logits[row] - alone[0]).abs().max() < 1e-6 * alone.abs().max()
            assert torch.equal(made[row], user.generate(prompts[row : row + 1], **options)[0])


def test_interleavings_equal_the_sequential_result(tmp_path):
    for seed in range(8):
        interleave(seed, tmp_path / str(seed))


# ------------------------------------------------------------------------------------- refusals


def test_refusals():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no levels"):
        Session(base())
    plain = Session(stacked())
    with pytest.raises(ValueError, match="needs a tokenizer"):
        plain.learn("text")
    with pytest.raises(ValueError, match=r"pass int64 ids \[1, T\]"):
        plain.learn(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="give two or more"):
        plain.perplexity(ids(1))
    with pytest.raises(ValueError, match="no folder"):
        plain.save()
    with pytest.raises(ValueError, match="tolerance=-1"):
        session(held_out=TEXT, tolerance=-1)
    with pytest.raises(ValueError, match="name is empty"):
        session(memory="")
    with pytest.raises(ValueError, match="memory=3: give a name, a folder's path, or None"):
        session(memory=3)


def test_the_history_is_json(tmp_path):
    one = session(memory=tmp_path / "a")
    one.learn(TEXT, source="a letter")
    one.learn("x", source="one token")
    json.dumps(one.history)
    one.history.clear()
    assert len(one.history) == 2
    assert set(one.bytes) == {"level 0", "level 1", "context"}
    assert one.bytes["level 0"] == 2 * 3 * 16 * 24 * 4 + 12
    unstack(one.model)
    assert isinstance(one.tokenizer, Letters)
