"""HopeLM: configuration, generation, files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestlearn import HopeConfig, HopeLM, Level, options

LEVELS = options.Continuum((Level(chunk=2), Level(chunk=6), Level()))
TINY = HopeConfig(17, 16, 2, 2, options.Titans(chunk=4), LEVELS)
MIXERS = [
    options.Titans(chunk=4), options.Attention(), options.StaticTitans(chunk=4),
    options.DeltaNet(chunk=4), options.Linear(chunk=4),
]  # fmt: skip
every_mixer = pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
FLAT = json.loads((Path(__file__).parent / "saved" / "flat_configs.json").read_text())


def model(**changes):
    torch.manual_seed(0)
    return HopeLM(replace(TINY, **changes)).eval()


@every_mixer
@pytest.mark.parametrize("channel", [LEVELS, options.SwiGLU()], ids=["levels", "mlp"])
def test_generation_from_the_state_equals_generation_without(mixer, channel):
    lm = model(mixer=mixer, channel=channel).double()
    prompt = torch.randint(0, 17, (2, 7))
    ids = lm.generate(prompt, 12, temperature=0)
    assert torch.equal(ids[:, :7], prompt)
    for t in range(7, 19):  # every token again, each from the whole text before it
        with torch.no_grad():
            logits, _ = lm(ids[:, :t])
        assert torch.equal(logits[:, -1].argmax(-1), ids[:, t])


def test_sampling_is_seeded_and_top_k_1_is_greedy():
    lm, prompt = model(), torch.zeros(1, 1, dtype=torch.int64)

    def draw(seed, **options):
        return lm.generate(prompt, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), lm.generate(prompt, 20, temperature=0))
    assert lm.generate(prompt, 0).shape == (1, 1)


def test_generation_ends_where_every_row_has_said_the_last_token():
    lm, prompt = model(), torch.tensor([[1, 2], [3, 4]])

    def draw(token=None):
        seed = torch.Generator().manual_seed(0)
        return lm.generate(prompt, 40, generator=seed, eos_token_id=token)

    whole = draw()
    ends = [{int(t): i for i, t in reversed(list(enumerate(row[2:])))} for row in whole]
    common = ends[0].keys() & ends[1].keys()
    assert common
    late, alone = max(common), min(ends[0].keys() ^ ends[1].keys())  # what one row alone says
    for token, length in ((late, 3 + max(row[late] for row in ends)), (alone, 42)):
        assert torch.equal(draw(token), whole[:, :length])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 1, "temperature": -0.5}, r"temperature=-0\.5"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 1, "top_k": 0}, "top_k=0"),
        ({"max_new_tokens": 1, "eos_token_id": 17}, "eos_token_id=17: give one of 0 to 16"),
    ],
)
def test_generate_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=r"ids is a str: give a tensor of token ids"):
        model().generate("hello", **options | {"max_new_tokens": 1, "temperature": 0, "top_k": 1})
    with pytest.raises(ValueError, match=message):
        model().generate(torch.zeros(1, 1, dtype=torch.int64), **options)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    lm = model(mixer=options.Titans(4, adapt=("k", "v"), bound=None))
    lm.save_pretrained(tmp_path / "m")
    again = HopeLM.from_pretrained(tmp_path / "m")
    assert again.config == lm.config
    ids = torch.randint(0, 17, (2, 9))
    assert torch.equal(again(ids)[0], lm(ids)[0])
    files = {"config.json", "model.safetensors", "README.md"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == files


def test_a_saved_model_has_a_card_that_loads_it(tmp_path):
    lm = model()
    lm.save_pretrained(tmp_path, trained="On three lines.")
    card = (tmp_path / "README.md").read_text()
    assert f"{lm.parameter_count():,} parameters" in card
    assert "a\nTitans mixer and a Continuum channel" in card
    assert "On three lines." in card
    said = card.split("```json\n")[1].split("```")[0]
    assert HopeConfig.from_dict(json.loads(said)) == lm.config
    load = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path))
    names: dict = {}
    exec(load, names)
    assert names["model"].config == lm.config


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_parts_options_may_be_said_of_the_whole():
    levels = (Level(chunk=4), Level())
    said = HopeConfig(dim=16, heads=2, chunk=8, levels=levels, hidden=3, depth=2)
    assert said == HopeConfig(
        dim=16,
        heads=2,
        mixer=options.Titans(8, hidden=3, depth=2),
        channel=options.Continuum(levels),
    )
    assert HopeConfig(channel="mlp", mlp_hidden=5).channel == options.SwiGLU(5)
    assert replace(said, chunk=4).mixer == options.Titans(4, hidden=3, depth=2)
    nested, odd = options.Continuum(levels, "nested"), (Level(chunk=4), Level(chunk=6))
    free = HopeConfig(channel=nested, levels=odd, variant="sequential").channel
    assert free == options.Continuum(odd, "sequential")  # `odd` alone would not fit
    with pytest.warns(UserWarning, match="chunk=8 changes nothing: Attention and Continuum"):
        assert HopeConfig(mixer="attention", chunk=8) == HopeConfig(mixer="attention")
    with pytest.raises(TypeError, match="HopeConfig has no 'chunks'"):
        HopeConfig(chunks=8)


def test_a_tied_head_is_saved_and_is_tied_again(tmp_path):
    lm = model()
    lm.head.weight = lm.embed.weight
    lm.save_pretrained(tmp_path)
    again = HopeLM.from_pretrained(tmp_path)
    assert again.head.weight is again.embed.weight
    assert again.tied
    ids = torch.randint(0, 17, (2, 9))
    assert torch.equal(again(ids)[0], lm(ids)[0])
    model().save_pretrained(tmp_path)
    free = HopeLM.from_pretrained(tmp_path)
    assert free.head.weight is not free.embed.weight


@every_mixer
def test_what_was_read_in_inference_mode_can_be_trained_on(mixer):
    lm, ids = model(mixer=mixer), torch.randint(0, 17, (2, 11))
    gradients = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, state = lm(ids)
        lm.zero_grad()
        lm(ids, state)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_half_life_can_be_given_when_loading(tmp_path):
    model().save_pretrained(tmp_path)
    fading = HopeLM.from_pretrained(tmp_path, half_life=3)
    assert fading.config.mixer.half_life == 3
    assert [level.half_life for level in fading.config.channel.levels] == [3, 3, 3]
    ids = torch.randint(0, 17, (1, 30))
    assert (fading(ids)[0] - model()(ids)[0]).abs().max() > 1e-6
    assert torch.equal(fading(ids[:, :2])[0], model()(ids[:, :2])[0])

    model(mixer="attention", channel="mlp").save_pretrained(tmp_path / "nothing fades")
    with pytest.raises(ValueError, match="half_life=3: Attention and SwiGLU have none"):
        HopeLM.from_pretrained(tmp_path / "nothing fades", half_life=3)


def test_what_was_saved_before_memories_faded_does_not_fade():
    assert HopeConfig().mixer.half_life == 2048
    assert HopeConfig.from_dict({"dim": 16}).mixer.half_life is None


@pytest.mark.parametrize("saved", FLAT, ids=lambda saved: saved["name"])
def test_what_was_saved_before_there_were_options_is_the_same_model(saved):
    """Its parameters, by the names that its weights have in files, and what it computes."""
    config = HopeConfig.from_dict(saved["config"])
    assert HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    lm = HopeLM(config).double()
    assert {n: [*w.shape] for n, w in lm.state_dict().items()} == saved["parameters"]
    with torch.no_grad():
        for i, p in enumerate(lm.parameters()):
            numbers = torch.arange(p.numel(), dtype=p.dtype)
            p.copy_(0.5 * torch.sin(1.7 * numbers + i).view_as(p))
        logits = lm(7 * torch.arange(26).view(2, 13) % 11)[0][:, -1, :3].flatten()
    expected = torch.tensor(saved["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_a_folder_from_before_there_were_options_loads(tmp_path):
    config = {"format": "nestlearn-hope-1", "model_type": "nestlearn-hope", **FLAT[0]["config"]}
    lm = HopeLM(HopeConfig.from_dict(FLAT[0]["config"]))
    lm.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = HopeLM.from_pretrained(tmp_path)
    assert again.config == lm.config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), lm.parameters()))


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
def test_what_does_not_apply_cannot_be_written(mixer):
    config = replace(TINY, mixer=mixer)
    assert HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    data = config.to_dict()
    data["mixer"]["colour"] = "red"
    with pytest.raises(ValueError, match=rf"\['colour'\]: {type(mixer).__name__} has"):
        HopeConfig.from_dict(data)
    with pytest.raises(ValueError, match=r"unknown fields \['chunk'\]"):
        HopeConfig.from_dict({**config.to_dict(), "chunk": 4})


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        HopeLM.from_pretrained(tmp_path)
    model().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        HopeLM.from_pretrained(tmp_path)
    weights.write_bytes(whole)

    for broken in (
        text[:40],
        "[]",
        json.dumps({**json.loads(text), "colour": "red"}),
        json.dumps({**json.loads(text), "mixer": "rnn"}),
        json.dumps({**json.loads(text), "format": "other"}),
    ):
        config.write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            HopeLM.from_pretrained(tmp_path)
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(ValueError, match="a llama model, no Hope: `nestlearn stack` makes one"):
        HopeLM.from_pretrained(tmp_path)
    config.write_text(json.dumps({**json.loads(text), "dim": 32}))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or of another model"):
        HopeLM.from_pretrained(tmp_path)


def test_a_full_disk_keeps_the_old_model(tmp_path, monkeypatch):
    import errno

    from nestlearn.models import hope

    model().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hope, "save_file", full)
    with pytest.raises(OSError, match="free some space"):
        model(heads=4).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_sizes_and_refusals():
    assert HopeConfig.size("tiny", mixer="attention").mixer == options.Attention()
    assert HopeConfig.size("small").dim > HopeConfig.size("tiny").dim
    assert HopeConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    for make, message in (
        (lambda: HopeConfig.size("huge"), "'huge'"),
        (lambda: replace(TINY, mixer="rnn"), "'rnn'"),
        (lambda: replace(TINY, channel="moe"), "'moe'"),
        (lambda: replace(TINY, layers=0), "layers=0"),
        (lambda: replace(TINY, heads=3), "dim=16 is not divisible by heads=3"),
        (lambda: replace(TINY, dim="16"), "dim='16': give 1 or more"),
        (lambda: replace(TINY, truncate=0), "truncate=0: give 1 token or more, or None"),
        (lambda: options.Titans(chunk=0), "chunk=0: give 1 token or more$"),
        (lambda: options.Titans(chunk=2.5), r"chunk=2\.5"),
        (lambda: options.Titans(bound=1.0), r"bound=1\.0: give \(low, high\)"),
        (lambda: options.Titans(half_life=0), "half_life=0: give 1 token or more, or None"),
        (lambda: options.StaticTitans(hidden=0), "hidden=0: give a width of 1 or more, or None"),
        (lambda: options.Attention(window=0), "window=0: give 1 token or more, or None"),
        (lambda: options.Attention(sinks=2), "sinks=2: give a window"),
        (lambda: options.DeltaNet(conv=-1), "conv=-1: give 0 taps or more"),
        (lambda: options.DeltaNet(eta_min=1.0), r"eta_min=1\.0"),
        (lambda: options.Linear(eta_max=3.0), r"eta_max=3\.0: give a step bound in \(0, 2\]"),
        (lambda: options.Level(lr="fast"), r"lr='fast': give a step size in \[0, 1\)"),
        (lambda: options.Continuum(4), "4 is no level"),
        (lambda: options.Continuum(variant="stacked"), "variant='stacked': give one of"),
        (lambda: options.Continuum((Level(4), Level(6)), "nested"), "chunks 4 and 6"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("mixer", MIXERS[:2], ids=["Titans", "Attention"])
def test_bfloat16_and_autocast_stay_near_float32(mixer):
    lm, ids = model(mixer=mixer), torch.randint(0, 17, (2, 40))
    with torch.no_grad():
        truth = lm(ids)[0].softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = lm(ids)[0].float().softmax(-1)
        half = lm.bfloat16()(ids)[0].float().softmax(-1)
    assert (mixed - truth).abs().mean() < 5e-3
    assert (half - truth).abs().mean() < 5e-3


def test_prefill_then_decode_in_training_mode_keeps_gradients_out():
    lm = model().train()
    ids = lm.generate(torch.zeros(1, 3, dtype=torch.int64), 2)
    assert not ids.requires_grad
    assert lm.training


def test_what_stands_before_the_head_and_in_place_of_ids():
    lm, ids = model(), torch.randint(0, 17, (2, 9))
    logits, state = lm(ids)
    hidden, same = lm(None, embeds=lm.embed(ids), output="hidden")
    layers, _ = lm(ids, output="layers")
    assert torch.equal(lm.head(hidden), logits)
    assert [x.shape for x in layers] == [(2, 9, 16)] * 3
    assert torch.equal(layers[0], lm.embed(ids))
    assert torch.equal(layers[-1], hidden)
    assert torch.equal(lm(ids, state)[0], lm(ids, same)[0])
    for call, message in (
        (lambda: lm(None), "one of the two"),
        (lambda: lm(ids, embeds=hidden), "one of the two"),
        (lambda: lm(ids, output="words"), "output='words'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_each_parameter_keeps_its_type(tmp_path):
    lm = model()
    lm.embed.bfloat16()
    lm.blocks[0].double()
    lm.save_pretrained(tmp_path)
    again = HopeLM.from_pretrained(tmp_path)
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in lm.parameters()]


def test_a_state_dict_from_before_parameters_had_axes_still_loads():
    lm = model()
    old = {k: v[0] if k.endswith((".lr", ".scale")) else v for k, v in lm.state_dict().items()}
    again = HopeLM(TINY)
    again.load_state_dict(old)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lm.parameters()))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", [{}, {"mixer": "attention", "channel": "mlp"}])
def test_it_can_be_exported(free, kind, unchecked):
    lm = model(**{"layers": 1, "channel": options.Continuum((Level(chunk=4),)), **kind})
    tokens = {1: torch.export.Dim("tokens", min=2, max=6)}
    ids = torch.randint(0, 17, (1, 5))
    with torch.no_grad():
        program = torch.export.export(lm, (ids,), dynamic_shapes=(tokens,) if free else None)
    exported = program.module()
    for length in (2, 5, 6) if free else (5,):
        ids = torch.randint(0, 17, (1, length))
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                logits, state = exported(ids)
                torch.testing.assert_close(logits, lm(ids)[0])
        assert (state is None) == (free and not kind)  # what fills up would be in it
    if free and not kind:
        tokens = {1: torch.export.Dim("tokens", min=2)}
        with pytest.raises(ValueError, match="needs a greatest length"):
            torch.export.export(lm, (ids,), dynamic_shapes=(tokens,))
