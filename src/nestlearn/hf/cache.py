"""A Hope's state as the cache that `generate` of transformers carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import state as tree
from ..models.hope import HopeLM, HopeState

# The name of the cache in a model's call and in its output; transformers 5.24 changed it.
CACHE = next(
    name for name in ("cache", "past_key_values")
    if name in CausalLMOutputWithPast.__dataclass_fields__
)  # fmt: skip


class Rows(NamedTuple):
    """Rows of a batch that have read equally many tokens, and their states in that order.

    state: None before the first token.
    """

    rows: list[int]
    state: HopeState | None


class HopeCache(Cache):
    """What each row of a batch has read: one `HopeState` for the rows of equal length.

    Chunks end at multiples of a position that a whole state shares. Left padding makes rows of
    different lengths, so these are kept in groups: padding then writes no memory and moves no
    chunk, and a row reads as it does alone.

    state: goes on from an earlier reading (`nestlearn.state.load`, or `state` of another cache);
    give `generate` the new tokens only. Of rows that ended early, `generate` feeds padding until
    the last one ends: take a state from the rows that you generated alone.
    """

    def __init__(self, state: HopeState | None = None):
        super().__init__(layers=[])
        self.groups: list[Rows] = []
        self.columns = 0
        if state is not None:
            self.groups = [Rows(list(range(tree.batch_size(state) or 0)), state)]

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first token."""
        return sum(len(group.rows) for group in self.groups) if self.groups else -1

    @property
    def state(self) -> HopeState:
        """The state of all rows, in their order.

        Raises ValueError before the first token, and for rows that have read different numbers of
        tokens: these have no state in common.
        """
        if len(self.groups) != 1:
            read = {position(group.state): group.rows for group in self.groups}
            raise ValueError(
                f"rows by the number of tokens they have read: {read}; a state is of rows of one "
                "length, so take them by select([...]).state"
            )
        rows, state = self.groups[0]
        assert state is not None  # it has read
        return tree.select(state, sorted(range(len(rows)), key=rows.__getitem__))

    def select(self, rows: Sequence[int]) -> HopeCache:
        """A cache of its own for these rows, reordered and repeated at will."""
        chosen = HopeCache()
        chosen.groups, chosen.columns = self._taken(list(rows)), self.columns
        return chosen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The columns of the batch that were read through this cache, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a state has the same size after any number of tokens."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row beam_idx[i] has read."""
        self.groups = self._taken(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.groups = self._taken(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one after the other."""
        self.groups = self._taken([r for r in range(self.batch_size) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget all."""
        self.groups, self.columns = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless it is 0: what was written into a memory cannot be taken out."""
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: a memory cannot be read backwards; keep the "
                "state from before (select), and do without assisted generation"
            )

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """No: `generate` then leaves out of the whole text what this cache has read."""
        return [False]

    def __len__(self) -> int:
        state = self.groups[0].state if self.groups else None
        return 0 if state is None else len(state.blocks)

    def __repr__(self) -> str:
        read = {position(group.state): group.rows for group in self.groups}
        return f"HopeCache(rows by tokens read: {read})"

    def _taken(self, rows: list[int]) -> list[Rows]:
        bad = [row for row in rows if not 0 <= row < self.batch_size]
        if bad:
            raise ValueError(f"rows {bad}: this cache has {max(self.batch_size, 0)} rows")
        taken = []
        for group in self.groups:
            place = {row: i for i, row in enumerate(group.rows)}
            here = [(i, place[row]) for i, row in enumerate(rows) if row in place]
            if here:
                after, before = zip(*here)
                taken.append(Rows(list(after), _select(group.state, list(before))))
        return taken


def position(state: HopeState | None) -> int:
    """The number of tokens that a state has read."""
    return 0 if state is None else state.blocks[0][0].position


def chosen(group: Rows, names: Mapping[int, int]) -> Rows:
    """Those rows of the group that have a name, under it."""
    here = [i for i, row in enumerate(group.rows) if row in names]
    state = group.state if len(here) == len(group.rows) else _select(group.state, here)
    return Rows([names[group.rows[i]] for i in here], state)


@torch.compiler.disable(recursive=False)  # which rows go together is no matter for a graph
def read(
    model: HopeLM, x: Tensor, groups: list[Rows], real: Tensor | None, output: str
) -> tuple[tuple[Tensor, ...], list[Rows]]:
    """Read the real tokens of each row after what it has read: what `HopeLM` calls "hidden" or
    "layers", each [B, T, dim], and the groups then.

    x: ids [B, T] or embeddings [B, T, dim]; groups: every row in one of them; real [B, T] bool:
    which tokens are no padding (None: all). Rows of one group with equally many real tokens run
    together, so a batch costs one pass for each distinct length. Padding gives zeros.
    """
    if real is None and len(groups) == 1 and groups[0].rows == list(range(len(x))):
        said, now = _run(model, x, groups[0].state, output)
        return said, [Rows(groups[0].rows, now)]
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    counts = real.sum(1).tolist()
    parts, after = [], []
    for rows, state in groups:
        for count in sorted({counts[row] for row in rows}):
            local = [i for i, row in enumerate(rows) if counts[row] == count]
            alike = [rows[i] for i in local]
            part = state if alike == rows else _select(state, local)
            if count > 0:
                row, column = real[alike].nonzero(as_tuple=True)
                row = torch.tensor(alike, device=x.device)[row]
                some = x[row, column].view(len(alike), count, *x.shape[2:])
                said, part = _run(model, some, part, output)
                parts.append((row, column, said))
            elif part is None:
                part = model.init_state(len(alike))
            after.append(Rows(alike, part))
    if not parts:
        raise ValueError("attention_mask is 0 everywhere: give at least one token")
    out = [y.new_zeros(*real.shape, y.shape[-1]) for y in parts[0][2]]
    for row, column, said in parts:
        for whole, y in zip(out, said):
            whole[row, column] = y.flatten(0, 1)
    return tuple(out), _joined(after)


def _run(
    model: HopeLM, x: Tensor, state: HopeState | None, output: str
) -> tuple[tuple[Tensor, ...], HopeState]:
    ids, embeds = (None, x) if x.is_floating_point() else (x, None)
    said, after = model(ids, state, embeds=embeds, output=output)
    return said if isinstance(said, tuple) else (said,), after


def _select(state: HopeState | None, rows: list[int]) -> HopeState | None:
    return None if state is None else tree.select(state, rows)


def _joined(groups: list[Rows]) -> list[Rows]:
    """The groups, those of one length as one."""
    alike: dict[int, list[Rows]] = {}
    for group in groups:
        alike.setdefault(position(group.state), []).append(group)
    return [
        some[0]
        if len(some) == 1
        else Rows([r for g in some for r in g.rows], tree.concat([g.state for g in some]))
        for some in alike.values()
    ]
