"""Level stacking: the identity, one level's update by hand, periods, streams, rows."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from stacks import FAMILIES, tiny, tokens
from torch import nn

from nestlearn import DeltaLevel, Level, state
from nestlearn.hf import deltas
from nestlearn.hf.cache import CACHE
from nestlearn.hf.learning import unroll
from nestlearn.hf.lending import kernel
from nestlearn.hf.stack import stack_levels, unstack

LEVELS = [DeltaLevel(4, lr=0.5, rule="gd"), DeltaLevel(12, lr=0.2, rule="momentum")]
DGD = [DeltaLevel(4, lr=0.3, rule="dgd"), DeltaLevel(8, lr=0.3, rule="dgd")]
# Every configuration that reads or writes differently; the laws below hold for each.
CONFIGURATIONS = {
    "sequential": {},
    "nested": {"variant": "nested"},
    "independent": {"variant": "independent"},
    "dgd": {
        "levels": [
            DeltaLevel(4, lr=0.5, rule="dgd"), DeltaLevel(12, lr=0.2, half_life=20, rule="dgd"),
        ],
    },
    "depth": {"spread": "depth"},
    "depth-nested": {"spread": "depth", "variant": "nested"},
    "rank": {"rank": 3},
    "rank-nested-dgd": {"rank": 3, "variant": "nested", "levels": DGD},
    "local": {"objective": "local"},
    "skip": {"objective": "skip", "learns": "out"},
    "rank-skip-dgd": {
        "objective": "skip", "learns": "out", "rank": 3, "levels": DGD,
    },
    "one-layer": {"layers": [1]},
    "long-chunk": {
        "levels": [DeltaLevel(100, lr=0.5, rule="dgd"), DeltaLevel(200, lr=0.1, rule="dgd")],
    },
}  # fmt: skip


def stacked(model=None, levels=LEVELS, window=16, **options):
    return stack_levels(tiny() if model is None else model, levels, window=window, **options)


def tensors(tree):
    return [(path, leaf) for path, leaf in state.leaves(tree) if isinstance(leaf, torch.Tensor)]


def writes(memory, row=0):
    return [int(level.writes[row]) for level in memory.levels]


def assert_close(a, b, tolerance=1e-6):
    for (path, x), (_, y) in zip(tensors(a), tensors(b), strict=True):
        assert x.shape == y.shape, path
        assert x.numel() == 0 or (x - y).abs().max() <= tolerance * max(1, x.abs().max()), path


# --------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_size_of_zero_is_the_pretrained_model(family, dtype):
    model, ids = tiny(family, dtype), tokens(2, 20)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    with torch.no_grad():
        before = model(ids).logits
        made = {cache: model.generate(ids, use_cache=cache, **options) for cache in (True, False)}
    names = list(model.state_dict())
    model = stack_levels(
        model, [DeltaLevel(4, lr=0.0, rule="dgd"), DeltaLevel(8, lr=0.0, rule="dgd"), DeltaLevel()]
    )
    losses, memory = model.learn(ids)
    with torch.no_grad():
        assert torch.equal(model(ids, memory).logits, before)
    for cache in (True, False):
        again = model.generate(ids, memory, use_cache=cache, **options)
        assert torch.equal(again.sequences, made[cache].sequences)
        assert all(map(torch.equal, again.logits, made[cache].logits))
    expected = F.cross_entropy(before[:, :-1].mT.float(), ids[:, 1:], reduction="none")
    assert (losses[:, 1:] - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.2)
    assert losses[:, 0].isnan().all()
    model.learn(tokens(2, 9))
    base = unstack(model)
    assert list(base.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_leaves_the_base_model_as_it_was(family):
    model, ids = tiny(family), tokens(1, 20)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    logits = model(ids).logits
    model = stacked(model)
    _, memory = model.learn(ids)
    assert writes(memory) == [5, 1]
    assert not torch.equal(model(ids, memory).logits, logits)
    assert torch.equal(model(ids).logits, logits)  # no memory: the base model
    assert all(torch.equal(w, before[name]) for name, w in model.base.state_dict().items())
    base = unstack(model)
    assert type(base.get_submodule(model.blocks[0].name)).__name__.endswith("MLP")
    assert {type(layer) for layer in model.layers} <= {nn.Linear, type(model.layers[0])}
    assert torch.equal(base(ids).logits, logits)
    for use in (lambda: unstack(model), lambda: model(ids, memory), lambda: model.learn(ids)):
        with pytest.raises(ValueError, match="the model was unstacked"):
            use()


# ------------------------------------------------------------------------------ one update


def test_an_update_is_sgd_on_the_same_tokens():
    ids = tokens(1, 24)
    model = stack_levels(tiny(), [DeltaLevel(8, lr=0.7, rule="gd", bound=None)])
    losses, memory = model.learn(ids)

    hand, losses_by_hand = tiny(), []
    weights = [p for name, p in hand.named_parameters() if ".mlp." in name]
    past = None
    for a, b in ((0, 8), (8, 16), (16, 24)):
        seen = ids[:, max(a - 1, 0) : b - 1]
        out = hand(seen, **{CACHE: past}, use_cache=True)
        past = out[CACHE]
        for layer in past.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        loss = F.cross_entropy(out.logits.mT, ids[:, b - seen.shape[1] : b], reduction="none")
        losses_by_hand.append(loss.detach())
        for w, g in zip(weights, torch.autograd.grad(loss.mean(), weights)):
            w.data -= 0.7 * g
    assert (losses[:, 1:] - torch.cat(losses_by_hand, 1)).abs().max() < 1e-5
    deltas = {id(layer): d.left[0] for layer, d in zip(model.layers, memory.levels[0].fast)}
    for name, layer in unstack(model).named_modules():
        if id(layer) in deltas:
            moved = hand.get_submodule(name).weight - layer.weight
            assert (deltas[id(layer)] - moved).abs().max() < 1e-6
            assert moved.abs().max() > 1e-3


def test_a_slow_level_writes_the_mean_gradient_of_its_whole_chunk():
    """Two levels that keep apart: the slow one's step is the mean over what the fast one saw."""
    ids = tokens(1, 12)
    model = stacked(levels=[DeltaLevel(4, lr=0.5, rule="gd"), DeltaLevel(12, lr=0.2, rule="gd")],
                    variant="independent")  # fmt: skip
    seen, gathered = None, None
    for a in (0, 4, 8):
        before = seen
        _, seen = model.learn(ids[:, a : a + 4], seen)
        old = 0 if before is None else before.levels[0].fast[0].left
        gradient = (old - seen.levels[0].fast[0].left) / 0.5  # the mean over the piece
        tokens_in = 3 if a == 0 else 4
        gathered = tokens_in * gradient + (0 if gathered is None else gathered)
    assert (seen.levels[1].fast[0].left + 0.2 * gathered / 11).abs().max() < 1e-6


def test_delta_gradient_descent_on_one_token_is_equation_57s_retention():
    model = stacked(levels=[DeltaLevel(1, lr=0.3, rule="dgd", bound=None)])
    plain = stacked(levels=[DeltaLevel(1, lr=0.3, rule="gd", bound=None)])
    ids = tokens(1, 5)
    _, memory = model.learn(ids)
    x = {}
    hook = model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: x.update(x=args[0]))
    for each in (model, plain):
        each.after = each.learn(tokens(1, 1, seed=9), memory)[1].levels[0].fast[0].left[0]
    hook.remove()
    x, old = x["x"][0, -1], memory.levels[0].fast[0].left[0]
    eta = 0.3 / (1 + 0.3 * x @ x)
    assert (model.after - (plain.after - eta * torch.outer(old @ x, x))).abs().max() < 1e-6


def test_momentum_and_half_life_by_hand():
    ids, lr = tokens(1, 12), 0.3
    model = stacked(levels=[DeltaLevel(4, lr=lr, rule="momentum", half_life=8)])
    seen, delta, speed = None, 0, 0
    for a in (0, 4, 8):
        fresh = stacked(levels=[DeltaLevel(4, lr=lr, rule="gd", bound=None)])
        _, alone = fresh.learn(ids[:, a : a + 4], seen)
        gradient = (delta - alone.levels[0].fast[0].left) / lr
        speed = 0.9 * speed - lr * gradient
        delta = 0.5**0.5 * (delta + speed)
        _, seen = model.learn(ids[:, a : a + 4], seen)
        assert (seen.levels[0].fast[0].left - delta).abs().max() < 1e-6


def test_consolidation_moves_the_fast_delta_into_the_slow_one():
    ids = tokens(1, 12)
    levels = [DeltaLevel(4, lr=0.5, rule="gd"), DeltaLevel(12, lr=0.0, rule="dgd")]
    apart = stacked(levels=levels, variant="independent")
    joined = stacked(levels=levels)
    a, b = apart.learn(ids)[1].levels, joined.learn(ids)[1].levels
    assert b[0].fast == ()
    assert a[1].fast == ()
    assert_close(a[0].fast, b[1].fast)
    assert [int(level.writes) for level in b] == [3, 0]
    low = stacked(levels=levels, rank=6)
    before = low.learn(ids[:, :11])[1].levels[0].fast
    after = low.learn(ids)[1].levels
    assert after[0].fast == ()
    assert before
    assert torch.linalg.matrix_rank(after[1].fast[0].dense()[0]) <= 6


@pytest.mark.parametrize("rule", ["gd", "momentum", "dgd"])
@pytest.mark.parametrize("options", [{}, {"variant": "nested"}, {"objective": "local"}], ids=str)
def test_a_low_rank_that_leaves_nothing_out_is_the_full_delta(rule, options):
    ids, found = tokens(2, 50), []
    levels = [
        DeltaLevel(4, lr=0.5, rule=rule, bound=0.1),
        DeltaLevel(12, lr=0.2, half_life=30, rule="dgd"),
    ]
    for rank in (None, 16):  # the smaller side of every matrix
        base = tiny("gpt2", dtype=torch.float64, attn_implementation="eager")
        model = stacked(base, levels, rank=rank, **options)
        loss, memory = model.learn(ids)
        deltas = [d.dense() for level in memory.levels for d in level.fast]
        found.append((loss.nan_to_num(), deltas))
    (loss, full), (again, low) = found
    assert (loss - again).abs().max() < 1e-9
    assert max(d.norm() for d in full) > 1e-3
    assert max((a - b).abs().max() for a, b in zip(full, low, strict=True)) < 1e-9


def test_a_low_rank_write_is_the_best_approximation_of_the_full_one():
    ids, levels = tokens(2, 12), [DeltaLevel(12, lr=0.5, rule="gd", bound=None)]
    full = stacked(levels=levels).learn(ids)[1].levels[0].fast
    low = stacked(levels=levels, rank=3).learn(ids)[1].levels[0].fast
    for a, b in zip(full, low, strict=True):
        u, s, v = torch.linalg.svd(a.left)
        best = (u[:, :, :3] * s[:, None, :3]) @ v[:, :3]
        assert (b.dense() - a.left).norm() <= 1.001 * (best - a.left).norm()


def test_a_write_looks_at_the_bases_weights_once_and_not_once_a_layer(monkeypatch):
    seen = []
    known = deltas.version_of
    monkeypatch.setattr(deltas, "version_of", lambda some: seen.append(1) or known(some))
    stacked(
        levels=[DeltaLevel(4, lr=0.1, rule="dgd"), DeltaLevel(8, lr=0.1, rule="dgd")], rank=3
    ).learn(tokens(1, 9))
    assert len(seen) == 4  # two writes of one level, one of the other, and what that takes over


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_keys_and_values_are_kept_in_half_the_bytes(kind):
    ids, levels = tokens(2, 40), [DeltaLevel(4, lr=0.1, rule="gd")]
    whole, half = stacked(levels=levels), stacked(levels=levels, cache_dtype=kind)
    assert half.memory_limit()["context"] < 0.7 * whole.memory_limit()["context"]
    (a, memory), (b, _) = half.learn(ids), whole.learn(ids)
    assert all(str(k.dtype) == f"torch.{kind}" for pair in memory.cache for k in pair)
    assert (a - b)[:, 1:].abs().max() < 0.02
    first, memory = half.learn(ids[:, :17])
    second, memory = half.learn(ids[:, 17:], memory)
    assert_close(torch.cat([first, second], 1)[:, 1:], a[:, 1:])
    with pytest.raises(ValueError, match="cache_dtype='int8'"):
        stacked(cache_dtype="int8")


def test_consolidation_alone_changes_nothing_that_is_computed():
    """With plain GD and no bounds the sum of sequential levels is one SGD with both steps."""
    ids = tokens(1, 50)
    levels = [
        DeltaLevel(4, lr=0.3, rule="gd", bound=None),
        DeltaLevel(12, lr=0.2, rule="gd", bound=None),
    ]
    losses = [
        stacked(levels=levels, variant=v).learn(ids)[0] for v in ("sequential", "independent")
    ]
    assert (losses[0] - losses[1])[:, 1:].abs().max() < 1e-4


def test_nested_levels_start_again_from_a_start_value_that_moved():
    ids = tokens(1, 12)
    levels = [DeltaLevel(4, lr=0.5, rule="gd", meta_lr=0.25), DeltaLevel(12, lr=0.0, rule="dgd")]
    nested = stacked(levels=levels, variant="nested").learn(ids)[1].levels[0]
    alone = stacked(levels=levels, variant="independent").learn(ids)[1].levels[0]
    assert (nested.fast[0].left - 0.25 * alone.fast[0].left).abs().max() < 1e-6
    assert torch.equal(nested.fast[0].left, nested.start[0].left)


def test_a_delta_stays_within_its_bound():
    model = stacked(levels=[DeltaLevel(4, lr=0.9, rule="gd", bound=0.01)])
    _, memory = model.learn(tokens(1, 12))
    shares = [d.left.norm() / n for d, n in zip(memory.levels[0].fast, model.norms)]
    assert max(shares) == pytest.approx(0.01, rel=1e-4)
    _, memory = model.learn(tokens(1, 12), drift=0.001)
    shares = [d.left.norm() / n for d, n in zip(memory.levels[0].fast, model.norms)]
    assert max(shares) == pytest.approx(0.001, rel=1e-4)


def test_teaching_the_true_gradient_is_the_outer_objective():
    """The signal of one block, got by backpropagation, makes the block learn what "outer" does."""
    ids, levels = tokens(2, 8), [DeltaLevel(8, lr=0.5, rule="gd", bound=None)]
    model = tiny()
    outputs = []
    mlp = model.get_submodule("model.layers.1.mlp")
    hook = mlp.register_forward_hook(lambda *args: outputs.append(args[2]))
    loss = F.cross_entropy(model(ids[:, :-1]).logits.mT, ids[:, 1:], reduction="sum")
    hook.remove()
    signal = F.pad(torch.autograd.grad(loss, outputs)[0], (0, 0, 1, 0))[:, :, None]
    outer = stacked(model, levels, layers=[1])
    _, expected = outer.learn(ids)
    taught = stacked(unstack(outer), levels, layers=[1], objective="teach")
    _, memory = taught.learn(ids[:, :3], teach=signal[:, :3])
    _, memory = taught.learn(ids[:, 3:], memory, teach=signal[:, 3:])
    assert_close(memory.levels, expected.levels)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_last_block_alone_skip_is_outer(family, rank):
    """Nothing stands above it, so nothing is left out; of the block below something is."""
    ids, levels = tokens(2, 16), [DeltaLevel(8, lr=0.5, rule="gd", bound=None)]
    model, found = tiny(family), {}
    for layers in ([1], [0, 1]):
        for objective in ("outer", "skip"):
            one = stacked(
                model, levels, layers=layers, objective=objective, learns="out", rank=rank
            )
            assert all(len(block.layers) == 1 for block in one.blocks)
            losses, memory = one.learn(ids)
            assert memory.levels[0].fast[0].left.any()
            found[len(layers), objective] = (
                losses[:, 1:],
                [pair.dense() for pair in memory.levels[0].fast],
            )
            model = unstack(one)
    assert_close(found[1, "skip"], found[1, "outer"])
    outer, skip = found[2, "outer"][1], found[2, "skip"][1]
    assert (outer[0] - skip[0]).norm() > 0.1 * outer[0].norm()


def test_skip_reaches_blocks_below_one_that_rests():
    levels = [DeltaLevel(8, lr=0.5, rule="gd"), DeltaLevel()]
    model = stacked(levels=levels, spread="depth", objective="skip", learns="out")
    _, memory = model.learn(tokens(2, 16))
    assert memory.levels[0].fast[0].left.any()
    assert memory.levels[1].fast == ()
    with pytest.raises(ValueError, match="trains no step sizes"):
        unroll(model, tokens(2, 16), graph="full")


# -------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_stream_is_learned_the_same_however_it_is_cut(name):
    model, ids = stacked(**CONFIGURATIONS[name]), tokens(2, 50)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[:, 0] = True
    losses, memory = model.learn(ids, mask=mask)
    for seed in range(2):
        cuts = sorted(random.Random(seed).sample(range(1, 50), 6))
        parts, after = [], None
        for a, b in zip([0, *cuts], [*cuts, 50]):
            part, after = model.learn(ids[:, a:b], after, mask[:, a:b])
            parts.append(part)
        assert (torch.cat(parts, 1) - losses)[:, 1:].abs().max() < 1e-5
        assert_close(after, memory, 0.0)
        assert after.position == 50
    if name != "long-chunk":
        assert writes(memory)[0] == 50 // model.config.levels[0].chunk


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_rows_do_not_know_each_other(name):
    # In float64: what is learned at these step sizes doubles a rounding error every few writes.
    model, ids = stacked(tiny(dtype=torch.float64), **CONFIGURATIONS[name]), tokens(3, 50)
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[1, :10] = False
    losses, memory = model.learn(ids, mask=mask)
    alone = [model.learn(ids[i : i + 1], mask=mask[i : i + 1]) for i in range(3)]
    assert_close(losses[:, 1:], torch.cat([loss for loss, _ in alone])[:, 1:], 1e-9)
    assert_close(memory.levels, state.concat([m.levels for _, m in alone]), 1e-9)
    # Read together: each row its own memory, wherever that stands in its stream.
    _, further = model.learn(tokens(1, 7, seed=5), alone[2][1])
    memories = [alone[0][1], model.init_memory(), further]
    ids = tokens(3, 9, seed=7)
    with torch.no_grad():
        with model.using(memories):
            together = model.base(ids).logits
            doubled = model.base(ids.repeat_interleave(2, 0)).logits
        apart = torch.cat([model(ids[i : i + 1], m).logits for i, m in enumerate(memories)])
    assert (together - apart).abs().max() < 1e-9
    assert (doubled - apart.repeat_interleave(2, 0)).abs().max() < 1e-9


def test_levels_learn_at_exactly_their_periods():
    model = stacked(
        levels=[
            DeltaLevel(3, lr=0.1, rule="dgd"),
            DeltaLevel(6, lr=0.1, rule="dgd"),
            DeltaLevel(18, lr=0.1, rule="dgd"),
            DeltaLevel(),
        ]
    )
    memory, random_ = None, random.Random(0)
    while memory is None or memory.position < 60:
        old = [0, 0, 0, 0] if memory is None else writes(memory)
        length = random_.randint(1, 7)
        _, memory = model.learn(tokens(1, length, seed=random_.random().__hash__()), memory)
        new = writes(memory)
        assert new == [memory.position // 3, memory.position // 6, memory.position // 18, 0]
        assert all(a <= b for a, b in zip(old, new))


def test_nothing_is_learned_from_masked_tokens():
    model, ids = stacked(), tokens(1, 24)
    mask = torch.zeros(1, 24, dtype=torch.bool)
    _losses, memory = model.learn(ids, mask=mask)
    assert writes(memory) == [0, 0]
    assert all(level.fast == () for level in memory.levels)
    mask[:, 13:15] = True
    _, few = model.learn(ids, mask=mask)
    other = ids.clone()
    other[:, 15] = (other[:, 15] + 1) % 40 + 3  # nothing later is learned from
    assert writes(few) == [1, 1]
    assert_close(model.learn(other, mask=mask)[1].levels[1], few.levels[1])
    _, half = model.learn(ids, mask=0.5 * mask)  # a weight's scale does not matter
    assert_close(half.levels[0].fast, few.levels[0].fast)


def test_losses_are_causal():
    model, ids = stacked(), tokens(1, 40)
    losses, _ = model.learn(ids)
    other = ids.clone()
    other[:, 25] = (other[:, 25] - 2) % 45 + 3
    changed, _ = model.learn(other)
    assert torch.equal(losses[:, 1:25], changed[:, 1:25])
    assert not torch.equal(losses[:, 25:], changed[:, 25:])


def test_a_memory_is_data(tmp_path):
    model, ids = stacked(), tokens(2, 30)
    _, memory = model.learn(ids[:, :17])
    state.save(memory, tmp_path / "memory")
    loaded = state.load(tmp_path / "memory", like=memory)
    assert_close(model.learn(ids[:, 17:], loaded)[1], model.learn(ids[:, 17:], memory)[1], 0.0)
    swapped = state.select(memory, [1, 0])
    assert_close(model.learn(ids[[1, 0], 17:], swapped)[1].levels,
                 state.select(model.learn(ids[:, 17:], memory)[1].levels, [1, 0]))  # fmt: skip


@pytest.mark.parametrize("rank", [None, 3])
def test_merge_writes_a_level_into_the_weights(rank):
    model, ids = (
        stacked(
            levels=[DeltaLevel(4, lr=0.5, rule="dgd"), DeltaLevel(8, lr=0.1, rule="dgd")], rank=rank
        ),
        tokens(1, 20),
    )
    _, memory = model.learn(ids)
    with torch.no_grad():
        expected = model(ids, memory).logits
        before = kernel(model.layers[0]).clone()
        rest = model.merge(memory, level=0)
        assert not torch.equal(kernel(model.layers[0]), before)
        assert (model(ids, rest).logits - expected).abs().max() < 1e-5
        model.merge(rest, level=1)
        assert (unstack(model)(ids).logits - expected).abs().max() < 1e-5


def test_a_bfloat16_model_has_deltas_in_float32():
    """Small steps would be lost in bfloat16; what is read is rounded only once."""
    model = stacked(tiny(dtype=torch.bfloat16), [DeltaLevel(4, lr=1e-4, rule="gd")])
    losses, memory = model.learn(tokens(1, 30))
    assert losses.dtype == torch.float32
    delta = memory.levels[0].fast[0].left
    assert delta.dtype == torch.float32
    assert 0 < float(delta.abs().max()) < 1e-3
    assert model.weights(memory)[model.layers[0]].base.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_casts_the_base_model_only(dtype):
    """A stack that is cast is one of a base that was cast before: it learns in its own type."""
    cast, before = stacked(levels=LEVELS).to(dtype), stacked(tiny(dtype=dtype))
    assert cast.base.dtype == dtype
    assert {p.dtype for p in (*cast.lr, *cast.theta, *cast.meta_lr)} == {torch.float32}
    losses, memory = cast.learn(tokens(1, 30))
    expected, _ = before.learn(tokens(1, 30))
    assert losses.dtype == torch.float32
    if dtype != torch.float64:
        assert torch.equal(losses[:, 1:], expected[:, 1:])
    assert {leaf.dtype for path, leaf in tensors(memory.levels) if "writes" not in path} == {
        torch.float32
    } or dtype == torch.float64


def test_a_memory_reads_on_after_a_cast():
    model, ids = stacked(), tokens(1, 40)
    _, memory = model.learn(ids[:, :25])
    assert memory.cache[0][0].dtype == torch.float32
    expected, _ = model.learn(ids[:, 25:], memory)
    losses, memory = model.to(torch.bfloat16).learn(ids[:, 25:], memory)
    assert memory.cache[0][0].dtype == torch.bfloat16
    assert (losses - expected).abs().max() < 0.3


def test_bounds_follow_the_weights_as_they_are():
    model = stacked(levels=[DeltaLevel(4, lr=0.9, rule="gd", bound=0.01)])
    with torch.no_grad():
        model.base.model.layers[0].mlp.gate_proj.weight.mul_(3.0)
    _, memory = model.learn(tokens(1, 12))
    sizes = [kernel(layer).detach().norm() for layer in model.layers]
    shares = [d.left.norm() / n for d, n in zip(memory.levels[0].fast, sizes)]
    assert max(shares) == pytest.approx(0.01, rel=1e-4)
    assert model.norms == pytest.approx([float(n) for n in sizes], rel=1e-5)


def test_learning_is_the_same_in_every_mode():
    """Dropout and gradient checkpointing are a trainer's; no gradient is anybody's."""
    torch.manual_seed(0)
    model, ids = stacked(tiny("gpt2")), tokens(1, 30)
    losses, memory = model.learn(ids)
    said = model.generate(ids, memory, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.base.gradient_checkpointing_enable()
    model.base.train()
    for again in (model.learn(ids)[0], model.learn(ids[:, :20])[0]):
        assert torch.equal(again[:, 1:], losses[:, 1 : again.shape[1]])
    assert torch.equal(model.losses(ids, memory)[:, 1:], model.losses(ids, memory)[:, 1:])
    assert torch.equal(model.generate(ids, memory, max_new_tokens=4, pad_token_id=0), said)
    assert all(module.training for module in model.base.modules())  # as the trainer left it
    with torch.inference_mode():
        rows = ids.clone()
        half, part = model.learn(rows[:, :13])
        state_of_it = model.init_memory()
    assert torch.equal(half[:, 1:], losses[:, 1:13])
    assert torch.equal(model.learn(ids[:, 13:], part)[0], losses[:, 13:])
    assert torch.equal(model.learn(rows, state_of_it)[0][:, 1:], losses[:, 1:])


def test_generating_with_and_without_cache_agree_under_a_memory():
    model = stacked(tiny("gpt2"))
    _, memory = model.learn(tokens(2, 30))
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    made = [model.generate(tokens(2, 5), memory, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*made)


# ---------------------------------------------------------------------------------- refusals


def test_a_layers_level_stands_for_a_delta_level():
    level = Level(8, lr=0.2, rule="gd", half_life=64, bound=(0.5, 3.0))
    config = stack_levels(tiny(), [level, Level(bound=None, half_life=None)]).config
    same = DeltaLevel(8, lr=0.2, rule="gd", half_life=64, bound=3.0)
    assert config.levels == (same, DeltaLevel(lr=0.3, rule="dgd", bound=None))


def test_refusals_name_the_value_and_the_remedy():
    with pytest.raises(TypeError, match=r"str is no model: give AutoModelForCausalLM"):
        stack_levels("gpt2", LEVELS)
    with pytest.raises(ValueError, match=r"no MLP blocks found in Linear.*Llama, Mistral.*GPT-2"):
        stack_levels(nn.Linear(2, 2), LEVELS)
    model = tiny()
    with pytest.raises(ValueError, match="a LlamaForCausalLM is not stacked: give what stack_leve"):
        unstack(model)
    for levels, options, message in (
        ([], {}, "levels is empty"),
        (LEVELS, {"spread": "wide"}, r"spread='wide': use one of"),
        (LEVELS, {"variant": "x"}, "variant='x'"),
        (LEVELS, {"objective": "x"}, "objective='x'"),
        (LEVELS, {"learns": "x"}, "learns='x'"),
        (LEVELS, {"objective": "skip"}, 'give learns="out"'),
        (LEVELS, {"objective": "local", "learns": "out"}, 'whole MLPs: give learns="all"'),
        (LEVELS, {"layers": [2]}, r"layers=\[2\]: the model has the blocks 0 to 1"),
        (LEVELS, {"layers": [0, 0]}, "name each block once"),
        (LEVELS, {"rank": 0}, "rank=0"),
        (LEVELS, {"rank": 17}, "rank=17 is more"),
        (LEVELS, {"window": 65}, "window=65: the model has 64 positions"),
        ([DeltaLevel(4), DeltaLevel(6)], {}, "make 6 a larger multiple of 4"),
        ([Level(4, hidden=8)], {}, r"Level\(chunk=4.* has no hidden, give a DeltaLevel"),
        (["fast"], {}, "'fast' is none of a stack, give nestlearn.DeltaLevel"),
        (
            [DeltaLevel(4), DeltaLevel(8), DeltaLevel(16)],
            {"spread": "depth"},
            "3 levels over 2 blocks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            stack_levels(model, levels, **options)
    model = stacked(model)
    with pytest.raises(ValueError, match="stacked already"):
        stacked(model.base)
    _, memory = model.learn(tokens(1, 5))
    for ids, extra, message in (
        (torch.zeros(1, 3), {}, "int64 token ids"),
        (torch.full((1, 3), 48), {}, "the model has 48"),
        (tokens(2, 3), {}, "2 rows for a memory of 1"),
        (tokens(1, 3), {"mask": torch.ones(1, 2)}, r"mask \[1, 2\]"),
        (tokens(1, 3), {"mask": -torch.ones(1, 3)}, "finite weight"),
        (tokens(1, 3), {"drift": 0.0}, "drift=0.0"),
        (tokens(1, 3), {"teach": torch.ones(1)}, "teach"),
    ):
        with pytest.raises(ValueError, match=message):
            model.learn(ids, memory, **extra)
    with pytest.raises(ValueError, match="cannot be dealt"), model.using([memory, memory]):
        model.base(tokens(3, 4))
    warnings.resetwarnings()
