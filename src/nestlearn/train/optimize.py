"""What every training shares: the schedule and AdamW."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def schedule(
    step: int,
    steps: int,
    warmup: int,
    *,
    kind: str = "cosine",
    final: float = 0.0,
    lands: bool = True,
) -> float:
    """Return the share of the peak rate in the update after `step` others.

    Linear to 1 in `warmup` steps; then 1 ("constant") or along a cosine to `final`, which the last
    of the `steps` updates has (lands) or the one after it would have.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = (step + lands - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(model: nn.Module, config: Any, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with decay on matrices only.

    config: has lr, weight_decay and betas.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not getattr(parameter, "no_decay", False)
            (decayed if matrix else plain).append(parameter)
    if not decayed and not plain:
        raise ValueError("the model has no trainable parameters; set requires_grad on some")
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
