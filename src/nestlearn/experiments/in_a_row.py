"""Pages studied one after the other by one memory: what of the first is left after the last?

    nestlearn reproduce in-a-row --data FOLDER

FOLDER as in `closed-book`. Every page is studied and asked about at once; the first tenth is
asked about again on the way, ten times, and all after the last one. A training that was killed goes
on after its last page.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nestlearn.disk import atomic_write
from nestlearn.evals import closed_book
from nestlearn.evals.closed_book import DIRECT, HELD_OUT, PARAPHRASE
from nestlearn.experiments import pretrained
from nestlearn.experiments.cells import digest
from nestlearn.experiments.closed_book import cost, costs, loaded, right, said
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.tables import detail, mean, model

ROWS = {  # questions of earlier pages that are rehearsed in a step, beside eight of the page
    "studied": 0,
    "studied, 8 earlier questions a step": 8,
    "studied, 16 earlier questions a step": 16,
}
PAGES, QUICK_PAGES = 100, 2
FORMS = (DIRECT, PARAPHRASE)


def grid(asked: Options) -> list[Cell]:
    base = pretrained.part(asked)
    return [
        {
            "task": "pages in a row", "model": name, **base,
            "pages": asked.pick(QUICK_PAGES, PAGES),
            "short": asked.quick, "out": str(asked.out.resolve()),
        }
        for name in chosen(asked.models, tuple(ROWS), "way of studying")
    ]  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    from nestlearn import Session
    from nestlearn.learn import StudyConfig

    base, words_of = loaded(Path(cell["folder"]), cell["device"])
    place = Path(cell["out"]) / f"memory-{digest(cell)}"
    notes = place / "right.json"
    every = closed_book.documents(HELD_OUT, cell["pages"], cell["seed"] + 1)  # no two of one name
    new: dict[str, Any] = {"after": [], "undone": [], "left": []}
    found = json.loads(notes.read_text()) if notes.is_file() else new
    after: list[list[float]] = found["after"]
    tenth = len(every) // 10 or 1

    def keep() -> None:
        atomic_write(notes, partial(Path.write_text, data=json.dumps(found), encoding="utf-8"))

    def asked_again() -> None:
        """Of the first tenth: pages studied, shares."""
        if len(found["left"]) < len(after) // tenth:
            some = [_right(base, words_of, session, first) for first in every[:tenth]]
            found["left"].append([len(after), *map(statistics.fmean, zip(*some))])
            keep()

    short: dict[str, Any] = {"questions": 1, "words": 1, "epochs": 1} if cell["short"] else {}
    config = StudyConfig(**short, rehearse=ROWS[cell["model"]], seed=cell["seed"])
    session = Session(base, place / "memory", words_of)
    for n, page in enumerate(every[len(after) :], len(after)):
        asked_again()
        tell(n / len(every), f"page {n + 1}")
        if session.study(page.text, replace(config, seed=n)).rolled_back:
            found["undone"].append(n + 1)
        session.save()
        after.append(_right(base, words_of, session, page))
        keep()
    asked_again()
    last = [_right(base, words_of, session, page) for page in every]
    learned, kept = (sum(map(sum, some[:tenth])) for some in (after, last))
    return {
        "value": kept / max(learned, 1e-9), "scores": {"left": kept / max(learned, 1e-9)},
        **found, "last": last, "pages": len(every),
        "strayed": [told.get("strayed") for told in session.history if told["what"] == "study"],
        "cost": cost(cell, base.base, base.weights(session.memory)),
        "megabytes": sum(session.bytes.values()) / 1e6,
        "headline": f"of the first pages {kept:.2f} of {learned:.2f} left",
    }  # fmt: skip


def _right(base: Any, words_of: Any, session: Any, page: closed_book.Document) -> list[float]:
    """The shares of right answers, direct and paraphrased, with the page away."""
    asked = [q for q in page.questions if q.form in FORMS]
    answers = said(base.base, words_of, [q.text for q in asked], base.weights(session.memory))
    shares = right(asked, answers)
    return [shares[form] for form in FORMS]


def columns(records: Sequence[Record]) -> list[Column]:
    """Right at once and at the end, of all pages and of the first tenth; what it cost elsewhere."""

    def share(which: str, form: int, first: bool) -> Any:
        def value(record: Record) -> float:
            found = record.detail[which]
            some = found[: max(1, len(found) // 10)] if first else found
            return sum(page[form] for page in some) / len(some)

        return value

    return [
        model("memory"), mean("pages", detail("pages"), digits=0),
        *(
            mean(f"{name}, {form}{', first tenth' if first else ''}",
                 share(which, i, first), digits=2)
            for first in (False, True)
            for which, name in (("after", "at once"), ("last", "at the end"))
            for i, form in enumerate(FORMS)
        ),
        *costs(records), mean("undone", lambda r: len(r.detail.get("undone", [])), digits=0),
        mean("MB", detail("megabytes"), digits=1),
    ]  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    """The share of direct questions answered, mean of each tenth of the pages: at once and at the
    end; of the first tenth after so many pages.
    """

    def along(which: str) -> Callable[[Record], Along]:
        def tenths(r: Record) -> Along:
            right, size = [page[0] for page in r.detail[which]], max(1, r.detail["pages"] // 10)
            ends = range(size, len(right) + 1, size)
            return ends, [statistics.fmean(right[end - size : end]) for end in ends]

        return tenths

    def later(r: Record) -> Along:
        told = r.detail.get("left", [])  # earlier records have none
        return [at for at, *_ in told], [share for _, share, _ in told]

    parts: list[tuple[str, Callable[[Record], Along]]] = [
        ("at once", along("after")), ("of the first tenth, later", later),
        ("after the last page", along("last")),
    ]  # fmt: skip
    panels = [
        Panel(name, "pages", "direct questions answered", lines(records, part))
        for name, part in parts
    ]
    curves(panels, path, ylim=(0, 1))


EXPERIMENT = Experiment(
    name="in-a-row", shows="a hundred pages studied by one memory: what is left of the first",
    price=("~10 hours", "~50 minutes"),
    takes=("models", "data", "workers", "device"),
    grid=grid, work=work,
    seeds=1,
    columns=columns, figure=figure,
    sources=(*pretrained.SOURCES, "learn", "evals/closed_book.py", "experiments/closed_book.py"),
)  # fmt: skip
