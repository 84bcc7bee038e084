"""The README's code runs as it stands there, in its order; `commands.py` runs that of all pages."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import commands

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
PYTHON = {name: code for name, code in commands.programs().items() if "optimizers" not in name}


def test_the_blocks_are_found():
    assert sum(language == "python" for language, _ in BLOCKS) == 3
    assert len(PYTHON) == 5
    assert 'pip install -e ".[test]" && pytest' in COMMANDS
    assert "pip install -e . && nestlearn quickstart" in COMMANDS


@pytest.mark.parametrize("code", PYTHON.values(), ids=PYTHON)
def test_python_blocks_run(code, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})


def test_commands_run_in_their_order(tmp_path, monkeypatch, call, unchecked):
    monkeypatch.chdir(tmp_path)
    commands.texts(tmp_path)
    lines = [line for line in COMMANDS if line.startswith("nestlearn ")]
    assert len(lines) == 3
    shorter = {"train": "--batch 2 --length 64", "generate": "--tokens 9"}
    for line in lines:
        line += " " + shorter.get(line.split()[1], "")  # `commands.py` runs all of it
        code, _, said = call(*shlex.split(line)[1:])
        assert code == 0, f"{line}\n{said}"
    assert (tmp_path / "runs/first/model/model.safetensors").is_file()


def test_every_command_of_every_page_is_known():
    """Add a new one to tests/commands.py, in a short form if it is long."""
    assert set(commands.commands()) == {*commands.FORMS, *commands.AS_WRITTEN}


def test_a_command_in_a_shell_of_its_own(tmp_path):
    line = "nestlearn serve --help"
    good = commands.run(line, "README.md", commands.form(line), tmp_path)
    assert (good.code, good.ran) == (0, line)
    assert "--max-seconds" in good.last
    bad = commands.run("no", "README.md", commands.Form("echo out; echo why >&2; exit 3"), tmp_path)
    assert (bad.code, bad.last) == (3, "why")
    left = commands.run("gpu", "README.md", commands.Form(why="needs a GPU"), tmp_path)
    assert (left.code, left.last) == (None, "not run: needs a GPU")
    assert "| README.md | `no` | `echo out; echo why >&2; exit 3` | 3 |" in commands.table([bad])
    mended = commands.renewed(commands.table([good, bad]), commands.table([bad._replace(code=0)]))
    assert mended == commands.table([good, bad._replace(code=0)])
    with pytest.raises(KeyError):
        commands.form("nestlearn unheard-of --now")


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).is_file(), target


def test_this_python_has_the_command():
    assert Path(sys.executable).with_name("nestlearn").is_file()
