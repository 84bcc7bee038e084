"""With stream = N a row reads N windows in a row, with the model's memory carried on."""

import dataclasses
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from tiny_run import (
    CONFIG,
    Tiny,
    assert_same_weights,
    corpus,
    crash_after,
    crashed,
    run,
    without_time,
)
from torch import nn

from nestlearn import state as tree
from nestlearn.layers import Level
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Continuum, DeltaNet, StaticTitans, Titans
from nestlearn.train import Corpus, TrainConfig, evaluate
from nestlearn.train.carried import Carried
from nestlearn.train.checkpoint import _digest, verify_checkpoint
from nestlearn.train.data import restarts
from nestlearn.train.folder import RunFolder
from nestlearn.train.run import _batch, _Gradients

STREAM = dataclasses.replace(CONFIG, stream=3)
SEVERAL = [(2, 3), (8, 4), (3, 8), (5, 2)]  # (batch, stream)


def hope(**changes) -> HopeLM:
    torch.manual_seed(1)
    levels = [Level(chunk, learns="all", half_life=None) for chunk in (2, 8)]
    own = {"mixer": titans(), "channel": Continuum(tuple(levels))}
    return HopeLM(HopeConfig(32, 8, 1, 2, **{**own, **changes}))


def titans(**changes) -> Titans:
    return Titans(**{"chunk": 4, "half_life": None, **changes})


class Remembering(Tiny):
    """Tiny with a fading sum of what it read, for runs that are to be quick."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(16))

    def init_state(self, batch):
        return {"sum": self.start.expand(batch, 16).clone(), "position": 0}

    def forward(self, ids, state=None):
        state = self.init_state(len(ids)) if state is None else state
        sums = [state["sum"]]
        for x in self.drop(self.embed(ids)).unbind(1):
            sums.append(0.8 * sums[-1] + x)
        logits = self.head(torch.tanh(self.mix(torch.stack(sums[1:], 1))))
        return logits, {"sum": sums[-1], "position": state["position"] + ids.shape[1]}


def unbounded() -> HopeLM:
    """A model whose start values count through the first state alone."""
    free = {"bound": None, "half_life": None}
    levels = (Level(chunk=2, **free), Level(chunk=8, rule="momentum", **free))
    return hope(mixer=titans(bound=None), channel=Continuum(levels))


def stepper(model):
    carried = Carried(model, STREAM)
    return carried, _Gradients(model, STREAM, carried)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------ windows


def test_a_stream_of_one_window_is_what_it_was():
    data = corpus()
    expected = [[83, 307], [236, 25], [255, 370]]  # drawn before there were streams
    for step, offsets in enumerate(expected):
        windows = data.batch(step, 2, 8, seed=3)
        assert torch.equal(windows, data.batch(step, 2, 8, seed=3, stream=1))
        assert windows.tolist() == [data.train[i : i + 9].tolist() for i in offsets]
    assert restarts(5, 4, 1).all()


@pytest.mark.parametrize(("batch", "stream"), SEVERAL)
def test_windows_go_on_where_the_row_was_until_it_starts_anew(batch, stream):
    data = Corpus(torch.arange(1000), torch.arange(30), 1000)
    steps = range(3 * stream + 1)
    windows = [data.batch(step, batch, 8, seed=0, stream=stream) for step in steps]
    anew = [restarts(step, batch, stream) for step in steps]
    starts = []
    for before, now, fresh in zip(windows, windows[1:], anew[1:]):
        assert torch.equal(now - now[:, :1], torch.arange(9).expand(batch, 9))
        assert torch.equal(now[~fresh, 0], before[~fresh, -1])
        assert (now[fresh, 0] != before[fresh, -1]).all()
        starts += now[fresh, 0].tolist()
    assert len(set(starts)) > len(starts) // 2
    assert torch.equal(data.batch(4, batch, 8, seed=0, stream=stream), windows[4])
    assert not torch.equal(data.batch(4, batch, 8, seed=1, stream=stream), windows[4])


@pytest.mark.parametrize(("batch", "stream"), SEVERAL)
def test_rows_start_anew_in_turn(batch, stream):
    assert restarts(0, batch, stream).all()
    counts = torch.stack([restarts(step, batch, stream) for step in range(1, 1 + 2 * stream)])
    assert (counts.sum(0) == 2).all()
    each = counts.sum(1)
    assert batch // stream <= each.min()
    assert each.max() <= -(-batch // stream)


def test_streams_may_begin_later():
    """Until then every window starts anew, of the same text."""
    settings = [dataclasses.replace(STREAM, stream_from=n) for n in (0, 4, 999)]
    logs = [run(None, each, Remembering())[1] for each in settings]
    losses = [[r["loss"] for r in log] for log in logs]
    assert losses[1][:4] == losses[2][:4] != losses[0][:4]
    assert losses[1][4:] != losses[2][4:]
    for wrong in ({"stream_from": -1}, {"stream_from": 4, "stream": 1}):
        with pytest.raises(ValueError, match=r"stream_from=.* more than 1 window"):
            dataclasses.replace(STREAM, **wrong)


def test_every_place_of_a_stream_is_drawn_and_a_short_text_is_refused():
    data = Corpus(torch.arange(27), torch.arange(30), 30)
    rows = data.batch(0, 60, 8, seed=0, stream=3)
    assert set(rows[:20, 0].tolist()) == {0, 1, 2}  # those at the beginning of their stream
    assert int(rows.max()) == 26
    short = Corpus(torch.arange(24), torch.arange(30), 30)
    with pytest.raises(ValueError, match=r"has 24 tokens.* = 3 \* 8 \+ 1 = 25; give more text"):
        short.batch(0, 2, 8, seed=0, stream=3)
    with pytest.raises(ValueError, match=r"stream=0"):
        data.batch(0, 2, 8, seed=0, stream=0)


# ------------------------------------------------------------------------------- what is carried


@pytest.mark.parametrize("make", [hope, unbounded], ids=["bounded", "unbounded"])
def test_a_step_is_that_of_rows_read_one_by_one(make):
    """Against a loop over rows, whose positions go on with the stream."""
    model = make().double()
    data = corpus()
    _, gradients = stepper(model)
    states = [None, None]
    for step in range(6):
        windows, anew = _batch(data, STREAM, step), restarts(step, 2, 3)
        loss = gradients(windows, anew)
        losses = []
        for row in range(2):
            before = None if anew[row] else states[row]
            window = windows[row : row + 1]
            with torch.no_grad():
                logits, states[row] = model(window[:, :-1], before)
            losses.append(F.cross_entropy(logits[0], window[0, 1:]))
        assert float(loss) == pytest.approx(float(sum(losses)) / 2, rel=1e-6)  # float32 loss
        starts = {n: g for n, g in gradients_of(model).items() if ".start." in n}
        assert len(starts) >= 6
        assert all(g.abs().max() > 0 for g in starts.values()), step  # at 1 and 4 no row is fresh


def test_start_values_learn_through_the_carried_state():
    """Their gradient is that of the state, added up over the rows, fresh or not."""
    model = hope(mixer=DeltaNet(4), channel="mlp").double()
    nn.init.normal_(model.blocks[0].mixer.start[0])
    carried, gradients = stepper(model)
    for step in range(4):
        windows, anew = _batch(corpus(), STREAM, step), restarts(step, 2, 3)
        state = tree.tree_map(
            lambda old, new, anew=anew: torch.where(
                anew.view(-1, *[1] * (old.ndim - 1)), new, old
            ).detach(),
            carried.state,
            model.init_state(2),
        )
        memory = state.blocks[0][0].memory
        weights = [w.requires_grad_() for w in (*memory.start, *memory.now)]
        logits, _ = model(windows[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        given = torch.autograd.grad(loss, weights, allow_unused=True)
        expected = sum(g.sum(0) for g in given if g is not None)
        gradients(windows, anew)
        assert expected.abs().max() > 0
        torch.testing.assert_close(
            model.blocks[0].mixer.start[0].grad, expected, rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("poison", [1e30, float("nan")])
def test_a_row_that_starts_anew_takes_nothing_over(poison):
    ends = []
    for value in (None, poison):
        model = hope()
        carried, gradients = stepper(model)
        for step in range(3):
            if step == 2 and value is not None:  # then row 1 starts anew and row 0 goes on
                tree.tree_map(lambda t, value=value: t[1].fill_(value), carried.state)
            anew = restarts(step, 2, 3)
            loss = gradients(_batch(corpus(), STREAM, step), anew)
        assert anew.tolist() == [False, True]
        ends.append((loss, gradients_of(model), carried.state))
    assert torch.equal(ends[0][0], ends[1][0])
    for name, grad in ends[0][1].items():
        assert torch.equal(grad, ends[1][1][name]), name
    for (path, a), (_, b) in zip(tree.leaves(ends[0][2]), tree.leaves(ends[1][2])):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), path


def test_what_is_carried_is_data_of_its_own():
    model = hope()
    carried, gradients = stepper(model)
    tensors = [x for _, x in tree.leaves(carried.state) if isinstance(x, torch.Tensor)]
    assert len({x.data_ptr() for x in tensors}) == len(tensors)
    before = [x.clone() for x in tensors]
    gradients(_batch(corpus(), STREAM, 0), restarts(0, 2, 3))
    after = [x for _, x in tree.leaves(carried.state) if isinstance(x, torch.Tensor)]
    assert all(a is b for a, b in zip(tensors, after))  # a CUDA graph finds them again
    assert not any(x.requires_grad for x in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_carries_the_same():
    logs = []
    for graph in (False, True):
        config = dataclasses.replace(STREAM, device="cuda", cuda_graph=graph)
        logs.append([record["loss"] for record in run(None, config, hope())[1]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole():
    return run(None, STREAM, Remembering())


def stopped(out, step):
    with pytest.raises(RuntimeError, match="crash"):
        run(out, STREAM, Remembering(), on_step=crash_after(step))


def test_it_differs_from_fresh_windows_and_is_evaluated_as_they_are(whole):
    other, log = run(None, CONFIG, Remembering())
    assert log[0]["loss"] != whole[1][0]["loss"]  # other windows
    windows = corpus().val_windows(CONFIG.eval_windows, CONFIG.length)
    assert evaluate(whole[0], windows, 2)[0] == whole[1][-1]["val_loss"]
    assert other.training == whole[0].training


@pytest.mark.parametrize("step", [2, 4, 8, 10])
def test_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path, whole, step):
    stopped(tmp_path, step)
    if step >= 4:
        folder = tmp_path / f"checkpoints/step-{step // 4 * 4:06d}"
        assert "carried.safetensors" in verify_checkpoint(folder)["files"]
    model, log = run(tmp_path, STREAM, Remembering(), resume=True)
    assert_same_weights(model, whole[0])
    assert without_time(log) == without_time(whole[1])


def test_a_memory_is_copied_before_the_run_goes_on(tmp_path, whole, monkeypatch):
    """The files of step 4 are made after step 6, and hold step 4."""
    held, publish = threading.Event(), RunFolder._publish

    def slow(*given):
        assert held.wait(60)
        publish(*given)

    def on_step(record):
        if record["step"] == 6:
            held.set()
            raise RuntimeError("crash")

    monkeypatch.setattr(RunFolder, "_publish", slow)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, STREAM, Remembering(), on_step=on_step)
    model, log = run(tmp_path, STREAM, Remembering(), resume=True)
    assert_same_weights(model, whole[0])
    assert without_time(log) == without_time(whole[1])


def test_the_resumed_memory_is_the_saved_one(tmp_path, whole):
    """Step 9 (the ninth) goes on with rows that were under way at step 8."""
    assert not restarts(8, 2, 3).all()
    stopped(tmp_path, 8)
    path = tmp_path / "checkpoints/step-000008/carried.safetensors"
    saved = tree.load(path, like=Remembering().init_state(2))
    fresh = Remembering().init_state(2)
    pairs = zip(tree.leaves(saved), tree.leaves(fresh))
    assert any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_a_damaged_memory_falls_back_to_the_checkpoint_before(tmp_path, whole, caplog):
    stopped(tmp_path, 9)
    path = tmp_path / "checkpoints/step-000008/carried.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    model, _ = run(tmp_path, STREAM, Remembering(), resume=True)
    assert "carried.safetensors has changed" in caplog.text
    assert_same_weights(model, whole[0])


def test_another_stream_is_refused_and_an_older_run_goes_on(tmp_path):
    crashed(tmp_path, 5)
    with pytest.raises(ValueError, match=r"train\.stream was 1, now 3"):
        run(tmp_path, STREAM, Remembering(), resume=True)
    path = tmp_path / "checkpoints/step-000004"
    assert set(verify_checkpoint(path)["files"]) == {"model.safetensors", "optimizer.safetensors"}
    meta = json.loads((path / "meta.json").read_text())
    del meta["train"]["stream"], meta["sha256"]  # as an older version wrote it
    (path / "meta.json").write_text(json.dumps({**meta, "sha256": _digest(meta)}))
    with pytest.raises(ValueError, match=r"train\.stream was 1, now 3"):
        run(tmp_path, STREAM, Remembering(), resume=True)
    assert run(tmp_path, resume=True)[1][-1]["step"] == 12


def test_an_older_run_without_a_checkpoint_begins_again(tmp_path):
    crashed(tmp_path, 2)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["train"]["stream"]
    path.write_text(json.dumps(settings))
    assert run(tmp_path, resume=True)[1][-1]["step"] == 12


# ------------------------------------------------------------------------------------ refusals


def refused(tmp_path, match, model, config=STREAM, **kwargs):
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "run", config, model, **kwargs)
    assert not (tmp_path / "run").exists()  # before anything is written


def test_refusals_name_the_value_and_the_remedy(tmp_path):
    attention = hope(mixer="attention")
    refused(tmp_path, r"stream=3: .* grows with the stream .*\.k has.* stream=1", attention)
    refused(tmp_path, r"stream=3: Tiny has no init_state.*stream=1", Tiny())
    short = Corpus(torch.arange(24), torch.arange(30), 32)
    refused(tmp_path, r"24 tokens.* = 25; give more text", hope(), data=short)
    with pytest.raises(ValueError, match="stream=0: choose an integer of 1 or more"):
        TrainConfig(stream=0)


def test_a_length_that_cuts_a_chunk_or_a_bound_is_refused(tmp_path):
    for changes, period in [
        ({"mixer": titans(chunk=3)}, 24),
        ({"mixer": titans(projection_chunk=16)}, 16),
        ({"mixer": titans(half_life=2048)}, 512),
        ({"mixer": titans(half_life=48)}, 24),
        ({"channel": Continuum((Level(8, half_life=None),))}, 512),  # its bound is as seldom
        ({"channel": Continuum((Level(8, bound=None),))}, 512),  # and so is its fade
        ({"mixer": StaticTitans(16), "channel": "mlp"}, 16),
        ({"mixer": DeltaNet(5), "channel": "mlp"}, 5),
    ]:
        refused(tmp_path, rf"length=8: with stream=3 give a multiple of {period},", hope(**changes))
    # a state of no columns, but one that does not grow
    Carried(hope(mixer=titans(conv=1)), STREAM)
