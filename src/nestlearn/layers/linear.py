"""Memories whose keys, values and gates are projections: Titans, DeltaNet, linear attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..memory import Gates, Matrix, ResidualMLP, Weights, decay, delta, hebbian, step_sizes
from ..memory import momentum as with_momentum
from ..memory.linalg import unit
from ..options import DeltaNet, Linear, StaticTitans, limits
from ..scan import FastWeights, Span, Writer
from .parts import BiasedLinear, Readout, ShortConvolution
from .streaming import (
    Course,
    Device,
    MemoryLayer,
    Starts,
    check_heads,
    check_truncate,
    chosen,
    wide,
)


class MixerState(NamedTuple):
    """position: tokens seen. conv: inputs of the convolution. memory: the fast weights."""

    position: int
    conv: Tensor | None
    memory: FastWeights


class StaticProjections(MemoryLayer):
    """One memory per head, written with keys, values and gates from static projections.

    The base of the baselines: `static_titans`, `gated_deltanet` and `linear_attention` below choose
    the memory and the rule. steps: limits of the step size, see `memory.step_sizes`; above 1 the
    delta rule has negative eigenvalues.
    """

    _state = MixerState

    def __init__(
        self, dim: int, heads: int, writer: Writer, *, steps: tuple[float, float] = (0.0, 1.0),
        conv: int = 4, truncate: int | None = None, remat: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, heads)
        check_truncate(truncate)
        self.dim, self.heads, self.writer, self.steps = dim, heads, writer, limits(*steps)
        self.truncate, self.remat = truncate, remat
        rule = writer.rule
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConvolution(dim, conv) if conv else None
        kinds = 1 + rule.decay + getattr(rule, "momentum", False)
        self.gates = BiasedLinear(dim, [0.0, *[5.0] * rule.decay, 0.0][:kinds], heads)
        if not isinstance(writer.memory, Matrix | ResidualMLP):
            raise ValueError(f"memory {writer.memory!r}: give a Matrix or a ResidualMLP")
        if isinstance(writer.memory, Matrix) and writer.bound is not None:
            raise ValueError(
                "bound: a matrix memory starts at zero, so no multiple of it bounds it"
            )
        self.start = Starts(partial(start_weights, writer.memory, heads))
        self.readout = Readout(dim, heads)

    def init_state(self, batch: int, device: Device = None) -> MixerState:
        """The state before the first token."""
        conv = None if self.conv is None else self.conv.init_state(batch, device)
        return MixerState(0, conv, self.writer.begin(self.start(), batch))

    def _course(self, xs: Any, memories: FastWeights) -> Course:
        return Course(self.start(), self.writer.chunk, (self.writer.chunk,))

    def _inputs(self, x: Tensor, conv: Tensor | None):
        """q, k, v [B, H, T, D / H], gates [B, H, T]; the convolution's state."""
        z = x
        if self.conv is not None:
            z, conv = self.conv(x, conv)
        q, k, v = rearrange(self.qkv(z), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        q, k = unit(q), unit(k)
        gates = list(rearrange(wide(self.gates(z)), "b t (n h) -> n b h t", h=self.heads))
        eta = gates.pop(0)
        log_alpha = F.logsigmoid(gates.pop(0)) if self.writer.rule.decay else None
        eta = step_sizes(eta, self.steps, log_alpha)
        log_theta = F.logsigmoid(gates.pop(0)) if gates else None
        return (q, k, v, Gates(eta, log_alpha, log_theta)), conv

    def _outputs(self, o: Tensor, x: Tensor) -> Tensor:
        return self.readout(o, x)

    def _step(self, memory: FastWeights, xs: tuple, span: Span, starts: Weights):
        q, k, v, gates = xs
        return self.writer.write(memory, q, k, v, gates, span, starts)


def start_weights(memory: Matrix | ResidualMLP, *lead: int) -> list[Tensor]:
    """Start values of a memory: zeros for a matrix, unit pre-activations for an MLP."""
    weights = []
    for out, into in memory.shapes():
        scale = 0.0 if isinstance(memory, Matrix) else 1 / math.sqrt(max(out, into))
        weights.append(torch.randn(*lead, out, into) * scale)
    return weights


def static_titans(
    dim: int, heads: int, options: StaticTitans = StaticTitans(), *,
    truncate: int | None = None, remat: bool = False, **changes: Any,
) -> StaticProjections:  # fmt: skip
    """Titans: one residual MLP memory per head, static projections, momentum, retention (L2)."""
    options = chosen(options, StaticTitans, changes)
    width = dim // heads
    hidden = options.hidden or width
    memory = ResidualMLP(width, hidden, gain=math.sqrt(hidden))
    rule = with_momentum(decay(hebbian(normalize=True)))
    writer = Writer(memory, rule, options.chunk, objective="l2", bound=(0.25, 2.0))
    return StaticProjections(dim, heads, writer, conv=options.conv, truncate=truncate, remat=remat)


def gated_deltanet(
    dim: int, heads: int, options: DeltaNet = DeltaNet(), *,
    truncate: int | None = None, remat: bool = False, **changes: Any,
) -> StaticProjections:  # fmt: skip
    """Gated DeltaNet: a matrix memory, the delta rule with retention; exact at any chunk size."""
    options = chosen(options, DeltaNet, changes)
    rule = decay(delta()) if options.weight_decay else delta()
    writer = Writer(Matrix(dim // heads, dim // heads), rule, options.chunk)
    return StaticProjections(
        dim, heads, writer, steps=(options.eta_min, options.eta_max), conv=options.conv,
        truncate=truncate, remat=remat,
    )  # fmt: skip


def linear_attention(
    dim: int, heads: int, options: Linear = Linear(), *,
    truncate: int | None = None, remat: bool = False, **changes: Any,
) -> StaticProjections:  # fmt: skip
    """Linear attention: a matrix memory that only adds."""
    options = chosen(options, Linear, changes)
    writer = Writer(Matrix(dim // heads, dim // heads), hebbian(), options.chunk)
    return StaticProjections(
        dim, heads, writer, steps=(0.0, options.eta_max), conv=options.conv,
        truncate=truncate, remat=remat,
    )  # fmt: skip
