"""The one door to a chunk: checks, types, and the choice of the form that runs it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import state as tree
from ..memory import Gates, GradientRule, Memory, Objective, Rule, Weights
from ..memory import objective as objective_named
from ..memory.memories import FunctionMemory, MatrixMemory
from . import chunk as _chunk
from . import fused as _fused
from . import naive as _naive


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
    reader: int | None = None,
    own: bool = False,
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
    gradient (first-order MAML); k, v and the gates stay in it. `reader`: only that memory along the
    last leading axis answers; q and o lack the axis. `own`: the memory makes its own values
    (eq. 84), M(v) at the chunk's first weights; v is then [*c, T, K] like k.

    backend: "naive" is the definition, "chunk" its parallel algebra by autograd, "fused" the common
    case with its backward pass written out (else "chunk"), "auto" that or, on CUDA, Triton kernels.

    Raises ValueError for an unknown option and for a rule that the memory or backend cannot run.
    """
    _check(memory, rule, k, gates, read, backend)
    if (offset > 0) != (at is not None):
        raise ValueError(
            f"offset={offset} and at={'given' if at is not None else None}: inside a chunk give "
            "both, the tokens of it already taken and its first weights; at its start neither"
        )
    dtype = torch.promote_types(W[0].dtype, torch.float32)
    W, S, at = tree.tree_map(lambda x: x.to(dtype), (W, S, W if at is None else at))
    reply = q.dtype if q is not None else dtype
    q, k, v = None if q is None else q.to(dtype), k.to(dtype), v.to(dtype)
    gates = gates.map(lambda g: g.to(dtype))
    aim = objective_named(objective)
    run: Any = _chunk.update
    options: dict[str, Any] = {}
    if backend == "naive" or not isinstance(rule, GradientRule):
        run = _naive.update
    elif backend != "chunk" and _fused.supports(
        memory, rule, aim, offset=offset, first_order=first_order
    ):
        run, options = _fused.update, {"own": own}
        if backend == "auto" and _on_gpu(W, q, k, v, gates, memory=memory, rule=rule, aim=aim):
            from . import triton  # here, so that it is loaded only where it can run

            run, options = triton.update, {"dot": triton.precision()}
    with torch.autocast(device_type=k.device.type, enabled=False):
        if own and "own" not in options:
            v = memory.read(at, v)
        o, W, S = run(
            memory, rule, W, S, q, k, v, gates,
            at=at, offset=offset,
            objective=aim, read=read, first_order=first_order,
            reader=reader, **options,
        )  # fmt: skip
    return None if o is None else o.to(reply), W, S


_TRITON_IS_THERE = find_spec("triton") is not None  # asked once: a compiler cannot ask it
_triton = True


def use_triton(on: bool = True) -> None:
    """Whether CUDA tensors go through the Triton kernels (the default) or torch's own products."""
    global _triton
    _triton = on


def on_card(x: Tensor) -> bool:
    """Whether tensors where x is go through the Triton kernels."""
    return _triton and _TRITON_IS_THERE and x.is_cuda


def _on_gpu(
    W: Weights, q: Tensor | None, k: Tensor, v: Tensor, gates: Gates, *,
    memory: Any, rule: GradientRule, aim: Objective,
) -> bool:  # fmt: skip
    """Whether the Triton kernels run this whole chunk."""
    if not on_card(k):
        return False
    from . import triton

    return triton.supported(
        memory, rule, W, None, q, k, v, gates, at=None, objective=aim, read="token", offset=0
    )


def _check(memory: Memory, rule: Rule, k: Tensor, gates: Gates, read: str, backend: str) -> None:
    check_read(read)
    if backend not in ("auto", "naive", "chunk", "fused"):
        raise ValueError(f"backend={backend!r}: use 'auto', 'naive', 'chunk' or 'fused'")
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
    elif backend in ("chunk", "fused"):
        raise ValueError(f"{type(rule).__name__} has no parallel form: use backend='naive'")
    elif not isinstance(memory, MatrixMemory) or len(memory.shapes()) != 1:
        raise ValueError(f"{type(rule).__name__} writes a Matrix memory, not {memory!r}")
    if rule.decay != (gates.log_alpha is not None):
        raise ValueError("gates.log_alpha goes with decay(rule): give both or neither")


def check_read(read: str) -> None:
    """Raise ValueError unless `read` names a way to read."""
    if read not in ("token", "boundary"):
        raise ValueError(f"read={read!r}: use 'token' or 'boundary'")
