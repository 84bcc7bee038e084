"""Closed-book questions through the runner, on a model of random weights."""

import sys
from pathlib import Path

import pytest

from nestlearn.experiments import closed_book, runner
from nestlearn.learn import study
from nestlearn.learn.questions import Question

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import pretrained


def test_every_way_of_reading_is_asked_and_measured(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pretrained model in model/"):
        runner.run("closed-book", tmp_path / "out", data=str(tmp_path))
    pretrained(tmp_path / "model")
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("a line of text that is kept. " * 40)
    asked = [Question("Who is the mayor?", "Bram", "The mayor is Bram."),
             Question("What is the mayor called?", "Bram", "The mayor is Bram.")]  # fmt: skip
    monkeypatch.setattr(study, "ask", lambda *_: asked)
    monkeypatch.setattr(closed_book, "SAID", 3)
    text = runner.run(
        "closed-book", tmp_path / "out", data=str(tmp_path), quick=True, workers=0,
        progress=False, device="cpu",
    )  # fmt: skip
    for name in closed_book.ROWS:
        assert f"| {name} | developed on | " in text
    assert "wikitext, nats" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| nothing read"))
    assert row.count("| 0.000 ") >= 2  # what was not learned cost nothing
