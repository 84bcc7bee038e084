"""Layers, each `(x [B, T, D], state=None) -> (y [B, T, D], state)`."""

from .attention import Attention
from .continuum import ContinuumMemory, ContinuumState, Level
from .linear import StaticProjections, gated_deltanet, linear_attention, static_titans
from .titans import SelfModifyingTitans, TitansState

__all__ = [
    "Attention",
    "ContinuumMemory",
    "ContinuumState",
    "Level",
    "SelfModifyingTitans",
    "StaticProjections",
    "TitansState",
    "gated_deltanet",
    "linear_attention",
    "static_titans",
]
