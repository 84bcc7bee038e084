"""Self-modifying Titans (section 8): memories that generate their own keys, values and gates."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..memory import Gates, GradientRule, Matrix, ResidualMLP, Weights, step_sizes
from ..memory.linalg import unit
from ..options import PROJECTIONS, Titans
from ..scan import FastWeights, Span, Writer
from ..scan.fused import answers
from ..scan.loop import RUN
from ..scan.writer import constants
from .parts import Readout, ShortConvolution, logit
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
from .together import once

FADE_EVERY = 512  # tokens: whole runs of chunks, and nothing at the usual windows


class Group(NamedTuple):
    """Memories that one update writes: they share keys, gates, chunk and rule."""

    names: tuple[str, ...]
    writer: Writer
    heads: slice


class Given(NamedTuple):
    """What a group's step needs of the parameters: the start values, stacked; if the layer's chunks
    run by `Writer.generate`, these for every sample, and `constants`.
    """

    weights: Weights
    constants: Tensor | None


class TitansState(NamedTuple):
    """position: tokens seen. conv: inputs of the convolution. memories: fast weights of each of the
    layer's `groups`, the memories of a group stacked [B, heads, memories, ...].
    """

    position: int
    conv: Tensor | None
    memories: tuple[FastWeights, ...]


class SelfModifyingTitans(MemoryLayer):
    """Memories M_k, M_v, M_η, M_α, M_mem that write each other and themselves (eqs. 83–93).

        q_t = W_q x_t,  k_t = M_k(x_t),  v_t = M_v(x_t),  η_t = M_η(x_t),  α_t = M_α(x_t)
        o_t = M_mem(q_t),   v̂_□ = M_□(v_t)   for every memory □
        M_□ ← M_□ (α_t I − η_t k_t k_tᵀ) − η_t ∇L(M_□; k_t, v̂_□)

    x [B, T, dim] -> y [B, T, dim]. All that a memory reads is of unit norm per head; the scalars
    η, α are a learned readout of their memory's vector answer. The outer gradient reaches every
    start value through every write. Memories that are matrices, of one chunk size and without
    momentum, all move by the same matrix (`docs/math.md`); those with a hidden layer do not.

    options: what it is made of, see there; changes: of its fields, such as chunk=32. truncate: the
    outer gradient through the memories stops at multiples of so many tokens; give it for long
    sequences with large steps (eta_max > 1, momentum), where products of many writes make it
    explode. remat: recompute each chunk in the backward pass. backend: as in
    `nestlearn.scan.update`; "auto" also takes whole chunks as one step where it can.

    Not for sequences where exact recall over the whole length is all that counts and the length
    is short: there softmax attention is simpler and cheaper.
    """

    _state = TitansState

    def __init__(
        self,
        dim: int,
        heads: int,
        options: Titans = Titans(),
        *,
        truncate: int | None = None,
        remat: bool = False,
        backend: str = "auto",
        **changes: Any,
    ):
        super().__init__()
        check_heads(dim, heads)
        check_truncate(truncate)
        o = chosen(options, Titans, changes)
        replacing = o.replacing(heads)
        self.dim, self.heads, self.steps = dim, heads, (o.eta_min, o.eta_max)
        self.truncate, self.remat = truncate, remat
        decayed = PROJECTIONS if o.weight_decay else tuple(n for n in PROJECTIONS if n != "alpha")
        self.adapt = tuple(n for n in decayed if n in o.adapt)
        width = dim // heads
        hidden = width if o.hidden is None else o.hidden
        memory: Matrix | ResidualMLP = (
            Matrix(width, width)
            if o.depth == 1
            else ResidualMLP(width, hidden, o.depth, gain=math.sqrt(max(hidden, 1)))
        )
        rule = GradientRule(
            replacing > 0, decay=o.weight_decay, momentum=o.momentum, normalize=True
        )
        self.writer = Writer(
            memory, rule, o.chunk, objective=o.objective, read=o.read, bound=o.bound,
            backend=backend, answering=-1, makes_values=True,
        )  # fmt: skip
        names = ["k", "v", "eta", "alpha"] + ["q"] * ("q" in self.adapt) + ["mem"]
        self.start = nn.ModuleDict(
            {
                n: Starts(partial(_fresh, memory, heads))
                for n in names
                if o.weight_decay or n != "alpha"
            }
        )
        self.groups = _groups(o, self.adapt, self.writer, rule, (replacing, heads))
        self.half_life = o.half_life
        self.fade_every = _fade_every(o.half_life, [group.writer.chunk for group in self.groups])
        self.conv = ShortConvolution(dim, o.conv) if o.conv else None
        self.query = None if "q" in self.adapt else nn.Linear(dim, dim, bias=False)
        # η starts at 2 % of its bound, α at 0.9999: a memory that is not trained yet
        # neither floods itself nor fades within any context that it may be given.
        self.eta = Scalar(heads, width, logit(0.02))
        self.alpha = Scalar(heads, width, logit(0.9999)) if o.weight_decay else None
        self.theta = nn.Linear(dim, heads) if o.momentum else None
        self.readout = Readout(dim, heads)

    def start_weights(self, group: Group) -> Weights:
        """Start values of a group's memories, stacked: each [heads, memories, out, in]."""
        starts = ([_own(w, group.heads) for w in self._start(name)] for name in group.names)
        return tuple(torch.stack(ws, 1) for ws in zip(*starts))

    def _start(self, name: str) -> Weights:
        return self.start[name]()

    def init_state(self, batch: int, device: Device = None) -> TitansState:
        """The state before the first token."""
        conv = None if self.conv is None else self.conv.init_state(batch, device)
        memories = (g.writer.begin(self.start_weights(g), batch) for g in self.groups)
        return TitansState(0, conv, tuple(memories))

    def _course(self, xs: tuple, memories: tuple[FastWeights, ...]) -> Course:
        z, q, _ = xs
        generated = self._generates(z, q, memories)
        starts = once(
            (self, len(z), generated),
            lambda: tuple(self._starts(group, len(z), generated) for group in self.groups),
        )
        chunks = tuple(group.writer.chunk for group in self.groups)
        alone = chunks[0] if len(set(chunks)) == 1 and not generated else None
        runs = generated and torch.is_grad_enabled() and self.fade_every not in chunks
        run = RUN if runs else 1
        if self.fade_every is None:
            return Course(starts, alone, chunks, run, joins=generated)
        return Course(starts, alone, (*chunks, self.fade_every), run, self._faded, generated)

    def _generates(self, z: Tensor, q: Tensor | None, memories: tuple[FastWeights, ...]) -> bool:
        """Whether `Writer.generate` runs the chunks: every group is all memories of its heads. A
        compiled step is faster than all but kernels.
        """
        compiled = "_step" in self._compiled
        return q is not None and all(
            group.names == tuple(self.start) and group.writer.generates(z, q, fast.now, compiled)
            for group, fast in zip(self.groups, memories)
        )

    def _starts(self, group: Group, batch: int, generated: bool) -> Given:
        """For one call."""
        weights = self.start_weights(group)
        if not generated:
            return Given(weights, None)
        readouts = (self.eta,) if self.alpha is None else (self.eta, self.alpha)
        scalars = [_own(p, group.heads) for scalar in readouts for p in scalar()]
        held = wide(constants(scalars, weights)).expand(batch, -1, -1)
        return Given(tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in weights), held)

    def _inputs(self, x: Tensor, conv: Tensor | None):
        """z [B, H, T, d] of unit norm, the static query, the momentum's gate; the convolution."""
        z = x
        if self.conv is not None:
            z, conv = self.conv(x, conv)
        heads = "b t (h d) -> b h t d"
        q = None if self.query is None else unit(rearrange(self.query(z), heads, h=self.heads))
        log_theta = None if self.theta is None else F.logsigmoid(wide(self.theta(z))).mT
        z = unit(rearrange(z, heads, h=self.heads))
        return (wide(z), q, log_theta), conv

    def _outputs(self, o: Tensor, x: Tensor) -> Tensor:
        return self.readout(o.to(x.dtype), x)

    def _step(self, memories: tuple, xs: tuple, span: Span, starts: tuple[Given, ...]):
        """One span: whole chunks, or the beginning of one, as `Writer.generate` runs them; what
        begins inside a chunk, or has no such form, composed.
        """
        z, q, _ = xs
        if starts[0].constants is None or span.start % self.groups[0].writer.chunk:
            return self._composed(memories, xs, span, starts)
        heads = [group.heads.stop - group.heads.start for group in self.groups]
        zs, qs = ((x,) if len(heads) == 1 else x.split(heads, 1) for x in (z, q))
        after, os = [], []
        for group, fast, start, z, q in zip(self.groups, memories, starts, zs, qs):
            assert start.constants is not None
            o, fast = group.writer.generate(fast, z, q, start.constants, self.steps, span)
            after.append(fast)
            os.append(o)
        return _joined(os), tuple(after)

    def _composed(self, memories: tuple, xs: tuple, span: Span, starts: tuple[Given, ...]):
        """One span: generate with the weights of the chunk's start, answer, write (eqs. 86–88)."""
        z, q, log_theta = xs
        written = {name for group in self.groups for name in group.names}
        alone = {name: self._start(name) for name in self.start if name not in written}
        said = {
            name: self._says(name, tuple(w.to(z.dtype) for w in starts), z, slice(None))
            for name, starts in alone.items()
        }
        parts: dict[str, list[Tensor]] = {}  # of each memory, from the first heads on
        for (names, _, heads), fast in zip(self.groups, memories):
            for name, *W in zip(names, *(w.unbind(2) for w in fast.start)):
                if name != "mem":
                    parts.setdefault(name, []).append(self._says(name, tuple(W), z, heads))
        said |= {name: _joined(answer) for name, answer in parts.items()}
        k, v = unit(said["k"]).unsqueeze(2), unit(said["v"]).unsqueeze(2)
        q = unit(said["q"]) if q is None else q
        log_alpha = None if self.alpha is None else F.logsigmoid(said["alpha"])
        eta = step_sizes(said["eta"], self.steps, log_alpha)
        gates = Gates(eta, log_alpha, log_theta).map(lambda g: g.unsqueeze(2))

        after, os = [], []
        for (names, writer, heads), fast, start in zip(self.groups, memories, starts):
            own = itemgetter((slice(None), heads))
            asked = own(q) if "mem" in names else None
            o, fast = writer.write(fast, asked, own(k), own(v), gates.map(own), span, start.weights)
            after.append(fast)
            os += [] if o is None else [o]
        return _joined(os), tuple(after)

    def _says(self, name: str, W: Weights, z: Tensor, heads: slice) -> Tensor:
        """What a memory of these heads answers to z: a vector, or the logit that is read off it."""
        readout, z = {"eta": self.eta, "alpha": self.alpha}.get(name), z[:, heads]
        with torch.autocast(z.device.type, enabled=False):
            if len(W) == 1:  # a logit's row of the matrix is all that is asked
                return z @ W[0].mT if readout is None else readout(z, heads, W[0])
        memory = self.writer.memory
        assert isinstance(memory, ResidualMLP)
        answer = answers(memory, W, z)
        return answer if readout is None else readout(answer, heads)

    def _faded(
        self, memories: tuple[FastWeights, ...], span: Span, starts: tuple[Given, ...]
    ) -> tuple[FastWeights, ...]:
        """The memories, every `fade_every` tokens nearer to their start values."""
        assert self.fade_every is not None
        if not span.ends(self.fade_every):
            return memories
        assert self.half_life is not None
        faded = 1 - 2 ** (-self.fade_every / self.half_life)
        after = []
        for fast, start in zip(memories, starts):
            now = tuple(
                w.lerp(w0.to(w.dtype).expand_as(w), faded) for w, w0 in zip(fast.now, start.weights)
            )
            after.append(FastWeights(now, now, fast.rule))
        return tuple(after)


class Scalar(nn.Module):
    """A scalar per head from a memory's answer: [B, H, T, d] -> [B, H, T]. With W [B, H, d, d] from
    what a matrix memory would answer W x of. Of None its weight and bias, for a kernel.
    """

    def __init__(self, heads: int, width: int, bias: float):
        super().__init__()
        self.first = bias
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The bias at its start value."""
        nn.init.normal_(self.weight)
        nn.init.constant_(self.bias, self.first)

    def forward(
        self, x: Tensor | None = None, heads: slice = slice(None), W: Tensor | None = None
    ) -> Any:
        if x is None:
            return self.weight, self.bias
        row = _own(self.weight, heads).to(x.dtype).unsqueeze(-2)
        if W is not None:
            row = row @ W
        return (x @ row.mT).squeeze(-1) + _own(self.bias, heads).unsqueeze(-1)


def _fade_every(half_life: int | None, chunks: list[int]) -> int | None:
    """After how many tokens, at which all chunks end, memories fade."""
    if half_life is None:
        return None
    size = math.lcm(*chunks)
    return max(1, min(FADE_EVERY, half_life // 4) // size) * size


def _own(x: Tensor, heads: slice) -> Tensor:
    """x of these heads; the gradient of a slice costs two passes, also where it is the whole."""
    return x if heads in (slice(None), slice(0, len(x))) else x[heads]


def _joined(heads: list[Tensor]) -> Tensor:
    return heads[0] if len(heads) == 1 else torch.cat(heads, 1)


def _fresh(memory: Matrix | ResidualMLP, heads: int) -> list[Tensor]:
    """Identity for a matrix; for an MLP, pre-activations and answers of about unit norm."""
    if isinstance(memory, Matrix):
        eye = torch.eye(memory.value_dim, memory.key_dim).repeat(heads, 1, 1)
        return [eye + 0.02 * torch.randn_like(eye)]
    scale = 1 / math.sqrt(memory.hidden)
    return [scale * torch.randn(heads, *shape) for shape in memory.shapes()]


def _groups(
    o: Titans, adapt: tuple[str, ...], writer: Writer, rule: GradientRule, ends: tuple[int, int]
) -> tuple[Group, ...]:
    """The memories that one update writes: all of them, if their chunks are of one size; those of
    the heads that replace and of the others, which end at `ends`, apart.
    """
    size = o.chunk if o.projection_chunk is None else o.projection_chunk
    together: list[tuple[tuple[str, ...], int]] = [((*adapt, "mem"), o.chunk)]
    if adapt and size != o.chunk:
        together = [(adapt, size), (("mem",), o.chunk)]
    kinds = [(True, slice(0, ends[0])), (False, slice(*ends))]
    return tuple(
        Group(names, replace(writer, chunk=size, rule=replace(rule, delta=delta)), part)
        for names, size in together
        for delta, part in kinds
        if part.start < part.stop
    )
