"""The loss of a model on windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from nestlearn.train.config import DTYPES, require


def cast(device: torch.device, dtype: str) -> torch.autocast:
    """Within: products in that type, by autocast."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def nats(logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Cross entropy at every position of windows [B, T + 1], in nats, float32 [B, T]."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return flat.view(windows.shape[0], -1)


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: torch.Tensor, batch: int = 8, dtype: str = "float32"
) -> tuple[float, torch.Tensor]:
    """Return the mean loss over windows int64 [N, T + 1], and by position, in nats per token [T].

    batch: windows at once. Every module's training mode is put back afterwards.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; pass [N >= 1, T + 1 >= 2]")
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    device = next(model.parameters()).device
    with evaluating(model):
        total = torch.zeros(windows.shape[1] - 1, dtype=torch.float64)
        for part in windows.split(batch):
            part = part.to(device)
            with cast(device, dtype):
                logits, _ = model(part[:, :-1])
            total += nats(logits, part).cpu().double().sum(0)  # Apple's GPU has no float64
    by_position = total / windows.shape[0]
    return float(by_position.mean()), by_position.float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
