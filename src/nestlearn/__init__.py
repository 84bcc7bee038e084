"""nestlearn: models that keep learning (Nested Learning and Hope in PyTorch)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .hf.plan import DeltaLevel
    from .hf.stack import stack_levels, unstack
    from .layers import Attention, ContinuumMemory, Level, SelfModifyingTitans
    from .learn import Session
    from .models import HopeConfig, HopeLM
    from .train import TrainConfig, evaluate, load_text

_NAMES = {
    "layers": ("Attention", "ContinuumMemory", "Level", "SelfModifyingTitans"),
    "hf.plan": ("DeltaLevel",),
    "hf.stack": ("stack_levels", "unstack"),
    "models": ("HopeConfig", "HopeLM"),
    "learn": ("Session",),
    "train": ("TrainConfig", "evaluate", "load_text"),
}
_HOME = {name: room for room, names in _NAMES.items() for name in names}
_ROOMS = (
    "memory", "scan", "state", "options", "layers", "levels", "models", "hf", "learn", "train",
    "optim", "evals",
)  # fmt: skip

__all__ = [
    "Attention",
    "ContinuumMemory",
    "DeltaLevel",
    "HopeConfig",
    "HopeLM",
    "Level",
    "SelfModifyingTitans",
    "Session",
    "TrainConfig",
    "evaluate",
    "load_text",
    "stack_levels",
    "unstack",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing the package alone stays cheap."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
