"""A memory on a stream: its rule, its chunk, its read and the bound on its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import Gates, Weights
from ..memory.linalg import frobenius
from . import transition
from .chunk import Chunk, Given, check_backend, note, on_card, ready
from .loop import Span
from .shell import into_shell_, out_of_shell_


class FastWeights(NamedTuple):
    """Weights that change along the stream, leading axes [B, ...].

    start: at the current chunk's first token, where inner gradients are taken. now: after the last
    token. rule: what the rule keeps (momentum, held-back writes).
    """

    start: Weights
    now: Weights
    rule: Any


@dataclass(frozen=True)
class Writer(Chunk):
    """A chunk with its place on a stream.

    chunk: tokens between two points where inner gradients are taken. bound: (low, high), the
    shell in which each matrix stays: after a chunk it is scaled so that its Frobenius norm is
    between low and high times that of its start value (projected gradient descent; None: free,
    and then nothing stops a memory that writes what it reads from growing without end).
    bound_every: tokens after which it acts, a multiple of the chunk (None: every chunk).
    half_life: tokens in which what was learned fades by half *towards the start value*,
    W ← W_0 + 2^(−fades/half_life) (W − W_0), every `fades` tokens (None: it does not): a retention
    (eq. 59) for streams much longer than those trained on. fade_every: those tokens (None: as of
    the bound, which costs nothing more). If they are more than half of the half-life, it fades
    after every chunk. backend: as in `nestlearn.scan.update`.
    """

    chunk: int = field(kw_only=False)
    bound: tuple[float, float] | None = None
    half_life: int | None = None
    backend: str = "auto"
    bound_every: int | None = None
    fade_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)
        period = getattr(self.rule, "period", 1)
        if self.chunk < 1 or self.chunk % period:
            raise ValueError(
                f"chunk={self.chunk}: give a positive multiple of the rule's period ({period})"
            )
        if self.half_life is not None and self.half_life < 1:
            raise ValueError(f"half_life={self.half_life}: give 1 token or more, or None")
        if self.bounded < 1 or self.bounded % self.chunk:
            raise ValueError(
                f"bound_every={self.bound_every}: give a positive multiple of chunk={self.chunk}"
            )
        if self.bound is not None and not 0 <= self.bound[0] <= self.bound[1]:
            raise ValueError(f"bound={self.bound}: give (low, high) with 0 ≤ low ≤ high, or None")

    @property
    def bounded(self) -> int:
        """Tokens after which the bound acts."""
        return self.chunk if self.bound_every is None else self.bound_every

    @property
    def fades(self) -> int:
        """Tokens after which it fades."""
        every = self.fade_every or self.bounded
        seldom = self.half_life is None or every <= self.half_life // 2
        return every if seldom else self.chunk

    def faded(self, W: Tensor, W0: Tensor) -> Tensor:
        """W where it fades."""
        if self.half_life is None:
            return W
        return W.lerp(W0.to(W.dtype).expand_as(W), 1 - 2 ** (-self.fades / self.half_life))

    def begin(self, W0: Weights, batch: int) -> FastWeights:
        """The state before the first token, from start values [...] shared by all samples."""
        W = tuple(  # a copy: the state must not change when an optimizer steps on the start values
            w.to(torch.promote_types(w.dtype, torch.float32)).expand(batch, *w.shape).clone()
            for w in W0
        )
        return FastWeights(W, W, self.rule.init(W))

    def write(
        self,
        fast: FastWeights,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        span: Span,
        W0: Weights,
    ) -> tuple[Tensor | None, FastWeights]:
        """Write the pairs of one span and answer its queries (see `nestlearn.scan.update`)."""
        offset = span.start % self.chunk
        run = ready(
            self, fast.now, fast.rule, q, k, v, gates, backend=self.backend,
            at=fast.start if offset else None, offset=offset,
        )  # fmt: skip
        with torch.autocast(k.device.type, enabled=False):
            o, now, rule = run()
        o = None if o is None or q is None else o.to(q.dtype)
        if not span.ends(self.chunk):
            return o, FastWeights(fast.start, now, rule)
        if span.ends(self.fades):
            now = tuple(self.faded(w, w0) for w, w0 in zip(now, W0))
        if self.bound is not None and span.ends(self.bounded):
            now = tuple(into_shell(w, w0, *self.bound) for w, w0 in zip(now, W0))
        if getattr(rule, "ahead", None) is not None:
            rule = rule._replace(ahead=now)
        return o, FastWeights(now, now, rule)

    def generates(self, z: Tensor, q: Tensor, W: Weights, kernels: bool = False) -> bool:
        """Whether `generate` runs a call's chunks best; kernels: if it does so as kernels."""
        found = self._generator(z, q, W)
        if found is None or found[0] != "generated":
            return found is not None
        return not kernels and transition.too_wide(z[..., : self.chunk, :]) is None

    def _generator(self, z: Tensor, q: Tensor, W: Weights) -> tuple[str, Any] | None:
        """What runs them, by name: the kernels, or torch's operations for matrices."""
        if self.backend != "auto" or self.half_life is not None or torch.compiler.is_exporting():
            return None
        few = z[..., : self.chunk, :]
        call = Given(W, q, few, few, Gates(few), 0)
        if on_card(z):
            from .card import generated, given  # here: triton is loaded only where it can run

            if z.dtype == torch.float32 and given.why_not(self, call) is None:
                return "card: generated", generated
        from . import generated as composed

        return ("generated", composed) if composed.why_not(self, call) is None else None

    def generate(
        self, fast: FastWeights, z: Tensor, q: Tensor, constants: Tensor,
        steps: tuple[float, float], span: Span,
    ) -> tuple[Tensor, FastWeights]:  # fmt: skip
        """Whole chunks, or the beginning of one, of memories stacked [B, heads, memories, ...] that
        say k, v, η within `steps` (and log α) of z [B, heads, T, d] and are written with them,
        the last of them answering q: see `scan.generated` and `scan.card.generated`.
        """
        found = self._generator(z, q, fast.now)
        assert found is not None
        name, form = found
        ends = span.ends(self.chunk)
        note(name, z.shape[-2])
        o, now = form.run(
            self, self.chunk, fast.now, z, q, constants, steps=steps,
            bound=self.bound if ends else None,
        )  # fmt: skip
        return o, FastWeights(now if ends else fast.start, now, fast.rule)


def constants(scalars: list[Tensor], W0: Weights) -> Tensor:
    """What `Writer.generate` needs beside the memories [heads, ...]: weight and bias of what makes
    η (and log α) of an answer, and the norms of the start values.
    """
    norms = (frobenius(w).flatten(1) for w in W0)
    return torch.cat([x.unsqueeze(-1) if x.ndim == 1 else x for x in (*scalars, *norms)], 1)


def into_shell(W: Tensor, W0: Tensor, low: float, high: float) -> Tensor:
    """W scaled so that its Frobenius norm is between low and high times that of W0."""
    return _Rescaled.apply(W, frobenius(W0).to(W.dtype), low, high)


class _Rescaled(torch.autograd.Function):
    """W in its shell; kept is the result, not W."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, start: Tensor, low: float, high: float) -> Tensor:
        scaled = W.clone()
        ctx.bound = low, high
        ctx.save_for_backward(scaled, *into_shell_(scaled, start, low, high), start)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        W, norm, size, start = ctx.saved_tensors
        dW = grad.clone()
        dstart = out_of_shell_(W, dW, norm, size, start, *ctx.bound)
        return dW, dstart.sum_to_size(start.shape), None, None
