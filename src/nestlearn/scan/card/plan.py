"""What to launch for a run of chunks of self-modifying memories, and where their tokens lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .given import _kind, _precisions
from .tiles import Kind, Place

Tokens = tuple[int, int, int, int, int, int]


class Plan(NamedTuple):
    """What to launch for a run of `chunks` equal chunks: `place` is of one. held: how a kernel
    finds the constants, see `kernels._constants`.
    """

    kind: Kind
    chunks: int
    place: Place
    held: tuple[int, int, int, int, int]

    @property
    def heads(self) -> int:
        """Of all samples; one memory of each answers."""
        return self.place.N // self.place.groups

    @property
    def roles(self) -> int:
        """How many memories of a head say something."""
        return 4 if self.kind.decay else 3

    @property
    def every(self) -> Place:
        """Of all chunks at once."""
        return self.place._replace(N=self.chunks * self.place.N)


def plan_of(
    tokens: int, form: str, gain: float, steps: tuple[float, float],
    bound: tuple[float, float] | None, z: Tensor, q: Tensor, constants: Tensor,
    W1: Tensor, W2: Tensor | None,
) -> Plan:  # fmt: skip
    B, heads, memories = W1.shape[:3]
    T = min(tokens, z.shape[2])
    (H, K), V = W1.shape[-2:], (W1 if W2 is None else W2).shape[-2]
    many = constants.shape[-1]
    norms = memories * (1 if W2 is None else 2)
    low, high = bound or (0.0, 0.0)
    eta_min, eta_max = map(float, steps)
    kind = _kind(
        form, float(gain), K, H, V, many - norms > V + 1, T, *_precisions(form, K, H, V), own=True,
        shell=bound is not None, low=float(low), high=float(high), eta_min=eta_min,
        eta_max=eta_max,
    )  # fmt: skip
    place = Place(B * heads * memories, T, memories, 1, memories, memories - 1)
    chunks = z.shape[2] // T
    return Plan(
        kind, chunks, place, (heads, constants.stride(0), many, many - norms, chunks * B * heads)
    )


def laid(x: Tensor, T: int) -> tuple[Tensor, Tokens]:
    """x [B, heads, tokens, d] as it lies, and how a kernel finds the tokens of a head and chunk,
    see `tiles._among`.
    """
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    sample, head, token, _ = x.stride()
    return x, (x.shape[1], x.shape[0], T * token, sample, head, token)
