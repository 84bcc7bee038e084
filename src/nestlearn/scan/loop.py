"""The loop over chunks: where spans end, what is recomputed, how far the outer gradient reaches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from itertools import pairwise
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from .. import state as tree

SEGMENT = 8  # chunks computed again together: their memory is about that of so many states
RUN = 16  # chunks that one step takes where it can: their answers are one launch


P = ParamSpec("P")
R = TypeVar("R")


def _uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable(function)`; that loads the compiler, which takes as long as all else
    of torch, so it is asked for only where someone else has loaded it.
    """
    disabled = cache(torch.compiler.disable)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        return disabled(function)(*args, **options)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # a graph ends before the call
    return call


class Span(NamedTuple):
    """The tokens [start, stop) of the stream that one step of a scan covers."""

    start: int
    stop: int

    def ends(self, chunk: int) -> bool:
        """Whether a chunk of that size ends here."""
        return self.stop % chunk == 0


@_uncompiled  # it would unroll the loop: layers compile the step (`Stepping.compile`)
def scan(
    f: Callable[[Any, Any, Span], tuple[Any, Any]],
    state: Any,
    xs: Any,
    *,
    length: int,
    chunks: tuple[int, ...],
    position: int = 0,
    truncate: int | None = None,
    remat: bool = False,
    axis: int = 1,
    run: int = 1,
    after: Callable[[Any, Span], Any] | None = None,
) -> tuple[list[Any], Any]:
    """Run `f(state, xs_span, span) -> (y, state)` along a stream, one span at a time.

    xs is a tree of tensors with T = `length` along `axis`. Spans end at the call's end and at every
    multiple of every size in `chunks`, counted from the stream's first token, which `position`
    tokens of earlier calls came before: so splitting a call changes nothing but its spans.
    `truncate`: the outer gradient through the state stops at each multiple of so many tokens.
    `remat`: keep only the state at every eighth chunk; the backward pass computes the rest again.
    `run`: spans of up to so many whole chunks of the smallest size, for an f that takes them.
    `after(state, span) -> state`: what becomes of the state where a span has ended.
    Returns the list of y.
    """
    size = min(chunks)
    if truncate is not None and truncate % size:
        run = 1
    run = min(run, SEGMENT) if remat else run
    spans = _cut(position, position + length, chunks, truncate, run)
    ys = []
    if remat and torch.is_grad_enabled():
        for span, part in _split(xs, _segments(spans, size), axis):
            again = partial(
                scan, f, length=span.stop - span.start, chunks=chunks, position=span.start,
                truncate=truncate, axis=axis, run=run, after=after,
            )  # fmt: skip
            more, state = checkpoint(again, state, part, use_reentrant=False)
            ys += more
        return ys, state
    for span, part in _split(xs, spans, axis):
        if truncate is not None and span.start > 0 and span.start % truncate == 0:
            state = tree.detach(state)
        y, state = f(state, part, span)
        if after is not None:
            state = after(state, span)
        ys.append(y)
    return ys, state


def _cut(
    position: int, end: int, chunks: tuple[int, ...], truncate: int | None, run: int
) -> list[Span]:
    """The tokens [position, end) in spans."""
    size, cuts = min(chunks), {position, end}
    for own in chunks:
        first, last = -(-position // own) * own, end // own * own
        cuts.update(range(first, last, own) if run == 1 or own > size else (), {first, last})
    if truncate is not None:
        cuts.update(range(position - position % truncate + truncate, end, truncate))
    cuts = {x for x in cuts if position <= x <= end}
    if run > 1:
        cuts.update(*(range(a, b, run * size) for a, b in pairwise(sorted(cuts))))
    return [Span(*ends) for ends in pairwise(sorted(cuts))]


def _split(xs: Any, spans: list[Span], axis: int) -> Iterator[tuple[Span, Any]]:
    """Each span and its part of xs, split once: the gradient of a slice would be as long as the
    whole call, at every span.
    """
    tensors = [x for _, x in tree.leaves(xs) if isinstance(x, torch.Tensor)]
    parts = [x.split([span.stop - span.start for span in spans], axis) for x in tensors]
    for span, *pieces in zip(spans, *parts):
        rest = iter(pieces)
        yield span, tree.tree_map(lambda _, rest=rest: next(rest), xs)


def _segments(spans: list[Span], size: int) -> list[Span]:
    """The spans in groups of at most SEGMENT chunks of `size` tokens, begun ones counted whole."""
    groups, held = [spans[0]], 0
    for start, stop in spans:
        chunks = -(-(stop - start) // size)
        if held + chunks > SEGMENT:
            groups.append(Span(start, stop))
            held = 0
        groups[-1] = Span(groups[-1].start, stop)
        held += chunks
    return groups
