"""`nestlearn eval stream` reads a text with any model, and says what the readers said."""

import json

import pytest
import torch

from commands import pretrained  # isort: skip

from nestlearn.evals.streams import bits_per_byte, nats
from nestlearn.experiments import readers
from nestlearn.models.hope import HopeConfig, HopeLM

TOLD = "The key is under the mat — as on every day. " * 12


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(TOLD, encoding="utf-8")
    return file


@pytest.fixture
def hope(tmp_path):
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(256, dim=16, layers=1, heads=2))
    model.save_pretrained(tmp_path / "hope")
    return tmp_path / "hope"


def test_a_hope_reads_in_every_way_it_has(call, hope, text, tmp_path):
    asked = ("eval", "stream", "--model", hope, "--text", text, "--tokens", 300, "--window", 64)
    code, out, err = call(*asked, "--json", tmp_path / "found.json", "--device", "cpu")
    assert code == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["windows", "carried", "calibration", "cache", "knn", "dynamic"]
    assert found["tokens"] == found["bytes"] == 300
    opened = readers.opened(hope, window=64)
    own = opened.text(TOLD, 300)
    for name, dial in (("windows", 1.0), ("cache", 2000)):
        bits = bits_per_byte(nats(opened.reader(name, dial), own.ids), own.sizes)
        assert rows[name]["bits_per_byte"] == pytest.approx(bits)
        assert f"{bits:.4f}" in out
    assert "300 bytes, 300 tokens, windows of 64." in out


def test_a_pretrained_model_has_levels_and_a_dial_that_is_chosen(call, text, tmp_path):
    pretrained(tmp_path / "model")
    asked = ("eval", "stream", "--model", tmp_path / "model", "--text", text, "--tokens", 200)
    some = ("--rows", "levels", "--rows", "windows", "--choose", text, "--device", "cpu")
    code, out, err = call(*asked, *some)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines[1:]] == [
        "levels that learn", "as it is, in windows",
    ]  # fmt: skip
    assert "temperature 1" in out


def test_what_cannot_be_read_is_one_line(call, hope, text, tmp_path):
    asked = ("eval", "stream", "--text", text, "--device", "cpu", "--model")
    for model, rows, words in (
        (tmp_path / "nothing", (), "no folder"),
        (hope, (), "give a window"),
        (hope, ("--window", 64, "--rows", "levels"), "row 'levels' is unknown"),
    ):
        code, _, err = call(*asked, model, *rows)
        assert code == 2
        assert words in err
        assert "Traceback" not in err
