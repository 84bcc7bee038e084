"""Memories, objectives and rules, as pure functions on tensors."""

from .memories import FunctionMemory, Matrix, Memory, ResidualMLP, Weights
from .objectives import Objective, dot_product, l2, objective
from .rules import (
    Gates,
    GradientRule,
    Oja,
    Omega,
    Rule,
    RuleState,
    decay,
    delta,
    every,
    hebbian,
    momentum,
    step_sizes,
)

__all__ = [
    "FunctionMemory",
    "Gates",
    "GradientRule",
    "Matrix",
    "Memory",
    "Objective",
    "Oja",
    "Omega",
    "ResidualMLP",
    "Rule",
    "RuleState",
    "Weights",
    "decay",
    "delta",
    "dot_product",
    "every",
    "hebbian",
    "l2",
    "momentum",
    "objective",
    "step_sizes",
]
