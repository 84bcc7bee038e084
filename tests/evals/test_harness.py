"""Sets of questions as they are shipped; lm-evaluation-harness counts what a model finds likely,
skipped where it is not installed.
"""

import bz2
import gzip
import json
import sys
from pathlib import Path

import pytest

from nestlearn.evals import harness
from nestlearn.evals.harness import Question

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import DATA


@pytest.fixture
def folder(tmp_path):
    written(tmp_path)
    return tmp_path


def written(folder):
    """Four questions of each set; of the options the first one is right, and once the second."""
    place = folder / "lm_eval"
    place.mkdir()
    for name, quiz in harness.QUIZZES.items():
        options = ["by", "éé", "up", "on it"][: quiz.options or 1]
        if name == "HellaSwag":
            lines = [f"Cats: A cat. the cat\n{i // 3}\n" + "\n".join(options) for i in range(4)]
            (place / quiz.file).write_bytes(bz2.compress("\n".join(lines).encode()))
            continue
        for_one = {
            "LAMBADA": {"context": "The cat — the", "continuation": "cat"},
            "WinoGrande": {"context_options": ["The cat", "The mat"], "continuation": "sat."},
        }.get(name, {"query": "Question: what?\n", "choices": options})
        rows = [for_one | {"gold": i // 3} for i in range(4)]
        with gzip.open(place / quiz.file, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_files_are_read_as_they_are_shipped(folder):
    assert len(harness.files(folder)) == 7
    assert harness.questions(folder, "LAMBADA", 1)[0].pairs == [("The cat — the", " cat")]
    assert harness.questions(folder, "WinoGrande", 9)[3] == Question(
        ("The cat", "The mat"), ("sat.",), 1
    )
    piqa = harness.questions(folder, "PIQA", 9)
    ask = "Question: what?\nAnswer:"
    assert piqa[0].pairs == [(ask, " by"), (ask, " éé")]
    assert [one.right for one in piqa] == [0, 0, 0, 1]
    swag = harness.questions(folder, "HellaSwag", 2)
    assert swag == harness.questions(folder, "HellaSwag", 9)[::2]
    assert swag[0] == Question(("Cats: A cat. the cat",), ("by", "éé", "up", "on it"), 0)


def test_other_files_are_refused(folder):
    for name, row in {"PIQA": {"choices": ["a"], "query": "?", "gold": 0}, "BoolQ": [1]}.items():
        file = folder / "lm_eval" / harness.QUIZZES[name].file
        file.write_bytes(gzip.compress(json.dumps(row).encode()))
        harness.text_of.cache_clear()
        with pytest.raises(ValueError, match=f"holds no rows of {name}"):
            harness.questions(folder, name, 9)
    file.unlink()
    with pytest.raises(ValueError, match=r"give a folder with lm_eval/boolq\.jsonl\.gz"):
        harness.files(folder)


@pytest.mark.skipif(not (DATA / "lm_eval").is_dir(), reason="needs ../shared/data")
def test_the_published_sets_have_all_their_questions():
    sizes = {name: len(harness.questions(DATA, name, 10**6)) for name in harness.QUIZZES}
    assert sizes == {
        "LAMBADA": 5153, "HellaSwag": 10_042, "PIQA": 1838, "ARC easy": 2376,
        "ARC challenge": 1172, "WinoGrande": 1267, "BoolQ": 3270,
    }  # fmt: skip
    texts = [pair for n in harness.QUIZZES for one in harness.questions(DATA, n, 500)
             for pair in one.pairs]  # fmt: skip
    assert all(text and len(ending) > 1 for text, ending in texts)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install \"nestlearn\[harness\]\""):
        harness.accuracy(lambda pairs: [], {})


def test_the_harness_counts_what_is_asked(folder):
    """Of a reader who likes "by" best, "éé" for its four bytes though not for its two letters, and
    a mat.
    """
    pytest.importorskip("lm_eval")
    nats, seen = {" by": -3.0, " éé": -4.0, " cat": -1.0, " sat.": -2.0}, []

    def score(pairs):
        seen.extend(pairs)
        return [(nats.get(e, -90.0) + text.count("mat"), e == " cat") for text, e in pairs]

    asked = {name: harness.questions(folder, name, 9) for name in harness.QUIZZES}
    found = harness.accuracy(score, asked)
    right = {"LAMBADA": 100.0, "WinoGrande": 25.0}
    for name, quiz in harness.QUIZZES.items():
        told = {key: value for key, value in found[name].items() if "stderr" not in key}
        assert told == {"acc": right.get(name, 75.0)} | (
            {"acc_bytes": 25.0} if quiz.by_bytes else {}
        )
    assert found["PIQA"]["acc_stderr"] == pytest.approx(25.0)  # √(¼ · ¾ / 3)
    assert seen == [pair for some in asked.values() for one in some for pair in one.pairs]
