"""The MLP blocks of Hugging Face models, and weights that are lent to them for one call.

`adopt` gives a block's linear layers a forward that looks whether the current call lends them
fast weights; where it does not, they compute what they always did, bit for bit. Their parameters,
names and state dict stay as they are, and nothing of a call outlives it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# The linear layers of one MLP by their names, and the families that name them so.
FAMILIES = {
    ("gate_proj", "up_proj", "down_proj"): "Llama, Mistral, Qwen2, Qwen3, Gemma",
    ("gate_up_proj", "down_proj"): "Phi-3",
    ("c_fc", "c_proj"): "GPT-2",
    ("dense_h_to_4h", "dense_4h_to_h"): "GPT-NeoX",
    ("fc1", "fc2"): "Phi",
}


class Factors(NamedTuple):
    """The fast weights of one linear layer: full [B, out, in] (right None), or left [B, out, r]
    times right [B, r, in].
    """

    left: Tensor
    right: Tensor | None = None

    def dense(self) -> Tensor:
        """[B, out, in]"""
        return self.left if self.right is None else self.left @ self.right


class Effective(NamedTuple):
    """What one linear layer computes with. base: its weights [1 or B, out, in], None for its own.
    added: low-rank terms beside them. Rows of a call are dealt to the B memories in equal runs.
    version: of the layer's own weights when they were added to the deltas. taps: where the layer
    notes its input and output each time it runs; outputs that depend on nothing become leaves.
    """

    base: Tensor | None
    added: tuple[Factors, ...] = ()
    version: int | None = None
    taps: list[tuple[Tensor, Tensor]] | None = None


Weights = dict[nn.Module, Effective]


class _Loan(NamedTuple):
    weights: Weights
    inputs: dict[nn.Module, Tensor] | None
    ran: dict[nn.Module, int]


_LOAN: ContextVar[_Loan | None] = ContextVar("nestlearn_fast_weights", default=None)


@contextmanager
def lend(
    weights: Weights, inputs: dict[nn.Module, Tensor] | None = None
) -> Iterator[dict[nn.Module, int]]:
    """Inside the block the adopted layers compute with `weights`, and note their inputs; gives how
    often each of them has run.
    """
    ran: dict[nn.Module, int] = {}
    token = _LOAN.set(_Loan(weights, inputs, ran))
    try:
        yield ran
    finally:
        _LOAN.reset(token)


@dataclass(frozen=True, eq=False)
class _Shared:
    """An open `share` block: of which layers it speaks, and the threads that are older than it."""

    loan: _Loan
    layers: frozenset[nn.Module]
    older: frozenset[threading.Thread]
    outer: _Shared | None


# Threads do not inherit a context, so they look here: at the open blocks, and at those in which
# they were started and which have ended since.
_OPEN: list[_Shared] = []
_ENDED: WeakKeyDictionary[threading.Thread, list[_Shared]] = WeakKeyDictionary()
_INSIDE: ContextVar[_Shared | None] = ContextVar("nestlearn_shared", default=None)


@contextmanager
def share(weights: Weights, layers: Iterable[nn.Module]) -> Iterator[None]:
    """`lend` to all of these layers, also in the threads that are started inside the block.

    What a block around it lends to the layers of other models stays lent.
    """
    about, outer, loan = frozenset(layers), _INSIDE.get(), _LOAN.get()
    beside = {} if loan is None else {k: v for k, v in loan.weights.items() if k not in about}
    lent = _Loan({**beside, **weights}, None, {})
    about = about if outer is None else about | outer.layers
    block = _Shared(lent, about, frozenset(threading.enumerate()), outer)
    tokens = _LOAN.set(lent), _INSIDE.set(block)
    _OPEN.append(block)
    try:
        yield
    finally:
        _OPEN.remove(block)
        for thread in frozenset(threading.enumerate()) - block.older:
            _ENDED.setdefault(thread, []).append(block)
        _LOAN.reset(tokens[0])
        _INSIDE.reset(tokens[1])


def _inherited(layer: nn.Module) -> _Loan | None:
    """What a thread without a loan of its own reads; ValueError where that is not certain."""
    thread = threading.current_thread()
    about = [b for b in (*_OPEN, *_ENDED.get(thread, ())) if layer in b.layers]
    blocks = [b for b in about if not any(c.outer is b for c in about)]  # the innermost
    if not blocks:
        return None
    if len(blocks) > 1 or thread in blocks[0].older:
        raise ValueError(
            "another thread is using a memory of this model, and this one did not say what it "
            "reads: enter using(memory), or using(None), in this thread"
        )
    return blocks[0].loan


def _loan(layer: nn.Module) -> _Loan | None:
    """What the layer reads in this call."""
    loan = _LOAN.get()
    return _inherited(layer) if loan is None and (_OPEN or _ENDED) else loan


def version(layer: nn.Module) -> int | None:
    """How often the layer's own weights were written; None where torch does not count it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return None if weight.is_inference() else weight._version


def kernel(layer: nn.Module) -> Tensor:
    """The layer's own weights as [out, in]; a view of its parameter."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


class _Adopted:
    """The forward of a layer that may be lent weights; x [rows, ..., in] -> [rows, ..., out]."""

    def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:  # type: ignore[misc]
        loan = _loan(self)
        if loan is not None and self in loan.weights:
            raise ValueError(
                "torch.nn.DataParallel computes with copies of the layers, which read no memory: "
                "inside using(memory) call the model itself, or one process for each device"
            )
        return super()._replicate_for_data_parallel()  # type: ignore[misc]

    def forward(self: nn.Module, x: Tensor) -> Tensor:  # type: ignore[misc]
        loan = _loan(self)
        if loan is not None:
            loan.ran[self] = loan.ran.get(self, 0) + 1
            if loan.inputs is not None:
                loan.inputs[self] = x
        lent = loan.weights.get(self) if loan is not None else None
        plain = super().forward  # type: ignore[misc]
        return plain(x) if lent is None else _compute(self, plain, x, lent)


class AdoptedLinear(_Adopted, nn.Linear):
    """A linear layer that may be lent weights."""


class AdoptedConv1D(_Adopted, Conv1D):
    """GPT-2's linear layer that may be lent weights."""


_ADOPTED = {nn.Linear: AdoptedLinear, Conv1D: AdoptedConv1D}
_RELEASED = {adopted: plain for plain, adopted in _ADOPTED.items()}


def _compute(layer: nn.Module, plain, x: Tensor, lent: Effective) -> Tensor:
    if lent.version is not None and lent.version != version(layer):
        raise ValueError(
            "the base model's weights have changed since the memory was added to them: leave "
            "using(...) after an optimizer's step, and enter it again"
        )
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    if lent.base is None:
        y = plain(x)
    else:
        y = _by_row(x, lent.base.to(x.dtype))
        y = y if bias is None else y + bias
    for left, right in lent.added:
        assert right is not None
        y = y + _by_row(_by_row(x, right.to(x.dtype)), left.to(x.dtype))
    if lent.taps is not None:
        y = y if y.requires_grad else y.detach().requires_grad_()
        lent.taps.append((x, y))
    return y


def _by_row(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, ..., in], weight [B, out, in], B a divisor of rows -> [rows, ..., out]."""
    if len(weight) == 1:
        # In two dimensions, or torch spreads the weights over the rows for the backward pass.
        return F.linear(x.reshape(-1, x.shape[-1]), weight[0]).view(*x.shape[:-1], weight.shape[1])
    if x.shape[0] % len(weight):
        raise ValueError(
            f"{x.shape[0]} rows cannot be dealt to {len(weight)} memories: give one row, or "
            "equally many, for each memory"
        )
    y = x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT
    return y.view(*x.shape[:-1], weight.shape[1])


class Block(NamedTuple):
    """One MLP. number: of its transformer block. name: of the module. layers: its linear ones,
    paths: their names in the model.
    """

    number: int
    name: str
    mlp: nn.Module
    layers: tuple[nn.Module, ...]
    paths: tuple[str, ...]


def adoptable(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer."""
    return type(layer) in _ADOPTED


def adopted(layer: nn.Module) -> bool:
    """Whether the layer may be lent weights."""
    return type(layer) in _RELEASED


def adopt(layer: nn.Module) -> None:
    """Let the layer be lent weights."""
    layer.__class__ = _ADOPTED[type(layer)]


def release(layer: nn.Module) -> None:
    """Give the layer its own class back."""
    layer.__class__ = _RELEASED[type(layer)]
