"""M3, momentum of several scales (algorithm 1, eq. 75): two levels over the stream of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chain import At, Memory, Slot, State, Transform, Updates, chain, every, total
from .sharded import greatest
from .transforms import accumulate, second_moment

_LAST = 0xFF  # of a float32 the last 8 bits of its significand


def literal_m3(
    betas: tuple[float, float, float], alpha: float, period: int, eps: float, sigma: Transform
) -> Transform:
    """Algorithm 1 to the letter: (NS(M1) + α NS(M2)) / (√V + ε), the three being growing sums.

    V only grows, so the update shrinks like 1/√t: for the record, not for training.
    """
    b1, b2, b3 = betas
    fast = chain(accumulate(b1, name="fast"), sigma)
    slow = every(period, chain(accumulate(b3, name="slow"), sigma))
    return chain(total((1.0, fast), (alpha, slow)), second_moment(b2, eps=eps, total=True))


def multiscale(
    fast: Transform,
    sigma: Transform,
    *,
    decay: float,
    alpha: float,
    period: int,
    modulation: Transform | None = None,
    exact: bool = False,
) -> Transform:
    """The practical M3: O1 + α O2 at the size of O1: α turns the update and never lengthens it.

    fast, every step: O1 = σ(fast memory). slow, every f = `period` steps: O2 = σ(M2) with
    M2 ← β3 M2 + (1 − β3) · mean of the last f gradients, β3 = `decay`. modulation: what the sum
    passes before it is scaled. exact: M2 and O2 in a tensor each; else they share one (`Slow`).
    alpha = 0 keeps no slow memory. σ's answer must be new, as Newton–Schulz' is: it is written to.
    """
    slow = Slow(decay, period, exact)

    def init(slot: Slot) -> State:
        state = fast.init(slot) | (modulation.init(slot) if modulation else {})
        return state | slow.init(slot) if alpha else state

    def update(u: Updates, states: list[State], at: At) -> Updates:
        one = sigma.update(fast.update(u, states, at), states, at)
        if not alpha and modulation is None:
            return one
        length = at.norms(one)
        if alpha:
            slow.turn(states, at, sigma)
            slow.write(u, states)
            torch._foreach_add_(one, slow.directions(states), alpha=alpha)
        if modulation:
            one = modulation.update(one, states, at)
        tiny = torch.finfo(one[0].dtype).tiny  # a direction over a large √V is small, not zero
        factors = [a / b.clamp(min=tiny) for a, b in zip(length, at.norms(one))]
        torch._foreach_mul_(one, factors)
        return one

    rule = f"M ← {decay:g} M + {1 - decay:g} mean(g)"
    kept = (Memory("slow momentum", "−⟨m, g⟩", rule, period),) if alpha else ()
    memories = fast.memories + kept
    return Transform(init, update, memories + (modulation.memories if modulation else ()))


def say_form(group: dict[str, Any], states: list[State]) -> None:
    """Of a saved group without `exact`: what its states hold says which form they have."""
    slow = ["direction" in state for state in states if "slow" in state]
    if slow:
        group.setdefault("exact", all(slow))


class Slow:
    """The slow level's M2 and its direction O2, which readers see until the window ends.

    exact, and of float64 parameters: a tensor for each. Else both share one float32: M2 its upper
    24 bits, O2 the last 8, in steps of peak / 127. So M3 needs one copy more than Muon and not two.
    M2 keeps 16 significant bits, and a write rounds it by at most the last of them; O2 is about 1 %
    off, where Newton–Schulz itself leaves singular values between 0.7 and 1.2.
    """

    def __init__(self, decay: float, period: int, exact: bool) -> None:
        self.decay, self.period, self.exact = decay, period, exact

    def init(self, slot: Slot) -> State:
        if self.exact or slot.value.dtype == torch.float64:
            return {"slow": slot.zeros(), "direction": slot.zeros()}
        peak = torch.zeros((), dtype=torch.float32, device=slot.value.device)
        return {"slow": slot.zeros(), "slow_peak": peak}

    def turn(self, states: list[State], at: At, sigma: Transform) -> None:
        """Where a window has ended: a new direction, and the old windows fade."""
        due = [i for i, s in enumerate(at.slots) if s.step and s.step % self.period == 0]
        if not due:
            return
        chosen, here = [states[i] for i in due], at.only(due)
        slow = [s["slow"] for s in chosen]
        directions = sigma.update(slow, chosen, here)
        torch._foreach_mul_(slow, self.decay)
        for direction, state, slot in zip(directions, chosen, here.slots):
            if "direction" in state:
                state["direction"].copy_(direction)
                continue
            peak = greatest(direction, slot.source)
            state["slow_peak"].copy_(peak)
            code = (direction * (127 / (peak + 1e-30))).round_().to(torch.int32)
            _set_last(state["slow"], code.bitwise_and_(_LAST))

    def write(self, u: Updates, states: list[State]) -> None:
        """The window's mean grows; nobody sees it before the window ends."""
        codes = [None if "direction" in s else s["slow"].view(torch.int32) & _LAST for s in states]
        torch._foreach_add_([s["slow"] for s in states], u, alpha=(1 - self.decay) / self.period)
        for state, code in zip(states, codes):
            if code is not None:
                _set_last(state["slow"], code)

    def directions(self, states: list[State]) -> Updates:
        return [s["direction"] if "direction" in s else _direction(s) for s in states]


def _set_last(t: Tensor, code: Tensor) -> None:
    """Put `code`, 0 to 255, in the last 8 bits of every float32."""
    t.view(torch.int32).bitwise_and_(~_LAST).bitwise_or_(code)


def _direction(state: State) -> Tensor:
    """O2 from the last 8 bits, a signed number: the shift leaves it 2²⁴ times as large."""
    return (state["slow"].view(torch.int32) << 24) * (state["slow_peak"] / (127 * 2**24))
