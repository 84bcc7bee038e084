"""The way from `nestlearn train` to the arithmetic of a chunk: short, and as it is told."""

import re
import sys
from pathlib import Path

import pytest

import nestlearn
from nestlearn.scan import generated, plain_spans

PACKAGE = Path(nestlearn.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
MOST = 10


def on_the_stack() -> list[tuple[str, str]]:
    """(file, function) of the package's frames, the command's first. What calls the function that
    it decorates is no step of the way.
    """
    found, frame = [], sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and "_uncompiled" not in frame.f_code.co_qualname:
            found.insert(0, (path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))
        frame = frame.f_back
    return found[found.index(("cli/training.py", "train")) :]


@pytest.fixture
def ways(tmp_path, call, monkeypatch, unchecked) -> dict[str, list[tuple[str, str]]]:
    """By the file that computes, the frames of a training step down to the first one in it."""
    ways: dict[str, list[tuple[str, str]]] = {}

    def watched(module, name, file):
        before = getattr(module, name)

        def watch(*args):
            frames = on_the_stack()
            first = [path for path, _ in frames].index(file)
            ways.setdefault(file, frames[: first + 1])
            if len(ways) == 2:
                raise ValueError("all is seen")
            return before(*args)

        monkeypatch.setattr(module, name, watch)

    watched(generated, "_forward", "scan/generated.py")
    watched(plain_spans, "_systems", "scan/plain_spans.py")
    text = tmp_path / "text.txt"
    text.write_text("What learns, learns what it reads. " * 100)
    small = ["--steps", "1", "--batch", "1", "--length", "64", "--device", "cpu"]
    _, out, err = call("train", "--data", text, "--out", tmp_path / "run", *small)
    assert "all is seen" in out + err
    return ways


def test_ten_frames_and_no_file_is_come_back_to(ways):
    assert ways.keys() == {"scan/generated.py", "scan/plain_spans.py"}
    for frames in ways.values():
        assert len(frames) <= MOST, frames
        files = [file for file, _ in frames]
        assert all(file not in files[:i] for i, file in enumerate(files) if file != files[i - 1])
    told = re.findall(r"^(\S+\.py) +(\S+)  ", PAGE.read_text(encoding="utf-8"), re.M)
    titans, level = ways["scan/generated.py"], ways["scan/plain_spans.py"]
    shared = next(i for i, pair in enumerate(zip(titans, level)) if len(set(pair)) > 1)
    assert told == titans + level[shared:]
