"""The command line: help at once, errors as one line, and a model trained and read."""

import ast
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from nestlearn import cli
from nestlearn.train import TrainConfig

SMALL = ["--steps", "4", "--batch", "2", "--length", "16", "--device", "cpu"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return path


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['nestlearn', '--help']\n"
        "from nestlearn.cli import main\n"
        "try: main()\n"
        "finally: print('loaded', sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded []" in done.stdout
    assert "Train a model on text" in done.stdout
    assert time.perf_counter() - began < 5  # about 0.2 s; the rest is for a busy machine


def test_help_names_every_option(call):
    code, out, _ = call("train", "--help")
    assert code == 0
    for option in ("data", "out", "resume", "size", "mixer", "channel", "steps", "batch", "length"):
        assert f"--{option} " in out
    for option in ("lr", "seed", "dtype", "device", "tokenizer", "stream"):
        assert f"--{option} " in out
    assert "kill -9" in out
    code, out, _ = call("generate", "--help")
    assert code == 0
    for option in ("prompt", "tokens", "temperature", "top-k", "seed"):
        assert f"--{option} " in out


def test_defaults_are_those_of_the_library():
    given = inspect.signature(cli.training.train).parameters
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name in given]
    assert len(fields) == 13
    for field in fields:
        assert given[field.name].default == field.default, field.name


def assert_one_line(shown, *parts):
    code, out, err = shown
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert err.count("Error") == 1
    last = err.splitlines()[-1]
    assert last.startswith("Error: ")
    for part in parts:
        assert part in last


def test_foreseen_errors_are_one_line(call, tmp_path, text):
    out = ("--out", tmp_path / "run")
    assert_one_line(call("train", "--data", tmp_path / "absent", *out), "absent", "no such file")
    assert_one_line(call("train", "--data", text, *out, "--lr", "-1"), "lr=-1.0", "choose")
    assert_one_line(call("train", "--data", text, *out, "--steps", "0"), "steps=0", "choose")
    assert_one_line(call("train", "--data", text, *out, "--length", "0"), "length=0", "choose")
    tokenizer = ("--tokenizer", tmp_path / "absent.json")
    assert_one_line(call("train", "--data", text, *out, *tokenizer), "absent.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("two\n  lines [red]"), "Error: two lines [red]\n"),
        (FloatingPointError("nan at step 3"), "Error: nan at step 3\n"),
        (OSError(28, "No space left on device", "/disk"), "No space left on device: '/disk'\n"),
        (ImportError('pip install "nestlearn[tokenizer]"'), '"nestlearn[tokenizer]"\n'),
    ],
    ids=["value", "float", "disk", "extra"],
)
def test_any_command_is_wrapped(call, monkeypatch, error, shown):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    result = call()
    assert_one_line(result)
    assert result[2].endswith(shown)


def test_a_bug_is_not_hidden(call, monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        call()


def test_wrong_usage_exits_with_2(call):
    code, _, err = call("train", "--data", "x")
    assert code == 2
    assert "--out" in err
    code, _, err = call("train", "--data", "x", "--out", "y", "--mixer", "magic")
    assert code == 2
    assert "magic" in err


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0
    assert re.fullmatch(r"nestlearn \d+\.\d+\.\d+\S*\n", out)


# ---------------------------------------------------------------------------- end to end


@pytest.fixture
def hope():
    return importlib.import_module("nestlearn.models.hope")


def test_train_and_generate(call, hope, tmp_path, text):
    run = tmp_path / "run"
    code, out, err = call("train", "--data", text, "--out", run, *SMALL)
    assert code == 0, err
    assert out == ""
    assert "bits per byte" in err
    assert (run / "loss.png").is_file()
    assert_one_line(call("train", "--data", text, "--out", run, *SMALL), "already holds a run")
    code, _, err = call("train", "--data", text, "--out", run, *SMALL, "--resume")
    assert code == 0, err

    texts = []
    for source, seed in ((run, 0), (run / "model", 0), (run, 1)):
        code, out, err = call(
            "generate", source, "--prompt", "the ", "--tokens", 12, "--seed", seed
        )
        assert code == 0, err
        assert out.startswith("the ")
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]
    greedy = ("--temperature", 0, "--tokens", 5)
    assert call("generate", run, "--prompt", "the ", *greedy)[0] == 0
    assert_one_line(call("generate", run, "--prompt", ""), "prompt is empty")
    assert_one_line(call("generate", tmp_path, "--prompt", "x"), "no model in")
    (run / "model").rename(tmp_path / "elsewhere")
    assert_one_line(call("generate", run, "--prompt", "x"), "not finished")
    assert call("generate", tmp_path / "elsewhere", "--prompt", "x", "--tokens", 1)[0] == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_another_encoding_gets_what_it_can_show(hope, monkeypatch, tmp_path, encoding):
    torch.manual_seed(0)
    config = hope.HopeConfig(dim=16, layers=1, heads=2)
    hope.HopeLM(config).save_pretrained(tmp_path)

    def call(*args):
        shown = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(shown, encoding, write_through=True))
        monkeypatch.setattr(sys, "argv", ["nestlearn", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, shown.getvalue()
        return shown.getvalue().decode(encoding, errors="replace")

    options = ("--tokens", 40, "--temperature", 3)
    assert call("generate", tmp_path, "--prompt", "the ", *options).startswith("the ")
    assert "Level" in call("levels", tmp_path).title()
    assert json.loads(call("levels", tmp_path, "--json"))
    assert "train" in call("--help")


def test_no_file_is_written_in_the_consoles_encoding():
    """Of our files each names its own: a table with a ± would be lost after hours of training."""
    folder = os.path.dirname(cli.__file__)
    for parent, _, names in os.walk(folder):
        for name in (name for name in names if name.endswith(".py")):
            with open(os.path.join(parent, name), encoding="utf-8") as file:
                tree = ast.parse(file.read())
            for node in ast.walk(tree):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr in ("read_text", "write_text"):
                    given = [keyword.arg for keyword in node.keywords]
                    assert "encoding" in given, f"{name}:{node.lineno}"


def test_the_tokenizer_travels_with_the_model(call, hope, tmp_path, text):
    tokenizers = importlib.import_module("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", *sorted(set(text.read_text().split()))])}
    coder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    coder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    coder.save(str(tmp_path / "words.json"))
    options = ("--out", tmp_path / "run", "--tokenizer", tmp_path / "words.json", *SMALL)
    code, _, err = call("train", "--data", text, *options)
    assert code == 0, err
    (tmp_path / "words.json").unlink()
    code, out, err = call("generate", tmp_path / "run", "--prompt", "quick brown", "--tokens", 4)
    assert code == 0, err
    assert out.startswith("quick brown ")
    assert set(out.split()) <= words.keys()


def test_an_interrupt_exits_with_130(call, hope, monkeypatch, tmp_path, text):
    forward = hope.HopeLM.forward

    def interrupted(self, *args, **kwargs):
        if torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(hope.HopeLM, "forward", interrupted)
    code, _, err = call("train", "--data", text, "--out", tmp_path / "run", *SMALL)
    assert code == 130
    assert "stopped after step 1 of 4" in err
    assert "--resume" in err
    assert "Traceback" not in err


# -------------------------------------------------------------------------------- levels


@pytest.fixture
def model(hope):
    from nestlearn.options import Continuum, Level

    levels = Continuum((Level(chunk=16), Level(chunk=64), Level()))
    return hope.HopeLM(hope.HopeConfig(dim=16, layers=2, heads=2, channel=levels))


def periods(shown):
    code, out, err = shown
    assert code == 0, err
    return [level["period"] for level in json.loads(out)]


def test_levels_of_a_model_and_of_a_run(call, model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    code, out, err = call("levels", tmp_path / "run" / "model")
    assert code == 0, err
    assert "Level 1 · every token · of each sample" in out
    assert "Level 4 · never updated · shared by all samples" in out
    assert "AdamW" not in out
    assert periods(call("levels", tmp_path / "run" / "model", "--json")) == [1, 16, 64, None]

    config = {"train": {"batch": 4, "length": 48}, "model": model.config.to_dict()}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert periods(call("levels", tmp_path / "run", "--json")) == [1, 16, 64, 192, 192]
    code, out, err = call("levels", tmp_path / "run")
    assert code == 0, err
    assert "AdamW: first moment m" in out
    assert "CMS MLP 2 is never written in training" in err
    assert "64 is longer than the windows of 48" in err
    assert "CMS MLP 1" not in err


def test_levels_errors(call, tmp_path):
    assert_one_line(call("levels", tmp_path), "no run or model in", "config.json")
    for text in ("{", "[]", '{"format": "other"}', '{"train": {}, "model": {"dim": 0}}'):
        (tmp_path / "config.json").write_text(text)
        assert_one_line(call("levels", tmp_path), "config.json describes no run or model")


# ---------------------------------------------------------------------------- quickstart


@pytest.fixture
def long_text(tmp_path):
    lines = [f"line {i}: {i} times {i} is {i * i}, and so it goes on" for i in range(400)]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def language(monkeypatch):
    language = importlib.import_module("nestlearn.experiments.language")
    sizes = importlib.import_module("nestlearn.models.config").SIZES
    monkeypatch.setitem(sizes, "tiny", (32, 1, 2))
    return language


def test_quickstart_trains_shows_and_reads_back(
    call, language, monkeypatch, tmp_path, text, long_text
):
    out = tmp_path / "start"
    command = ("quickstart", "--quick", "--steps", 2, "--data", long_text, "--out", out)
    code, shown, err = call(*command)
    assert code == 0, err
    assert "2 steps of 4 × 128 bytes" in err
    assert "This takes about" in err
    for part in ("bits per byte at 128", "bits per byte at 512", "Try next"):
        assert part in shown
    records = json.loads((out / "results.json").read_text())
    assert [record["model"] for record in records] == ["Hope", "Transformer"]
    assert all(record["commit"] and record["config"]["code"] for record in records)
    for record in records:
        assert f"{record['detail']['bits_per_byte']['512']:.3f}" in shown
        assert f"{record['parameters']:,}" in shown
        assert f"─ {record['model']} ─" in shown
        assert f"│ {record['detail']['sample'].split()[0]} " in shown
    assert all(c.isprintable() or c == "\n" for c in shown)  # whatever bytes a model draws
    assert (out / "comparison.png").stat().st_size > 10_000
    assert f"nestlearn levels {out}/hope-seed0" in shown
    assert call("generate", out / "hope-seed0", "--prompt", "line", "--tokens", 1)[0] == 0
    assert periods(call("levels", out / "hope-seed0", "--json")) == [1, 4, 16, 64, 512, 512]

    def fail(*args, **kwargs):
        raise AssertionError("what is done was trained again")

    monkeypatch.setattr(language, "train", fail)
    again = call(*command)
    assert (again[0], again[1]) == (0, shown)
    assert "All of it is done" in again[2]
    assert_one_line(call(*command, "--steps", 3), "hope-seed0 holds other settings", "--out")
    other = ("--data", text, "--data", long_text)
    assert_one_line(call(*command, *other), "trained on other text (", "long.txt", "--out")


def test_quickstart_fails_before_it_trains(call, language, tmp_path, text):
    out = ("--out", tmp_path / "start")
    assert_one_line(call("quickstart", "--quick", "--data", text, *out), "shorter than one window")
    assert_one_line(call("quickstart", "--data", tmp_path / "absent", *out), "no such file")
    assert_one_line(call("quickstart", "--steps", 0, *out), "steps=0", "choose")
    assert call("quickstart", "--seeds", 0, *out)[0] == 2
    assert not (tmp_path / "start").exists()


def test_quickstart_stops_at_an_interrupt(call, language, monkeypatch, tmp_path, long_text):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(language, "train", interrupted)
    out = ("--out", tmp_path / "start")
    code, shown, err = call("quickstart", "--quick", "--data", long_text, *out)
    assert (code, shown) == (130, "")
    assert "the same command goes on" in err


# ---------------------------------------------------------------------------- eval, reproduce


def test_experiments_are_listed(call):
    for arguments in (("reproduce",), ("reproduce", "--list")):
        code, out, _ = call(*arguments)
        assert code == 0
        lines = {line.split()[0]: line for line in out.splitlines()}
        assert {"table4", "fig4", "frontier", "language", "stream"} < lines.keys()
        assert re.search(
            r"(hours?|minutes?) .* (hours?|minutes?) .*compression, recall", lines["table4"]
        )
    for command in (("eval", "formal"), ("reproduce",)):
        code, out, _ = call(*command, "--help")
        assert code == 0
        for option in ("only", "seeds", "steps", "workers", "device", "quick", "out"):
            assert f"--{option} " in out


def test_a_quick_evaluation_prints_its_scores_and_goes_on(call, tmp_path):
    options = ("--quick", "--steps", "2", "--workers", "0", "--device", "cpu", "--out", tmp_path)
    asked = ("eval", "formal", "--model", "lstm", "--only", "anbn", *options)
    code, out, err = call(*asked)
    assert code == 0, err
    assert "| LSTM | 0 / 0 |" in out
    assert "| *LSTM, paper* | 100 / 100 |" in out
    assert "anbn-lstm" in err
    assert (tmp_path / "results.json").is_file()
    code, again, err = call(*asked)
    assert (code, again) == (0, out)
    assert "anbn-lstm" not in err  # done, so not run
    assert "shows that it runs, not how good anything is" in err
    code, both, _ = call(
        "reproduce", "table5", "--models", "transformer", "--only", "anbn", *options
    )
    assert code == 0
    assert "| LSTM | 0 / 0 |" in both
    assert "| Transformer | " in both


def test_what_cannot_be_evaluated_is_one_line(call, tmp_path):
    assert_one_line(call("eval", "formal", "--model", tmp_path), "is a folder", "hope-attention")
    assert_one_line(call("eval", "mad", "--model", "rwkv"), "model 'rwkv' is unknown")
    assert_one_line(call("eval", "mqar", "--model", "lstm"), "lstm has no memory of a size")
    assert_one_line(call("reproduce", "table9"), "'table9' is unknown", "table4")
    assert_one_line(call("reproduce", "table5", "--only", "dyck"), "language 'dyck' is unknown")
    assert_one_line(call("reproduce", "table5", "--device", "abacus"), "device='abacus'")
