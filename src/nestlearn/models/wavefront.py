"""Blocks side by side on a card: block l reads a part of the sequence while l + 1 reads the one
before it. A step of one long sample is otherwise a chain of kernels too small for the card.

Asked for by `HopeLM.side_by_side`, for CUDA graphs, whose kernels need no Python to be launched. 98
million parameters, one sample, an H200: 96,500 tokens/s in segments of 32,768, 108,500 in segments
of 65,536, and 52,400 without; with later kernels 74,000 in segments of 65,536 (docs/results/speed).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import state as tree
from ..layers.streaming import Stepping

PART = 2048  # tokens, at least: shorter parts have smaller products (1,024: 85,600 tokens/s)
PARTS = 16  # at most, of a length of so many PART and more: enough for all blocks to have work
FULL = 64  # samples × heads of which a block's kernels fill a card by themselves


def fits(blocks: Iterable[nn.Module], x: Tensor, heads: int) -> bool:
    """Whether these are few long samples on a card, for memories of fixed size alone, and nothing
    hooks on to a block (sharding and offloading count on one call of it, in their stream).
    """
    return (
        x.is_cuda
        and x.shape[1] >= 2 * PART
        and x.shape[0] * heads < FULL
        and not torch.compiler.is_compiling()
        and all(isinstance(block.mixer, Stepping) and _plain(block) for block in blocks)
    )


def _plain(block: nn.Module) -> bool:
    hooked = block._forward_pre_hooks or block._forward_hooks or block._backward_hooks
    return not hooked and "forward" not in vars(block)


def wavefront(
    blocks: Iterable[nn.Module], x: Tensor, states: Iterable[Any], part: int | None = None
) -> tuple[Tensor, list[Any]]:
    """What the blocks in turn make of x [B, T, dim], and their states after it.

    The same numbers as one block after the other, to rounding: a stream may be cut anywhere. On a
    card each block has a stream of its own, which its backward pass takes, too.
    """
    chain, now = list(blocks), list(states)
    part = part or max(PART, x.shape[1] // PARTS // PART * PART)
    main = torch.cuda.current_stream(x.device) if x.is_cuda else None
    streams = _streams(x.device, len(chain)) if x.is_cuda else (None,) * len(chain)
    for stream in streams:
        _follow(stream, main)
    read = []
    for y in x.split(part, 1):
        before = None
        for i, (block, stream) in enumerate(zip(chain, streams)):
            if before is not None:
                _follow(stream, before)
            with torch.cuda.stream(stream):  # None: where it is
                _in_use(y, stream)
                y, now[i] = block(y, now[i])
            before = stream
        read.append(y)
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
