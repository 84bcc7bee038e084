"""Room 2: writes along a stream. `update` is one chunk, `scan` loops anything over chunks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import state as tree
from ..memory import Gates, GradientRule, Memory, Objective, Rule, RuleState, Weights, objective
from ..memory.memories import FunctionMemory, MatrixMemory
from . import chunk as _chunk
from . import naive as _naive
from .writer import FastWeights, Writer, check_read


def update(
    memory: Memory,
    rule: Rule,
    W: Weights,
    S: Any,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    objective: str | Objective = "dot",
    read: str = "token",
    backend: str = "auto",
    at: Weights | None = None,
    offset: int = 0,
    first_order: bool = False,
) -> tuple[Tensor | None, Weights, Any]:
    """Write one chunk of pairs into a memory and read it: (o, W, S) after the chunk (eqs. 88, 90).

    Every inner gradient is taken at the chunk's first weights; retention and delta term run token
    by token. `read="token"` answers q_t through the weights that token t's write left, "boundary"
    through the chunk's first weights; q=None skips the answers.

    Shapes: W and S have leading axes *b, q and k are [*b, T, K], v is [*b, T, V], gates [*b, T];
    an axis of size 1 in k and in the gates is shared. A call may end inside a chunk: the next one
    goes on with W, S, `at` = the weights that the chunk began with, and `offset` = the tokens of
    the chunk already taken. States and solves are float32 at least; o has the type of q.
    `first_order` leaves the inner gradient's own dependence on the weights out of the outer
    gradient (first-order MAML); k, v and the gates stay in it.

    Raises ValueError for an unknown option and for a rule that the memory or backend cannot run.
    """
    _check(memory, rule, k, gates, read, backend)
    dtype = torch.promote_types(W[0].dtype, torch.float32)
    reply = q.dtype if q is not None else dtype
    q, k, v = None if q is None else q.to(dtype), k.to(dtype), v.to(dtype)
    gates = gates.map(lambda g: g.to(dtype))
    parallel = isinstance(rule, GradientRule) and backend != "naive"
    run: Any = _chunk.update if parallel else _naive.update
    with torch.autocast(device_type=k.device.type, enabled=False):
        o, W, S = run(
            memory, rule, W, S, q, k, v, gates,
            at=W if at is None or offset == 0 else at, offset=offset,
            objective=_objective(objective), read=read, first_order=first_order,
        )  # fmt: skip
    return None if o is None else o.to(reply), W, S


_objective = objective  # `update` has an argument of that name


def _check(memory: Memory, rule: Rule, k: Tensor, gates: Gates, read: str, backend: str) -> None:
    check_read(read)
    if backend not in ("auto", "naive", "chunk"):
        raise ValueError(f"backend={backend!r}: use 'auto', 'naive' or 'chunk'")
    if k.shape[-2] == 0:
        raise ValueError("the chunk has T = 0 tokens: give at least one")
    if isinstance(rule, GradientRule):
        if (rule.delta or rule.normalize) and isinstance(memory, FunctionMemory):
            raise ValueError(
                "delta and normalize need each matrix's input, which a FunctionMemory does not "
                "give: use hebbian(), or a Matrix or ResidualMLP memory"
            )
        if rule.momentum != (gates.log_theta is not None):
            raise ValueError("gates.log_theta goes with momentum(rule): give both or neither")
    elif backend == "chunk":
        raise ValueError(f"{type(rule).__name__} has no parallel form: use backend='naive'")
    elif not isinstance(memory, MatrixMemory) or len(memory.shapes()) != 1:
        raise ValueError(f"{type(rule).__name__} writes a Matrix memory, not {memory!r}")
    if rule.decay != (gates.log_alpha is not None):
        raise ValueError("gates.log_alpha goes with decay(rule): give both or neither")


class Span(NamedTuple):
    """The tokens [start, stop) of the stream that one step of a scan covers."""

    start: int
    stop: int

    def ends(self, chunk: int) -> bool:
        """Whether a chunk of that size ends here."""
        return self.stop % chunk == 0


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
) -> tuple[list[Any], Any]:
    """Run `f(state, xs_span, span) -> (y, state)` along a stream, one span at a time.

    xs is a tree of [B, T, ...] tensors with T = `length`. Spans end at the call's end and at every
    multiple of every size in `chunks`, counted from the stream's first token, which `position`
    tokens of earlier calls came before: so splitting a call changes nothing but its spans.
    `truncate`: the outer gradient stops at each multiple of so many tokens. `remat`: keep only the
    states between spans and compute each span again in the backward pass. Returns the list of y.
    """
    cuts = {position, position + length}
    for size in chunks if truncate is None else (*chunks, truncate):
        cuts.update(range(position - position % size + size, position + length, size))
    ys = []
    for start, stop in pairwise(sorted(cuts)):
        if truncate is not None and start > 0 and start % truncate == 0:
            state = tree.detach(state)
        tokens = slice(start - position, stop - position)
        args = (state, tree.tree_map(itemgetter((slice(None), tokens)), xs), Span(start, stop))
        if remat and torch.is_grad_enabled():
            y, state = checkpoint(f, *args, use_reentrant=False)
        else:
            y, state = f(*args)
        ys.append(y)
    return ys, state


__all__ = ["FastWeights", "Gates", "RuleState", "Span", "Writer", "scan", "update"]
