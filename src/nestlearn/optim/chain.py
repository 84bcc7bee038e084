"""What an optimizer is made of: transforms of a list of gradients, and how they are put together.

A transform is a pair (init, update), as in optax. `init(slot)` makes what it remembers of one
parameter; `update(u, states, at)` maps the updates u of a list of parameters to other updates. It
never writes to u, nor to the parameters; the states are its own and change in place, because a
second copy of a large model's momentum is not free. A chain's last update u is what the optimizer
subtracts: W ← W − lr u.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .sharded import own_part, reduced, whole_of

State = dict[str, Tensor]
Updates = list[Tensor]


class Memory(NamedTuple):
    """What a transform remembers, as `nestlearn levels` shows it.

    objective: what it is trained on (eq. 6). rule: how it is written. period: optimizer steps
    between two changes that its readers see.
    """

    name: str
    objective: str
    rule: str
    period: int = 1


@dataclass(frozen=True)
class Layout:
    """How a parameter is read as matrices [k, m, n].

    Two axes are a matrix, fewer are one row; a convolution kernel [out, in, ...] is the matrix
    [out, in · ...]. stacked: leading axes count matrices (experts, heads). split: the rows of each
    part of a fused matrix (query, key, value), each a matrix of its own.
    """

    stacked: bool = False
    split: tuple[int, ...] = ()

    def matrices(self, t: Tensor) -> list[Tensor]:
        """The matrices of a whole parameter: one [k, m, n] for each part."""
        if t.ndim < 2:
            return [t.reshape(1, 1, -1)]
        t = t.reshape((-1, *t.shape[-2:]) if self.stacked else (1, t.shape[0], -1))
        return list(t.split(list(self.split), 1)) if self.split else [t]

    def join(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The parameter again, from what `matrices` made of it."""
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)).reshape(shape)


@dataclass(frozen=True)
class Slot:
    """One parameter as transforms see it.

    value: its values here (of a sharded parameter, this process' part). shape: of the whole.
    step: updates that it has had before. source: the parameter itself, sharded or not.
    """

    value: Tensor
    shape: torch.Size
    step: int
    source: Tensor
    layout: Layout = Layout()

    def zeros(self) -> Tensor:
        """A state like the parameter, in float32 at least."""
        dtype = torch.promote_types(self.value.dtype, torch.float32)
        return torch.zeros_like(self.value, dtype=dtype, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class At:
    """Where a chain stands: the parameters of this call, all of one group, and their gradients."""

    slots: tuple[Slot, ...]
    gradients: tuple[Tensor, ...]
    lr: float

    def only(self, chosen: Sequence[int], period: int = 1) -> At:
        """The same for some of the parameters; of their steps only every `period`-th counts."""
        slots = [self.slots[i] for i in chosen]
        slots = [replace(s, step=s.step // period) for s in slots]
        return At(tuple(slots), tuple(self.gradients[i] for i in chosen), self.lr)

    def on_matrices(self, f: Callable[..., list[Tensor]], *lists: Sequence[Tensor]) -> Updates:
        """f of the parameters' matrices, each [k, m, n], and back to updates.

        f takes one list of matrices for each of `lists` and returns one such list. Sharded
        updates are gathered first; every process then computes the whole.
        """
        parts = [
            [s.layout.matrices(whole_of(u, s.source)) for s, u in zip(self.slots, us)]
            for us in lists
        ]
        results = iter(f(*([m for ms in one for m in ms] for one in parts)))
        found = []
        for slot, ms in zip(self.slots, parts[0]):
            whole = slot.layout.join([next(results) for _ in ms], slot.shape)
            found.append(own_part(whole, slot.source))
        return found

    def norms(self, us: Sequence[Tensor]) -> list[Tensor]:
        """The Frobenius norm of each whole update, a tensor without axes."""
        squares = [n.square() for n in torch._foreach_norm(list(us))]
        return [reduced(q, s.source).sqrt() for q, s in zip(squares, self.slots)]


@dataclass(frozen=True)
class Transform:
    """A pair of functions on the updates of a list of parameters, and what it remembers.

    sized: its update already holds the step size (the paper's literal forms): W ← W − u.
    """

    init: Callable[[Slot], State]
    update: Callable[[Updates, list[State], At], Updates]
    memories: tuple[Memory, ...] = ()
    sized: bool = False


def stateless(f: Callable[[Updates, At], Updates]) -> Transform:
    """A transform that remembers nothing."""
    return Transform(lambda slot: {}, lambda u, states, at: f(u, at))


def chain(*transforms: Transform) -> Transform:
    """One after the other: each takes what the one before it made of the gradients."""

    def update(u: Updates, states: list[State], at: At) -> Updates:
        for t in transforms:
            u = t.update(u, states, at)
        return u

    return _together(transforms, update)


def total(*parts: tuple[float, Transform]) -> Transform:
    """Σ weight · transform(u): each reads the same updates."""

    def update(u: Updates, states: list[State], at: At) -> Updates:
        (weight, first), *rest = parts
        result = torch._foreach_mul(first.update(u, states, at), weight)
        for weight, t in rest:
            torch._foreach_add_(result, t.update(u, states, at), alpha=weight)
        return list(result)

    return _together([t for _, t in parts], update)


def every(period: int, inner: Transform, name: str = "window") -> Transform:
    """A slower level (eqs. 71, 75): every `period` steps `inner` sees the sum of their gradients.

    Between, its last answer stands; before the first window is full it is zero. State: the sum and
    the answer, two copies of the parameter beside what `inner` keeps.
    """
    if period < 1:
        raise ValueError(f"period={period}: a slow memory is written every 1 or more steps")
    held, running = f"{name}_held", f"{name}_sum"

    def init(slot: Slot) -> State:
        return {held: slot.zeros(), running: slot.zeros(), **inner.init(slot)}

    def update(u: Updates, states: list[State], at: At) -> Updates:
        due = [i for i, s in enumerate(at.slots) if s.step and s.step % period == 0]
        if due:
            sums = [states[i][running] for i in due]
            answer = inner.update(sums, [states[i] for i in due], at.only(due, period))
            torch._foreach_copy_([states[i][held] for i in due], answer)
            torch._foreach_zero_(sums)
        torch._foreach_add_([s[running] for s in states], u)
        return [s[held] for s in states]

    memories = tuple(m._replace(period=m.period * period) for m in inner.memories)
    return Transform(init, update, memories, inner.sized)


def _together(transforms: Sequence[Transform], update: Callable[..., Updates]) -> Transform:
    """What remembers all that these do, each under names of its own."""

    def init(slot: Slot) -> State:
        state: State = {}
        for t in transforms:
            own = t.init(slot)
            if twice := sorted(state.keys() & own.keys()):
                raise ValueError(
                    f"two transforms of one chain keep a state named {twice}: give one of them "
                    "another name="
                )
            state |= own
        return state

    memories = tuple(m for t in transforms for m in t.memories)
    return Transform(init, update, memories, any(t.sized for t in transforms))
