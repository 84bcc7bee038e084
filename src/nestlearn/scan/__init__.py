"""Writes along a stream. `update` is one chunk, `scan` loops anything over chunks."""

from ..memory import Gates, RuleState
from .chunk import Chunk, explain, update, use_triton
from .loop import Span, scan
from .writer import FastWeights, Writer

__all__ = [
    "Chunk",
    "FastWeights",
    "Gates",
    "RuleState",
    "Span",
    "Writer",
    "explain",
    "scan",
    "update",
    "use_triton",
]
