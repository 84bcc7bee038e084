"""The README's code runs as it stands there, in its order."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]


def test_the_blocks_are_found():
    assert len(PYTHON) == 4
    assert 'pip install -e ".[test]" && pytest' in COMMANDS
    assert "pip install -e . && nestlearn quickstart" in COMMANDS


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:30])
def test_python_blocks_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_commands_run_in_their_order(tmp_path):
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text("def main():\n    return 'a line of text'\n" * 300)
    lines = [line for line in COMMANDS if line.startswith("nestlearn ")]
    assert len(lines) == 5
    program = Path(sys.executable).with_name("nestlearn")
    for line in lines:
        done = subprocess.run(
            [program, *shlex.split(line)[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "runs/first/model/model.safetensors").is_file()


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).is_file(), target
