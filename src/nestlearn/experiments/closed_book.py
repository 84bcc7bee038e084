"""Closed-book questions: what a model knows of a page that is not before it any more.

    nestlearn reproduce closed-book --data FOLDER

FOLDER/model is a pretrained model that follows instructions, with its tokenizer, as transformers
saves it; FOLDER/wikitext2/test.txt, if there, a text on which forgetting is measured beside the
model's own samples. Pages are of invented facts (`nestlearn.evals.closed_book`); two kinds of them
were used for nothing else. A memory starts anew for every page and goes through its file.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.evals import Record, closed_book
from nestlearn.evals.closed_book import FORMS, HELD_OUT, KINDS
from nestlearn.experiments.cells import Cell, Tell
from nestlearn.experiments.experiment import Experiment, Options, chosen
from nestlearn.experiments.provenance import fingerprint
from nestlearn.experiments.tables import Column, detail, mean, model, words

ROWS = {
    "nothing read": "",
    "the page before the question": "context",
    "read once": "learn 1",
    "read four times": "learn 4",
    "read and studied": "study",
}
PAGES, QUICK_PAGES = 10, 1
SAID = 24  # tokens of an answer


def grid(asked: Options) -> list[Cell]:
    """A cell for each page and way of reading."""
    folder = Path(asked.data or "")
    files = sorted((folder / "model").glob("*.safetensors"))
    if asked.data is None or not files:
        raise ValueError(f"--data {asked.data}: give a folder with a pretrained model in model/")
    kinds = chosen(asked.only, tuple(KINDS), "kind")
    pages = asked.pick(QUICK_PAGES, PAGES)
    return [
        {
            "task": kinds[n % len(kinds)], "model": name, "page": n, "folder": asked.data,
            "setting": "kept apart" if kinds[n % len(kinds)] in HELD_OUT else "developed on",
            "weights": fingerprint(files), "questions": asked.pick(4, 64),
        }
        for n in range(pages)
        for name in chosen(asked.models, tuple(ROWS), "way of reading")
    ]  # fmt: skip


@cache
def _stacked(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nestlearn import DeltaLevel, stack_levels

    base: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    levels = [DeltaLevel(64, lr=0.05, rule="gd"), DeltaLevel(512, lr=0.05, rule="gd")]
    stacked = stack_levels(base.to(device), levels, rank=8, window=128, cache_dtype="bfloat16")
    return stacked, AutoTokenizer.from_pretrained(folder / "model")


@cache
def _elsewhere(folder: Path, device: str) -> dict[str, Tensor]:
    """Texts on which forgetting is measured: ids [N, T]."""
    from nestlearn.hf.anchor import Anchor

    stacked, tokenizer = _stacked(folder, device)
    length = min(128, stacked.window - 1)
    found = {"own": Anchor.sampled(stacked, 16, length, seed=9).samples}
    if (file := folder / "wikitext2" / "test.txt").is_file():
        ids = tokenizer.encode(file.read_text(encoding="utf-8")[:20_000])
        rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        found["wikitext"] = rows.to(stacked.lr[0].device)
    return found


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One page, read in one way, and every question about it."""
    from nestlearn import Session
    from nestlearn.hf.lending import lend
    from nestlearn.learn import StudyConfig
    from nestlearn.learn.questions import FROM_TEXT, decode, prompt

    folder, how = Path(cell["folder"]), ROWS[cell["model"]]
    stacked, words_of = _stacked(folder, cell["device"])
    page = closed_book.document(cell["task"], 10_000 * (cell["seed"] + 1) + cell["page"])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        session = Session(stacked, Path(place) / "memory", words_of)
        for _ in range(int(how.split()[1]) if how.startswith("learn") else how == "study"):
            session.learn(page.text)
        if how == "study":
            settings = StudyConfig(cell["questions"], seed=cell["seed"])
            session.study(page.text, settings, tell=lambda what, done, of: tell(done / of, what))
        session.save()
        seconds = time.perf_counter() - began
        session = Session(stacked, Path(place) / "memory", words_of)  # what is on disk
    weights = stacked.weights(session.memory)
    asked = [
        FROM_TEXT.format(text=page.text, question=q.text) if how == "context" else q.text
        for q in page.questions
    ]
    with lend(weights):
        said = decode(
            stacked.base, words_of, [prompt(words_of, text) for text in asked], SAID, "", _silent
        )
    right: dict[str, list[bool]] = {form: [] for form in FORMS}
    for question, answer in zip(page.questions, said):
        right[question.form].append(closed_book.right(question, answer))
    cost = {}
    for name, rows in _elsewhere(folder, cell["device"]).items():
        now, before = stacked.losses(rows, session.memory), stacked.losses(rows)
        cost[name] = float((now - before)[:, 1:].mean())
    shares = {form: sum(found) / len(found) for form, found in right.items() if found}
    return {
        "scores": {"direct": shares["direct"]}, "value": shares["direct"], "shares": shares,
        "cost": cost, "megabytes": sum(session.bytes.values()) / 1e6,
        "seconds": round(seconds, 1),
        "answers": [[q.text, q.answer, a] for q, a in zip(page.questions, said)],
        "headline": ", ".join(f"{form} {share:.2f}" for form, share in shares.items()),
    }  # fmt: skip


def _silent(*_: Any) -> None:
    """Nobody is told."""


def columns(records: Sequence[Record]) -> list[Column]:
    """Shares of right answers by form, what it cost elsewhere, bytes and seconds."""
    costs = [
        mean(f"{name}, nats", detail("cost", name))
        for name in ("own", "wikitext")
        if any(name in r.detail["cost"] for r in records)
    ]
    return [
        model("memory"),
        words("kinds", lambda r: r.setting),
        *(mean(form, _share(form), digits=2) for form in FORMS),
        *costs,
        mean("MB", detail("megabytes"), digits=1),
        mean("seconds", lambda r: r.seconds, digits=0),
    ]


def _share(form: str) -> Any:
    return lambda r: r.detail["shares"].get(form)


EXPERIMENT = Experiment(
    name="closed-book",
    shows="questions about a page of invented facts, with the page away",
    price=("~1 hour", "–"),
    takes=("only", "models", "data", "workers", "device"),
    grid=grid,
    work=work,
    seeds=1,
    columns=columns,
    by=lambda r: (r.setting, r.model),
    sources=("hf", "learn", "evals/closed_book.py"),
)
