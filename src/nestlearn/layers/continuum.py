"""The continuum memory system (section 7): a chain of MLPs that learn at different frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import state as tree
from ..memory import Gates, GradientRule, Matrix, ResidualMLP, Weights
from ..memory.linalg import unit
from ..options import Continuum, Level
from ..scan import FastWeights, Span, Writer, scan, spans
from ..scan.spans import LevelState
from .streaming import (
    Device,
    Starts,
    Stepping,
    StreamingLayer,
    check_input,
    check_truncate,
    wide,
)
from .together import joined, parted, together

SELDOM = 512  # tokens: a level fades, its bound acts at the first chunk's end after so many
STRETCH = 2048  # tokens computed again together


class ContinuumState(NamedTuple):
    """position: tokens seen. levels: one state for each level (None for one that never updates)."""

    position: int
    levels: tuple[LevelState | None, ...]


class Weighted(nn.RMSNorm):
    """An RMS norm before a unit norm, which leaves nothing of it but its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


class LevelMLP(Stepping):
    """One level: s √D · W_2 σ(W_1 z), z the normalised input; its weights learn from the stream.

    Inside a chunk the weights stand still; its end writes the pairs (z_{t−1}, P z_t) of the chunk,
    the level's own associative objective: to tell, from what it read, what comes next. Where only
    W_2 learns the pairs are (σ(W_1 z_{t−1}), P z_t).
    x [B, T, D] -> [B, T, D], before scale and skip, which `_joined` adds.
    """

    _around: ClassVar = {"_features": ((0, 1),), "_static": ((0, 1),), "_joined": ((0, 1), (0, 1))}

    def __init__(
        self, dim: int, level: Level, hidden: int, *, parent: int | None = None,
        meta_gradient: str = "full", truncate: int | None = None, remat: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.level, self.parent = dim, level, parent
        self.truncate, self.remat = truncate, remat
        self.memory = ResidualMLP(dim, hidden, gain=math.sqrt(hidden), residual=False)
        self.norm = Weighted(dim)
        self.start = Starts(partial(_fresh, self.memory))
        self.scale = None if level.scale is None else nn.Parameter(torch.empty(1))
        if level.chunk is None:
            self.reset_parameters()
            return
        with_momentum = level.rule == "momentum"
        rule = GradientRule(delta=level.rule == "dgd", momentum=with_momentum, normalize=True)
        self.linear = level.learns == "out"
        seldom = -(-SELDOM // level.chunk) * level.chunk
        self.writer = Writer(
            Matrix(hidden, dim) if self.linear else self.memory, rule, level.chunk,
            objective=level.objective, read="boundary", bound=level.bound,
            half_life=level.half_life, first_order=meta_gradient == "first-order",
            bound_every=seldom if self.linear else None, fade_every=seldom,
        )  # fmt: skip
        self.value = nn.Linear(dim, dim, bias=False)
        self.lr = nn.Parameter(torch.empty(1))
        self.gate = nn.Parameter(torch.empty(dim))
        self.theta = nn.Parameter(torch.empty(1)) if with_momentum else None
        self.meta_lr = None if parent is None else nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Step sizes and scale as the level says, the gates' inputs zero."""
        starts = {"gate": 0.0, "theta": 0.0, "lr": self.level.lr, "meta_lr": self.level.meta_lr}
        for name, value in {**starts, "scale": self.level.scale}.items():
            if isinstance(getattr(self, name, None), nn.Parameter) and value is not None:
                nn.init.constant_(getattr(self, name), value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name, own in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None and given.ndim < own.ndim:  # in older files these have no axis
                state_dict[prefix + name] = given.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def learning(self) -> Weights:
        """Start values of the matrices that learn."""
        return self.start()[1:] if self.linear else self.start()

    def init_state(self, batch: int) -> LevelState | None:
        """The state before the first token; None for a level that never updates."""
        if self.level.chunk is None:
            return None
        fast = self.writer.begin(self.learning, batch)
        last = fast.now[0].new_zeros(batch, 1, self.memory.hidden if self.linear else self.dim)
        return LevelState(last, fast, None if self.parent is None else fast.start)

    def forward(
        self, x: Tensor, state: LevelState | None, position: int, onto: Tensor, mix: Tensor | None
    ) -> tuple[Tensor, LevelState | None]:
        """onto [B, T, D] and what the level adds to it; its state then (None: from the start)."""
        if self.level.chunk is None:
            return self._outside("_joined", onto, self._outside("_static", x), mix), None
        before, xs = self._begun(x, state)
        ran = scan(**self._steps(x.shape[1], position, before, xs, self.learning))
        o, after = self._ended(*ran, before, xs[0])
        return self._outside("_joined", onto, o, mix), after

    @staticmethod
    def together(
        mlps: Sequence[LevelMLP], xs: Sequence[Tensor], states: Sequence[LevelState | None],
        positions: Sequence[int], ontos: Sequence[Tensor], mixes: Sequence[Tensor | None],
    ) -> list[tuple[Tensor, LevelState | None]]:  # fmt: skip
        """`nestlearn.layers.together.together`, of equal levels and xs [B, T, D] of one length."""
        first, own = mlps[0], (xs, states, positions, ontos, mixes)
        if not all(mlp._joins(position) for mlp, position in zip(mlps, positions)):
            return [mlp(*args) for mlp, *args in zip(mlps, *own)]
        begun = [mlp._begun(x, state) for mlp, x, state in zip(mlps, xs, states)]
        W0s = (mlp.learning[0].unsqueeze(0) for mlp in mlps)
        starts = [(W0.expand(len(x), -1, -1),) for W0, x in zip(W0s, xs)]
        before, given = joined(begun)
        ys, after = scan(
            **first._steps(xs[0].shape[1], positions[0], before, given, joined(starts))
        )
        ran = parted(first._ended(ys, after, before, given[0]), [len(x) for x in xs])
        each = zip(mlps, ran, ontos, mixes)
        return [(mlp._outside("_joined", onto, o, mix), s) for mlp, (o, s), onto, mix in each]

    def _joins(self, position: int) -> bool:
        """Whether it may run as one with equal levels: its steps need no parameter but the start
        value, and all that it does seldom begins anew.
        """
        return (
            self.level.chunk is not None and self.linear and self.parent is None
            and self.truncate is None
            and not any(position % n for n in (self.writer.bounded, self.writer.fades))
        )  # fmt: skip

    def _begun(self, x: Tensor, state: LevelState | None) -> tuple[LevelState, tuple]:
        """The state before and what the steps read."""
        state = self.init_state(x.shape[0]) if state is None else state
        assert state is not None
        return tree.tree_map(wide, state), self._outside("_features", x)

    def _steps(
        self, length: int, position: int, state: LevelState, xs: tuple, starts: Weights
    ) -> dict[str, Any]:
        """What `nestlearn.scan.scan` is given. starts: the level's own, or of each sample."""
        assert self.level.chunk is not None
        how: dict[str, Any] = {
            "length": length, "position": position, "truncate": self.truncate,
            "chunks": (self.level.chunk, *([self.parent] if self.parent else [])),
            "after": self._restarted if self.parent else None,
        }  # fmt: skip
        if not self.linear:
            step = self._stepping(starts, None if self.parent else self.level.chunk)
            k, *pairs = xs
            past = torch.cat([state.last.to(k.dtype), k[:, :-1]], 1)
            how |= {"state": state._replace(last=None), "xs": (k, past, *pairs)}
            return {**how, "f": step, "remat": self.remat}
        step = partial(spans.write, self.writer, starts[0], options=self._options)
        if self.remat and torch.is_grad_enabled():
            step, how["after"] = partial(self._computed_again, step), None
        run = max(1, (STRETCH if self.remat else 1 << 40) // self.level.chunk)
        return {**how, "f": step, "state": state, "xs": xs, "run": run}

    def _ended(
        self, ys: list[Tensor], after: LevelState, before: LevelState, k: Tensor
    ) -> tuple[Tensor, LevelState]:
        """o [B, T, D] of all steps, and the state after them."""
        if not self.linear:
            after = after._replace(last=k[:, -1:].to(before.last.dtype).contiguous())
        return (torch.cat(ys, 1) if len(ys) > 1 else ys[0]).contiguous(), after

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor, Gates]:
        """What is known of all tokens at once: the keys one token later, values and gates."""
        z = unit(self.norm(x))
        k = z
        if self.linear:
            gain = self.memory.gain
            k = F.silu(z @ (gain * self.start()[0]).to(z.dtype).mT) / gain
        gate = 2 * torch.sigmoid(wide(z @ self.gate.to(z.dtype)) * math.sqrt(self.dim))
        eta = (self.lr * gate).clamp(0.0, 1.0)
        log_theta = None
        if self.theta is not None:
            log_theta = F.logsigmoid(self.theta).expand_as(eta)
        return k, self.value(z), Gates(eta, None, log_theta)

    def _static(self, x: Tensor) -> Tensor:
        """The answer of a level that never updates."""
        z, gain = unit(self.norm(x)), self.memory.gain
        one, two = self.start()  # the gain is met by the weights, which are smaller
        return F.silu(z @ (gain * one).to(z.dtype).mT) @ (two / gain).to(z.dtype).mT

    def _joined(self, x: Tensor, o: Tensor, mix: Tensor | None) -> Tensor:
        """x and what the level adds to it."""
        factor: Any = math.sqrt(self.dim)
        for share in (self.scale, mix):
            factor = factor if share is None else factor * share.to(o.dtype)
        return x + (factor * o).to(x.dtype)

    def _step(self, state: LevelState, xs: tuple, span: Span, starts: Weights):
        z, past, v, gates = xs
        o, fast = self.writer.write(state.fast, z, past, v, gates, span, starts)
        return o, state._replace(fast=fast)

    def _computed_again(self, step: Callable, state: LevelState, xs: tuple, span: Span):
        """A step and what follows it, of which only the ends are kept for the backward pass."""

        def run(state: LevelState, xs: tuple) -> tuple[Tensor, LevelState]:
            y, state = step(state, xs, span)
            return y, self._restarted(state, span)

        return checkpoint(run, state, xs, use_reentrant=False)

    def _restarted(self, state: LevelState, span: Span) -> LevelState:
        """In a nested system, where the next slower level's context ends, the level starts again
        from a start value that has moved towards what it has learned.
        """
        if state.start is None or self.parent is None or not span.ends(self.parent):
            return state
        assert self.meta_lr is not None
        share = self.meta_lr.clamp(0.0, 1.0)
        start = tuple(w.lerp(now, share) for w, now in zip(state.start, state.fast.now))
        fast = FastWeights(start, start, self.writer.rule.init(start))
        return LevelState(state.last, fast, start)


class ContinuumMemory(StreamingLayer):
    """A chain of MLP levels, each updated at its own period (eqs. 70–74).

    x [B, T, dim] -> y [B, T, dim], residual. levels: fast to slow is the paper's order.
    variant: "sequential" (73), a chain whose levels each go on learning; "nested" (72), where
    a level starts again, whenever the next slower level's context ends, from a start value that
    moved with what it had learned; "independent" (74), all levels read x and a learned weighted sum
    joins them. meta_gradient: "full" through the inner gradients, or "first-order". truncate: the
    outer gradient stops at multiples of so many tokens. remat: recompute chunks in the backward
    pass.

    Levels that never update make it a plain MLP. Raises ValueError if a nested system's chunks do
    not divide one another.
    """

    def __init__(
        self,
        dim: int,
        levels: list[Level] | tuple[Level, ...],
        variant: str = "sequential",
        *,
        meta_gradient: str = "full",
        truncate: int | None = None,
        remat: bool = False,
    ):
        super().__init__()
        check_truncate(truncate)
        options = Continuum(tuple(levels), variant, meta_gradient)  # refuses what cannot be
        self.dim, self.levels, self.variant = dim, options.levels, variant
        self.mlps = nn.ModuleList(
            LevelMLP(
                dim, level, level.hidden or _share(dim, len(levels)), parent=parent,
                meta_gradient=meta_gradient, truncate=truncate, remat=remat,
            )
            for level, parent in zip(self.levels, options.parents())
        )  # fmt: skip
        self.mix = nn.Parameter(torch.empty(len(levels))) if variant == "independent" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every level counts once."""
        if self.mix is not None:
            nn.init.ones_(self.mix)

    def init_state(self, batch: int, device: Device = None) -> ContinuumState:
        """The state before the first token."""
        return ContinuumState(0, tuple(mlp.init_state(batch) for mlp in self._chain()))

    def _shares(self) -> Sequence[Tensor | None]:
        """How much each level counts."""
        return [None] * len(self.mlps) if self.mix is None else self.mix.unbind()

    def _chain(self) -> list[LevelMLP]:
        return [mlp for mlp in self.mlps if isinstance(mlp, LevelMLP)]

    def forward(
        self, x: Tensor, state: ContinuumState | None = None
    ) -> tuple[Tensor, ContinuumState]:
        position, before = self._begun(x, state)
        y, states = x, []
        for mlp, own, mix in zip(self._chain(), before, self._shares()):
            y, after = mlp(y if mix is None else x, own, position, y, mix)
            states.append(after)
        return y, ContinuumState(position + x.shape[1], tuple(states))

    @staticmethod
    def together(
        layers: Sequence[ContinuumMemory], xs: Sequence[Tensor], states: Sequence[Any]
    ) -> list[tuple[Tensor, ContinuumState]]:
        """`nestlearn.layers.together.together`, level by level, xs [B, T, dim] of one length."""
        positions, before = zip(*(layer._begun(x, s) for layer, x, s in zip(layers, xs, states)))
        ys: Sequence[Tensor] = xs
        after = []
        each = (zip(layer._chain(), own, layer._shares()) for layer, own in zip(layers, before))
        for level in zip(*each):
            mlps, own, mixes = zip(*level)
            read = ys if layers[0].mix is None else xs
            ys, now = zip(*together(mlps, read, own, positions, ys, mixes))
            after.append(now)
        ends = (position + x.shape[1] for position, x in zip(positions, xs))
        return list(zip(ys, map(ContinuumState, ends, zip(*after))))

    def _begun(self, x: Tensor, state: ContinuumState | None) -> tuple[int, Sequence[Any]]:
        """The position and each level's state, None where it begins in its own forward pass, with
        its weights at hand.
        """
        readers = (mlp.value for mlp in self._chain() if mlp.level.chunk is not None)
        check_input(x, self.dim, next(readers, None))
        return (0, [None] * len(self.mlps)) if state is None else self.begin(state, x)


def _fresh(memory: ResidualMLP) -> list[Tensor]:
    return [torch.randn(shape) / math.sqrt(memory.hidden) for shape in memory.shapes()]


def _share(dim: int, levels: int) -> int:
    """The hidden width of each of so many levels: together 4 dim, in multiples of 16."""
    return max(16, 16 * round(4 * dim / levels / 16))
