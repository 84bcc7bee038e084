"""What a stacked model is made of, as plain data: its configuration and its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from nestlearn.options import Level, check

from .writes import LevelState

SPREADS = ("block", "depth")
VARIANTS = ("sequential", "nested", "independent")
OBJECTIVES = ("outer", "skip", "local", "teach")
LEARNS = ("all", "out")
CACHE_DTYPES = (None, "bfloat16", "float16")
WINDOW = 1024  # tokens read at once, at most, unless the caller says otherwise
AUTO: Literal["auto"] = "auto"
# From so many parameters on a memory is small by default.
LARGE, RANK, SHORT, HALF = 50_000_000, 4, 448, "bfloat16"

Cache = tuple[tuple[Tensor, Tensor], ...]


class StackMemory(NamedTuple):
    """What a stacked model has learned, and where in its stream it stands.

    position: tokens read. context [B, n]: the window's tokens before the running piece; cache:
    their keys and values, all but the last token's. pending: the running piece: tokens [B, p],
    their weights [B, p], and teach signals if there are any. levels: one state for each level.
    """

    position: int
    context: Tensor
    cache: Cache
    pending: tuple[Tensor, ...]
    levels: tuple[LevelState, ...]


Memory = StackMemory  # its name in pickles of before


@dataclass(frozen=True)
class DeltaLevel:
    """One delta from the pretrained weights of each MLP that belongs to it, and how it learns.

    chunk: tokens between two writes, at absolute positions (eq. 71); None: it is never written.
    lr: step on the mean gradient of the chunk (0.3 with "dgd" destroys a pretrained model within
    a page); 0: the pretrained model, bit for bit. rule: "gd";
    "momentum" (eq. 33); "dgd" (eq. 57), whose retention falls on the delta. objective: "l2" or
    "dot", of a stack that learns by the "local" one. half_life: tokens in which the delta fades by
    half towards its start (None: never). bound: its largest norm, in units of the pretrained
    weights' (None: any). meta_lr: in a nested stack, how far its start value moves when it starts
    again.
    """

    chunk: int | None = None
    lr: float = 0.05
    rule: str = "gd"
    objective: str = "l2"
    half_life: int | None = None
    bound: float | None = 2.0
    meta_lr: float = 0.1

    def __post_init__(self) -> None:
        check(self, bound=(lambda x: x >= 0, "a norm of 0 or more"))

    @classmethod
    def of(cls, level: DeltaLevel | Level) -> DeltaLevel:
        """A stack's level of a layer's; ValueError if it has what a delta has not."""
        if not isinstance(level, Level):
            return level
        foreign = [
            n for n in ("hidden", "scale", "learns") if getattr(level, n) != getattr(Level, n)
        ]
        if foreign:
            raise ValueError(f"{level!r}: a stack's level has no {foreign[0]}, give a DeltaLevel")
        shared = {f.name: getattr(level, f.name) for f in fields(cls)}
        return cls(**shared | {"bound": None if level.bound is None else level.bound[1]})


@dataclass(frozen=True)
class StackConfig:
    """How a model is stacked: the arguments of `stack_levels`, where they are explained."""

    levels: tuple[DeltaLevel, ...]
    layers: tuple[int, ...] | None = None
    spread: str = "block"
    variant: str = "sequential"
    objective: str = "outer"
    rank: int | None = None
    window: int | None = None
    cache_dtype: str | None = None
    learns: str = "all"

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty: give at least one DeltaLevel")
        if other := [level for level in self.levels if not isinstance(level, DeltaLevel)]:
            raise ValueError(f"levels: {other[0]!r} is none of a stack, give nestlearn.DeltaLevel")
        for name, value, known in (
            ("spread", self.spread, SPREADS),
            ("variant", self.variant, VARIANTS),
            ("objective", self.objective, OBJECTIVES),
            ("learns", self.learns, LEARNS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: use one of {known}")
        if self.objective == "skip" and self.learns != "out":
            raise ValueError('objective="skip" reaches the MLPs\' outputs only: give learns="out"')
        if self.objective in ("local", "teach") and self.learns != "all":
            raise ValueError(f'objective="{self.objective}" is of whole MLPs: give learns="all"')
        if self.objective == "local" and len({level.objective for level in self.levels}) > 1:
            raise ValueError("levels with different objectives: the local one is shared by all")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank={self.rank!r}: give 1 or more, or None for full weights")
        if self.window is not None and self.window < 2:
            raise ValueError(f"window={self.window}: give 2 tokens or more")
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={self.cache_dtype!r}: use one of {CACHE_DTYPES}")
        if not self._linked:
            return
        for fast, slow in pairwise(self._chunks()):
            if slow % fast or slow == fast:
                raise ValueError(
                    f"{self.variant} levels with chunks {fast} and {slow}: a slower level's "
                    f"context must end where a faster one's does, so make {slow} a larger "
                    f"multiple of {fast}, or use variant='independent'"
                )

    @property
    def _linked(self) -> bool:
        """Does a level's end of context reach into a faster one?"""
        return self.variant == "nested" or (self.variant, self.spread) == ("sequential", "block")

    def _chunks(self) -> list[int]:
        return sorted(level.chunk for level in self.levels if level.chunk is not None)

    def parents(self) -> list[int | None]:
        """For each level the number of the next slower one, where that reaches into it."""
        above = dict(pairwise(self.faster_first())) if self._linked else {}
        return [above.get(i) for i in range(len(self.levels))]

    def faster_first(self) -> list[int]:
        """The numbers of the levels that update, from the fastest on."""
        order = sorted((x.chunk, i) for i, x in enumerate(self.levels) if x.chunk is not None)
        return [i for _, i in order]

    def deal(self, blocks: int, per_block: int) -> list[list[int]]:
        """For each level the numbers of its linear layers: all of them, or over the depth runs
        of blocks, the first level's nearest to the input (eq. 70).
        """
        n = len(self.levels)
        if self.spread == "block":
            return [list(range(blocks * per_block)) for _ in range(n)]
        if blocks < n:
            raise ValueError(f"{n} levels over {blocks} blocks: give fewer levels, or more layers")
        cuts = [per_block * round(i * blocks / n) for i in range(n + 1)]
        return [list(range(a, b)) for a, b in pairwise(cuts)]

    def cut_after(self, position: int, limit: int) -> int:
        """Where the piece that begins at `position` (a cut) ends: cuts stand at every multiple
        of every level's chunk, and in longer stretches every `limit` tokens after such a one.
        """
        chunks = self._chunks()
        if not chunks:
            return position + limit
        return min(position + limit, *((position // c + 1) * c for c in chunks))

    def gathers(self, i: int, limit: int) -> bool:
        """Whether level i keeps gradients from one piece to the next, before it writes."""
        own = self.levels[i].chunk
        return own is not None and (own > limit or any(c % own for c in self._chunks()))


def small_memory(model: PreTrainedModel) -> dict[str, Any]:
    """Rank, window and cache type where none are given: None for a small model; for others such
    that a memory of 135 million parameters takes 20 MB at most, its context included.
    """
    large = isinstance(model, PreTrainedModel) and (
        sum(p.numel() for p in model.parameters()) >= LARGE
    )
    if not large:  # what is none of transformers' models is refused further on
        return {"rank": None, "window": None, "cache_dtype": None}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", SHORT)
    return {"rank": RANK, "window": min(SHORT, positions), "cache_dtype": HALF}


def chosen(layers: Iterable[int] | None, blocks: int) -> list[int]:
    """The numbers of the blocks to stack; ValueError for one that is not there or named twice."""
    numbers = list(range(blocks)) if layers is None else list(layers)
    if bad := [i for i in numbers if not 0 <= i < blocks]:
        raise ValueError(f"layers={bad}: the model has the blocks 0 to {blocks - 1}")
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"layers={numbers}: name each block once, and at least one")
    return sorted(numbers)
