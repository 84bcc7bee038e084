"""Level stacking (section 7.3): a pretrained model's MLPs become levels that go on learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestlearn import state as trees

from . import learning
from .anchor import Anchor
from .door import check_ran, check_weight, evaluating, find_blocks, probe
from .families import (
    Effective,
    Factors,
    Weights,
    adopt,
    adopted,
    kernel,
    lend,
    release,
    share,
    version,
)
from .families import full_precision as wide
from .plan import AUTO, WINDOW, DeltaLevel, Memory, StackConfig, chosen, rank_of
from .version import version_of
from .writes import Fast, LevelState

MOMENTUM = 0.9  # θ of DeltaLevel(rule="momentum"), unless it is trained


def stack_levels(
    model: PreTrainedModel,
    levels: Sequence[DeltaLevel],
    *,
    layers: Sequence[int] | None = None,
    spread: str = "block",
    variant: str = "sequential",
    objective: str = "outer",
    rank: int | Literal["auto"] | None = AUTO,
    window: int | None = None,
) -> StackedModel:
    """Let the MLPs of a pretrained causal LM learn from what the model reads (section 7.3).

    Every level holds deltas from the pretrained MLP weights and moves them at the multiples of
    its chunk, counted in tokens from the start of the stream, by the mean gradient over the chunk
    (eq. 71), taken at the weights with which its tokens were read. A model whose levels have
    lr=0, or that has learned nothing yet, computes bit for bit what the base model does.

    levels: fast to slow or in any order. layers: the blocks that learn, by number (default all).
    spread: "block", every block has one delta per level, which add up; "depth", every block
    belongs to one level, the first blocks to the first one. variant, of levels in a block:
    "sequential" (73), at the end of a slower level's context it takes over what the next faster
    one has learned, and that starts again from its start value; "nested" (72),
    the faster one starts again and its start value has moved by meta_lr towards what it had
    learned; "independent" (74), each level learns and keeps its own. Over the depth sequential and
    independent are the same. objective: "outer", next-token cross-entropy by backpropagation;
    "local", each MLP learns to tell the next token's input from its own, y(x_t−1) → x_t, by the
    levels' `objective` (inside a piece); "teach", the caller passes the gradients. rank: of
    low-rank deltas [out, r] [r, in], None for full ones; "auto": full below 50 million
    parameters, from there on 4 (`memory_limit` says how large a memory gets). window: tokens that
    the model reads at once (default: its positions, at most 1,024); when it is full, its last
    quarter is read again as the start of the next one.

    The model is taken over, not copied: it is put into evaluation mode and `unstack` gives it
    back. It reads six tokens first, to see that every MLP that learns runs and gets a gradient.
    Raises ValueError for a model without recognisable MLPs, listing the families; for mixtures of
    experts, hybrids with other states than keys and values, adapters, and quantised, offloaded or
    sharded weights; and for options that do not fit.
    """
    config = StackConfig(
        tuple(levels), None if layers is None else tuple(layers), spread, variant, objective,
        rank_of(model) if rank == AUTO else rank, window,
    )  # fmt: skip
    return StackedModel(model, config)


def unstack(model: StackedModel) -> PreTrainedModel:
    """The base model, bit for bit as it was (in evaluation mode); the stacked one is of no use
    afterwards, and says so with a ValueError.
    """
    model.check_adopted()
    for layer, path in model.paths.items():
        if "forward" in vars(layer):  # it holds on to the forward that would be gone
            raise ValueError(f"{path} has a forward put over it since: remove that hook first")
    for layer in model.layers:
        release(layer)
    return model.base


class StackedModel(nn.Module):
    """A causal language model whose MLPs learn from what it reads; `stack_levels` builds it.

    `learn` reads tokens and returns their losses and the `Memory` afterwards; `forward` and
    `generate` compute with a memory and write nothing. The base model's parameters never change
    (only `merge` writes into them): what was learned is in the memory alone.
    """

    def __init__(self, base: PreTrainedModel, config: StackConfig):
        super().__init__()
        found = find_blocks(base)
        blocks = [found[i] for i in chosen(config.layers, len(found))]
        layers = [layer for block in blocks for layer in block.layers]
        if config.rank is not None and config.rank > min(min(kernel(x).shape) for x in layers):
            raise ValueError(f"rank={config.rank} is more than the MLPs' smallest side")
        positions = getattr(base.config.get_text_config(), "max_position_embeddings", WINDOW)
        if config.window is not None and config.window > positions:
            raise ValueError(f"window={config.window}: the model has {positions} positions")
        self.window = config.window or min(positions, WINDOW)
        self.again = self.window // 4  # tokens read again when the window is full
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

    # ------------------------------------------------------------------------------ the doors

    def init_memory(self, batch: int = 1) -> Memory:
        """The memory before the first token, of `batch` streams."""
        tokens = torch.zeros(batch, 0, dtype=torch.long, device=self.lr[0].device)
        like = self.lr[0].detach()
        seen, writes = like.new_zeros(batch), tokens.new_zeros(batch)
        levels = tuple(LevelState((), (), seen, (), (), writes) for _ in self.config.levels)
        return Memory(0, tokens, (), (tokens, like.new_zeros(batch, 0)), levels)

    def forward(self, input_ids: Tensor, memory: Memory | None = None, **options: Any) -> Any:
        """The base model's output under the memory, in evaluation mode (before anything is learned:
        the base model's, in its own mode); options are its own forward's.
        """
        weights = self._effective(memory)
        mode = evaluating(self.base) if weights else nullcontext()
        with mode, lend(weights) as ran:
            out = self.base(input_ids=input_ids, **options)
        self.check_ran(weights, ran)
        return out

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, memory: Memory | Weights | None = None, **options: Any
    ) -> Any:
        """The base model's `generate` under the memory; options are its own."""
        weights = self._effective(memory)
        with evaluating(self.base), lend(weights) as ran:
            made = self.base.generate(input_ids, **options)
        self.check_ran(weights, ran)
        return made

    @contextmanager
    def using(self, memory: Memory | Sequence[Memory] | Weights | None) -> Iterator[None]:
        """Inside the block the base model, and all that is built on it, reads the memory.

        Several memories, of one row or more each, read one batch: its rows are dealt to them in
        equal runs, in their order. The weights are computed once, on entering; pass what
        `weights(memory)` returned to use them again. The base is in evaluation mode meanwhile.
        Threads that are started inside the block read the memory, too; any other one says for
        itself what it reads, or gets a ValueError. A backward pass inside reaches the base model's
        own weights, as without a memory; once an optimizer has changed these, the block has to be
        entered anew.
        """
        with evaluating(self.base), share(self._effective(memory), self.layers):
            yield

    def _effective(self, memory: Memory | Sequence[Memory] | Weights | None) -> Weights:
        if not isinstance(memory, dict):
            return self.weights(memory)
        if not memory.keys() <= set(self.layers):
            raise ValueError("these are another model's weights: pass this one's weights(memory)")
        return memory

    def learn(
        self,
        ids: Tensor,
        memory: Memory | None = None,
        mask: Tensor | None = None,
        *,
        teach: Tensor | None = None,
        drift: float | None = None,
        anchor: Anchor | None = None,
    ) -> tuple[Tensor, Memory]:
        """Read tokens and learn from them; the same however the stream is cut into calls.

        ids [B, T]: the stream's next tokens. mask [B, T]: the tokens to learn from, bool or a
        weight of each (default all); the others are context only. teach [B, T, N, D], for the
        objective "teach": for each token, at the place that predicts it, the gradient of a loss
        in the output of each of the N blocks. drift: no delta's norm passes this share of its
        pretrained weights' norm (default: the level's bound). anchor: what the model is held to
        while it learns, for the objective "outer" (see `Anchor`).

        Returns (losses [B, T], memory): each token's −log p in nats, predicted before anything
        was learned from it or a later one; the stream's first is nan. Raises ValueError for
        arguments of another shape, before anything is learned, and for a layer that has been put
        out of action since it was stacked.
        """
        losses, memory = learning.unroll(
            self, ids, memory, mask, teach=teach, drift=drift, anchor=anchor
        )
        return losses, trees.detach(memory)

    @torch.no_grad()
    def losses(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """−log p in nats of each token of a text by itself [B, T], under what the memory has
        learned; the first is nan. Nothing is written, and the memory's own context is not read.
        """
        return learning.losses(self, ids, memory)

    @torch.no_grad()
    def merge(self, memory: Memory, level: int) -> Memory:
        """Add what a level has learned to the base model's own weights, for good; the memory
        returned has that level at its start again, so nothing that it computes changes.

        Other memories of the base model do not fit it any more. ValueError for a batch, or a
        level that is not there.
        """
        if len(memory.context) != 1:
            raise ValueError(f"a memory of {len(memory.context)} streams: select() one to merge")
        self.check_level(level)
        for j, delta, start in zip(
            self.owned[level], memory.levels[level].fast, self.start(level, 1)
        ):
            own = kernel(self.layers[j])
            own.copy_((wide(own) + delta.dense()[0] - start.dense()[0]).to(own.dtype))
        return self.reset(memory, level)

    def reset(self, memory: Memory, level: int) -> Memory:
        """The memory with one level at its start value, nothing gathered; all else goes on."""
        self.check_level(level)
        fresh = self.init_memory(len(memory.context)).levels[level]
        levels = (*memory.levels[:level], fresh, *memory.levels[level + 1 :])
        return memory._replace(levels=levels)

    def memory_bytes(self) -> int:
        """Bytes of one stream's deltas, once every level has written (momentum: twice those)."""
        return sum(self._level_bytes(i) for i in range(len(self.owned)))

    def memory_limit(self) -> dict[str, int]:
        """The most bytes that one stream's memory takes: each level (its deltas, and what it
        gathers for the next write; momentum; a start value that moves), and the context: the keys
        and values of a full window, with which it reads on.
        """
        config, found = self.config, {}
        for i, level in enumerate(config.levels):
            parts = 2 + (level.rule == "momentum") + (config.variant == "nested")
            found[f"level {i}"] = parts * self._level_bytes(i) if level.chunk is not None else 0
        each = sum(h * (k + v) * kind.itemsize for h, k, v, kind in learning.cache_shapes(self))
        return {**found, "context": self.window * (each + 32)}

    def _level_bytes(self, i: int) -> int:
        rank, shapes = self.config.rank, [kernel(self.layers[j]).shape for j in self.owned[i]]
        numbers = [out * width if rank is None else rank * (out + width) for out, width in shapes]
        return sum(numbers) * self.lr[0].element_size()

    @property
    def norms(self) -> list[float]:
        """The norms of the pretrained weights of each layer, as they are now."""
        known = version_of(kernel(layer) for layer in self.layers)
        if self._norms is None or self._norms[0] != known:
            self._norms = (known, [float(wide(kernel(x).detach()).norm()) for x in self.layers])
        return self._norms[1]

    def check_level(self, level: int) -> None:
        """ValueError if there is no such level."""
        if not 0 <= level < len(self.owned):
            raise ValueError(f"level={level}: the model has the levels 0 to {len(self.owned) - 1}")

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedModel:
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

    # ---------------------------------------------------------------------- effective weights

    def weights(self, memory: Memory | Sequence[Memory] | None) -> Weights:
        """The weights of every layer that a memory has changed; none for an untouched one."""
        memory = self.init_memory() if memory is None else memory
        several = [memory] if isinstance(memory, Memory) else list(memory)
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

    def start(self, i: int, batch: int) -> Fast:
        """Level i's start value: zero unless it was trained. A low-rank one is zero on its left;
        its right side is drawn, always the same.
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

    def effective(self, fasts: dict[int, Fast], *, dense: bool = False) -> Weights:
        """Pretrained weights plus the levels' deltas; low-rank ones beside them unless `dense`."""
        self.check_adopted()
        parts: dict[int, list[Factors]] = {}
        for i, fast in fasts.items():
            for j, delta in zip(self.owned[i], fast):
                parts.setdefault(j, []).append(delta)
        weights = {}
        for j, deltas in parts.items():
            layer, own = self.layers[j], kernel(self.layers[j])
            if self.config.rank is not None and not dense:
                weights[layer] = Effective(None, tuple(deltas))
                continue
            total = wide(own) + deltas[0].dense()
            for delta in deltas[1:]:
                total += delta.dense()
            weights[layer] = Effective(total.to(own.dtype), (), version(layer))
        return weights


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
