"""HopeForCausalLM: transformers' interface gives what HopeLM gives."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import nestlearn
from nestlearn import HopeLM, Level, state
from nestlearn.hf import HopeCache, HopeConfig, HopeForCausalLM
from nestlearn.hf.cache import CACHE
from nestlearn.hf.config import LOADER
from nestlearn.options import Attention, Continuum, DeltaNet, SwiGLU, Titans

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
LEVELS = Continuum((Level(chunk=2), Level(chunk=6), Level()))
TINY = {
    "vocab_size": 17,
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "mixer": Titans(4),
    "channel": LEVELS,
}
KINDS = [(Titans(4), LEVELS), (Attention(), LEVELS), (DeltaNet(4), SwiGLU())]
GREEDY = {"max_new_tokens": 7, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 2}


def model(**changes):
    """In float64, so that the reads of a chunk at once and token by token choose alike."""
    torch.manual_seed(0)
    lm = HopeForCausalLM(HopeConfig(**{**TINY, **changes})).double().eval()
    with torch.no_grad():  # or a random model repeats its last token
        lm.model.head.weight *= 3
    return lm


def padded(*rows):
    """Rows of ids as a batch with left padding: ids, attention_mask."""
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def some_rows(*lengths):
    torch.manual_seed(1)
    return [torch.randint(0, 17, (n,)) for n in lengths]


# Files


def test_saved_and_loaded_it_is_the_same_and_nothing_is_pickled(tmp_path):
    lm = model(mixer=Titans(4, bound=None, adapt=("k", "v")))
    lm.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", LOADER}
    for auto in (HopeForCausalLM, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is HopeForCausalLM
        assert again.dtype == torch.float64
        for (name, a), b in zip(again.state_dict().items(), lm.state_dict().values()):
            assert torch.equal(a, b), name
        (ids,) = some_rows(9)  # what is mapped from a file is aligned otherwise: the last bit
        logits = again(ids[None]).logits
        torch.testing.assert_close(logits, lm(ids[None]).logits, rtol=0, atol=1e-12)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HopeConfig
    assert config.to_hope() == lm.model.config


def test_a_fresh_configuration_is_the_librarys_own():
    assert HopeConfig().to_hope() == nestlearn.HopeConfig()


@pytest.mark.parametrize("auto", [False, True])
def test_a_file_from_before_there_were_options_loads(tmp_path, auto):
    saved = Path(__file__).parents[1] / "models" / "saved" / "transformers_config.json"
    (tmp_path / "config.json").write_text(saved.read_text())
    config = (AutoConfig if auto else HopeConfig).from_pretrained(tmp_path, heads=1)
    levels = Continuum((Level(chunk=2, half_life=None), Level(half_life=None)))
    mixer = Titans(4, half_life=8, dgd=0.5)
    expected = nestlearn.HopeConfig(11, 8, 1, 1, mixer=mixer, channel=levels)
    assert config.to_hope() == expected
    assert config.pad_token_id == 3
    config.save_pretrained(tmp_path / "again")
    assert HopeConfig.from_pretrained(tmp_path / "again").to_hope() == expected


def test_options_can_be_set_and_words_stand_for_their_defaults():
    config = HopeConfig(mixer="attention", channel=SwiGLU(8))
    assert config.mixer == {
        "kind": "Attention", "conv": 4, "rotary": True, "window": None, "sinks": 0,
    }  # fmt: skip
    config.mixer = Titans(8)
    assert config.to_hope() == nestlearn.HopeConfig(mixer=Titans(8), channel=SwiGLU(8))


def test_the_file_of_the_configuration_is_complete(tmp_path):
    HopeConfig(**TINY, pad_token_id=3).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    whole = nestlearn.HopeConfig(**TINY).to_dict()
    assert whole.items() <= data.items()
    assert data["model_type"] == "nestlearn-hope"
    again = HopeConfig.from_pretrained(tmp_path)
    assert (again.pad_token_id, again.hidden_size, again.num_hidden_layers) == (3, 16, 1)


def test_a_checkpoint_without_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first 'model\.head\.weight'"):
        HopeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, r"unknown fields \['colour'\]"),
        ({"mixer": "rnn"}, "mixer='rnn'"),
        ({"dim": 0}, "dim=0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"channel": {"kind": "Continuum", "levels": [{"chunk": 0}]}}, "chunk=0"),
        ({"mixer": {"kind": "Linear", "half_life": 8}}, r"\['half_life'\]: Linear has"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HopeConfig(**options)
    HopeConfig(**TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_it_wraps_a_model_that_is_there():
    lm = HopeLM(nestlearn.HopeConfig(**TINY))
    wrapped = HopeForCausalLM.from_hope(lm, eos_token_id=2)
    ids = some_rows(7)[0][None]
    assert torch.equal(wrapped(ids).logits, lm(ids)[0])
    assert wrapped.get_output_embeddings() is lm.head
    assert wrapped.generation_config.eos_token_id == 2


def test_more_tokens_can_be_added():
    lm = model()
    lm.resize_token_embeddings(20)
    assert lm(torch.tensor([[19]])).logits.shape == (1, 1, 20)
    assert lm.config.vocab_size == 20


# Generation


@pytest.mark.parametrize(("mixer", "channel"), KINDS)
@pytest.mark.parametrize("options", [GREEDY, BEAMS, {"max_new_tokens": 7, "do_sample": True}])
def test_generation_with_the_cache_equals_generation_without(mixer, channel, options):
    lm = model(mixer=mixer, channel=channel)
    ids = torch.stack(some_rows(7, 7))
    torch.manual_seed(2)
    with_cache = lm.generate(ids, **options)
    torch.manual_seed(2)
    assert torch.equal(lm.generate(ids, use_cache=False, **options), with_cache)
    if options is GREEDY:
        assert torch.equal(lm.model.generate(ids, 7, temperature=0), with_cache)


@pytest.mark.parametrize(("mixer", "channel"), KINDS)
@pytest.mark.parametrize("options", [GREEDY, BEAMS])
def test_a_left_padded_row_gives_what_it_gives_alone(mixer, channel, options):
    lm = model(mixer=mixer, channel=channel)
    rows = some_rows(9, 5, 1, 5)
    batch = lm.generate(**padded(*rows), **options)
    for row, tokens in zip(rows, batch):
        alone = lm.generate(row[None], **options)[0, len(row) :]
        assert torch.equal(tokens[9:], alone)


def test_padding_changes_no_logits_and_no_state():
    lm = model()
    rows = some_rows(9, 5, 1, 5)
    said = lm(**padded(*rows))
    for i, row in enumerate(rows):
        alone = lm(row[None])
        torch.testing.assert_close(said.logits[i, 9 - len(row) :], alone.logits[0])
        mine = said[CACHE].select([i]).state
        for (path, a), (_, b) in zip(state.leaves(mine), state.leaves(alone[CACHE].state)):
            torch.testing.assert_close(a, b, msg=path)
    right = {name: x.flip(1) for name, x in padded(*[row.flip(0) for row in rows]).items()}
    for use_cache in (True, False):  # stripped, or read as it is
        logits = lm(**right, use_cache=use_cache).logits
        torch.testing.assert_close(logits[1, :5], said.logits[1, 4:])


def test_padded_turns_go_on_from_the_cache():
    lm = model()
    first, second = some_rows(6, 3), some_rows(2, 5)  # each row reads 8 tokens
    cache = lm(**padded(*first))[CACHE]
    assert cache.get_seq_length() == 6
    with pytest.raises(ValueError, match=r"\{3: \[1\], 6: \[0\]\}"):
        _ = cache.state
    said = lm(**padded(*second), cache=cache)
    assert said[CACHE] is cache
    for i in range(2):
        alone = lm(torch.cat([first[i], second[i]])[None])
        torch.testing.assert_close(said.logits[i, -1], alone.logits[0, -1])
    assert state.batch_size(cache.state) == 2  # of one length again
    older = lm(first[0][None], past_key_values=lm(first[0][None])[CACHE])  # the name until 5.24
    assert older[CACHE].get_seq_length() == 12


def test_beams_take_their_state_along():
    lm = model()
    rows = some_rows(6, 3, 6)
    cache = lm(**padded(*rows))[CACHE]
    order = [2, 1, 1, 0]
    cache.reorder_cache(torch.tensor(order))
    following = torch.tensor([[4], [5], [6], [7]])
    said = lm(following, cache=cache).logits
    for i, row in enumerate(order):
        alone = lm(torch.cat([rows[row], following[i]])[None]).logits
        torch.testing.assert_close(said[i, -1], alone[0, -1])
    cache.batch_select_indices(torch.tensor([3]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)


def test_a_state_is_saved_and_generation_goes_on_from_it(tmp_path):
    lm = model()
    past, new = some_rows(7, 4)
    state.save(lm(past[None])[CACHE].state, tmp_path / "memory.safetensors")
    memory = state.load(tmp_path / "memory.safetensors", like=lm.model.init_state(1))
    out = lm.generate(new[None], **{CACHE: HopeCache(memory)}, **GREEDY)
    whole = lm.generate(torch.cat([past, new])[None], **GREEDY)
    assert torch.equal(out[0, 4:], whole[0, 11:])


def test_a_cache_that_was_returned_takes_the_whole_text_again():
    lm = model()
    ids = torch.stack(some_rows(5, 5))
    out = lm.generate(ids, return_dict_in_generate=True, **GREEDY)
    more = lm.generate(out.sequences, **{CACHE: out[CACHE]}, **GREEDY)
    assert torch.equal(more, lm.generate(ids, max_new_tokens=14, do_sample=False))


def test_a_call_says_what_does_not_fit():
    lm, ids = model(), torch.stack(some_rows(5, 5))
    cache = lm(ids)[CACHE]
    with pytest.raises(ValueError, match="2 rows for 1 samples"):
        lm(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="DynamicCache"):
        lm(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        lm(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\)"):
        lm(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        cache.reorder_cache(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="read backwards"):
        cache.crop(-1)


def test_calls_without_a_cache_leave_it_and_logits_can_be_few():
    lm, ids = model(), torch.stack(some_rows(5, 5))
    cache = lm(ids)[CACHE]
    before = cache.state
    first = lm(ids, cache=cache, use_cache=False)
    assert CACHE not in first
    assert state.leaves(cache.state)[0] == state.leaves(before)[0]
    whole = lm(ids, return_dict=False)
    assert torch.equal(lm(ids, logits_to_keep=2).logits, whole[0][:, -2:])
    assert torch.equal(lm(ids, logits_to_keep=torch.tensor([1])).logits, whole[0][:, [1]])


# Training


def test_the_loss_is_the_cross_entropy_of_the_next_tokens():
    lm = model()
    rows = some_rows(8, 3)
    ids = torch.stack(some_rows(6, 6))
    out = lm(ids, labels=ids)
    assert CACHE not in out
    expected = F.cross_entropy(out.logits[:, :-1].reshape(-1, 17).float(), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)

    alone = [lm(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    batch = padded(*rows)
    torch.testing.assert_close(lm(**batch, labels=batch["input_ids"]).loss, sum(alone) / 9)
    summed = lm(**batch, labels=batch["input_ids"], num_items_in_batch=3).loss
    torch.testing.assert_close(summed, sum(alone) / 3)


def test_trainer_trains_and_writes_checkpoints(tmp_path):
    torch.manual_seed(0)
    lm = HopeForCausalLM(HopeConfig(**TINY))
    before = lm.model.embed.weight.detach().clone()
    ids = torch.arange(12) % 5
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 8
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_steps=4,
        use_cpu=True, report_to=[], disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(lm, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(lm.model.embed.weight, before)
    saved = HopeForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(saved.model.head.weight, lm.model.head.weight)
    assert trainer.evaluate()["eval_loss"] < losses[0]


def test_gradient_checkpointing_is_remat():
    lm, ids = model(), some_rows(12)[0][None]
    gradients = []
    for enable in (False, True):
        lm.gradient_checkpointing = enable
        (block,) = lm.model.blocks
        assert {part.remat for part in (block.mixer, *block.channel.mlps)} == {enable}
        lm.zero_grad()
        lm(ids, labels=ids).loss.backward()
        gradients.append(lm.model.embed.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="Attention and SwiGLU has none"):
        model(mixer="attention", channel="mlp").gradient_checkpointing = True


def test_a_compiled_model_gives_the_same():
    """Without memories: the runtime checks of their shapes (conftest.py) cannot be compiled."""
    lm = model(mixer="attention", channel="mlp")
    compiled = torch.compile(lm, backend="eager")  # what is traced, without the compiler's minute
    batch = padded(*some_rows(6, 3))
    out = compiled(**batch, labels=batch["input_ids"])
    out.loss.backward()
    torch.testing.assert_close(out.logits[:, 3:], lm(**batch).logits[:, 3:])


def test_compile_compiles_the_steps_of_chunks():
    lm = model()
    lm.compile()
    assert "_step" in lm.model.blocks[0].mixer._compiled


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    block = block.replace(").cache ", f").{CACHE} ").replace("cache=memory", f"{CACHE}=memory")
    names = {}
    exec(block, names)
    assert names["out"].shape == (2, 27)
    assert names["more"].shape == (1, 11)
