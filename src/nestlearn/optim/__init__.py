"""Optimizers as memories of gradients, and the transforms that they are chains of."""

from .base import ChainOptimizer
from .chain import Transform, chain, every, total
from .delta import DGD
from .general import GGD, GM
from .groups import groups
from .optimizers import M3, AdaMuon, Chain, DeepMomentum, DeltaMomentum, Muon

__all__ = [
    "DGD",
    "GGD",
    "GM",
    "M3",
    "AdaMuon",
    "Chain",
    "ChainOptimizer",
    "DeepMomentum",
    "DeltaMomentum",
    "Muon",
    "Transform",
    "chain",
    "every",
    "groups",
    "total",
]
