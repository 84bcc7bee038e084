"""Room 2: writes along a stream. `update` is one chunk, `scan` loops anything over chunks."""

from ..memory import Gates, RuleState
from .door import update, use_triton
from .loop import Span, scan
from .writer import FastWeights, Writer

__all__ = ["FastWeights", "Gates", "RuleState", "Span", "Writer", "scan", "update", "use_triton"]
