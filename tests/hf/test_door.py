"""What is let in: every MLP that is stacked runs and gets its gradient, or the model is refused."""

import pytest
import torch
import torch.nn.functional as F
from stacks import VOCAB, tiny, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from nestlearn import DeltaLevel
from nestlearn.hf import plan
from nestlearn.hf.stack import stack_levels, unstack
from nestlearn.learn.store import sizes

LEVELS = [DeltaLevel(4, lr=0.5, rule="gd")]
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
UNFIT = {
    "some layers of experts": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}, "experts of"),
    "all of experts": ("qwen3_moe", EXPERTS, r"layers.0.mlp.experts of .* mixture of experts"),
    "hybrid": ("qwen3_5_text", {**LINEAR, "layer_types": ["full_attention", "linear_attention"]},
               "layers of the type 'linear_attention'"),
}  # fmt: skip


def made(kind, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **options}))


@pytest.mark.parametrize("name", UNFIT)
def test_a_family_of_which_only_a_part_could_learn_is_refused(name):
    kind, options, message = UNFIT[name]
    model = made(kind, **options)
    model.train()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        stack_levels(model, LEVELS)
    assert [type(module) for module in model.modules()] == classes
    assert model.training


@pytest.mark.parametrize("options", [{"rule": "gd"}, {"rule": "dgd"}], ids=["gd", "dgd"])
def test_of_a_model_that_sees_the_language_part_learns(options):
    text = {**SMALL, "model_type": "gemma3_text", "sliding_window": 8}
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16,
        "num_attention_heads": 4, "patch_size": 8, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, image_token_index=47,
        boi_token_index=45, eoi_token_index=46, mm_tokens_per_image=4,
    )  # fmt: skip
    model = stack_levels(Gemma3ForConditionalGeneration(config), [DeltaLevel(4, lr=0.5, **options)])
    assert len(model.blocks) == 2
    assert not any("vision" in path for path in model.paths.values())
    _, memory = model.learn(tokens(1, 12))
    assert all(bool(delta.left.any()) for delta in memory.levels[0].fast)


def test_a_forward_put_over_a_layers_own_is_refused_by_name():
    """As accelerate's hooks do it, for device maps and offloading."""
    model = tiny()
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has a forward .*device_map"):
        stack_levels(model, LEVELS)
    del layer.forward
    stacked = stack_levels(model, LEVELS)
    _, expected = stacked.learn(tokens(1, 12))
    old = layer.forward
    layer.forward = lambda x: old(x)  # put over it later it calls what learns
    _, memory = stacked.learn(tokens(1, 12))
    assert torch.equal(memory.levels[0].fast[-2].left, expected.levels[0].fast[-2].left)
    with pytest.raises(ValueError, match="remove that hook first"):
        unstack(stacked)
    del layer.forward
    assert type(unstack(stacked).model.layers[1].mlp.up_proj) is nn.Linear


class Quantised(torch.Tensor):
    """Weights that only look like numbers."""


def test_weights_that_are_no_plain_numbers_are_refused():
    model = tiny()
    mlp = model.model.layers[0].mlp
    for wrong, message in (
        (nn.Parameter(torch.zeros(24, 16).as_subclass(Quantised), False), "weight is Quantised"),
        (nn.Parameter(torch.zeros(24, 16, dtype=torch.float8_e4m3fn), False), "float8_e4m3fn"),
        (nn.Parameter(torch.zeros(24, 16, device="meta")), r"lies on cpu, meta"),
    ):
        mlp.gate_proj.weight = wrong
        with pytest.raises(ValueError, match=message):
            stack_levels(model, LEVELS)
    mlp.gate_proj = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24, bias=False))
    with pytest.raises(ValueError, match="ParametrizedLinear, not a plain linear layer"):
        stack_levels(model, LEVELS)
    model = tiny()
    model.model.layers[0].self_attn.q_proj.lora_A = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="carries an adapter: merge_and_unload"):
        stack_levels(model, LEVELS)
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(ValueError, match=r"made under torch.inference_mode"):
        stack_levels(model, LEVELS)


def past_the_layers(mlp):
    """The MLP as a fused kernel computes it: from the weights, without calling the layers."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return lambda x: F.linear(
        F.silu(F.linear(x, gate.weight)) * F.linear(x, up.weight), down.weight
    )


def test_a_layer_without_effect_is_an_error_before_and_after_stacking():
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.forward = past_the_layers(mlp)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj did not run"):
        stack_levels(model, LEVELS)
    assert type(mlp.gate_proj) is nn.Linear  # given back
    del mlp.forward
    block = model.model.layers[1]
    block.forward = torch.no_grad()(block.forward)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj gets no gradient"):
        stack_levels(model, LEVELS)
    del block.forward

    stacked = stack_levels(model, LEVELS)
    _, memory = stacked.learn(tokens(1, 12))
    block.forward = torch.no_grad()(block.forward)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj gets no gradient"):
        stacked.learn(tokens(1, 12))
    del block.forward
    mlp.forward = past_the_layers(mlp)
    for use in (
        lambda: stacked.learn(tokens(1, 12)),
        lambda: stacked.losses(tokens(1, 5), memory),
        lambda: stacked(tokens(1, 5), memory),
        lambda: stacked.generate(tokens(1, 5), memory, max_new_tokens=1, pad_token_id=0),
    ):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj did not run"):
            use()


def test_what_is_no_causal_language_model_is_refused():
    for model, message in (
        (tiny().model, "does not read 6 tokens"),  # no head
        (nn.ModuleList([tiny()]), "pass the PreTrainedModel that it wraps"),
    ):
        with pytest.raises(ValueError, match=message):
            stack_levels(model, LEVELS)
    model = tiny()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ValueError, match="2 layers, and 1 MLPs"):
        stack_levels(model, LEVELS)
    model = tiny()
    forward = model.forward
    model.forward = lambda input_ids, **more: forward(input_ids, use_cache=True)  # forgets its past
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        stack_levels(model, LEVELS)


# --------------------------------------------------------------------------------- how large


def test_large_models_are_stacked_at_a_low_rank_unless_told_otherwise(monkeypatch):
    config = stack_levels(tiny(), LEVELS).config
    assert (config.rank, config.window, config.cache_dtype) == (None, None, None)
    monkeypatch.setattr(plan, "LARGE", 1000)
    config = stack_levels(tiny(), LEVELS).config
    assert (config.rank, config.cache_dtype) == (plan.RANK, plan.HALF)
    assert 2 <= config.window <= plan.SHORT
    assert stack_levels(tiny(), LEVELS, rank=None).config.rank is None
    assert stack_levels(tiny(), LEVELS, rank=2).config.rank == 2
    with pytest.raises(ValueError, match="rank='low'"):
        stack_levels(tiny(), LEVELS, rank="low")


def test_a_large_module_that_is_no_model_of_transformers_is_refused_as_such(monkeypatch):
    monkeypatch.setattr(plan, "LARGE", 10)
    with pytest.raises(ValueError, match="no MLP blocks found in Linear"):
        stack_levels(torch.nn.Linear(8, 8), LEVELS)


@pytest.mark.parametrize(("rank", "variant"), [(None, "nested"), (2, "sequential")])
def test_a_memory_gets_no_larger_than_was_said(rank, variant):
    levels = [
        DeltaLevel(4, lr=0.5, rule="gd"),
        DeltaLevel(12, lr=0.2, rule="momentum"),
        DeltaLevel(),
    ]
    model = stack_levels(tiny(), levels, rank=rank, variant=variant, window=16)
    limit, memory, largest = model.memory_limit(), None, {}
    for part in tokens(1, 40).split(5, 1):
        _, memory = model.learn(part, memory)
        for name, size in sizes(memory).items():
            largest[name] = max(largest.get(name, 0), size)
            assert size <= limit[name] + 100, name  # a few numbers count what was seen
    assert largest["context"] > 0.6 * limit["context"]
    assert largest["level 0"] > 0.5 * limit["level 0"]
