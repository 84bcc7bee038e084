"""The commands of stacked models, from a pretrained model's folder to one that remembers."""

import re

import pytest
import torch
from people import LETTERS, base
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nestlearn import Session, cli
from nestlearn.hf.folder import load_stack
from nestlearn.recipes import stacked


@pytest.fixture
def folder(tmp_path):
    """A tiny pretrained model with a tokenizer of letters, as transformers saves them."""
    letters = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    base().save_pretrained(tmp_path / "model")
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="^", pad_token="\0")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the key is under the mat. " * 20)
    (tmp_path / "keep.txt").write_text("a quick brown fox jumps over it. " * 4)
    return tmp_path


def test_from_a_pretrained_model_to_one_that_remembers(call, folder, monkeypatch):
    out = folder / "stacked"
    code, _, said = call(
        "stack", folder / "model", "--out", out, "--chunk", 8, "--chunk", 16, "--lr", 0.3
    )
    assert code == 0, said
    assert "2 blocks, 2 levels; a memory takes 0.0 MB" in said
    code, _, said = call("learn", out, "--data", folder / "text.txt", "--memory", "mine")
    assert code == 0, said
    first, last, without, now = map(float, re.findall(r" (\d\.\d{3}) ", said)[:4])
    assert now < without
    assert last <= first  # one block: the same
    assert "Forgotten: loss on its own samples" in said
    assert "tokens/s" in said

    model = load_stack(out)
    session = Session(model, out / "memories" / "mine", cli.stacking.words_of(out))
    assert session.memory.position == 520
    assert session.history[0]["source"] == "text.txt"
    assert "mine   │ 520" in call("memory", "list", out)[1]
    shown = call("memory", "show", out, "mine")[1]
    assert "learn: begin 0, learned 519" in shown

    assert call("memory", "fork", out, "mine", "copy")[0] == 0
    assert call("memory", "reset", out, "copy", "--level", 1)[0] == 0
    table = call("memory", "diff", out, "mine", "copy")[1]
    assert re.search(r"│ 0 +│ 0\.0000 │ 0\.0000|│ 0 .*0\.0000 +│ (1\.0000|nan)", table)

    lines = iter(["the key", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, _, said = call("chat", out, "--memory", "mine", "--tokens", 5)
    assert code == 0, said
    assert "learn: begin 520" in call("memory", "show", out, "mine")[1]

    assert call("memory", "export", out, "mine", "--out", folder / "plain")[0] == 0
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    session.load()
    probe = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = model(probe, session.memory).logits
        assert (plain(probe).logits - expected).abs().max() < 1e-4
    assert call("memory", "merge", out, "mine", "--level", 1, "--out", folder / "merged")[0] == 0
    merged = load_stack(folder / "merged")
    there = Session(merged, folder / "merged" / "memories" / "mine")
    with torch.no_grad():
        assert (merged(probe, there.memory).logits - expected).abs().max() < 1e-4


def test_training_how_it_learns_is_kept_in_the_folder(call, folder):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 8, "--lr", 0.05)
    before = load_stack(out)
    code, _, said = call(
        "stack", "train", out, "--data", folder / "text.txt", "--keep", folder / "keep.txt",
        "--steps", 2, "--length", 32, "--batch", 1, "--start-values",
    )  # fmt: skip
    assert code == 0, said
    assert "step 2/2: loss while learning" in said
    assert "on the text to keep" in said
    after = load_stack(out)
    assert not torch.equal(before.lr[0], after.lr[0])
    assert len(after.starts) == 6
    assert after.fingerprint != before.fingerprint
    assert len(list(out.glob("rates-*"))) == 1
    (out / "base" / "config.json").unlink()
    (out / "stack.json").write_text((out / "stack.json").read_text().replace("rates-", "../"))
    with pytest.raises(ValueError, match="has been altered"):
        load_stack(out)


def test_an_anchor_holds_what_is_forgotten_down(call, folder):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 8, "--lr", 0.5)
    forgotten = {}
    for name, options in (("free", ()), ("held", ("--anchor", 30))):
        code, _, said = call(
            "learn", out, "--data", folder / "text.txt", "--memory", name, *options
        )
        assert code == 0, said
        line = next(line for line in said.splitlines() if line.startswith("Forgotten"))
        forgotten[name] = float(line.split()[-2].rstrip("."))
    assert forgotten["held"] < forgotten["free"]


def test_a_text_that_harms_is_taken_back(call, folder):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 4, "--lr", 0.9)
    (folder / "bad.txt").write_text("qzx." * 80)
    code, _, said = call(
        "learn", out, "--data", folder / "bad.txt", "--memory", "mine",
        "--keep", folder / "keep.txt", "--tolerance", 0.0,
    )  # fmt: skip
    assert code == 0, said
    assert "1 of 1 blocks were taken back: they harmed the text to keep" in said


def test_errors_are_one_line(call, folder, monkeypatch):
    out = folder / "stacked"
    (folder / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / "two" / name).write_bytes(b"GGUF")
    monkeypatch.setattr(stacked, "find_spec", lambda name: None)
    for args, message in (
        (("stack", folder / "two", "--out", out), "name one of a.gguf, b.gguf"),
        (("stack", folder / "two" / "a.gguf", "--out", out), "pip install gguf"),
        (("stack", folder / "two" / "c.gguf", "--out", out), "no file"),
        (("learn", out, "--data", "x", "--memory", "m"), "no stacked model in"),
        (("stack", folder / "model", "--out", folder), "is there already"),
        (("stack", folder / "model", "--out", out, "--chunk", 4, "--chunk", 6), "multiple of 4"),
        (("stack", folder / "model", "--out", out, "--lr", 0.1, "--lr", 0.1, "--lr", 0.1), "3 ste"),
        (("memory", "show", out, "../x"), "no memory's name"),
        (("memory", "show", out, "mine"), "no memory in"),
    ):
        code, _, said = call(*args)
        assert code == 2, said
        assert message in said
        assert said.count("\n") == 1
    assert not out.exists()


def test_help_shows_an_example(call):
    for command in ("stack", "learn", "chat", "memory"):
        code, out, _ = call(command, "--help")
        assert code == 0
        assert "Example:" in out
