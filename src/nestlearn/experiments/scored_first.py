"""Bits per byte of books that are read as streams, each token scored before anything learns it.

    nestlearn reproduce scored-first --data FOLDER

FOLDER/model is a pretrained model with its tokenizer, as transformers saves it, or a Hope; where
there is none, the one that the package brings is read. The books are those of
FOLDER/gutenberg/{valid,test}.txt.xz, with a form feed between two; without these, of
FOLDER/books/*.txt.gz, by name, the first two to choose by. Every book is read from its beginning,
by a model that has read nothing. Beside levels that learn stand controls: what else a stream can
be learned by. Each row has one dial of three values, chosen on the validation books.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.evals import read_records
from nestlearn.evals.files import text_of
from nestlearn.evals.streams import Text, bits_per_byte, nats, tenths
from nestlearn.experiments import readers
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.provenance import fingerprint
from nestlearn.experiments.readers import ROWS, Opened
from nestlearn.experiments.tables import RATE, detail, mean, metric, words
from nestlearn.names import SHIPPED, model_folder, weights_folder

LETTERS, QUICK_LETTERS = 100_000, 1500  # of a book
TESTED, VALIDATED = 8, 2  # books
PLAIN = "windows"  # what the other rows are compared with


def grid(asked: Options) -> list[Cell]:
    if asked.data is None:
        raise ValueError("--data: give a folder with gutenberg/ or books/ in it")
    folder = Path(asked.data)
    model = _model(folder)
    lacking = "levels" if readers.is_hope(model) else "carried"
    known = [row for row in ROWS if row != lacking]
    stored = list(weights_folder(model).glob("*.safetensors")) or list(model.rglob("*.safetensors"))
    if not stored:
        raise ValueError(f"{model} has no weights (*.safetensors): give a model that was saved")
    weights, there = fingerprint(stored), asked.out / "results.json"
    if there.is_file() and any(r.config["weights"] != weights for r in read_records(there)):
        raise ValueError(f"{there} is of another model than {model}: give another --out")
    return cells(
        asked, ["books"], known, ("task", "row"), folder=str(folder), weights=weights,
        text=fingerprint(files(folder, "valid") + files(folder, "test")),
        letters=asked.pick(QUICK_LETTERS, LETTERS), validated=asked.pick(1, VALIDATED),
        tested=asked.pick(1, TESTED),
    )  # fmt: skip


def _model(folder: Path) -> Path:
    """Where the model is."""
    return own if (own := folder / "model").is_dir() else model_folder(SHIPPED)


def files(folder: Path, split: str) -> list[Path]:
    """Where the books of a split, "valid" or "test", are; ValueError where there are none."""
    if (whole := folder / "gutenberg" / f"{split}.txt.xz").is_file():
        return [whole]
    found = sorted((folder / "books").glob("*.txt.gz"))
    if len(found) <= VALIDATED:
        raise ValueError(
            f"--data {folder}: give gutenberg/{split}.txt.xz, or {VALIDATED + 1} books or more as "
            "books/*.txt.gz"
        )
    return found[:VALIDATED] if split == "valid" else found[VALIDATED:]


def books(folder: Path, split: str, count: int, letters: int) -> list[str]:
    """The beginnings of the first books of a split."""
    found = []
    for file in files(folder, split):
        texts = text_of(file).split("\f") if file.suffix == ".xz" else [text_of(file)]
        found += [text.strip()[:letters] for text in texts]
    return [text for text in found if text][:count]


@cache
def _opened(folder: Path, device: str, weights: str) -> Opened:
    return readers.opened(_model(folder), device)


def _losses(cell: Cell, split: str, tell: Callable[[int, int], None]) -> list[tuple[Tensor, Text]]:
    """−log p of every token of the books of a split, and the books."""
    folder = Path(cell["folder"])
    model = _opened(folder, cell["device"], cell["weights"])
    count = cell["validated" if split == "valid" else "tested"]
    texts = [model.text(t) for t in books(folder, split, count, cell["letters"])]
    read, of, found = 0, sum(len(text.ids) for text in texts), []
    for text in texts:
        reader = model.reader(cell["model"], cell["lr"])
        told = partial(lambda before, done, _: tell(before + done, of), read)
        found.append((nats(reader, text.ids, told), text))
        read += len(text.ids)
    return found


def _bits(read: Sequence[tuple[Tensor, Text]]) -> float:
    return bits_per_byte(*map(torch.cat, zip(*((found, text.sizes) for found, text in read))))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """The validation books and the test books, read in one way at one value of its dial."""
    began, row = time.perf_counter(), ROWS[cell["model"]]

    def told(share: float, what: str) -> Callable[[int, int], None]:
        return lambda done, of: tell(share + 0.5 * done / of, f"{what}, {done:,} of {of:,} tokens")

    validation = _bits(_losses(cell, "valid", told(0.0, "validation")))
    middle = time.perf_counter()
    read = _losses(cell, "test", told(0.5, "test"))
    tokens = sum(len(text.ids) for _, text in read)
    parts = [tenths(found, text.sizes) for found, text in read]
    bits = _bits(read)
    return {
        "value": -validation, "scores": {"bits per byte": bits}, "validation": validation,
        "books": [bits_per_byte(found, text.sizes) for found, text in read],
        "tenths": [statistics.fmean(part) for part in zip(*parts)], "tokens": tokens,
        "bytes": sum(int(text.sizes.sum()) for _, text in read),
        "tokens_per_second": tokens / (time.perf_counter() - middle),
        "seconds": time.perf_counter() - began,
        "headline": f"{row.dial} {cell['lr']:g}: {validation:.4f} on validation, {bits:.4f}",
    }  # fmt: skip


def columns(records: Sequence[Record]) -> list[Column]:
    """Bits per byte of all books, of their first and last tenths; in how many a row is better."""
    plain = {r.seed: r.detail["books"] for r in records if r.model == PLAIN}

    def better(r: Record) -> str:
        if r.model == PLAIN or r.seed not in plain:
            return "–"
        pairs = list(zip(r.detail["books"], plain[r.seed]))
        return f"{sum(own < theirs for own, theirs in pairs)} of {len(pairs)}"

    return [
        words("row", lambda r: ROWS[r.model].title),
        Column("setting", lambda rows: f"{ROWS[rows[0].model].dial} {RATE.text(rows)}"),
        mean("bits per byte", metric("bits per byte")), mean("first tenth", detail("tenths", 0)),
        mean("last tenth", detail("tenths", -1)), words("books better than as it is", better),
        mean("tokens/s", detail("tokens_per_second"), digits=0),
    ]  # fmt: skip


def notes(records: Sequence[Record]) -> str:
    """Which model has read."""
    shipped = fingerprint(model_folder(SHIPPED).glob("*.safetensors"))
    own = {r.config["weights"] for r in records} == {shipped}
    return f"Read by {SHIPPED}, the model in the package." if own else "Read by FOLDER/model."


def figure(records: Sequence[Record], path: Path) -> None:
    def along(r: Record) -> Along:
        return range(1, len(r.detail["tenths"]) + 1), r.detail["tenths"]

    drawn = lines(records, along, lambda r: ROWS[r.model].title)
    curves([Panel("", "tenth of a book", "bits per byte", drawn)], path)


EXPERIMENT = Experiment(
    name="scored-first", shows="bits per byte of books read as streams, by what learns from them",
    price=("~1 hour (135M: ~1 day)", "~1 hour"),
    takes=("models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: ROWS[cell["model"]].values, seeds=1,
    columns=columns, notes=notes, figure=figure,
    sources=("hf", "experiments/readers.py"),
)  # fmt: skip
