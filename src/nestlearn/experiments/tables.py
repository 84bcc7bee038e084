"""The one writer of tables: a row of records, a column that says something of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nestlearn.evals import Record, grouped

Number = Callable[[Record], float | None]


@dataclass(frozen=True)
class Column:
    """head, and what stands below it for the records of a row. key: what it is of, for `below`."""

    head: str
    text: Callable[[Sequence[Record]], str]
    key: Any = None


Below = Callable[[Sequence[Record], Sequence[Column]], Sequence[str] | None]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± half the range of several; "–" of none."""
    if not values:
        return "–"
    text = number(statistics.mean(values), digits)
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """With so many digits; with one, a whole number without; "–" of None."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}"
    return text.removesuffix(".0") if digits == 1 else text


def mean(head: str, *of: Number, digits: int = 3) -> Column:
    """The spread of a number of the records, `*` where a run diverged; of several, in turn."""

    def part(rows: Sequence[Record], get: Number) -> str:
        told = [(r, value) for r in rows if (value := get(r)) is not None]
        mark = "*" * any(r.note.startswith("diverged") for r, _ in told)
        return spread([value for _, value in told], digits) + mark

    return Column(head, lambda rows: " / ".join(part(rows, get) for get in of))


def words(head: str, of: Callable[[Record], Any]) -> Column:
    """What differs among the records, in turn."""
    return Column(head, lambda rows: " / ".join(dict.fromkeys(str(of(r)) for r in rows)))


def metric(name: str) -> Number:
    """The record's value, of those of that metric."""
    return lambda r: r.value if r.metric == name else None


def at(task: str, setting: str | None = None) -> Number:
    """The record's value, of those of that task and setting."""
    return lambda r: r.value if r.task == task and setting in (None, r.setting) else None


def detail(*keys: str | int) -> Number:
    """A number of what the training left."""

    def get(r: Record) -> float | None:
        found: Any = r.detail or None
        for key in keys if found else ():
            found = found[key]
        return found

    return get


def rate(record: Record) -> str:
    """The learning rate, and whether it stood at the end of those tried: widen them there."""
    lr, tried = record.config["lr"], record.config.get("rates", ())
    chosen = record.rule.startswith("learning rate: the best")
    edge = chosen and lr in (min(tried), max(tried))
    return f"{lr:g}{' (end of grid)' * edge}"


def parameters(rows: Sequence[Record]) -> str:
    """The number of trained values, from the smallest to the largest."""
    counts = sorted({r.parameters for r in rows})
    return " – ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))


RATE = words("rate", rate)
PARAMETERS = Column("parameters", parameters)
SEEDS = Column("seeds", lambda rows: str(len({r.seed for r in rows})))


def model(head: str = "model") -> Column:
    return words(head, lambda r: r.model)


def table(
    records: Sequence[Record],
    columns: Sequence[Column],
    by: Callable[[Record], Any] = lambda r: r.model,
    below: Below = lambda rows, columns: None,
) -> str:
    """Markdown: a row for all records of one `by`, in the order of their first, and what `below`
    says of them.
    """
    rows: list[Sequence[str]] = [[column.head for column in columns]]
    for group in grouped(records, by).values():
        rows.append([column.text(group) for column in columns])
        if (more := below(group, columns)) is not None:
            rows.append(more)
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
