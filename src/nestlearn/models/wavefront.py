"""Blocks side by side on a card: block l reads a part of the sequence while l + 1 reads the one
before it. A step of one long sample is otherwise a chain of kernels too small for the card.

The blocks of a wave are as many samples to their memories (`nestlearn.layers.together.together`):
a kernel of each, where blocks one after the other would have one for each block.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .. import state as tree
from ..layers import SelfModifyingTitans
from ..layers.together import one_call, together

PART = 2048  # tokens, at least: shorter parts have smaller products
PARTS = 16  # at most, of a length of so many PART and more: enough for all blocks to have work
GROUPS = 3  # of blocks: while the memories of one leave the card room, another fills it
FULL = 64  # samples × heads of which a block's kernels fill a card by themselves


def fits(blocks: Iterable[nn.Module], x: Tensor, heads: int) -> bool:
    """Whether these are few long samples on a card, for memories of fixed size alone, and nothing
    hooks on to a block or its memories (sharding and offloading count on calls of them).
    """
    return (
        x.is_cuda
        and x.shape[1] >= 2 * PART
        and x.shape[0] * heads < FULL
        and not torch.compiler.is_compiling()
        and all(isinstance(block.mixer, SelfModifyingTitans) and _plain(block) for block in blocks)
    )


def _plain(block: nn.Module) -> bool:
    passed = [part for part in block.modules() if hasattr(type(part), "together")]  # not called
    return not any(
        part._forward_pre_hooks or part._forward_hooks or part._backward_hooks
        or part._backward_pre_hooks or "forward" in vars(part) for part in passed
    )  # fmt: skip


@one_call()
def wavefront(
    blocks: Iterable[nn.Module], x: Tensor, states: Iterable[Any],
    part: int | None = None, groups: int | None = None,
) -> tuple[Tensor, list[Any]]:  # fmt: skip
    """What the blocks in turn make of x [B, T, dim], and their states after it. part: tokens that
    a block reads at a time. groups: of blocks, of which each runs as one.

    The same numbers as one block after the other, to rounding: a stream may be cut anywhere. On a
    card each group of blocks has a stream of its own, which its backward pass takes, too.
    """
    chain, now = list(blocks), list(states)
    part = part or max(PART, x.shape[1] // PARTS // PART * PART)
    parts = x.split(part, 1)
    said: list[Any] = [None] * (len(chain) + 1)  # of x, of the blocks: what they said last
    groups = groups or (GROUPS if x.is_cuda else 1)
    ends = [len(chain) * i // groups for i in range(groups + 1)]
    main = torch.cuda.current_stream(x.device) if x.is_cuda else None
    streams = _streams(x.device, groups) if x.is_cuda else (None,) * groups
    for stream in streams:
        _follow(stream, main)
    read = []
    for wave in range(len(parts) + len(chain) - 1):
        first = max(0, wave - len(parts) + 1)
        said[0] = parts[min(wave, len(parts) - 1)]
        # the last group first: what it reads was said in the wave before
        for g, stream in reversed(list(enumerate(streams))):
            working = [i for i in range(ends[g], ends[g + 1]) if first <= i <= wave]
            if not working:
                continue
            _follow(stream, streams[g - 1] if g else main)
            with torch.cuda.stream(stream):  # None: where it is
                _in_use(said[working[0]], stream)
                ys = []
                for _, same in groupby(working, lambda i: said[i].shape[1]):  # the last: shorter
                    some = list(same)
                    ys += together(*([things[i] for i in some] for things in (chain, said, now)))
            for i, y in zip(working, ys):
                said[i + 1], now[i] = y
        if wave >= len(chain) - 1:
            read.append(said[-1])
    for stream in streams:
        _follow(main, stream)
    tree.tree_map(lambda y: _in_use(y, main), (read, now))
    return torch.cat(read, 1), now


@lru_cache(8)
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))


def _follow(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    """The stream goes on after what the other one has been given so far."""
    if stream is not None and other is not None:
        stream.wait_stream(other)


def _in_use(x: Tensor, stream: torch.cuda.Stream | None) -> Tensor:
    """x, whose memory is not given away before the stream is done with it."""
    if stream is not None:
        x.record_stream(stream)
    return x
