"""What several mixers are put together from: convolution, readout, gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .streaming import Device


class BiasedLinear(nn.Linear):
    """A linear map of dim whose bias starts at `biases`, each for so many heads."""

    def __init__(self, dim: int, biases: Sequence[float], heads: int = 1):
        self.biases, self.heads = tuple(biases), heads  # Linear's own constructor resets
        super().__init__(dim, len(biases) * heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias.copy_(torch.tensor(self.biases).repeat_interleave(self.heads))


class ShortConvolution(nn.Module):
    """Causal depth-wise convolution of `width` taps; state [B, D, width − 1], the last inputs."""

    def __init__(self, dim: int, width: int = 4):
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: a convolution has 1 tap or more")
        self.width = width
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Taps whose answer to noise has its size."""
        with torch.no_grad():
            self.weight.normal_().div_(math.sqrt(self.width))

    def init_state(self, batch: int, device: Device = None) -> Tensor:
        """Zeros: before the first token there is nothing."""
        dim, width = self.weight.shape
        return self.weight.new_zeros(batch, dim, width - 1, device=device)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        past = self.init_state(x.shape[0], x.device) if state is None else state
        seen = torch.cat([past.to(x.dtype), x.mT], -1)
        y = F.conv1d(seen, self.weight.to(x.dtype).unsqueeze(1), groups=x.shape[2])
        return F.silu(y.mT.contiguous()), seen[..., seen.shape[-1] - self.width + 1 :].contiguous()


class Readout(nn.Module):
    """What follows a memory's answer: RMS norm per head, a gate from the input, a projection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, H, T, D / H], x [B, T, D] -> [B, T, D]."""
        o = rearrange(self.norm(o), "b h t d -> b t (h d)")
        return self.out(o * F.silu(self.gate(x)))


def logit(p: float) -> float:
    """The bias whose sigmoid is p."""
    return math.log(p / (1 - p))
