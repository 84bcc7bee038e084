"""Questions about long texts through the runner, on a model of random weights."""

import gzip
import json
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from nestlearn import DeltaLevel, stack_levels
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
        ("1470 sentences", "It has 1470 sentences.", 1), ("1470 sentences", "11470 sentences", 0),
        ("147", "1470", 0), ("147", "", 0),
    ],
)  # fmt: skip
def test_an_answer_counts_as_whole_words(answer, said, so):
    assert fig7.contained(answer, said) == so


@pytest.mark.parametrize(
    ("answer", "said", "share"),
    [
        ("the blue fox", " A blue fox\nand more", 1), ("blue fox", "the fox", 2 / 3),
        ("fox fox", "fox", 2 / 3), ("fox", "\nlamp\nfox", 0), ("fox", "", 0),
        ("68.2%", "68.8%", 0), ("0.7", "0.5", 0), ("BERT-base", "BERT-large", 0),
        ("dont", "don't", 1),
    ],
)  # fmt: skip
def test_words_of_a_line_count_without_articles(answer, said, share):
    assert fig7.overlap(answer, said) == pytest.approx(share)


def test_the_likelier_choice_is_said(tmp_path):
    pretrained(tmp_path / "model")
    base, tokenizer = fig7.pretrained.opened(tmp_path, "cpu")
    stacked = stack_levels(base, [DeltaLevel(8, lr=0.1, rule="dgd")], rank=2, window=40)
    texts, letters = [f"{letter} text" for letter in "abcdefgh"], "abcdefghijklm"
    prompts = [tokenizer.encode(f"{text}\nSo? ") for text in texts]
    logits = base(torch.tensor(prompts)).logits[:, -1, [tokenizer.encode(x)[0] for x in letters]]
    likelier = {
        (x, y): [x if row[i] > row[j] else y for row in logits]
        for (i, x), (j, y) in combinations(enumerate(letters), 2)
    }
    pair, wanted = next(item for item in likelier.items() if len(set(item[1])) == 2)
    asked = [fig7.Asked(text, "So?", pair[0], pair) for text in texts]
    assert fig7.answers(stacked, tokenizer, asked, 40, 40, learn=False) == wanted
