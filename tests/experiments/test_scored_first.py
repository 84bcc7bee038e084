"""Books read as streams through the runner, on a model of random weights."""

import gzip
import sys
from pathlib import Path

import pytest

from nestlearn.evals.streams import bits_per_byte, nats
from nestlearn.experiments import readers, runner, scored_first

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import pretrained


@pytest.fixture
def folder(tmp_path):
    pretrained(tmp_path / "model")
    (tmp_path / "books").mkdir()
    for name in "abc":
        with gzip.open(tmp_path / "books" / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            file.write(f"It was day {name} — a good one. " * 40)
    return tmp_path


def test_every_row_is_read_and_compared(folder):
    options = {"data": str(folder), "quick": True, "workers": 0, "progress": False, "device": "cpu"}
    text = runner.run("scored-first", folder / "out", **options)
    for name, row in readers.ROWS.items():
        assert (f"| {row.title} | " in text) == (name != "carried")
    assert "Read by FOLDER/model" in text
    assert (folder / "out" / "scored-first.png").is_file()
    with pytest.raises(ValueError, match="row 'knm' is unknown"):
        runner.run("scored-first", folder / "other", models=["knm"], **options)
    (folder / "books" / "a.txt.gz").unlink()
    with pytest.raises(ValueError, match="3 books or more"):
        runner.run("scored-first", folder / "other", **options)


def test_the_model_of_the_package_is_read_where_there_is_no_other(folder):
    (folder / "model").rename(folder / "elsewhere")
    options = {"data": str(folder), "quick": True, "workers": 0, "progress": False, "device": "cpu"}
    text = runner.run("scored-first", folder / "out", models=["windows", "carried"], **options)
    assert readers.ROWS["carried"].title in text
    assert "Read by nestlearn/tiny" in text
    (folder / "elsewhere").rename(folder / "model")
    with pytest.raises(ValueError, match=r"results\.json is of another model"):
        runner.run("scored-first", folder / "out", **options)
    (folder / "model").rename(folder / "elsewhere")
    (folder / "model").mkdir()
    with pytest.raises(ValueError, match="has no weights"):
        runner.run("scored-first", folder / "other", **options)


def test_levels_of_step_size_0_read_as_the_model_in_windows_does(folder):
    model = readers.opened(folder / "model", window=64)
    text = model.text("The key is under the mat. " * 20)
    plain = nats(model.reader("windows", 1.0), text.ids)
    still = nats(model.reader("levels", 0.0), text.ids)
    assert plain[:48].allclose(still[:48], atol=1e-4)  # later windows begin elsewhere
    assert bits_per_byte(plain, text.sizes) == pytest.approx(
        bits_per_byte(still, text.sizes), rel=0.02
    )
    with pytest.raises(ValueError, match="this model has windows, levels"):
        model.reader("carried")
    with pytest.raises(ValueError, match="the text is empty"):
        model.text("")


def test_the_bytes_of_tokens_are_those_of_their_text():
    text = "aö😀b"
    assert readers.sizes([1, 2, 3, 3, 4], text).tolist() == [1, 2, 4, 0, 1]
    assert readers.sizes([1, 3], text).tolist() == [1, 7]
    assert int(readers.even([5, 6, 7], text).sum()) == len(text.encode())


def test_books_are_split(folder):
    assert len(scored_first.books(folder, "valid", 8, 100)) == 2
    assert [len(b) for b in scored_first.books(folder, "test", 8, 100)] == [100]
