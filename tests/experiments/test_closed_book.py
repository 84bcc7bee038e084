"""Closed-book questions through the runner, on a model of random weights."""

import gzip
import sys
from pathlib import Path

import pytest

from nestlearn.experiments import closed_book, in_a_row, runner
from nestlearn.learn import study
from nestlearn.learn.questions import Question

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import pretrained


def test_pages_in_a_row_are_studied_by_one_memory_and_gone_on_with(tmp_path, monkeypatch):
    pretrained(tmp_path / "model")
    monkeypatch.setattr(study, "ask", lambda *_: [])
    monkeypatch.setattr(closed_book, "SAID", 3)
    options = {"data": str(tmp_path), "quick": True, "workers": 0, "progress": False,
               "device": "cpu", "models": ["studied, 8 earlier questions a step"]}  # fmt: skip
    told = []

    def stop(*given):
        told.append(given)
        if len(told) == 2:
            raise KeyboardInterrupt
        return [0.5, 0.25]

    with monkeypatch.context() as patched:
        patched.setattr(in_a_row, "_right", stop)
        with pytest.raises(KeyboardInterrupt):
            runner.run("in-a-row", tmp_path / "out", **options)
    (notes,) = (tmp_path / "out").glob("*/right.json")
    assert notes.read_text() == '{"after": [[0.5, 0.25]], "undone": [], "left": []}'
    text = runner.run("in-a-row", tmp_path / "out", **options)
    assert "| studied, 8 earlier questions a step | 2 | " in text
    detail = runner.read_records(tmp_path / "out" / "results.json")[0].detail
    assert detail["after"][0] == [0.5, 0.25]
    assert len(detail["after"]) == 2
    assert detail["cost"]["own"] != 0  # random weights that studied: further from what they were
    assert [pages for pages, *_ in detail["left"]] == [1, 2]
    assert len(detail["strayed"]) == 2
    assert (tmp_path / "out" / "in-a-row.png").is_file()


def test_every_way_of_reading_is_asked_and_measured(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pretrained model in model/"):
        runner.run("closed-book", tmp_path / "out", data=str(tmp_path))
    pretrained(tmp_path / "model")
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("a line of text that is kept. " * 40)
    (tmp_path / "lm_eval").mkdir()
    with gzip.open(tmp_path / "lm_eval" / "lambada_openai.jsonl.gz", "wt") as file:
        file.write('{"context": "A letter for the", "continuation": "mayor"}\n' * 3)
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
    assert "lambada, points" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| nothing read"))
    assert row.count("| 0.000 ") >= 2  # what was not learned cost nothing
