"""New languages through the runner, on a model of random weights."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from nestlearn.experiments import fig8, runner

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import DATA, pretrained


def _write(folder: Path) -> None:
    (folder / "novel_languages").mkdir()
    for name in fig8.LANGUAGES.values():
        pairs = [{"src": f"{name} ba ne{n}", "en": f"the {n} fish"} for n in range(12)]
        listed = [{"word": f"ne{n}", "en": f"fish {n}; other"} for n in range(6)]
        for what, rows in (("pairs", pairs), ("wordlist", listed)):
            with gzip.open(folder / "novel_languages" / f"{name}_{what}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def test_every_row_translates_alone_and_one_after_the_other(tmp_path, monkeypatch):
    pretrained(tmp_path / "model")
    _write(tmp_path)
    for kind in (fig8.InContext, fig8.Translator):
        monkeypatch.setattr(kind, "longest", 3)
    text = runner.run(
        "fig8", tmp_path / "out", data=str(tmp_path), quick=True, workers=0, progress=False,
        device="cpu",
    )  # fmt: skip
    for order in fig8.ORDERS:
        for row in fig8.ROWS:
            assert f"| {order} | {row} | " in text


@pytest.mark.skipif(not (DATA / "novel_languages").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", fig8.LANGUAGES)
def test_sentences_of_one_part_are_in_no_other(name):
    told = fig8.language(DATA, name, 0)
    parts = [{t.text for t in part} for part in (told.group.train, told.group.validation)]
    parts.append({t.text for t in told.group.test})
    assert [len(part) for part in parts[1:]] == [fig8.VALIDATION, fig8.TEST]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert len(told.group.train) > 1500
