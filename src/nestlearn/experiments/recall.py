"""What table 1 and figure 9 share: models, answers about long texts, columns and a figure.

A text is read once, in pieces, with the state carried. Strictly asked: the state is saved, and
another process, which has the model and that file, is told the question
(`nestlearn.experiments.asked`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nestlearn import state as tree
from nestlearn.evals.haystack import Asked, Row
from nestlearn.experiments import books
from nestlearn.experiments.asked import Elsewhere, answers, read
from nestlearn.experiments.cells import Work
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.figures import Panel, curves, points
from nestlearn.experiments.lessons import Lesson, Make, teach
from nestlearn.experiments.models import FAMILIES
from nestlearn.experiments.tables import PARAMETERS, RATE, SEEDS, mean, metric
from nestlearn.experiments.tables import model as name_of
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Continuum, DeltaNet, Titans
from nestlearn.options import SwiGLU as MLP

STEPS, LANGUAGE = 3000, 0.1  # the latter: weight of the loss of bytes that answer nothing
# What is written fades by later writes alone: a retention α loses a needle in 1 / (1 - α).
_LASTING = Continuum(tuple(replace(level, half_life=None) for level in Continuum().levels))
_PLAIN, _FREE = DeltaNet(weight_decay=False), Titans(half_life=None, weight_decay=False)
# Levels learn a needle before a gate does, so they have to forget it within a lesson.
_BRIEF = Continuum(tuple(replace(level, half_life=256) for level in Continuum().levels))
_OWN: dict[str, dict[str, Any]] = {  # levels beside gates that can shut fade
    "Hope": {"mixer": _FREE, "channel": _LASTING},
    "Hope, shut below 0.1": {"mixer": replace(_FREE, eta_min=0.1)},
    "Hope, shut below 0.5": {"mixer": replace(_FREE, eta_min=0.5)},
    "Hope without levels, shut below 0.2": {"mixer": replace(_FREE, eta_min=0.2), "channel": MLP()},
    "Hope-Attention": {"channel": _LASTING},
    "DeltaNet with levels": {"mixer": _PLAIN, "channel": _LASTING},
    "DeltaNet with levels, shut below 0.2": {
        "mixer": replace(_PLAIN, eta_min=0.2), "channel": _BRIEF,
    },
    "DeltaNet": {"mixer": _PLAIN},
    "DeltaNet, shut below 0.2": {"mixer": replace(_PLAIN, eta_min=0.2)},
    "DeltaNet, shut below 0.5": {"mixer": replace(_PLAIN, eta_min=0.5)},
    "Transformer": {},
}  # fmt: skip
TAPS = 16  # of every mixer's convolution: bytes of about four tokens, which it is made for


def _row(name: str, own: dict[str, Any]) -> dict[str, Any]:
    row = FAMILIES[name.split(",")[0].replace("Hope without levels", "Hope")] | own
    return row | {"mixer": replace(row.get("mixer", Titans()), conv=TAPS)}


ROWS = {name: _row(name, own) for name, own in _OWN.items()}
# Whose steps at a haystack's bytes cost: without, many of a book's stay just below the limit.
COSTLY = (
    "Hope without levels, shut below 0.2", "DeltaNet with levels, shut below 0.2",
    "DeltaNet, shut below 0.2", "DeltaNet, shut below 0.5",
)  # fmt: skip
SIZE, QUICK_SIZE = (320, 7, 5), (16, 1, 2)  # width, layers, heads
LONG, ENOUGH = 65_536, 8  # bytes: of texts that are asked strictly alone; beyond an answer's own
READINGS = ("strict", "ahead")  # the question after the text, in another process; or before it, too

Ask = Callable[[Cell, str, int, str, bool], list[Asked]]  # cell, task, length, split, ahead


def cells(
    asked: Options, task: str, lessons: Sequence[Sequence[Lesson]], lengths: Sequence[int],
    usual: int, short: int, **own: Any,
) -> list[Cell]:  # fmt: skip
    """A cell for each model. lessons: of a quick run, and the usual ones. lengths: that may be
    asked for, the first `usual` where none is; short: of a quick run. own: what else it holds.
    ValueError where `asked.data` has no books in gutenberg/.
    """
    assert asked.data is not None
    text = books.text_of(str(Path(asked.data) / "gutenberg")) | {"folder": asked.data}
    known = {f"{length:,}": length for length in lengths}
    names = chosen(asked.only or tuple(known)[:usual], known, "length")
    return [
        {
            "task": task, "model": name, "size": asked.pick(QUICK_SIZE, SIZE),
            "lessons": asked.pick(*lessons), "setting": " ".join(names),
            "lengths": asked.pick([short], [known[length] for length in names]),
            "validated": asked.pick(short, lengths[0]), "out": str(asked.out.resolve()),
            "steps": asked.steps or asked.pick(4, STEPS), "language": LANGUAGE,
            "costly": name in COSTLY, **text, **own,
        }
        for name in chosen(asked.models, ROWS, "model")
    ]  # fmt: skip


def config_of(name: str, size: tuple[int, int, int]) -> HopeConfig:
    """The row's model, with Hope's parameters. Attention's window gives its state Hope's bytes."""
    return books.bounded(books.sized(ROWS[name], size), books.sized(ROWS["Hope"], size))


def trained(cell: Cell, make: Make, tell: Tell) -> tuple[HopeLM, dict[str, Any]]:
    """The cell's model, trained, and what is to be kept of that. cell: as of `lessons.teach`, with
    model and size.
    """
    torch.manual_seed(cell["seed"])
    model = HopeLM(config_of(cell["model"], tuple(cell["size"])))
    return model, teach(model, cell, make, tell)


# ------------------------------------------------------------------------------------- answers


def said(
    lm: HopeLM, asked: Sequence[Asked], most: int, elsewhere: Elsewhere | None
) -> tuple[list[str], int]:
    """What the model answers, up to `most` bytes each, and the bytes of a state. asked: of texts of
    one length. elsewhere: who is asked with the saved state; None: the model itself.
    """
    state = read(lm, [one.text for one in asked])
    questions = [one.question for one in asked]
    size = tree.nbytes(state) // len(asked)
    if elsewhere is None:
        return answers(lm, state, questions, most), size
    with TemporaryDirectory() as place:
        path = Path(place) / "state.safetensors"
        tree.save(state, path)
        return elsewhere.ask(path, len(asked[0].text), questions, most), size


def measured(
    cell: Cell, tell: Tell, make: Callable[..., Row], names: Sequence[str], ask: Ask,
    score: Callable[[Asked, str], float],
) -> dict[str, Any]:  # fmt: skip
    """Train a cell's model, and ask it: percent of the answers that are said, by task, length and
    reading; "value": on validation texts. make(folder, lesson, rng): a sequence to train on. cell:
    as of `trained`, with lengths, validated (a length), said (bytes of an answer), and what `ask`
    needs of it.
    """
    lm, result = trained(cell, partial(make, cell["folder"]), tell)

    def percent(key: tuple[str, int, str], ahead: bool, who: Elsewhere | None) -> float:
        asked = ask(cell, *key, ahead)
        most = ENOUGH + max(sum(len(answer) + 2 for answer in one.answers) for one in asked)
        told, sizes[key] = said(lm, asked, min(most, cell["said"]), who)
        return 100 * statistics.fmean(map(score, asked, told))

    sizes: dict[tuple[str, int, str], int] = {}
    scores: dict[str, float] = {}
    with TemporaryDirectory() as place:
        lm.save_pretrained(place)
        held = [percent((name, cell["validated"], "valid"), False, None) for name in names]
        with Elsewhere(Path(place), cell["device"]) as elsewhere:
            for length, name in product(cell["lengths"], names):
                both = READINGS[: 2 if length <= LONG else 1]
                for reading, who in zip(both, (elsewhere, None)):
                    key = f"{name}, {length:,}, {reading}"
                    scores[key] = percent((name, length, "test"), who is None, who)
                    tell(1.0, f"{key}: {scores[key]:.0f}")
    strict = [share for key, share in scores.items() if key.endswith("strict")]
    value = statistics.fmean(held)
    return result | {
        "value": value, "scores": scores, "state_bytes": max(sizes.values()),
        "headline": f"{value:.0f} on validation, {statistics.fmean(strict):.0f} strictly",
    }  # fmt: skip


@cache
def haystacks(folder: Path) -> dict[str, Any]:
    """The training, validation and test books, as bytes."""
    text = books.read(folder / "gutenberg")
    parts = {"train": text.corpus.train, "valid": text.corpus.val, "test": text.test}
    return {split: ids.numpy() for split, ids in parts.items()}


# -------------------------------------------------------------------------- the experiment


NOTE = (
    "Percent of the answers that are said: strictly (the text is read once, its state saved to a "
    "file, another process asked) / with the question told before the text, too. Lengths in bytes."
)


def experiment(
    name: str, shows: str, price: tuple[str, str], grid: Callable[[Options], list[Cell]],
    work: Work, panels: Mapping[str, Sequence[str]],
) -> Experiment:  # fmt: skip
    """Table 1, figure 9, or what is like them. panels: of the figure, a group of tasks each."""
    names = tuple(dict.fromkeys(name for group in panels.values() for name in group))
    return Experiment(
        name=name, shows=shows, price=price,
        takes=("seeds", "steps", "only", "models", "data", "workers", "device"),
        grid=grid, work=work,
        rates=(3e-3, 6e-3), quick_rates=(0, 1), seeds=1,
        columns=lambda records: columns(records, names), notes=lambda _: NOTE,
        figure=lambda records, path: figure(records, panels, path),
        sources=tuple(f"experiments/{name}.py" for name in ("recall", "lessons", "asked", "books")),
    )  # fmt: skip


def _length(r: Record) -> int:
    return int(r.metric.split(", ")[1].replace(",", ""))


def columns(records: Sequence[Record], names: Sequence[str]) -> list[Column]:
    """Percent of the answers said, by task and length: strictly / ahead."""
    state = mean("state, kB", lambda r: r.detail.get("state_bytes", 0) / 1e3 or None, digits=0)
    heads = [f"{name}, {n:,}" for name in names for n in sorted({_length(r) for r in records})]
    each = (mean(h, *(metric(f"{h}, {kind}") for kind in READINGS), digits=0) for h in heads)
    return [name_of(), PARAMETERS, state, RATE, SEEDS, *each]


def figure(records: Sequence[Record], panels: Mapping[str, Sequence[str]], path: Path) -> None:
    """By length, strictly asked; the mean of a panel's tasks."""

    def panel(title: str, names: Sequence[str]) -> Panel:
        told = (r for r in records if r.metric.endswith(", strict"))
        own = (r for r in told if r.metric.split(", ")[0] in names)
        return Panel(title, "bytes read", "answers (%)", points(own, lambda r: float(_length(r))))

    curves([panel(*some) for some in panels.items()], path, log="2", marker=True, ylim=(-2, 104))
