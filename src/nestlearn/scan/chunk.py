"""One chunk as one object, the one door to it, and the choice of the form that runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import state as tree
from ..memory import Gates, GradientRule, Memory, Objective, Rule, Weights
from ..memory import objective as objective_named
from ..memory.memories import FunctionMemory, MatrixMemory


@dataclass(frozen=True)
class Chunk:
    """What happens in one chunk, whatever runs it.

    memory: what is written. rule: how one write happens. objective: "dot" or "l2", or one of your
    own. read: "token" answers q_t through the weights that token t's write left, "boundary" through
    the chunk's first weights. answering: only that memory along the last leading axis answers, and
    q and o lack the axis (None: all answer). makes_values: the memory makes its own values (eq.
    84), M(v) at the chunk's first weights; v is then like k. first_order: the inner gradient's own
    dependence on the weights stays out of the outer gradient (first-order MAML); k, v and the gates
    stay in it.

    Raises ValueError for an unknown option and for a rule that cannot write the memory.
    """

    memory: Memory
    rule: Rule
    _: KW_ONLY
    objective: str | Objective = "dot"
    read: str = "token"
    answering: int | None = None
    makes_values: bool = False
    first_order: bool = False

    def __post_init__(self) -> None:
        objective_named(self.objective)  # refuses an unknown name
        if self.read not in ("token", "boundary"):
            raise ValueError(f"read={self.read!r}: use 'token' or 'boundary'")
        memory, rule = self.memory, self.rule
        if not isinstance(rule, GradientRule):
            if not isinstance(memory, MatrixMemory) or len(memory.shapes()) != 1:
                raise ValueError(f"{type(rule).__name__} writes a Matrix memory, not {memory!r}")
        elif (rule.delta or rule.normalize) and isinstance(memory, FunctionMemory):
            raise ValueError(
                "delta and normalize need each matrix's input, which a FunctionMemory does not "
                "give: use hebbian(), or a Matrix or ResidualMLP memory"
            )

    @property
    def aim(self) -> Objective:
        """The objective itself."""
        return objective_named(self.objective)


class Given(NamedTuple):
    """The tensors of one call, by which a form says whether it can run it."""

    W: Weights
    q: Tensor | None
    k: Tensor
    v: Tensor
    gates: Gates
    offset: int


def update(
    chunk: Chunk,
    W: Weights,
    S: Any,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    backend: str = "auto",
    at: Weights | None = None,
    offset: int = 0,
) -> tuple[Tensor | None, Weights, Any]:
    """Write one chunk of pairs into a memory and read it: (o, W, S) after the chunk (eqs. 88, 90).

    Every inner gradient is taken at the chunk's first weights; retention and delta term run token
    by token. q=None skips the answers.

    Shapes: W and S have leading axes *b, q and k are [*b, T, K], v is [*b, T, V], gates [*b, T];
    an axis of size 1 in k and in the gates is shared. A call may end inside a chunk: the next one
    goes on with W, S, `at` = the weights that the chunk began with, and `offset` = the tokens of
    the chunk already taken. States and solves are float32 at least; o has the type of q.

    backend: "naive" is the definition, "parallel" its algebra by autograd, "fused" the common case
    with its backward pass written out, "transition" the same for matrices that make their own
    values, "card" fused as Triton kernels, "auto" the first of card, transition, fused, parallel
    and naive that can run the call, "torch" the same without card (see `explain`).

    Raises ValueError for a backend that is unknown or cannot run the call, saying why.
    """
    run = ready(chunk, W, S, q, k, v, gates, backend=backend, at=at, offset=offset)
    with torch.autocast(device_type=k.device.type, enabled=False):
        o, W, S = run()
    return None if o is None or q is None else o.to(q.dtype), W, S


def ready(
    chunk: Chunk,
    W: Weights,
    S: Any,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    backend: str,
    at: Weights | None,
    offset: int,
) -> Callable[[], tuple[Tensor | None, Weights, Any]]:
    """The call as a form runs it, in wide types, outside of autocast: see `update`."""
    _check(chunk, k, gates, at, offset)
    dtype = torch.promote_types(W[0].dtype, torch.float32)
    W, S, at = tree.tree_map(lambda x: x.to(dtype), (W, S, W if at is None else at))
    q, k, v = None if q is None else q.to(dtype), k.to(dtype), v.to(dtype)
    gates = gates.map(lambda g: g.to(dtype))
    name, form = choose(chunk, Given(W, q, k, v, gates, offset), backend)
    note(name, k.shape[-2])
    options = form.options()  # what must be asked while the caller's autocast holds
    return partial(form.update, chunk, W, S, q, k, v, gates, at=at, offset=offset, **options)


def _check(chunk: Chunk, k: Tensor, gates: Gates, at: Weights | None, offset: int) -> None:
    if k.shape[-2] == 0:
        raise ValueError("the chunk has T = 0 tokens: give at least one")
    if (offset > 0) != (at is not None):
        raise ValueError(
            f"offset={offset} and at={'given' if at is not None else None}: inside a chunk give "
            "both, the tokens of it already taken and its first weights; at its start neither"
        )
    if getattr(chunk.rule, "momentum", False) != (gates.log_theta is not None):
        raise ValueError("gates.log_theta goes with momentum(rule): give both or neither")
    if chunk.rule.decay != (gates.log_alpha is not None):
        raise ValueError("gates.log_alpha goes with decay(rule): give both or neither")


# ------------------------------------------------------------------------------- which form runs

# A form is a module with `why_not(chunk, given)` -> None or what keeps it from running the call,
# `options()` and `update(chunk, ...)`.
FORMS = ("card", "transition", "fused", "parallel", "naive")  # the first that can run a call does
ANY = {"auto": FORMS, "torch": FORMS[1:]}
BACKENDS = (*ANY, *FORMS)


def choose(chunk: Chunk, given: Given, backend: str) -> tuple[str, ModuleType]:
    """The form that runs the call, by name; ValueError if the named one cannot."""
    check_backend(backend)
    for name in ANY.get(backend, (backend,)):
        reason = why_not(name, chunk, given)
        if reason is None:
            return name, _form(name)
    raise ValueError(f"backend={backend!r} cannot run this: {reason}; use 'auto'")


def why_not(name: str, chunk: Chunk, given: Given) -> str | None:
    """What keeps the form of that name from running the call; None: it can."""
    if name == "card" and not on_card(given.k):
        return "the tensors are not on CUDA, or Triton is absent or turned off"
    return _form(name).why_not(chunk, given)


def check_backend(backend: str) -> None:
    """Raise ValueError unless there is such a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {BACKENDS}")


def _form(name: str) -> Any:
    if name == "card":
        from .card import given  # here, so that triton is loaded only where it can run

        return given
    from . import fused, naive, parallel, transition

    forms = {"transition": transition, "fused": fused, "parallel": parallel, "naive": naive}
    return forms[name]


_TRITON_IS_THERE = find_spec("triton") is not None  # asked once: a compiler cannot ask it
_triton = True


def use_triton(on: bool = True) -> bool:
    """Whether CUDA tensors go through the Triton kernels (the default) or torch's own products.

    Returns what it was before.
    """
    global _triton
    before, _triton = _triton, on
    return before


def on_card(x: Tensor) -> bool:
    """Whether tensors where x is go through the Triton kernels."""
    return _triton and _TRITON_IS_THERE and x.is_cuda


_ran: Counter[str] | None = None


@contextmanager
def noted() -> Iterator[Counter[str]]:
    """Count the tokens of every update made meanwhile, by the form that ran it."""
    global _ran
    before, _ran = _ran, Counter()
    try:
        yield _ran
    finally:
        _ran = before


def note(name: str, tokens: int) -> None:
    """Say that a form runs so many tokens."""
    if not torch.compiler.is_compiling() and _ran is not None:
        _ran[name] += tokens


@torch.no_grad()
def explain(layer: Any, x: Tensor) -> dict[str, int]:
    """Which forms run a layer, or a model, on x: tokens by form, summed over its memories' updates.

    "generated" are whole chunks of self-modifying matrices, "card: generated" of any such memories
    in kernels of their own, "spans" levels by whole spans; the others are the backends of `update`.
    The call is made, without gradients; steps that are compiled are not seen.

        >>> layer = SelfModifyingTitans(64, 4, Titans(chunk=32))
        >>> nestlearn.scan.explain(layer, torch.randn(1, 40, 64))
        {'generated': 40}
    """
    with noted() as ran:
        layer(x)
    return dict(ran)
