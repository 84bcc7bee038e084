"""Shapes are law here: memory and scan run with their annotations enforced."""

import atexit
import functools
import gc
import inspect
import os
import re
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import config, install_import_hook

gc.disable()  # until all is imported and collected: none of that is garbage
torch.set_num_threads(1)  # two workers share two cores; and one thread is reproducible
os.environ["OMP_NUM_THREADS"] = "1"  # what they start, too: a second thread waits, and busily
_SHAPE = re.compile(r"""\[[\w.]+, ["']""")  # as in Float[Tensor, "*b T K"]


def _checked(*, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """What the hook puts around a function. Where shapes are said, what their letters mean is
    jaxtyping's for the time of a call, and beartype checks arguments and result, once each; other
    types beartype checks by itself. What a function defines inside, without shapes, has no check:
    each call would compile one anew.
    """

    def decorate(f):
        annotations = getattr(f, "__annotations__", {}).values()
        shapes = any(_SHAPE.search(str(kind)) for kind in annotations)
        if not inspect.isfunction(f) and (shapes or isinstance(f, type)):
            return jaxtyped(f, typechecker=typechecker)
        if shapes:
            return _with_letters(f, jaxtyped)
        return f if "<locals>" in f.__qualname__ else beartype(f)

    return decorate


def _with_letters(f, jaxtyped):
    checked = beartype(f)

    @functools.wraps(f)
    def call(*args, **kwargs):
        if config.jaxtyping_disable:
            return f(*args, **kwargs)
        with jaxtyped("context"):
            return checked(*args, **kwargs)

    return call


jaxtyping.jaxtyped = _checked
_hook = install_import_hook(["nestlearn.memory", "nestlearn.scan"], "beartype.beartype")
ROOT = Path(__file__).parents[1]
LONG = ("test_compile.py", "test_numerics.py")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def pytest_addoption(parser):
    parser.addoption(
        "--data", type=Path, default=ROOT.parent / "shared" / "data",
        help="folder with models/stories260K.bin, books/ ... (default: ../shared/data)",
    )  # fmt: skip
    parser.addoption("--transformers", type=Path, help="folder of transformers' unpacked sdist")


def pytest_collection_modifyitems(items):
    """The longest files first: one that is begun last keeps one worker when the other has ended."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    """What stands now stays: it is looked through no more at each search for garbage."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)
    gc.enable()


def pytest_unconfigure():
    # libraries look at their end for what was left; pytest itself, before, for what tests left
    atexit.register(gc.unfreeze)


@pytest.fixture(scope="session")
def shared_data(request) -> Path:
    """The folder with data sets and a small pretrained model, which are not part of the project."""
    folder = request.config.getoption("--data")
    if not (folder / "models" / "stories260K.bin").is_file():
        pytest.skip(f"{folder} holds no models/stories260K.bin: give the folder with --data")
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """Annotations are not enforced: for long work, of which that takes half the time."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `nestlearn ...` in this process; returns exit code, stdout, stderr."""
    from nestlearn import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["nestlearn", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "100")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        return stop.value.code, ANSI.sub("", shown.out), ANSI.sub("", shown.err)

    return run
