"""Tables 2 and 3: what small language models know, and what they recall of what they have read.

    nestlearn reproduce table3 --data FOLDER [--only 10M ...]
    nestlearn reproduce table3 --data FOLDER --only 0.8M

FOLDER holds gutenberg/ (see `nestlearn.experiments.books`) and lm_eval/ (`evals.harness`). Rows,
sizes and training are those of `nestlearn.experiments.table2`, by bytes. A model is asked
seven sets of questions, none of which it was trained for, and strings of the test books that it has
read 500 to 30,000 bytes before (`nestlearn.evals.cloze`). Attention sees all that was read. 0.8M is
the Hope that the package brings, which is asked without a training.

A call goes on with what one before has left in out/models/NAME: the weights in bfloat16, as which a
model is asked; training.json; and asked-*.json, how likely it finds each answer. Only counting
those of the seven sets needs lm-evaluation-harness. So one call trains and asks on a card without
it, its table with "–" for the sets; and the same call where the harness is counts them, with no
more than the .json files there. A training is kept also where the code has changed since (its
commit is in training.json, and without that folder it is done anew); then it is asked again.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nestlearn.disk import atomic_write
from nestlearn.evals import cloze, harness
from nestlearn.experiments import books, table2
from nestlearn.experiments.asked import scored
from nestlearn.experiments.cells import digest
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.provenance import commit, fingerprint
from nestlearn.experiments.tables import PARAMETERS, SEEDS, mean, metric, rate, words
from nestlearn.experiments.tables import model as name_of
from nestlearn.models.hope import HopeLM
from nestlearn.names import SHIPPED, model_folder

CHANCE = "chance"  # a row beside the models: who knows nothing
SMALL, PACKAGE = "0.8M", "Hope of the package"  # a size that is not trained here, and its model
EDGES = (500, 2000, 8000, 30_000)  # bytes from the first time to the second
QUESTIONS, REPEATS = 1000, 150  # of a set, and between two edges
WITHOUT, BY_BYTES = ", without", ", by bytes"  # end names of scores
TESTS = ("questions", "repeats", "edges", "quizzes", "harness", "code")  # no part of a training


def grid(asked: Options) -> list[Cell]:
    """A cell for each model of each size, and one for chance."""
    models = (*chosen(asked.models, (*table2.ROWS, PACKAGE), "model"), CHANCE)
    data = asked.data and str(Path(asked.data, "gutenberg"))
    sizes = {name: {"size": asked.pick((32, 1, 2), size)} for name, size in table2.SIZES.items()}
    sizes[SMALL] = {"weights": fingerprint(model_folder(SHIPPED).glob("*.safetensors"))}
    usual = (table2.STEPS, table2.BATCH, table2.LENGTH)
    part = replace(asked, data=data, models=models)
    cells = books.cells(part, sizes, models, usual, what=("size", "model"))
    own = {
        "folder": asked.data, "out": str(asked.out.resolve()), "harness": harness.version(),
        "quizzes": fingerprint(harness.files(Path(asked.data or ""))),
        "questions": asked.pick(8, QUESTIONS), "repeats": asked.pick(2, REPEATS),
        "edges": asked.pick(EDGES[:2], EDGES),
    }  # fmt: skip
    there = [
        c for c in cells if c["model"] == CHANCE or (c["model"] == PACKAGE) == (c["task"] == SMALL)
    ]
    tasks = {cell["task"] for cell in there if cell["model"] != CHANCE}
    found = [cell | own for cell in there if cell["task"] in tasks]
    for cell in found:
        if cell["task"] == SMALL:  # its training was another one
            for name in ("steps", "batch", "length"):
                del cell[name]
    return found


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train a model, or read what is left of it, and ask it; "value" is of validation books."""
    if cell["model"] == CHANCE:
        return {"value": 0.0, "scores": chance(), "steps": 0}
    name = f"{cell['task']}-{cell['model']}-{cell.get('lr')}-{cell['seed']}-{digest(cell, TESTS)}"
    place = Path(cell["out"], "models", name.lower().replace(" ", "-"))
    make = shipped if cell["model"] == PACKAGE else trained
    result = left(place / "training.json", lambda: make(cell, place, tell))
    quizzes, again = asked_of(cell["folder"], cell["questions"], cell["repeats"], *cell["edges"])
    pairs = [pair for some in quizzes.values() for one in some for pair in one.pairs]
    texts = [(text.encode(), ending.encode()) for text, ending in pairs]
    for some in again.values():
        texts += [(text, one.word) for one in some for text in (one.text, one.without)]
    of = (cell["code"], result["weights"], texts)
    key = hashlib.sha256(repr(of).encode()).hexdigest()[:12]

    def asked() -> list[tuple[float, bool]]:
        source = SHIPPED if cell["model"] == PACKAGE else place
        lm = HopeLM.from_pretrained(source).float().to(cell["device"]).eval()
        return scored(lm, texts)

    said = left(place / f"asked-{key}.json", asked)
    result["scores"] |= recalled(again, [right for _, right in said[len(pairs) :]])
    if cell["harness"]:
        known = dict(zip(pairs, map(tuple, said)))
        result["counted"] = harness.accuracy(lambda some: [known[pair] for pair in some], quizzes)
        for name, own in result["counted"].items():
            result["scores"][name] = own["acc"]
            if "acc_bytes" in own:
                result["scores"][name + BY_BYTES] = own["acc_bytes"]
    return result


def left(file: Path, make: Callable[[], Any]) -> Any:
    """What a call before has left in a file; or what is made now, and left there."""
    if not file.is_file():
        text = json.dumps(make())
        atomic_write(file, lambda path: path.write_text(text, encoding="utf-8"))
    return json.loads(file.read_text(encoding="utf-8"))


def shipped(cell: Cell, place: Path, tell: Tell) -> dict[str, Any]:
    """In place of a training: how that of the model in the package went, as its card says."""
    count = HopeLM.from_pretrained(SHIPPED).parameter_count()
    place.mkdir(parents=True, exist_ok=True)
    went = {"parameters": count, "steps": 1500, "tokens": 98_304_000}
    return {"value": 0.0, "scores": {}, "weights": cell["weights"], **went}


def trained(cell: Cell, place: Path, tell: Tell) -> dict[str, Any]:
    """Train a cell's model, save it in a folder, and say how it went."""
    cell = cell | {"folder": f"{cell['folder']}/gutenberg"}
    lm, result = books.trained(cell, books.sized(table2.ROWS[cell["model"]], cell["size"]), tell)
    told = f"{result['tokens']:,} bytes of books of Project Gutenberg, `nestlearn reproduce table3`"
    lm.to(torch.bfloat16).save_pretrained(place, trained=told)
    result |= {"trained": commit(), "weights": fingerprint(place.glob("*.safetensors"))}
    return books.in_bits(books.read(Path(cell["folder"])), result)


@cache
def asked_of(
    folder: str, most: int, repeats: int, *edges: int
) -> tuple[dict[str, list[harness.Question]], dict[str, list[cloze.Again]]]:
    """The questions of each set, and the repeats in the test books between each two edges."""
    quizzes = {name: harness.questions(Path(folder), name, most) for name in harness.QUIZZES}
    text = books.read(Path(folder, "gutenberg")).test.numpy().tobytes()
    again = {
        f"again after {near:,}–{far:,}": cloze.repeats(text, near, far, repeats)
        for near, far in pairwise(edges)
    }
    return quizzes, again


def recalled(again: Mapping[str, Sequence[cloze.Again]], right: Sequence[bool]) -> dict[str, float]:
    """Percent of the words that are said, of texts that had them before, and of those without; of
    what is right of each repeat's two texts in turn.
    """
    scores: dict[str, float] = {}
    rest = iter(right)
    for name, some in again.items():
        own = [(next(rest), next(rest)) for _ in some]
        for end, part in zip(("", WITHOUT), zip(*own)):
            scores[name + end] = 100 * statistics.fmean(part)
    return scores


def chance() -> dict[str, float]:
    """Percent right of who knows nothing."""
    scores: dict[str, float] = {}
    for name, quiz in harness.QUIZZES.items():
        scores |= dict.fromkeys([name, name + BY_BYTES][: 1 + quiz.by_bytes], quiz.chance)
    return scores


def columns(records: Sequence[Record]) -> list[Column]:
    """Bits a byte, percent right in each set, and of what stood there before, with and without."""

    def part(name: str, end: str) -> Column:
        there = [name + e for e in ("", end) if any(r.metric == name + e for r in records)]
        return mean(name, *map(metric, there), digits=1)

    again = dict.fromkeys(
        r.metric.removesuffix(WITHOUT) for r in records if r.metric.startswith("again")
    )
    return [
        words("setting", lambda r: r.task), name_of(), PARAMETERS,
        words("rate", lambda r: "–" if r.model in (CHANCE, PACKAGE) else rate(r)), SEEDS,
        mean("bits a byte", metric(books.NEAR)),
        *(part(name, BY_BYTES) for name in harness.QUIZZES),
        *(part(name, WITHOUT) for name in again),
    ]  # fmt: skip


def notes(records: Sequence[Record]) -> str:
    """How to read the table, and what it waits for."""
    told = [
        "Percent right, of the sets with options also by log p a byte: acc / acc_bytes of "
        "lm-evaluation-harness. Words of the test books that stood there so many bytes before: "
        "with / without their first time."
    ]
    if not all(r.detail.get("counted") for r in records if r.detail and r.model != CHANCE):
        told.append(
            'The sets are not counted yet: pip install "nestlearn[harness]", and give the same '
            "command again."
        )
    return " ".join(told)


EXPERIMENT = Experiment(
    name="table3", shows="what small language models know, and what they recall of a text",
    price=("–", "~4 hours"),
    takes=("seeds", "steps", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: () if cell["task"] == SMALL else (3e-3, 6e-3), seeds=1,
    columns=columns, notes=notes, by=lambda r: (r.task, r.model),
    sources=("experiments/books.py", "experiments/table2.py", "experiments/asked.py"),
)  # fmt: skip
