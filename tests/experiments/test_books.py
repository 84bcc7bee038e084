"""Language models on books: the text in bytes and in pieces, and the experiments over them."""

import lzma
import math
import random

import pytest
import torch

from nestlearn.evals import Record, read_records
from nestlearn.experiments import books, fig10, runner, table2, table6
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Attention, SwiGLU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Books of made-up words."""
    place = tmp_path_factory.mktemp("books")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgé", k=draw.randint(2, 6))) for _ in range(60)]
    for name in books.BOOKS:
        told = "\n".join(" ".join(draw.choices(words, k=9)) for _ in range(200))
        (place / name).write_bytes(lzma.compress(told.encode()))
    return place


def test_pieces_are_of_the_same_text_and_bits_count_its_bytes(folder):
    plain, pieces = books.read(folder), books.read(folder, 300)
    assert pieces.test_bytes == plain.test_bytes == len(plain.test)
    assert len(pieces.test) < len(plain.test)
    assert int(pieces.corpus.train.max()) < 300
    assert plain.bits(math.log(2)) == pytest.approx(1.0)
    whole = math.log(2) * plain.test_bytes / len(pieces.test)  # nats a piece
    assert pieces.bits(whole) == pytest.approx(1.0)
    val = pieces.corpus
    assert pieces.bits(1.0, "val") == pytest.approx(val.val.numel() / val.val_bytes / math.log(2))


@pytest.mark.parametrize("change", [{}, {"mixer": Attention(), "channel": SwiGLU()}])
def test_a_stream_is_read_as_by_one_call(change):
    """With the memory carried; a window that is read anew has the tokens before it."""
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(40, dim=16, layers=1, heads=2, **change)).eval()
    ids = torch.randint(0, 40, (2, 101))
    logits, _ = model(ids[:, :-1])
    whole = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(books.surprise(model, ids, 32), whole, atol=1e-4, rtol=1e-4)
    anew = books.anew(model, ids, 32)
    assert anew.shape == whole.shape
    torch.testing.assert_close(anew[:, :16], whole[:, :16], atol=1e-4, rtol=1e-4)
    logits, _ = model(ids[:, 48:80])
    last = torch.nn.functional.cross_entropy(logits.mT, ids[:, 49:81], reduction="none")
    torch.testing.assert_close(anew[:, 64:80], last[:, 16:], atol=1e-4, rtol=1e-4)
    logits, _ = model(ids[:, 68:100])
    last = torch.nn.functional.cross_entropy(logits.mT, ids[:, 69:101], reduction="none")
    torch.testing.assert_close(anew[:, 96:], last[:, -4:], atol=1e-4, rtol=1e-4)


def test_a_stream_is_shown_in_tenths_beside_windows_read_anew(monkeypatch):
    monkeypatch.setattr(books, "STREAMS", (640, 10_000))
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(40, dim=16, layers=1, heads=2))
    ids = torch.randint(0, 40, (700,), dtype=torch.uint8)
    found = books.stream(model, ids, 64)
    assert list(found) == ["640"]  # the other one is longer than the text
    windows = torch.stack([ids[a : a + 65] for a in range(0, 640, 64)]).long()
    with torch.no_grad():
        whole, _ = model(ids[None, :640].long())
        apart, _ = model(windows[:, :-1])
    nats = torch.nn.functional.cross_entropy
    carried = nats(whole.mT, ids[None, 1:641].long(), reduction="none")[0]
    anew = nats(apart.mT, windows[:, 1:], reduction="none")
    for name, of in (("carried", carried.view(10, 64)), ("anew", anew)):
        assert found["640"][name] == pytest.approx(of.mean(1).tolist(), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("table2", [("10M, pieces", m) for m in ("Hope", "Transformer++")]),
        ("table6", [("books", m) for m in ("Hope", "without DGD")]),
        (
            "fig10",
            [
                ("books", m + way)
                for m in ("Hope, streams of 8 windows", "Transformer")
                for way in ("", ", in windows")
            ],
        ),
    ],
)
def test_every_experiment_runs(folder, tmp_path, name, rows):
    options = {"only": ["10M, pieces"]} if name == "table2" else {}
    runner.run(
        name, tmp_path / "out", data=str(folder), quick=True, workers=0, progress=False,
        device="cpu", models=[m for _, m in rows if "in windows" not in m], **options,
    )  # fmt: skip
    records = read_records(tmp_path / "out" / "results.json")
    assert list(dict.fromkeys((r.task, r.model) for r in records)) == rows
    assert all(math.isfinite(r.value) for r in records)
    assert (tmp_path / "out" / "table.md").is_file()
    assert str(folder) not in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.parametrize("rows", [table2.ROWS, table6.ROWS, fig10.ROWS])
def test_rows_have_the_parameters_of_hope(rows):
    with torch.device("meta"):
        counts = [
            HopeLM(books.sized(change, (320, 7, 5))).parameter_count() for change in rows.values()
        ]
    assert all(abs(count / counts[0] - 1) < 0.01 for count in counts)
    assert 9e6 < counts[0] < 12e6


def test_what_a_carried_state_adds_at_each_length(tmp_path, monkeypatch):
    """The first record of a reading holds its places at all lengths."""
    shown = []
    monkeypatch.setattr(fig10, "curves", lambda panels, *_, **__: shown.extend(panels))
    readings = {
        "Hope": {"100": [[64.0, 2.0], [100.0, 1.5]], "200": [[64.0, 2.0], [200.0, 1.25]]},
        "Hope, in windows": {
            "100": [[64.0, 2.0], [100.0, 2.0]],
            "200": [[64.0, 2.0], [200.0, 3.0]],
        },
    }
    records = [
        Record("fig10", "books", name, model, 0, name, 1.0, 1, 1, 1, 1.0, detail=detail)
        for model, places in readings.items()
        for name, detail in (("100", {"places": places}), ("200", {}))
    ]
    fig10.figure(records, tmp_path / "fig10.png")
    assert [panel.lines for panel in shown] == [
        {"Hope": ([64.0, 100.0], [[0.0, -0.5]])}, {"Hope": ([64.0, 200.0], [[0.0, -1.75]])},
    ]  # fmt: skip
