"""Table 6: what each part of Hope is worth, as a language model on books.

    nestlearn reproduce table6 --data FOLDER

FOLDER as in `nestlearn.experiments.books`. Every row is one change of Hope at its parameters. Test
books give the figures, validation books choose the learning rates. Hope here has no momentum and
no memory of queries by default (see docs/choices.md), so these two rows add what the paper's take
away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestlearn.experiments import books
from nestlearn.experiments.experiment import Cell, Experiment, Options, Tell
from nestlearn.options import Continuum, Level, SwiGLU, Titans

FAST, SLOW, NEVER = Level(chunk=4), Level(chunk=16), Level()
ROWS: dict[str, dict[str, Any]] = {
    "Hope": {},
    "without DGD": {"mixer": Titans(dgd=False)},
    "with momentum": {"mixer": Titans(momentum=True)},
    "without weight decay": {"mixer": Titans(weight_decay=False)},
    "without the continuum memory": {"channel": SwiGLU()},
    "without inner projection k": {"mixer": Titans(adapt=("v", "eta", "alpha"))},
    "without inner projection v": {"mixer": Titans(adapt=("k", "eta", "alpha"))},
    "with inner projection q": {"mixer": Titans(adapt=("k", "v", "q", "eta", "alpha"))},
    "without inner projections": {"mixer": Titans(adapt=())},
    "one level that learns: 16": {"channel": Continuum((SLOW, NEVER))},
    "three: 4, 16, 64": {"channel": Continuum((FAST, SLOW, Level(chunk=64), NEVER))},
    "both matrices learn": {
        "channel": Continuum((Level(4, learns="all"), Level(16, learns="all"), NEVER))
    },
}
SIZE = (320, 7, 5)  # width, layers, heads: about 10 million parameters
STEPS, BATCH, LENGTH = 300, 64, 512


def grid(asked: Options) -> list[Cell]:
    own = {"size": asked.pick((32, 1, 2), SIZE)}
    return books.cells(asked, {"books": own}, ROWS, (STEPS, BATCH, LENGTH), what=("", "row"))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    config = books.sized(ROWS[cell["model"]], cell["size"])
    _, result = books.trained(cell, config, tell)
    return books.in_bits(books.read(Path(cell["folder"])), result)


EXPERIMENT = Experiment(
    name="table6", shows="what each part of Hope is worth, on books", price=("–", "~1 hour"),
    takes=("seeds", "steps", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=(6e-3, 1.2e-2),
    columns=books.columns,
    sources=("experiments/books.py",),
)  # fmt: skip
