"""One format for results: a JSON list of records, written whole, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nestlearn.disk import atomic_write

T = TypeVar("T")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": (int, float), "dict[str, Any]": dict, "dict[str, str]": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One measured number and all that it hangs on.

    setting: the test set or variant of the task. value: in percent where the metric is an accuracy.
    parameters: trained values. steps: optimizer steps. tokens: read in training, padding not
    counted. seconds: of training and testing. config: of model and training. versions, commit: of
    the code. note: what a reader must know, e.g. that the run diverged. rule: by what data
    learning rate and checkpoint were chosen ("": of before it was said). detail: what else the
    training left, such as curves, in the first of its records alone. A file of before may lack the
    fields that have a default.
    """

    benchmark: str
    task: str
    setting: str
    model: str
    seed: int
    metric: str
    value: float
    parameters: int
    steps: int
    tokens: int
    seconds: float
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    note: str = ""
    rule: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, _TYPES[str(f.type)]) or isinstance(value, bool):
                raise ValueError(f"{f.name}={value!r}: a record holds {f.type} there")
        if not math.isfinite(self.value):
            raise ValueError(f"value={self.value}: give a finite number, and say more in note")


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write the records as JSON, whole or not at all."""
    text = json.dumps([asdict(record) for record in records], indent=1, allow_nan=False)
    atomic_write(path, lambda temp: temp.write_text(text + "\n", encoding="utf-8"))


def read_records(path: str | Path) -> list[Record]:
    """The records that `write_records` wrote; ValueError names the first that is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): write it again") from error
    if not isinstance(data, list):
        raise ValueError(f"{path} holds a {type(data).__name__}: give a JSON list of records")
    records = []
    for i, row in enumerate(data):
        try:
            records.append(Record(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: record {i} is damaged ({error}): write it again") from error
    return records


def grouped(items: Iterable[T], by: Callable[[T], Any]) -> dict[Any, list[T]]:
    """The records (or what else) of each `by`, in the order of their first."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(by(item), []).append(item)
    return found
