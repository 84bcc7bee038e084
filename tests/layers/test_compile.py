"""The tests of compiled.py, in a process without the runtime checks of conftest.py."""

import contextlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers import elsewhere


def run(file, said):
    """pytest's exit code; what it says is written."""
    with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        quiet = ["--noconftest", "-q", "-n", "0", "--show-capture=no", "-p", "no:cacheprovider"]
        return int(pytest.main([*quiet, str(file)]))


def test_compiled_layers(tmp_path):
    said = tmp_path / "said"
    code = elsewhere(run, Path(__file__).with_name("compiled.py"), said)
    assert code == 0, said.read_text()[-5000:]
