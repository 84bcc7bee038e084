"""Level stacking (section 7.3): a pretrained model's MLPs become levels that go on learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestlearn import state as trees
from nestlearn.layers.streaming import wide
from nestlearn.options import Level

from . import learning, reading
from .anchor import Anchor
from .deltas import Deltas
from .door import evaluating
from .lending import Weights, kernel, lend, release, share
from .plan import AUTO, DeltaLevel, StackConfig, StackMemory, small_memory


def stack_levels(
    model: PreTrainedModel,
    levels: Sequence[DeltaLevel | Level],
    *,
    layers: Sequence[int] | None = None,
    spread: str = "block",
    variant: str = "sequential",
    objective: str = "outer",
    rank: int | Literal["auto"] | None = AUTO,
    window: int | Literal["auto"] | None = AUTO,
    cache_dtype: str | None = AUTO,
    learns: str = "all",
) -> StackedModel:
    """Let the MLPs of a pretrained causal LM learn from what the model reads (section 7.3).

    Every level holds deltas from the pretrained MLP weights and moves them at the multiples of
    its chunk, counted in tokens from the start of the stream, by the mean gradient over the chunk
    (eq. 71), taken at the weights with which its tokens were read. A model whose levels have
    lr=0, or that has learned nothing yet, computes bit for bit what the base model does.

    levels: fast to slow or in any order; a layer's `Level` stands for the `DeltaLevel` of its
    chunk, lr, rule and the like. layers: the blocks that learn, by number (default all).
    spread: "block", every block has one delta per level, which add up; "depth", every block
    belongs to one level, the first blocks to the first one. variant, of levels in a block:
    "sequential" (73), at the end of a slower level's context it takes over what the next faster
    one has learned, and that starts again from its start value; "nested" (72),
    the faster one starts again and its start value has moved by meta_lr towards what it had
    learned; "independent" (74), each level learns and keeps its own. Over the depth sequential and
    independent are the same. objective: "outer", next-token cross-entropy by backpropagation;
    "skip", the same, with what the blocks above do to a block's output left out: every block's
    gradient is then that of the last one, and learning costs little more than reading; "local",
    each MLP learns to tell the next token's input from its own, y(x_t−1) → x_t, by the levels'
    `objective` (inside a piece); "teach", the caller passes the gradients. learns: "all", every
    matrix of an MLP; "out", its last one alone, which "skip" needs. rank: of
    low-rank deltas [out, r] [r, in], after each write the best approximation of what the full
    delta would be; None for full ones. window: tokens that the model reads at once; None: its
    positions, at most 1,024. When it is full, its last quarter is read again as the start of the
    next one. cache_dtype: in which the memory holds the window's keys and values: "bfloat16",
    "float16", or None, the model's own. "auto" is None below 50 million parameters, and from there
    on rank 4 and 448 tokens in bfloat16 (`memory_limit` says how large a memory gets).

    The model is taken over, not copied: it is put into evaluation mode and `unstack` gives it
    back. It reads six tokens first, to see that every MLP that learns runs and gets a gradient.
    Raises ValueError for a model without recognisable MLPs, listing the families; for mixtures of
    experts, hybrids with other states than keys and values, adapters, and quantised, offloaded or
    sharded weights; and for options that do not fit.
    """
    small = small_memory(model)
    config = StackConfig(
        tuple(map(DeltaLevel.of, levels)), None if layers is None else tuple(layers),
        spread, variant, objective,
        small["rank"] if rank == AUTO else rank,
        small["window"] if window == AUTO else window,
        small["cache_dtype"] if cache_dtype == AUTO else cache_dtype,
        learns,
    )  # fmt: skip
    return StackedModel(model, config)


def unstack(model: StackedModel) -> PreTrainedModel:
    """The base model, bit for bit as it was (in evaluation mode); the stacked one is of no use
    afterwards, and says so with a ValueError. ValueError, too, for a model that is not stacked.
    """
    if not isinstance(model, StackedModel):
        raise ValueError(
            f"a {type(model).__name__} is not stacked: give what stack_levels returned"
        )
    model.check_adopted()
    for layer, path in model.paths.items():
        if "forward" in vars(layer):  # it holds on to the forward that would be gone
            raise ValueError(f"{path} has a forward put over it since: remove that hook first")
    for layer in model.layers:
        release(layer)
    return model.base


class StackedModel(Deltas):
    """A causal language model whose MLPs learn from what it reads; `stack_levels` builds it.

    `learn` reads tokens and returns their losses and the `StackMemory` afterwards; `forward` and
    `generate` compute with a memory and write nothing. The base model's parameters never change
    (only `merge` writes into them): what was learned is in the memory alone.
    """

    # ------------------------------------------------------------------------------ the doors

    def forward(self, input_ids: Tensor, memory: StackMemory | None = None, **options: Any) -> Any:
        """The base model's output under the memory, in evaluation mode (before anything is learned:
        the base model's, in its own mode); options are its own forward's.
        """
        weights = self._effective(memory)
        mode = evaluating(self.base) if weights else nullcontext()
        with mode, lend(weights) as ran:
            out = self.base(input_ids=input_ids, **options)
        self.check_ran(weights, ran)
        return out

    @contextmanager
    def using(self, memory: StackMemory | Sequence[StackMemory] | Weights | None) -> Iterator[None]:
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

    def learn(
        self,
        ids: Tensor,
        memory: StackMemory | None = None,
        mask: Tensor | None = None,
        *,
        teach: Tensor | None = None,
        drift: float | None = None,
        anchor: Anchor | None = None,
    ) -> tuple[Tensor, StackMemory]:
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
    def losses(self, ids: Tensor, memory: StackMemory | None = None) -> Tensor:
        """−log p in nats of each token of a text by itself [B, T], under what the memory has
        learned; the first is nan. Nothing is written, and the memory's own context is not read.
        """
        return reading.losses(self, ids, memory)

    @torch.no_grad()
    def merge(self, memory: StackMemory, level: int) -> StackMemory:
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

    def reset(self, memory: StackMemory, level: int) -> StackMemory:
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
            parts = 1 + config.gathers(i, self.window - self.again)
            parts += (level.rule == "momentum") + (config.variant == "nested")
            found[f"level {i}"] = parts * self._level_bytes(i) if level.chunk is not None else 0
        each = sum(h * (k + v) * kind.itemsize for h, k, v, kind in reading.cache_shapes(self))
        return {**found, "context": self.window * (each + 32)}

    def _level_bytes(self, i: int) -> int:
        rank, shapes = self.config.rank, [kernel(self.layers[j]).shape for j in self.owned[i]]
        numbers = [out * width if rank is None else rank * (out + width) for out, width in shapes]
        return sum(numbers) * self.lr[0].element_size()

    def check_level(self, level: int) -> None:
        """ValueError if there is no such level."""
        if not 0 <= level < len(self.owned):
            raise ValueError(f"level={level}: the model has the levels 0 to {len(self.owned) - 1}")
