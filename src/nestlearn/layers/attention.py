"""Causal softmax attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..options import Attention as Options
from .parts import Readout, ShortConvolution
from .streaming import Device, StreamingLayer, check_heads, check_input


class AttentionState(NamedTuple):
    """position: tokens seen. conv: inputs of the convolution. k, v [B, H, kept, D / H]: of all
    tokens seen, or of the sinks and then of the last window − 1 others.
    """

    position: int
    conv: Tensor | None
    k: Tensor
    v: Tensor


class Attention(StreamingLayer):
    """Causal softmax attention with rotary positions, in the skeleton of the memories.

    `conv=0` and `gate=False` is the attention of a plain Transformer++. `rotary=False` leaves the
    positions out. Cost grows with the length of the stream, and so does the state; with `window` a
    token sees that many, itself included, and the stream's first `sinks` tokens (Xiao et al. 2024),
    these as if they stood no further away than the window reaches.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        conv: int = 0,
        gate: bool = False,
        rotary: bool = True,
        window: int | None = None,
        sinks: int = 0,
    ):
        super().__init__()
        check_heads(dim, heads)
        Options(conv, rotary, window, sinks)  # refuses what cannot be
        self.dim, self.heads, self.rotary = dim, heads, rotary
        self.window, self.sinks = window, sinks
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConvolution(dim, conv) if conv else None
        self.readout = Readout(dim, heads) if gate else None
        self.out = None if gate else nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int, device: Device = None) -> AttentionState:
        """The state before the first token: an empty cache."""
        conv = None if self.conv is None else self.conv.init_state(batch, device)
        size = (batch, self.heads, 0, self.dim // self.heads)
        empty = self.qkv.weight.new_zeros(size, device=device)
        return AttentionState(0, conv, empty, empty)

    def forward(
        self, x: Tensor, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        check_input(x, self.dim, self.qkv)
        state = self.begin(state, x)
        T, past = x.shape[1], state.position
        z, conv = x, None
        if self.conv is not None:
            z, conv = self.conv(x, state.conv)
        q, k, v = rearrange(self.qkv(z), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        at = torch.arange(past, past + T, device=x.device)
        far = q
        if self.rotary:
            if self.sinks:
                far = _rotate(q, at.clamp(max=self.window))
            q, k = _rotate(q, at), _rotate(k, at)
        if past > 0:
            k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
        if self.window is not None:
            o, k, v = self._within(q, far, k, v, at, past + T)
        elif past == 0:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        if self.readout is not None:
            y = self.readout(o, x)
        else:
            assert self.out is not None
            y = self.out(rearrange(o, "b h t d -> b t (h d)"))
        return y, AttentionState(past + T, conv, k, v)

    def _within(
        self, q: Tensor, far: Tensor, k: Tensor, v: Tensor, at: Tensor, seen: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What tokens at positions `at`, up to `seen`, see of the keys and values of those kept and
        their own, and what of these is kept. far: their queries of sinks.
        """
        assert self.window is not None
        sinks, count = self.sinks, k.shape[2]
        first = min(sinks, seen)
        own = torch.arange(count, device=k.device)
        place = torch.where(own < first, own, own + seen - count)
        gap = at[:, None] - place
        sink = place < sinks
        visible = (gap >= 0) & ((gap < self.window) | sink)
        if sinks:  # twice as wide: one half meets sinks, the other one all else
            q = torch.cat([q, far], -1)
            wide = torch.cat([k * ~sink[:, None], k * sink[:, None]], -1)
        else:
            wide = k
        o = F.scaled_dot_product_attention(q, wide, v, attn_mask=visible, scale=v.shape[-1] ** -0.5)
        last = max(first, count - self.window + 1)
        k, v = (torch.cat([x[:, :, :first], x[:, :, last:]], 2) for x in (k, v))
        return o, k, v


def _rotate(x: Tensor, at: Tensor) -> Tensor:
    """Rotary position embedding of [..., T, d], the tokens at positions `at` [T]."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = torch.outer(at.to(dtype), frequency)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
