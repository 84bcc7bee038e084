"""Published data as they are shipped: text, packed or not, and lines of JSON."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_OPENS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open
}  # fmt: skip


@cache
def text_of(file: Path) -> str:
    """The text of a file, as it is or packed (.gz, .xz, .bz2)."""
    with _OPENS.get(file.suffix, open)(file, "rb") as opened:
        return opened.read().decode()


def rows_of(file: Path) -> list[Any]:
    """What stands in a file's lines of JSON."""
    return [json.loads(line) for line in text_of(file).split("\n") if line]


def evenly(rows: Sequence[T], most: int) -> list[T]:
    """At most so many of them, from even places."""
    few = min(most, len(rows))
    return [rows[i * len(rows) // few] for i in range(few)]
