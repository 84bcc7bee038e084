"""The house: what importing costs, what is exported, which door is open."""

import subprocess
import sys

import pytest

import nestlearn


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_importing_the_package_loads_no_heavy_library():
    heavy = ["triton", "transformers", "accelerate", "datasets", "matplotlib", "rich", "typer"]
    report = f"print('|', *[m for m in {heavy} if m in sys.modules])"
    used = "from nestlearn import HopeLM, TrainConfig, levels"
    said = " ".join(python(f"import sys, nestlearn; {report}; {used}; {report}"))
    _, first, loaded = said.split("|")
    assert first.strip() == ""
    assert not {"transformers", "accelerate", "datasets", "matplotlib"} & set(loaded.split())


def test_every_public_name_is_there():
    for name in nestlearn.__all__:
        assert getattr(nestlearn, name) is not None
        assert name in dir(nestlearn)
    assert nestlearn.state.leaves([1]) == [("0", 1)]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Transformer"):
        _ = nestlearn.Transformer


def test_rooms_import_downwards_only():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "8 kept, 0 broken" in done.stdout
