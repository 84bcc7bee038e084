"""What a model is made of, as plain data: one frozen dataclass for each mixer and channel mixer.

The layers take these too: `SelfModifyingTitans(64, 4, Titans(chunk=32))`. Each has only what
applies to it, so a value that would change nothing cannot be written down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from numbers import Integral
from typing import Any

from .memory import objective

LEARNS = ("out", "all")
RULES = ("gd", "dgd", "momentum")
VARIANTS = ("sequential", "nested", "independent")
META_GRADIENTS = ("full", "first-order")
PROJECTIONS = ("k", "v", "eta", "alpha", "q")
Check = tuple[Callable[[Any], bool], str]


def _whole(words: str, least: int = 1) -> Check:
    return lambda x: isinstance(x, Integral) and int(x) >= least, words


def _shell(bound: tuple[float, float]) -> bool:
    low, high = bound
    return 0 <= low <= high


# Of the fields of that name: what may stand there, and in words.
CHECKS: dict[str, Check] = {
    **dict.fromkeys(
        ("chunk", "projection_chunk", "half_life", "window", "truncate"), _whole("1 token or more")
    ),
    **dict.fromkeys(("vocab_size", "dim", "layers", "heads"), _whole("1 or more")),
    "hidden": _whole("a width of 1 or more"), "depth": _whole("1 matrix or more"),
    "conv": _whole("0 taps or more", 0), "sinks": _whole("0 tokens or more", 0),
    "bound": (_shell, "(low, high) with 0 ≤ low ≤ high"),
    "dgd": (lambda x: 0 <= x <= 1, "a share in [0, 1]"),
    "lr": (lambda x: 0 <= x < 1, "a step size in [0, 1)"),
    "meta_lr": (lambda x: 0 <= x <= 1, "a share in [0, 1]"),
    "scale": (math.isfinite, "a finite factor"),
    "objective": (lambda x: bool(objective(x)), "'dot' or 'l2'"),
    **{
        name: (lambda x, known=known: x in known, f"one of {known}")  # type: ignore[misc]
        for name, known in (
            ("read", ("token", "boundary")), ("rule", RULES), ("learns", LEARNS),
            ("variant", VARIANTS), ("meta_gradient", META_GRADIENTS),
        )
    },
}  # fmt: skip


def check(options: Any, **own: Check) -> None:
    """ValueError for a field of the dataclass that cannot be: by its name, `own` before CHECKS."""
    known = {**CHECKS, **own}
    for field in fields(options):
        value, may_miss = getattr(options, field.name), "None" in str(field.type)
        if field.name not in known or (value is None and may_miss):
            continue
        passes, remedy = known[field.name]
        try:
            good = passes(value)
        except TypeError:  # of another kind altogether
            good = False
        if not good:
            remedy += ", or None" if may_miss else ""
            raise ValueError(f"{field.name}={value!r}: give {remedy}")


def limits(eta_min: float, eta_max: float) -> tuple[float, float]:
    """Of step sizes, (eta_min, eta_max); ValueError for what cannot be."""
    if not 0 < eta_max <= 2:
        raise ValueError(f"eta_max={eta_max}: give a step bound in (0, 2]")
    if not 0 <= eta_min < eta_max:
        raise ValueError(f"eta_min={eta_min}: give a step size from 0 to below eta_max={eta_max}")
    return eta_min, eta_max


@dataclass(frozen=True)
class Titans:
    """Self-modifying Titans (section 8), `nestlearn.SelfModifyingTitans`.

    chunk: tokens between two gradient points of M_mem; projection_chunk: of the others (default
    the same). adapt: which projections are memories that are written; one left out stays at its
    start value ("q" is static W_q unless named). objective: "dot" or "l2". dgd: the share of the
    heads, from the first on, with the retention term −η k kᵀ; the others learn by plain gradient
    descent, which adds up what DGD replaces (True: all have it, False: none). weight_decay: the
    retention α_t. momentum: input-gated S. eta_max: 1, or 2 for transitions with negative
    eigenvalues. read: "token" answers through the writes of the chunk so far, "boundary" through
    the chunk's first weights. bound: the shell, in units of the start's norm, to which each matrix
    is brought back after a chunk (None: free). half_life: tokens in which what was learned fades
    by half *towards the start* (None: never), a retention (eq. 59) without which the memories of a
    stream much longer than the trained ones drift; it acts where a chunk ends, every 512 tokens or
    every quarter of it: W ← W_0 + 2^(−every/half_life) (W − W_0). depth, hidden: matrices of each
    memory (1: a matrix memory) and the width between them (default: that of a head). conv: taps of
    the short convolution before it (0: none). eta_min: a step size below it is 0, so that a nearly
    shut gate leaves what is written alone, however long (0: none is too small); its gradient is
    that of the step size without it.
    """

    chunk: int = 64
    projection_chunk: int | None = None
    adapt: tuple[str, ...] = ("k", "v", "eta", "alpha")
    objective: str = "dot"
    dgd: float = True
    weight_decay: bool = True
    momentum: bool = False
    eta_max: float = 1.0
    read: str = "token"
    bound: tuple[float, float] | None = (0.25, 1.0)
    half_life: int | None = 2048
    depth: int = 1
    hidden: int | None = None
    conv: int = 4
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        limits(self.eta_min, self.eta_max)
        if unknown := set(self.adapt) - set(PROJECTIONS):
            raise ValueError(f"adapt={self.adapt}: {sorted(unknown)} not among {PROJECTIONS}")

    def replacing(self, heads: int) -> int:
        """How many of the heads replace (DGD); ValueError where they are no whole number."""
        count = round(self.dgd * heads)
        if abs(count - self.dgd * heads) > 1e-6:
            raise ValueError(
                f"dgd={self.dgd} of heads={heads}: give a share in [0, 1] of a whole number of "
                "heads"
            )
        return count


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention, `nestlearn.Attention`.

    conv: taps of the short convolution before it, which brings an output gate with it as the
    memories have (0: neither, a plain Transformer++). rotary: rotary positions (False: none).
    window: tokens that a token sees, itself included (None: all before it); with one the state has
    a largest size. sinks: of the stream's first tokens, so many are seen from everywhere.
    """

    conv: int = 4
    rotary: bool = True
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        check(self)
        if self.sinks and self.window is None:
            raise ValueError(f"sinks={self.sinks}: give a window with them, or 0")


@dataclass(frozen=True)
class StaticTitans:
    """Titans (Behrouz et al. 2024): an MLP memory with static projections, L2, momentum, retention.

    hidden: the memory's width (default: that of a head). chunk, conv: as in `Titans`.
    """

    chunk: int = 64
    hidden: int | None = None
    conv: int = 4

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet (plain, if no weight_decay): matrix memory, delta rule; fields of `Titans`."""

    chunk: int = 64
    eta_max: float = 1.0
    conv: int = 4
    weight_decay: bool = True
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        limits(self.eta_min, self.eta_max)


@dataclass(frozen=True)
class Linear:
    """Linear attention: a matrix memory that only adds. Fields as in `Titans`."""

    chunk: int = 64
    eta_max: float = 1.0
    conv: int = 4

    def __post_init__(self) -> None:
        check(self)
        limits(0.0, self.eta_max)


@dataclass(frozen=True)
class Level:
    """One MLP of the chain and how often it learns.

    chunk: tokens between two updates (eq. 71); None: it never updates, a plain MLP. learns: "out",
    the second matrix of the MLP alone, whose features the first one makes: then whole spans of
    chunks are products; or "all", both (eq. 71 to the letter), one chunk after another. lr: step
    size at the start of training, then learned. hidden: width (default: 4 dim, shared among the
    levels). rule: "gd", "dgd" (delta gradient descent) or "momentum" (gd with a learned momentum).
    objective: "l2" or "dot". meta_lr: in a nested system, how far the level's start value moves
    towards what the level has learned whenever the next slower level's context ends. bound: the
    shell, in units of the start's norm, to which each matrix that learns is brought back: after
    every chunk, or with "out" after the first that ends 512 tokens or more on. half_life: tokens in
    which what was learned fades by half towards the start (None: never), without which levels drift
    on streams much longer than the trained windows; it acts after the first chunk that ends 512
    tokens or more on, or if that is more than half of it, after every chunk. scale: a factor of the
    output, a third as large as the stream it is added to at the start of training, then learned
    (None: 1).
    """

    chunk: int | None = None
    lr: float = 0.3
    hidden: int | None = None
    rule: str = "dgd"
    objective: str = "l2"
    meta_lr: float = 0.1
    bound: tuple[float, float] | None = (0.25, 2.0)
    half_life: int | None = 2048
    scale: float | None = 0.3
    learns: str = "out"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Continuum:
    """The continuum memory (section 7), `nestlearn.ContinuumMemory`.

    levels: fast to slow. variant: "sequential" (eq. 73), "nested" (72) or "independent" (74).
    meta_gradient: "full" through the inner gradients, or "first-order".
    """

    levels: tuple[Level, ...] = (Level(chunk=4), Level(chunk=16), Level())
    variant: str = "independent"
    meta_gradient: str = "full"

    def __post_init__(self) -> None:
        levels = self.levels if isinstance(self.levels, Iterable) else (self.levels,)
        object.__setattr__(self, "levels", tuple(levels))
        if not self.levels:
            raise ValueError("levels is empty: give at least one Level")
        for level in self.levels:
            if not isinstance(level, Level):
                raise ValueError(f"{level!r} is no level: give Level(chunk=16), and so on")
        check(self)
        self.parents()

    def parents(self) -> list[int | None]:
        """For each level, in a nested system, the chunk of the next slower one that updates."""
        if self.variant != "nested":
            return [None] * len(self.levels)
        sizes = sorted({level.chunk for level in self.levels if level.chunk is not None})
        for fast, slow in pairwise(sizes):
            if slow % fast:
                raise ValueError(
                    f"nested levels with chunks {fast} and {slow}: a slower level's context must "
                    f"end where a faster one's does, so make {slow} a multiple of {fast}"
                )
        return [
            next((size for size in sizes if level.chunk is not None and size > level.chunk), None)
            for level in self.levels
        ]


@dataclass(frozen=True)
class SwiGLU:
    """A gated MLP without memory. hidden: its width (default: 8/3 of the model's)."""

    hidden: int | None = None

    def __post_init__(self) -> None:
        check(self)


Mixer = Titans | Attention | StaticTitans | DeltaNet | Linear
Channel = Continuum | SwiGLU
MIXERS: dict[str, type[Mixer]] = {  # by the words that stand for their defaults
    "hope": Titans, "attention": Attention, "titans": StaticTitans, "deltanet": DeltaNet,
    "linear": Linear,
}  # fmt: skip
CHANNELS: dict[str, type[Channel]] = {"cms": Continuum, "mlp": SwiGLU}


def named(field: str, value: Any) -> Any:
    """Of `mixer` or `channel` the options: themselves, or a word for their defaults, or their JSON.

    ValueError for what is none, and for a field that they do not have.
    """
    words: dict[str, dict[str, Any]] = {"mixer": {**MIXERS}, "channel": {**CHANNELS}}
    known = words[field]
    if isinstance(value, tuple(known.values())):
        return value
    if isinstance(value, str) and value in known:
        return known[value]()
    kinds = {kind.__name__: kind for kind in known.values()}
    if not isinstance(value, dict) or value.get("kind") not in kinds:
        raise ValueError(f"{field}={value!r}: use one of {(*known,)}, or options {(*kinds,)}")
    return from_json(kinds[value["kind"]], {k: v for k, v in value.items() if k != "kind"})


def to_json(options: Any) -> dict[str, Any]:
    """The options as plain JSON data, with their kind; `named` reads it."""
    return {"kind": type(options).__name__, **json.loads(json.dumps(asdict(options)))}


def from_json(kind: type, data: dict[str, Any]) -> Any:
    """Options of that kind from their fields in JSON; ValueError for a field that it has not."""
    if unknown := sorted(set(data) - names(kind)):
        raise ValueError(f"unknown fields {unknown}: {kind.__name__} has {sorted(names(kind))}")
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    if "levels" in data:
        own = (from_json(Level, v) if isinstance(v, dict) else v for v in data["levels"])
        data["levels"] = tuple(own)
    return kind(**data)


def names(kind: Any) -> set[str]:
    """The names of its fields."""
    return {f.name for f in fields(kind)}
