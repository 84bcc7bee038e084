"""Questions about long texts through the runner, on a model of random weights."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from nestlearn.experiments import fig7, runner

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import DATA, pretrained


def _write(folder: Path) -> None:
    def lines(path: str, rows: list[dict]) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        with gzip.open(folder / path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    (folder / "ruler_words").mkdir()
    (folder / "ruler_words" / "adjectivelist.txt").write_text("blue\nold\ntiny\nloud\n")
    (folder / "ruler_words" / "nounlist.txt").write_text("fox\nlamp\nriver\n")
    (folder / "books").mkdir()
    with gzip.open(folder / "books" / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("It was a day. " * 2000)
    qas = [{"question": "How many?", "answer": "1470"}]
    lines("qasper_subset/qasper_79papers.jsonl.gz", [{"text": "A paper.", "qas": qas}] * 3)
    rows = [{"context": f"Text {n}.\nQuestion: So {n}?\nAnswer: ", "continuation": "yes"}
            for n in range(8)]  # fmt: skip
    lines("lm_eval/pubmed_qa_labeled.jsonl.gz", rows)


def test_every_row_reads_and_is_asked(tmp_path, monkeypatch):
    pretrained(tmp_path / "model")
    _write(tmp_path)
    monkeypatch.setattr(fig7, "SAID", 3)
    monkeypatch.setattr(fig7, "QUICK_ASKED", 1)
    monkeypatch.setattr(fig7.needles, "ROOM", 0)
    # bytes as tokens: four needles and a question need more of them than a quick run has
    monkeypatch.setitem(fig7.needles.TASKS, "MK-NIAH-1", fig7.needles.Task("text"))
    text = runner.run(
        "fig7", tmp_path / "out", data=str(tmp_path), quick=True, workers=0, progress=False,
        device="cpu",
    )  # fmt: skip
    for row in fig7.ROWS:
        assert f"| {row} | " in text


@pytest.mark.skipif(not (DATA / "qasper_subset").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", fig7.SETS)
def test_questions_of_the_published_sets(name):
    def count(text):
        return len(text.split())

    asked = fig7.questions(DATA, name, count, 1000, 0, 12)
    assert len(asked) == 12
    assert asked == fig7.questions(DATA, name, count, 1000, 0, 12)
    validation = fig7.questions(DATA, name, count, 1000, 0, 12, validation=True)
    assert len({one.question for one in asked}) == 12
    assert not {one.text for one in asked} & {one.text for one in validation}
    assert all(one.text and one.question and one.answer for one in asked)
    if name == "MK-NIAH":
        assert all(one.answer in one.text for one in asked)


@pytest.mark.parametrize(
    ("answer", "said", "so"),
    [
        ("no", " No, it does not.", True), ("no", " I do not know.", False), ("yes", "eyes", False),
        ("maybe", "Yes, maybe.", False), ("1470 sentences", "It has 1470 sentences.", True),
        ("1470 sentences", "11470 sentences", False), ("147", "1470", False),
    ],
)  # fmt: skip
def test_an_answer_counts_as_whole_words(answer, said, so):
    assert fig7.right(answer, said) == so
