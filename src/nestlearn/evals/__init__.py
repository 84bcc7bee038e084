"""Benchmarks: how each is made and scored. Models enter by `Scorable`, results leave by `records`.

One benchmark, one file; each makes a `Task` from a seed: data only, no model and no training.
"""

from .records import Record, grouped, read_records, write_records
from .tasks import IGNORED, Examples, Logits, Scorable, Task, accuracy, predict, score

__all__ = [
    "IGNORED", "Examples", "Logits", "Record", "Scorable", "Task", "accuracy", "grouped", "predict",
    "read_records", "score", "write_records",
]  # fmt: skip
