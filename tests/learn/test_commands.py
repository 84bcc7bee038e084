"""The commands of stacked models, from a pretrained model's folder to one that remembers."""

import gzip
import re

import pytest
import torch
from people import LETTERS, base
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nestlearn import DeltaLevel, Session, cli
from nestlearn.cli import stacked
from nestlearn.hf.folder import load_stack
from nestlearn.learn import study
from nestlearn.learn.questions import Question


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
    assert "Memory mine: new, nothing read yet; it will take" in said
    without, now = map(float, re.search(r"on the text: (.+) before, (.+) after\.", said).groups())
    assert now < without
    assert "As it was met" not in said  # one block: nothing to compare
    assert "Forgotten: loss on its own samples" in said
    assert "tokens/s" in said
    assert re.search(r"0\.0 MB\): 520 tokens learned in \d+\.\d seconds, 520 in all", said)

    model = load_stack(out)
    session = Session(model, out / "memories" / "mine", cli.stacking.words_of(out))
    assert session.memory.position == 520
    assert session.history[0]["source"] == "text.txt"
    assert "mine   │ 520" in call("memory", "list", out)[1]
    shown = call("memory", "show", out, "mine")[1]
    assert "learn: begin 0, learned 519" in shown

    assert call("memory", "fork", out, "mine", "copy")[0] == 0
    code, _, said = call("memory", "fork", folder / "stacked", "nobody", "copy")  # reads nothing
    assert (code, "copy is there already, a memory: give another name" in said) == (2, True)
    assert call("memory", "reset", out, "copy", "--level", 1)[0] == 0
    table = call("memory", "diff", out, "mine", "copy")[1]
    assert re.search(r"│ 0 +│ 0\.0000 │ 0\.0000|│ 0 .*0\.0000 +│ (1\.0000|nan)", table)
    a_copy_is_deleted(call, out, monkeypatch)

    lines = iter(["the key", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, _, said = call("chat", out, "--memory", "mine", "--tokens", 5)
    assert code == 0, said
    assert re.search(
        r"Memory mine: 520 tokens read in 1 parts since \d\d \w+ \d{4}, the last from text\.txt; "
        r"its weights have moved by \d+\.\d\d%; 0\.0 MB\. It learns from your words\.", said
    )  # fmt: skip
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


def a_copy_is_deleted(call, out, monkeypatch):
    """And not `mine`, of which it is one."""
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda *_, **__: next(answers))
    code, _, said = call("memory", "delete", out, "copy")
    assert (code, said.count("Nothing was deleted.")) == (1, 1)
    code, _, said = call("memory", "delete", out, "copy", "nobody", "--yes")  # all or none
    assert (code, "no memory in" in said, (out / "memories" / "copy").is_dir()) == (2, True, True)
    code, _, said = call("memory", "delete", out, "copy")
    assert (code, "copy: deleted, 0.0 MB freed." in said) == (0, True)
    assert [path.name for path in (out / "memories").iterdir()] == ["mine"]
    elsewhere = out.parent / "elsewhere"
    (out / "memories").rename(elsewhere)
    (out / "memories").symlink_to(elsewhere)
    code, _, said = call("memory", "delete", out, "mine", "--yes")
    assert (code, "is a link out of" in said) == (2, True)
    (out / "memories").unlink()
    elsewhere.rename(out / "memories")


def test_a_text_of_several_blocks_is_also_measured_as_it_is_met(call, folder, monkeypatch):
    monkeypatch.setattr("nestlearn.cli.reading.BLOCK", 64)
    monkeypatch.setattr("nestlearn.cli.reading.SAMPLE", 64)
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 16, "--lr", 0.3)
    for _ in range(2):
        _, _, said = call(
            "learn", out, "--data", folder / "text.txt", "--memory", "mine", "--tokens", 150
        )
    text = re.search(
        r"its last 64 tokens\): (.+) before, (.+) after; without a memory (.+)\.", said
    )
    before, after, without = map(float, text.groups())
    assert max(before, after) < without
    met = re.search(r"As it was met, .+: (.+) in its first 64 tokens, (.+) in its last 22", said)
    assert float(met[2]) < without


def test_a_memory_that_is_only_read_stays_as_it_is(call, folder, monkeypatch):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 8)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, _, said = call("chat", out, "--memory", "mine", "--read-only")
    assert (code, "no memory in" in said) == (2, True)
    call("learn", out, "--data", folder / "keep.txt", "--memory", "mine")
    before = (out / "memories" / "mine" / "memory.json").read_bytes()
    lines = iter(["the key", "x" * 100, ""])
    code, _, said = call("chat", out, "--memory", "mine", "--read-only", "--tokens", 3)
    assert code == 0, said
    assert "It learns from nothing." in said
    assert (out / "memories" / "mine" / "memory.json").read_bytes() == before
    code, _, said = call("chat", out, "--memory", "mine", "--read-only", "--learn", "user")
    assert (code, "--learn user with --read-only" in said) == (2, True)


def test_what_goes_wrong_in_a_chat_does_not_end_it(call, folder, monkeypatch):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 8)
    lines = iter(["the key", "the mat", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat = Session.chat

    def fail_once(self, message, **options):
        if message == "the key":
            raise ValueError("too long")
        return chat(self, message, **options)

    monkeypatch.setattr(Session, "chat", fail_once)
    code, _, said = call("chat", out, "--memory", "mine", "--tokens", 3)
    assert code == 0
    assert "Error: too long" in said
    assert "learn: begin 0" in call("memory", "show", out, "mine")[1]


def test_names_are_shown_as_they_are(call, folder):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 8)
    source = folder / "x [draft] [/b].txt"
    (folder / "text.txt").rename(folder / "x [draft] [b].txt")
    names = ["[bold]b", "notes[1]"]
    for name in names:
        code, _, said = call(
            "learn", out, "--data", folder / "x [draft] [b].txt", "--memory", name, "--tokens", 20
        )
        assert code == 0, said
        assert f"Memory {name}: new" in said
    one = Session(load_stack(out), out / "memories" / names[0])
    one.learn(torch.tensor([[3, 4]]), source=source.name)
    one.save()
    code, shown, _ = call("memory", "list", out)
    assert code == 0
    assert all(name in shown for name in (*names, source.name, "x [draft] [b].txt"))
    (out / "memories" / "[i]stray").write_text("no memory")
    assert "[i]stray" in call("memory", "list", out)[1]
    assert names[0] in call("memory", "show", out, names[0])[1]
    shown = call("memory", "diff", out, *names)[1]
    assert all(name in shown for name in names)


def test_texts_are_read_whole_or_named(call, folder):
    out, memories = folder / "stacked", iter("abcdefgh")
    call("stack", folder / "model", "--out", out, "--chunk", 8)
    (folder / "many").mkdir()
    (folder / "many" / "a.txt").write_bytes(b"\xef\xbb\xbfthe key")
    (folder / "many" / "b.txt.gz").write_bytes(gzip.compress(b"the mat"))
    (folder / "many" / "latin.txt").write_bytes("schön".encode("latin-1"))

    def learn(path):
        code, _, said = call("learn", out, "--data", path, "--memory", next(memories))
        return code, " ".join(said.split())

    code, said = learn(folder / "many")
    assert code == 0, said
    assert "15 tokens learned" in said  # no mark of the byte order, one newline between
    assert "1 files in" in said
    assert "latin.txt is not UTF-8 text" in said
    code, said = learn(folder / "many" / "latin.txt")
    assert (code, "latin.txt is not UTF-8 text; convert it" in said) == (2, True)
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"the mat" * 20)[:-9])
    code, said = learn(folder / "cut.txt.gz")
    assert (code, "cut.txt.gz is a damaged .gz file" in said) == (2, True)
    (folder / "empty").mkdir()
    code, said = learn(folder / "empty")
    assert (code, "no text in" in said) == (2, True)


def test_a_place_that_cannot_be_written_is_refused_before_learning(call, folder):
    out = folder / "stacked"
    call("stack", folder / "model", "--out", out, "--chunk", 8)
    (out / "memories").write_text("a file")
    code, _, said = call("learn", out, "--data", folder / "text.txt", "--memory", "mine")
    assert (code, "cannot be a memory's folder" in said) == (2, True)
    assert "tokens/s" not in said


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
        (("learn", folder / "model", "--data", "x", "--memory", "m"), "model --out stacked"),
        (("memory", "list", out), "no stacked model in"),
        (("memory", "show", out, "../x"), "no memory's name"),
        (("memory", "show", out, "mine"), "no memory in"),
        (("memory", "delete", out, "mine", "--yes"), "no stacked model in"),
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


def test_a_text_too_short_to_be_written_says_so(call, folder):
    out = folder / "stacked"
    assert call("stack", folder / "model", "--out", out)[0] == 0
    assert load_stack(out).config.levels == (DeltaLevel(64), DeltaLevel(512))  # one default
    (folder / "short.txt").write_text((folder / "text.txt").read_text()[:12])
    code, _, said = call("learn", out, "--data", folder / "short.txt", "--memory", "mine")
    assert code == 0, said
    assert "No level has written anything yet: the fastest does every 64 tokens." in said


def test_a_text_is_studied_without_being_read(call, folder, monkeypatch):
    asked = [Question("where is the key", "under the mat", "the key is under the mat.")] * 2
    monkeypatch.setattr(study, "ask", lambda *_: asked)
    monkeypatch.setattr(study, "by_name", lambda *_: [])
    out = folder / "stacked"
    assert call("stack", folder / "model", "--out", out, "--chunk", 8)[0] == 0
    given = ("study", out, "--data", folder / "text.txt", "--memory", "mine")
    code, _, said = call(*given, "--questions", 2)
    assert code == 0, said
    assert "new, nothing read yet" in said
    assert re.search(r"Studied in \d+ seconds: 2 questions", said)
    found = Session(load_stack(out), out / "memories" / "mine")
    (told,) = found.history
    assert found.memory.position == 0
    assert (told["what"], told["source"], told["begin"]) == ("study", "text.txt", 0)
    code, _, said = call(*given)
    assert code == 0, said
    assert "0 tokens read in 0 parts, 1 studied" in " ".join(said.split())


def test_a_text_is_read_and_then_studied(call, folder, monkeypatch):
    asked = [
        Question("where is the key", "under the mat", "the key is under the mat."),
        Question("what is under the mat", "the key", "the key is under the mat."),
    ]
    monkeypatch.setattr(study, "ask", lambda *_: asked)
    monkeypatch.setattr(study, "by_name", lambda *_: [])
    out = folder / "stacked"
    assert call("stack", folder / "model", "--out", out, "--chunk", 8)[0] == 0
    learn = ("learn", out, "--data", folder / "text.txt", "--memory", "mine", "--study")
    code, _, said = call(*learn, "--questions", 2)
    assert code == 0, said
    shown = re.search(r"Studied in \d+ seconds: 2 questions, \d times\. (.+)", said)
    assert shown, said
    now, before = map(float, re.search(r"it is (\S+) nats [^,]+, (\S+) before", said).groups())
    assert now <= before
    assert said.count("Forgotten: loss on its own samples") == 2
    assert "study" in call("memory", "show", out, "mine")[1]
    code, _, said = call(*learn[:-1], "--questions", 2)
    assert (code, "add --study" in said) == (2, True)
    monkeypatch.setattr(study, "ask", lambda *_: [])
    code, _, said = call(*learn)
    assert code == 2
    assert "found no question that the text answers" in " ".join(said.split())
