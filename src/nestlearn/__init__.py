"""nestlearn: models that keep learning (Nested Learning and Hope in PyTorch)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .layers import Attention, ContinuumMemory, Level, SelfModifyingTitans
    from .models import HopeConfig, HopeLM
    from .train import TrainConfig, evaluate, load_text

_HOME = {
    "Attention": "layers",
    "ContinuumMemory": "layers",
    "Level": "layers",
    "SelfModifyingTitans": "layers",
    "HopeConfig": "models",
    "HopeLM": "models",
    "TrainConfig": "train",
    "evaluate": "train",
    "load_text": "train",
}
_ROOMS = ("memory", "scan", "state", "layers", "levels", "models", "hf", "train")

__all__ = [
    "Attention",
    "ContinuumMemory",
    "HopeConfig",
    "HopeLM",
    "Level",
    "SelfModifyingTitans",
    "TrainConfig",
    "evaluate",
    "load_text",
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
