"""What an optimizer remembers, said in the terms of nested learning: for `nestlearn.levels`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.optim.optimizer import Optimizer

from .base import ChainOptimizer
from .chain import Memory
from .delta import DGD
from .general import GGD, GM
from .groups import groups
from .optimizers import M3, AdaMuon, DeepMomentum, DeltaMomentum, Muon

NAMED: dict[str, type[ChainOptimizer]] = {
    kind.__name__: kind for kind in (AdaMuon, DGD, DeepMomentum, DeltaMomentum, GGD, GM, M3, Muon)
}
_ADAM = (
    Memory("first moment m", "½‖m − g‖²", "m ← β₁ m + (1 − β₁) g"),
    Memory("second moment v", "½‖v − g²‖²", "v ← β₂ v + (1 − β₂) g²"),
)
TORCH: dict[str, tuple[tuple[Memory, ...], str]] = {  # its memories, the step that reads them
    "AdamW": (_ADAM, "W ← W − lr (m / (√v + ε) + λ W)"),
    "momentum": ((Memory("momentum m", "−⟨m, g⟩", "m ← β m + g"),), "W ← W − lr m"),
    "SGD": ((), "W ← W − lr g"),
}
NAMES = (*TORCH, *NAMED)


class Declared(NamedTuple):
    """memories: each with the number of parameters that it serves. steps: by a parameter's id, the
    rule that writes it; a parameter without one is not trained."""

    name: str
    memories: list[tuple[Memory, int]]
    steps: dict[int, str]


def declared(model: nn.Module, optimizer: str | Optimizer) -> Declared:
    """The memories of an optimizer, or of one by its name with its default options, for a model.

    Names: those of `nestlearn.optim` (matrices and the rest by `groups`), "AdamW", "momentum",
    "SGD". ValueError for another name, or an optimizer of another class.
    """
    if isinstance(optimizer, ChainOptimizer):
        return _of_chains(optimizer)
    if isinstance(optimizer, str) and optimizer in NAMED:
        built = _built(model, NAMED[optimizer])
        return Declared(optimizer, [], {}) if built is None else _of_chains(built)
    name = optimizer if isinstance(optimizer, str) else _torch_name(optimizer)
    if name not in TORCH:
        raise ValueError(f"optimizer={name!r}: use one of {sorted(NAMES)}, or one that is built")
    params = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, Optimizer):
        params = [p for g in optimizer.param_groups for p in g["params"]]
    memories, step = TORCH[name]
    count = sum(p.numel() for p in params)
    return Declared(name, [(m, count) for m in memories], {id(p): step for p in params})


def _built(model: nn.Module, kind: type[ChainOptimizer]) -> ChainOptimizer | None:
    if not any(p.requires_grad for p in model.parameters()):
        return None
    if not issubclass(kind, DGD):
        return kind(groups(model))
    built = kind(model)
    built.detach()
    return built


def _of_chains(optimizer: ChainOptimizer) -> Declared:
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    steps = {id(p): optimizer.step_of(p, group) for p, group in pairs}
    return Declared(type(optimizer).__name__, optimizer.memories(), steps)


def _torch_name(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    if name == "SGD" and any(g["momentum"] for g in optimizer.param_groups):
        return "momentum"
    return "AdamW" if name == "Adam" else name
