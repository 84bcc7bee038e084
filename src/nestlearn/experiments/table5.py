"""Table 5: formal languages, within and beyond the trained lengths (section 9.5).

No model has positions or a short convolution here, as in the published runs (Irie, Csordás and
Schmidhuber, EMNLP 2023): what a model knows of the string is in its state. One chunk holds a whole
string, of every model that has chunks.
"""

from __future__ import annotations

from typing import Any

from nestlearn.evals import formal
from nestlearn.experiments.accuracy import Accuracies
from nestlearn.experiments.experiment import Cell, Experiment, Options, Tell, chosen
from nestlearn.experiments.fit import settings, train_cell
from nestlearn.experiments.models import ABLATIONS, CONTENDERS, RIVALS

NAMES = {
    "parity": "Parity", "aa": "(aa)*", "abab": "(abab)*", "anbn": "aⁿbⁿ", "anbncn": "aⁿbⁿcⁿ",
    "shuffle2": "Shuffle-2",
}  # fmt: skip
WHERE = {"bin0": "trained", "bin1": "longer"}  # strings of these lengths
_FAILS = [46.4, 0, 0, 0, 0, 0], [78.1, 0, 0, 0, 0, 0], [98.2, 10.1, 0, 0, 0, 0]
_ROWS = {
    "Hope": [100.0] * 12,
    "LSTM": [100.0] * 12,
    **{m: [*row, *[100.0] * 6] for m, row in zip(("Transformer", "Linear", "DeltaNet"), _FAILS)},
}
PAIRS = [(name, place) for name in NAMES for place in WHERE]
PAPER = {model: dict(zip(PAIRS, row)) for model, row in _ROWS.items()}

ACCURACIES = Accuracies(
    {f"{title} bin0 / bin1": [(name, place) for place in WHERE] for name, title in NAMES.items()},
    PAPER,
    {(name, place): f"{NAMES[name]}\n{WHERE[place]}" for name, place in PAIRS},
)

MODELS = ("hope", "hope-deep", *RIVALS, *(f"hope-{name}" for name in ABLATIONS))
_PLACES = list(dict.fromkeys((*MODELS, *CONTENDERS)))
STEPS = dict.fromkeys(NAMES, 1500) | {"shuffle2": 3000}  # which has two counters at once
QUICK_STEPS = 8
SKELETON: dict[str, Any] = {
    "dim": 64, "layers": 2, "heads": 4, "conv": 0, "rotary": False, "chunk": 640,
}  # fmt: skip


def grid(asked: Options) -> list[Cell]:
    names = asked.models or asked.pick(("hope", "lstm"), MODELS)
    cells = []
    for language in chosen(asked.only, NAMES, "language"):
        many = language in ("parity", "shuffle2")
        steps = asked.steps or asked.pick(QUICK_STEPS, STEPS[language])
        base = {
            "benchmark": "formal", "task": language,
            "skeleton": SKELETON | asked.pick({"dim": 32, "chunk": 32}, {}),
            "data": asked.pick({"train": 200, "test": 8}, {"test": 1000 if many else None}),
            # The rate is constant as published: a falling one settles before it generalises.
            "fit": settings(
                steps, asked.quick, batch=asked.pick(4, 32 if many else 16),
                warmup=min(50, steps // 10), schedule="constant", weight_decay=0.0,
                eval_every=min(50, max(1, steps // 10)), stop=100.0,
            ),
        }  # fmt: skip
        cells += [base | {"model": model} for model in chosen(names, CONTENDERS, "model")]
    return cells


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    return train_cell(cell, formal.task(cell["task"], **cell["data"]), tell)


EXPERIMENT = Experiment(
    name="table5", shows="formal languages, within and beyond trained lengths",
    price=("~10 hours", "~12 hours"),
    grid=grid, work=work,
    rates=(3e-3, 1e-2),
    columns=ACCURACIES.columns,
    order=lambda records: sorted(records, key=lambda r: _PLACES.index(r.model)),
    below=ACCURACIES.below, notes=ACCURACIES.rates, figure=ACCURACIES.figure,
)  # fmt: skip
