"""What the libraries around transformers ask of a model: each gets it, or hears why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PretrainedConfig

import nestlearn
from nestlearn import HopeLM, Level
from nestlearn.hf import HopeConfig, HopeForCausalLM, HopeModel
from nestlearn.hf.cache import CACHE
from nestlearn.hf.config import LOADER
from nestlearn.options import Continuum, DeltaNet, StaticTitans, Titans

sys.path.insert(0, str(Path(__file__).parent))
from test_modeling import GREEDY, TINY, model, padded, some_rows

SIX = torch.arange(6)[None]


def without_axes(weights):
    """As files were before every parameter had an axis."""
    names = ("lr", "scale", "theta", "meta_lr")
    return {k: v[0] if k.rpartition(".")[2] in names else v for k, v in weights.items()}


# Hidden states, and what stands in place of ids


def test_hidden_states_are_the_stream_and_what_the_head_reads():
    lm = model(layers=2)
    ids = torch.stack(some_rows(6, 6))
    out = lm(ids, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 6, 16)] * 3
    assert torch.equal(out.hidden_states[0], lm.model.embed(ids))
    assert torch.equal(lm.model.head(out.hidden_states[-1]), out.logits)
    asked = {"return_dict_in_generate": True, "output_hidden_states": True}
    steps = lm.generate(ids, **asked, **GREEDY).hidden_states
    assert len(steps) == 7
    assert steps[1][0].shape == (2, 1, 16)
    lm.config.output_hidden_states = True
    assert len(lm(ids).hidden_states) == 3
    with pytest.raises(ValueError, match="no attention maps"):
        lm(ids, output_attentions=True)


def test_the_base_model_gives_what_the_head_reads_and_shares_the_parameters():
    lm = model()
    batch = padded(*some_rows(6, 3))
    base = lm.base_model
    said = base(**batch, use_cache=False)
    assert CACHE not in said
    torch.testing.assert_close(lm.model.head(said.last_hidden_state), lm(**batch).logits)
    assert lm.get_decoder() is base is lm.base_model
    assert base.get_input_embeddings() is lm.get_input_embeddings()
    assert not [name for name in lm.state_dict() if not name.startswith("model.")]
    assert lm.eval().base_model.training is False


def test_a_body_alone_is_loaded_from_the_folder_of_the_whole(tmp_path):
    lm = model()
    lm.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is HopeModel
    assert body.base_model is body
    assert "model.head.weight" not in body.state_dict()
    torch.testing.assert_close(body(SIX)[0], lm.base_model(SIX)[0])


def test_embeddings_in_place_of_ids():
    lm = model()
    batch = padded(*some_rows(6, 3))
    embeds = lm.get_input_embeddings()(batch["input_ids"])
    said = lm(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert torch.equal(said.logits, lm(**batch).logits)
    ids = batch["input_ids"][:1]
    more = lm.generate(inputs_embeds=embeds[:1], **GREEDY)
    assert torch.equal(more, lm.generate(ids, **GREEDY)[:, 6:])
    for given in ({}, {"input_ids": ids, "inputs_embeds": embeds[:1]}):
        with pytest.raises(ValueError, match="one of the two"):
            lm.base_model(**given)


# Positions


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", [0, 2])
def test_packed_texts_read_as_they_do_alone(use_cache, pad):
    """The rows hold 3 + 5 and 8 tokens, the second after `pad` columns of padding."""
    lm = model()
    a, b, c = some_rows(3, 5, 8 - pad)
    ids = torch.stack([torch.cat([a, b]), F.pad(c, (pad, 0))])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [1] * pad + [*range(8 - pad)]])
    said = lm(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache)
    alone = [lm(x[None]) for x in (a, b, c)]
    torch.testing.assert_close(said.logits[0, :3], alone[0].logits[0])
    torch.testing.assert_close(said.logits[0, 3:], alone[1].logits[0])
    torch.testing.assert_close(said.logits[1, pad:], alone[2].logits[0])
    if use_cache:  # each row goes on from its last text
        following = lm(torch.tensor([[4], [5]]), **{CACHE: said[CACHE]}).logits
        for row, (before, token) in enumerate(zip(alone[1:], (4, 5))):
            after = lm(torch.tensor([[token]]), **{CACHE: before[CACHE]}).logits
            torch.testing.assert_close(following[row], after[0])


def test_packing_goes_on_from_the_cache_and_is_said_in_other_words():
    lm = model()
    past, a, b = some_rows(4, 2, 3)
    cache = lm(past[None])[CACHE]
    packed = torch.cat([a, b])[None]
    positions = torch.tensor([[4, 5, 0, 1, 2]])
    logits = lm(packed, position_ids=positions, use_cache=False, **{CACHE: cache}).logits
    torch.testing.assert_close(logits[0, :2], lm(torch.cat([past, a])[None]).logits[0, 4:])
    torch.testing.assert_close(logits[0, 2:], lm(b[None]).logits[0])
    want = lm(packed, position_ids=torch.tensor([0, 1, 0, 1, 2])).logits
    others = (
        {"cu_seq_lens_q": torch.tensor([0, 2, 5])},
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])},
    )
    for words in others:
        assert torch.equal(lm(packed, **words).logits, want)


def test_no_text_is_predicted_from_the_one_before():
    lm = model()
    a, b = some_rows(3, 5)
    ids, positions = torch.cat([a, b])[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    loss = lm(ids, position_ids=positions, labels=ids).loss
    alone = [lm(x[None], labels=x[None]).loss * (len(x) - 1) for x in (a, b)]
    torch.testing.assert_close(loss, sum(alone) / 6)


def test_what_has_no_meaning_is_refused():
    lm, ids = model(), torch.stack(some_rows(5, 5))
    for options, message in (
        ({"position_ids": torch.tensor([[0, 1, 5, 6, 7]])}, "go from 1 to 5 in row 0"),
        ({"position_ids": torch.zeros(2, 3)}, r"position_ids has shape \(2, 3\)"),
        ({"cache_position": torch.tensor([0, 1, 3, 4, 5])}, "cache_position is not"),
        ({"token_type_ids": torch.ones_like(ids)}, "token_type_ids holds 1"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2, 2]] * 2)}, "attention_mask holds 2"),
        ({"attention_mask": torch.zeros_like(ids)}, "0 everywhere"),
        ({"shift_labels": ids[:, 1:]}, r"shift_labels has shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lm(ids, **options)
    with pytest.raises(TypeError, match=r"takes no \['colour'\]"):
        lm(ids, colour=1)
    fine = {"token_type_ids": torch.zeros_like(ids), "cache_position": torch.arange(5)}
    assert torch.equal(lm(ids, position_ids=torch.arange(5), **fine).logits, lm(ids).logits)


def test_shifted_labels_are_taken_as_they_are():
    lm, ids = model(), torch.stack(some_rows(6, 6))
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    want = lm(ids, labels=ids).loss
    torch.testing.assert_close(lm(ids, shift_labels=shifted).loss, want)
    torch.testing.assert_close(lm(ids, labels=ids * 0, shift_labels=shifted).loss, want)


def test_integers_of_another_type_are_ids_and_labels_too():
    lm, ids = model(), torch.stack(some_rows(6, 6))
    loss = lm(input_ids=ids, labels=ids).loss
    assert torch.equal(lm(input_ids=ids.int(), labels=ids.int()).loss, loss)


# Files


def test_a_folder_loads_where_nestlearn_was_not_imported_and_after_another_save(tmp_path):
    model().save_pretrained(tmp_path / "a")
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
trust = {"trust_remote_code": True}
assert type(AutoConfig.from_pretrained("a", **trust)).__name__ == "HopeConfig"
lm = AutoModelForCausalLM.from_pretrained("a", **trust)
assert type(lm).__module__ == "nestlearn.hf.modeling", type(lm)
lm.save_pretrained("b")
assert type(AutoModel.from_pretrained("b", **trust)).__name__ == "HopeModel"
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "env": env}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr
    names = [{path.name for path in (tmp_path / x).iterdir()} for x in "ab"]
    assert names[0] == names[1]
    assert (tmp_path / "a" / LOADER).read_text() == (tmp_path / "b" / LOADER).read_text()
    lacking = f"import sys; sys.modules['nestlearn'] = None; exec(open('a/{LOADER}').read())"
    done = subprocess.run([sys.executable, "-c", lacking], **run)
    assert 'pip install "nestlearn[hf]"' in done.stderr


def test_no_code_of_the_library_is_copied_beside_the_weights(tmp_path):
    HopeConfig.register_for_auto_class()
    HopeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.py")] == [LOADER]


def test_a_subclass_of_the_configuration_is_one():
    class Mine(HopeConfig):
        model_type = "mine"

    class Own(HopeConfig):
        def __init__(self, **options):
            super().__init__(**options)
            self.extra = 1

    for kind in (Mine, Own):
        config = kind(**TINY, pad_token_id=3)
        assert (config.use_cache, config.dim, config.pad_token_id) == (True, 16, 3)
        assert config.to_hope() == nestlearn.HopeConfig(**TINY)
    assert isinstance(Mine(), PretrainedConfig)


@pytest.mark.parametrize("shards", [False, True])
def test_either_library_reads_the_other_ones_folder(tmp_path, shards):
    lm = model()
    lm.save_pretrained(tmp_path / "theirs", **({"max_shard_size": "20KB"} if shards else {}))
    lm.model.save_pretrained(tmp_path / "ours")
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) == 1 or shards
    for again in (
        HopeLM.from_pretrained(tmp_path / "theirs"),
        HopeForCausalLM.from_pretrained(tmp_path / "ours").model,
    ):
        assert again.config == lm.model.config
        for (name, a), b in zip(again.state_dict().items(), lm.model.state_dict().values()):
            assert torch.equal(a, b), name


def test_weights_of_another_size_start_as_in_a_new_model(tmp_path):
    lm = model().float()
    with torch.no_grad():
        for p in lm.parameters():
            p.fill_(7.0)
    lm.save_pretrained(tmp_path)
    options = {"ignore_mismatched_sizes": True, "heads": 4, "vocab_size": 30}
    torch.manual_seed(0)
    again = HopeForCausalLM.from_pretrained(tmp_path, **options)
    assert float(again.model.norm.weight.amin()) == 7.0  # it fits, so it is the file's
    assert 0.8 < float(again.model.embed.weight.std()) < 1.2
    mixer = again.model.blocks[0].mixer
    (start,) = mixer.start["k"]
    assert (start - torch.eye(4)).abs().max() < 0.2
    assert torch.equal(mixer.eta.bias, HopeLM(again.model.config).blocks[0].mixer.eta.bias)
    assert again(SIX).logits.isfinite().all()


@pytest.mark.parametrize("mixer", [Titans(4), StaticTitans(4), DeltaNet(4)], ids=repr)
def test_a_model_made_without_memory_is_initialised_like_any(mixer):
    """On the meta device, then emptied onto another, then started: no value is left out."""
    levels = (Level(chunk=2, rule="momentum"), Level())
    changes = {"mixer": mixer, "channel": Continuum(levels)}
    with torch.device("meta"):
        lm = HopeForCausalLM(HopeConfig(**{**TINY, **changes}))
    lm.to_empty(device="cpu")
    with torch.no_grad():
        for p in lm.parameters():
            p.fill_(float("nan"))
    lm.init_weights()
    like = HopeForCausalLM(HopeConfig(**{**TINY, **changes}))
    for (name, p), q in zip(lm.named_parameters(), like.parameters()):
        assert p.isfinite().all(), name
        if float(q.std(correction=0)) == 0:  # a constant
            assert torch.equal(p, q), name
        elif p.numel() > 100:
            assert 0.5 < float(p.std() / q.std()) < 2, name
    assert lm(SIX).logits.isfinite().all()


def test_files_from_before_parameters_had_axes_still_load(tmp_path):
    lm = model(channel=Continuum((Level(chunk=2, rule="momentum"), Level(chunk=4)), "nested"))
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.01)
    lm.save_pretrained(tmp_path)
    old = without_axes(load_file(tmp_path / "model.safetensors"))
    assert sum(w.ndim == 0 for w in old.values()) == 6
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    for again in (
        HopeForCausalLM.from_pretrained(tmp_path).model,
        HopeModel.from_pretrained(tmp_path).model,
        HopeLM.from_pretrained(tmp_path),
    ):
        for name, p in again.named_parameters():
            assert torch.equal(p, lm.model.get_parameter(name)), name


def test_a_head_tied_by_hand_is_saved(tmp_path):
    lm = model()
    lm.model.head.weight = lm.model.embed.weight
    lm.save_pretrained(tmp_path)
    again = HopeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(SIX).logits, lm(SIX).logits)


# Where parameters are


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel": Continuum((Level(chunk=2), Level(chunk=6), Level()), "nested")},
        {"mixer": StaticTitans(4)},
        {"mixer": "attention", "channel": "mlp"},
    ],
    ids=["hope", "nested", "titans", "attention"],
)
def test_a_model_whose_parameters_are_fetched_when_a_module_runs(changes):
    lm = model(**changes)
    want = lm.generate(SIX, **GREEDY)
    away = cpu_offload(model(**changes), torch.device("cpu"))
    assert all(p.is_meta for p in away.parameters())
    assert torch.equal(away.generate(SIX, **GREEDY), want)


def test_every_tensor_of_a_module_is_a_parameter_or_a_buffer_and_has_an_axis():
    lm = model(channel=Continuum((Level(chunk=2, rule="momentum"), Level(chunk=4)), "nested"))
    lm(SIX, **{CACHE: lm(SIX)[CACHE]})  # with a state: layers then know its shapes
    assert all(p.ndim > 0 for p in lm.parameters())
    for name, part in lm.named_modules():
        for attribute, value in vars(part).items():
            found = torch.utils._pytree.tree_leaves(value)
            if attribute not in ("_parameters", "_buffers", "_modules"):
                assert not any(isinstance(x, torch.Tensor) for x in found), (name, attribute)
