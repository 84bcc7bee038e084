"""What tables 4 and 5 share: columns of tasks, the paper's rows below ours, the best rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nestlearn.evals import Record
from nestlearn.experiments.figures import grid
from nestlearn.experiments.models import contender
from nestlearn.experiments.tables import PARAMETERS, Column, at, mean, number, table, words

Pair = tuple[str, str]  # task, setting
TITLE = words("model", lambda r: contender(r.model).title)


@dataclass(frozen=True)
class Accuracies:
    """heads: of columns, with the pairs in their cells. paper: by row of its table, then pair.
    names: of the pairs in the picture.
    """

    heads: Mapping[str, Sequence[Pair]]
    paper: Mapping[str, Mapping[Pair, float]]
    names: Mapping[Pair, str] = field(default_factory=dict)

    def columns(self, records: Sequence[Record]) -> list[Column]:
        """The model's title, then accuracies in percent, where there is a record."""
        there = {(r.task, r.setting) for r in records}
        shown = {head: pairs for head, pairs in self.heads.items() if there & set(pairs)}
        return [TITLE] + [
            replace(mean(head, *(at(*pair) for pair in pairs), digits=1), key=pairs)
            for head, pairs in shown.items()
        ]

    def below(self, rows: Sequence[Record], columns: Sequence[Column]) -> list[str] | None:
        name = contender(rows[0].model).paper
        if name is None or name not in self.paper:
            return None
        told = (" / ".join(number(self.paper[name].get(p)) for p in c.key) for c in columns[1:])
        return [f"*{name}, paper*", *told]

    def rates(self, records: Sequence[Record]) -> str:
        """The best learning rates, and the parameters."""

        def best(c: Column) -> Column:
            def text(rows: Sequence[Record]) -> str:
                own = (r.config["lr"] for r in rows if (r.task, r.setting) in c.key)
                return " / ".join(dict.fromkeys(f"{lr:g}" for lr in own))

            return Column(c.head, text)

        columns = [TITLE, PARAMETERS, *map(best, self.columns(records)[1:])]
        return f"Best learning rates:\n\n{table(records, columns)}"

    def figure(self, records: Sequence[Record], path: Path) -> None:
        """A grid of colours, the paper's rows below ours."""
        ours: dict[str, dict[str, list[float]]] = {}
        paper: dict[str, dict[str, float]] = {}
        for r in records:
            pair, about = (r.task, r.setting), contender(r.model)
            if (name := self.names.get(pair)) is None:
                continue
            ours.setdefault(about.title, {}).setdefault(name, []).append(r.value)
            told = self.paper.get(about.paper or "", {})
            if pair in told:
                paper.setdefault(about.title, {})[name] = told[pair]
        grid(ours, path, paper=paper)
