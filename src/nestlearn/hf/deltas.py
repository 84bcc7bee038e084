"""A base model and the deltas beside its MLPs: what is computed with, and what learns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestlearn.layers.streaming import wide

from .door import check_ran, check_weight, evaluating, find_blocks, probe
from .lending import Effective, Factors, Weights, adopt, adopted, kernel, lend, release, version
from .plan import WINDOW, StackConfig, StackMemory, chosen
from .writes import Fast, LevelState, Pace

MOMENTUM = 0.9  # θ of DeltaLevel(rule="momentum"), unless it is trained
_SAMPLES = 32  # numbers of each tensor: an update past the version counter (`.data`) moves them


class Deltas(nn.Module):
    """A base model whose MLPs compute with a memory's deltas, and the numbers by which these learn.

    lr, theta, forget, meta_lr: of each level. starts: trained start values. The base model's own
    parameters stay as they are.
    """

    def __init__(self, base: PreTrainedModel, config: StackConfig):
        super().__init__()
        found = find_blocks(base)
        blocks = [found[i] for i in chosen(config.layers, len(found))]
        if config.learns == "out":
            blocks = [b._replace(layers=b.layers[-1:], paths=b.paths[-1:]) for b in blocks]
        layers = [layer for block in blocks for layer in block.layers]
        if config.rank is not None and config.rank > min(min(kernel(x).shape) for x in layers):
            raise ValueError(f"rank={config.rank} is more than the MLPs' smallest side")
        positions = getattr(base.config.get_text_config(), "max_position_embeddings", WINDOW)
        if config.window is not None and config.window > positions:
            raise ValueError(f"window={config.window}: the model has {positions} positions")
        self.window = config.window or min(positions, WINDOW)
        self.again = self.window // 4  # tokens read again when the window is full
        kind = config.cache_dtype
        self.cache_dtype: torch.dtype | None = None if kind is None else getattr(torch, kind)
        self.config, self.blocks, self.layers = config, blocks, tuple(layers)
        self.owned = config.deal(len(blocks), len(layers) // len(blocks))
        self.parents = config.parents()
        self.paths = {x: path for b in blocks for x, path in zip(b.layers, b.paths)}
        self._norms: tuple[Any, list[float]] | None = None
        self.fingerprint: tuple[str, str] | None = None  # the weights' version, and their sha256

        with torch.inference_mode(False):  # what learns must be able to
            like = torch.empty(0, dtype=wide(kernel(layers[0])).dtype, device=base.device)
            pairs = list(zip(config.levels, self.owned))
            self.lr = _fixed(like.new_full((len(own),), level.lr) for level, own in pairs)
            self.theta = _fixed(like.new_tensor(MOMENTUM) for _ in pairs)
            self.forget = _fixed(like.new_tensor(1.0) for _ in pairs)
            self.meta_lr = _fixed(like.new_tensor(level.meta_lr) for level, _ in pairs)
            self.starts = nn.ParameterList()  # trained start values, flat; empty: zero
        for layer in layers:
            adopt(layer)
        try:
            probe(base, blocks)
        except BaseException:
            for layer in layers:
                release(layer)
            raise
        self.base = base.eval()

    def init_memory(self, batch: int = 1) -> StackMemory:
        """The memory before the first token, of `batch` streams."""
        tokens = torch.zeros(batch, 0, dtype=torch.long, device=self.lr[0].device)
        like = self.lr[0].detach()
        seen, writes = like.new_zeros(batch), tokens.new_zeros(batch)
        levels = tuple(LevelState((), (), seen, (), (), writes) for _ in self.config.levels)
        return StackMemory(0, tokens, (), (tokens, like.new_zeros(batch, 0)), levels)

    @property
    def norms(self) -> list[float]:
        """The norms of the pretrained weights of each layer, as they are now."""
        known = version_of(kernel(layer) for layer in self.layers)
        if self._norms is None or self._norms[0] != known:
            self._norms = (known, [float(wide(kernel(x).detach()).norm()) for x in self.layers])
        return self._norms[1]

    def check_adopted(self) -> None:
        """ValueError if a layer cannot be lent weights any more."""
        for layer, path in self.paths.items():
            if not adopted(layer):
                raise ValueError(
                    f"the model was unstacked ({path} takes no memory): stack_levels() it again"
                )
            check_weight(path, layer)

    def check_ran(self, weights: Weights, ran: dict[nn.Module, int]) -> None:
        """ValueError if a layer that was lent weights has not run: its memory has no effect."""
        check_ran({layer: self.paths[layer] for layer in weights}, ran)

    def version(self) -> str:
        """Another whenever the base model's weights or the start values are."""
        return version_of([*self.base.state_dict().values(), *self.starts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Deltas:
        """Move or cast. A cast is the base model's: step sizes, start values and all that is
        learned keep their type, and the base stays the one that memories know.
        """
        same = self.fingerprint is not None and self.fingerprint[0] == self.version()
        own = [p for name, p in self.named_parameters() if not name.startswith("base.")]
        before = [p.data for p in own]
        super()._apply(fn, recurse)
        for parameter, old in zip(own, before):
            if parameter.dtype != old.dtype:
                parameter.data = old.to(parameter.device)
        if same:
            assert self.fingerprint is not None
            self.fingerprint = (self.version(), self.fingerprint[1])
        return self

    def active(self) -> list[int]:
        """The levels that learn: with a chunk, and a step size above 0 (or one in training)."""
        return [
            i for i in self.config.faster_first()
            if self.lr[i].requires_grad or bool((self.lr[i] > 0).any())
        ]  # fmt: skip

    def pace(self, i: int, drift: float | None) -> Pace:
        """How level i writes; drift: see `StackedModel.learn`."""
        level = self.config.levels[i]
        assert level.chunk is not None
        keep = 1.0 if level.half_life is None else 0.5 ** (level.chunk / level.half_life)
        high = float("inf") if level.bound is None else level.bound
        high = high if drift is None else min(high, drift)
        theta = self.theta[i] if level.rule == "momentum" else None
        norms = self.norms  # once: that the weights are still the same takes a look at each
        bound = tuple(high * norms[j] for j in self.owned[i])
        return Pace(self.lr[i], theta, keep, bound)

    def fasts(self, memory: StackMemory) -> dict[int, Fast]:
        """The levels' deltas where there are any."""
        return {
            i: level.fast or self.start(i, len(memory.context))
            for i, level in enumerate(memory.levels)
            if level.fast or len(self.starts)
        }

    def weights(self, memory: StackMemory | Sequence[StackMemory] | None) -> Weights:
        """The weights of every layer that a memory has changed; none for an untouched one."""
        memory = self.init_memory() if memory is None else memory
        several = [memory] if isinstance(memory, StackMemory) else list(memory)
        moved = [
            i for i in range(len(self.owned))
            if len(self.starts) or any(m.levels[i].fast for m in several)
        ]  # fmt: skip
        batches = [len(m.context) for m in several]
        fasts = {
            i: _stack_rows([m.levels[i].fast or self.start(i, b) for m, b in zip(several, batches)])
            for i in moved
        }
        return self.effective(fasts, dense=sum(batches) == 1)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, memory: StackMemory | Weights | None = None, **options: Any
    ) -> Any:
        """The base model's `generate` under the memory; options are its own."""
        weights = self._effective(memory)
        with evaluating(self.base), lend(weights) as ran:
            made = self.base.generate(input_ids, **options)
        self.check_ran(weights, ran)
        return made

    def _effective(self, memory: StackMemory | Sequence[StackMemory] | Weights | None) -> Weights:
        if not isinstance(memory, dict):
            return self.weights(memory)
        if not memory.keys() <= set(self.layers):
            raise ValueError("these are another model's weights: pass this one's weights(memory)")
        return memory

    def start(self, i: int, batch: int) -> Fast:
        """Level i's start value: zero unless it was trained. A low-rank one is zero on its left;
        its right side, where a trained start begins, is drawn, always the same.
        """
        shapes = [kernel(self.layers[j]).shape for j in self.owned[i]]
        rank, like = self.config.rank, self.lr[i]
        if len(self.starts):
            sides = 1 if rank is None else 2
            first = sides * sum(len(own) for own in self.owned[:i])
            mine = [
                w.expand(batch, -1, -1) for w in self.starts[first : first + sides * len(shapes)]
            ]
            rights = mine[1::2] if sides == 2 else [None] * len(mine)
            return tuple(Factors(*pair) for pair in zip(mine[::sides], rights))
        if rank is None:
            return tuple(Factors(like.new_zeros(batch, *shape)) for shape in shapes)
        drawn = torch.Generator().manual_seed(i)
        rights = [
            torch.randn(rank, width, generator=drawn, dtype=torch.float32, device="cpu")
            / width**0.5
            for _, width in shapes
        ]
        return tuple(
            Factors(like.new_zeros(batch, out, rank), right.to(like).expand(batch, -1, -1))
            for (out, _), right in zip(shapes, rights)
        )

    def effective(
        self, fasts: dict[int, Fast], *, dense: bool = False, tapped: bool = False
    ) -> Weights:
        """Pretrained weights plus the levels' deltas; low-rank ones beside them unless `dense`,
        and with `tapped` such layers note what goes through them.
        """
        self.check_adopted()
        parts: dict[int, list[Factors]] = {}
        for i, fast in fasts.items():
            for j, delta in zip(self.owned[i], fast):
                parts.setdefault(j, []).append(delta)
        weights = {}
        for j, deltas in parts.items():
            layer, own = self.layers[j], kernel(self.layers[j])
            if self.config.rank is not None and not dense:
                weights[layer] = Effective(None, _beside(deltas), taps=[] if tapped else None)
                continue
            total = wide(own) + deltas[0].dense()
            for delta in deltas[1:]:
                total += delta.dense()
            weights[layer] = Effective(total.to(own.dtype), (), version(layer))
        return weights


def _beside(deltas: list[Factors]) -> tuple[Factors]:
    """The low-rank deltas of a layer's levels as one: two products in place of two for each."""
    if len(deltas) == 1:
        return (deltas[0],)
    rights = [delta.right for delta in deltas if delta.right is not None]
    return (Factors(torch.cat([delta.left for delta in deltas], -1), torch.cat(rights, 1)),)


def version_of(tensors: Iterable[Tensor]) -> str:
    """Another for other tensors, or once one of these is written, without reading all of them: by
    their places, autograd's version counters, and some of their numbers.
    """
    content, samples = hashlib.sha256(), list[Tensor]()
    for tensor in tensors:
        content.update(f"{tensor.data_ptr()} {tensor._version} {tensor.dtype} ".encode())
        numbers = tensor.detach().reshape(-1)
        some = numbers[:: max(1, len(numbers) // _SAMPLES)][:_SAMPLES]
        samples.append(some.to(torch.float64))
    if samples:
        content.update(torch.cat(samples).cpu().numpy().tobytes())
    return content.hexdigest()


def _fixed(values) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in values)


def _stack_rows(fasts: list[Fast]) -> Fast:
    """The fast weights of several memories, as of one batch."""
    joined = []
    for same in zip(*fasts):
        rights = [delta.right for delta in same if delta.right is not None]
        left = torch.cat([delta.left for delta in same])
        joined.append(Factors(left, torch.cat(rights) if rights else None))
    return tuple(joined)
