"""Who is measured: our layers and their peers, each built and called in its own fastest way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.layers import (
    Attention,
    Level,
    SelfModifyingTitans,
    gated_deltanet,
    static_titans,
)
from nestlearn.layers.streaming import StreamingLayer
from nestlearn.models.hope import HopeBlock, HopeConfig
from nestlearn.options import Continuum, DeltaNet, StaticTitans, Titans

FORWARD, TRAIN = "forward", "forward + backward"

OURS = "SelfModifyingTitans"
HOPE = "Hope block"
TITANS = "titans-pytorch NeuralMemory"
ENCODER = "nn.TransformerEncoderLayer"
NESTED = "nested-learning SelfModifyingTitans"
BASELINES = (TITANS, ENCODER, NESTED)  # the tables give the others' ratio to them

NEAR, FAR, CACHED = 100, 1_000_000, 4_000  # positions at which decoding is timed


class Shape(NamedTuple):
    """Width in channels, heads, and chunk in tokens: the same for all who are compared."""

    width: int = 256
    heads: int = 4
    chunk: int = 64


def compile_chunks(module: nn.Module) -> None:
    """`compile()` of every streaming layer in it: in place, the step of one chunk."""
    for part in module.modules():
        if isinstance(part, StreamingLayer):
            part.compile()


def can_compile() -> bool:
    """Whether layers compile one chunk; `nn.Module.compile` would unroll the loop over chunks."""
    return StreamingLayer.compile is not nn.Module.compile


Step = Callable[[Any, Tensor, Any], tuple[Tensor, Any]]


def _plain(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x, state)


def _keyword(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x, state=state)


def _stateless(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x), None


def _begun(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A block takes no None for its state."""
    return layer(x, layer.init_state(x.shape[0]) if state is None else state)


@dataclass(frozen=True)
class Contestant:
    """One line of the tables.

    build: the module for a shape. step: (module, x [B, T, width], state or None) -> (y, state).
    ours: its equivalence is checked before anything is measured. package, module: what must be
    installed, as pip and as Python know it. kinds: what is timed. batch, longest: its own batch
    and the most tokens, where they are not everyone's. decode: the positions at which one token is
    timed; grows: its state grows with the position, so the tokens before it have to be read.
    memory: its peak memory is measured. compiled: by `compile_chunks`, after build. prepare: called
    with T before the clock starts.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    step: Step = _plain
    ours: bool = True
    note: str = ""
    package: str = ""
    module: str = ""
    kinds: tuple[str, ...] = (FORWARD, TRAIN)
    batch: int | None = None
    longest: int | None = None
    decode: tuple[int, ...] = ()
    grows: bool = False
    memory: bool = False
    compiled: bool = False
    prepare: Callable[[int], Any] | None = None

    def make(self, shape: Shape) -> nn.Module:
        """The module with seeded weights, in training mode (no contestant has dropout), compiled
        if it is the compiled one.
        """
        torch.manual_seed(0)
        layer = self.build(shape).train()
        if self.compiled:
            compile_chunks(layer)
        return layer

    def wants(self, length: int) -> bool:
        """Whether it takes part at T = length."""
        return self.longest is None or length <= self.longest


def contestants() -> list[Contestant]:
    """All, installed or not, ours first."""
    return [*_ours(), *_peers()]


def _titans(shape: Shape, read: str = "token", remat: bool = False) -> nn.Module:
    options = Titans(shape.chunk, read=read, depth=2, half_life=None)
    return SelfModifyingTitans(shape.width, shape.heads, options, remat=remat)


def _hope(shape: Shape, remat: bool = False) -> nn.Module:
    levels = (Level(chunk=max(1, shape.chunk // 4)), Level(chunk=shape.chunk), Level())
    config = HopeConfig(
        dim=shape.width, heads=shape.heads, mixer=Titans(shape.chunk), channel=Continuum(levels),
        remat=remat,
    )  # fmt: skip
    return HopeBlock(config)


def _ours() -> list[Contestant]:
    both = (NEAR, FAR)
    titans = Contestant(OURS, _titans, decode=both, memory=True)
    hope = Contestant(
        HOPE, _hope, _begun, decode=both, memory=True,
        note="SelfModifyingTitans and a CMS of three levels: every chunk / 4, chunk, never",
    )  # fmt: skip
    return [
        titans,
        Contestant(
            f"{OURS}, boundary reads", lambda s: _titans(s, read="boundary"), decode=both,
            note="answers through the chunk's first weights, as titans-pytorch does",
        ),
        replace(titans, name=f"{OURS}, compiled", compiled=True, memory=False),
        hope,
        replace(hope, name=f"{HOPE}, compiled", compiled=True, memory=False, decode=()),
        Contestant(
            "gated DeltaNet", lambda s: gated_deltanet(s.width, s.heads, DeltaNet(s.chunk)),
            decode=both, note="nestlearn's own: a matrix memory",
        ),
        Contestant(
            "static Titans", lambda s: static_titans(s.width, s.heads, StaticTitans(s.chunk)),
            decode=both, note="nestlearn's own: one MLP memory, static projections",
        ),
        Contestant(
            "Attention", lambda s: Attention(s.width, s.heads), decode=(NEAR, CACHED), grows=True,
            memory=True, note="nestlearn's own, with rotary positions and a growing cache",
        ),
        replace(titans, name=f"{OURS}, batch 1", kinds=(FORWARD,), batch=1, longest=256,
                decode=(), memory=False, note=f"beside {NESTED}"),
    ]  # fmt: skip


def far_contestants() -> list[Contestant]:
    """Ours for lengths whose graph would not fit: each chunk is recomputed in the backward pass."""
    note = "chunks are computed again in the backward pass, so only one graph is held"
    return [
        Contestant(f"{OURS}, remat", lambda s: _titans(s, remat=True), note=note),
        Contestant(f"{HOPE}, remat", lambda s: _hope(s, remat=True), _begun, note=note),
    ]


# ------------------------------------------------------------------------------------- peers


def _peers() -> list[Contestant]:
    titans = Contestant(
        TITANS, lambda s: _neural_memory(s, s.chunk), _keyword, ours=False, decode=(NEAR, FAR),
        memory=True, package="titans-pytorch", module="titans_pytorch",
        note="batch_size = chunk: new gradients at every chunk; memories 4 times as wide",
    )  # fmt: skip
    encoder = Contestant(
        ENCODER,
        lambda s: _Encoder(s, hint=True),
        _stateless,
        ours=False,
        memory=True,
        prepare=causal_mask,
        note="causal mask with is_causal=True, MLP of 4 × width, in training mode (the eval path "
        "ignores the hint and forms all T × T scores)",
    )
    return [
        titans,
        replace(
            titans, name=f"{TITANS}, batch_size=None", build=lambda s: _neural_memory(s, None),
            decode=(), memory=False,
            note="all gradients at the first weights: another, weaker model",
        ),
        encoder,
        replace(encoder, name=f"{ENCODER}, mask only", build=lambda s: _Encoder(s, hint=False),
                memory=False, note="the same without the is_causal hint"),
        Contestant("attention sublayer", _Sublayer, _stateless, ours=False,
                   note="scaled_dot_product_attention between its two projections"),
        Contestant(
            NESTED, _nested_learning, _update_pass, ours=False, kinds=(FORWARD,), batch=1,
            longest=256, package="nested-learning", module="nested_learning",
            note="forward_with_updates, its updating pass; one head, no gradient",
        ),
    ]  # fmt: skip


def _neural_memory(shape: Shape, batch_size: int | None) -> nn.Module:
    from titans_pytorch import NeuralMemory

    return NeuralMemory(
        dim=shape.width, heads=shape.heads, dim_head=shape.width // shape.heads,
        chunk_size=shape.chunk, batch_size=batch_size,
    )  # fmt: skip


def _nested_learning(shape: Shape) -> nn.Module:
    from nested_learning.titan.self_modifying import (
        SelfModifyingTitans as Theirs,
    )
    from nested_learning.titan.self_modifying import SelfModifyingTitansConfig

    chunk = shape.chunk
    return Theirs(
        SelfModifyingTitansConfig(shape.width, chunk_size_other=chunk, chunk_size_memory=chunk)
    )


def _update_pass(layer: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """It writes into the state that it is given: each pass needs a fresh one."""
    return layer.forward_with_updates(x, layer.init_fast_state() if state is None else state)


@lru_cache
def causal_mask(length: int) -> Tensor:
    """[T, T] float: what the encoder layer wants even where the hint makes it unread."""
    return nn.Transformer.generate_square_subsequent_mask(length)


class _Encoder(nn.Module):
    def __init__(self, shape: Shape, hint: bool):
        super().__init__()
        self.hint = hint
        self.layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, dropout=0.0, batch_first=True,
            norm_first=True,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, causal_mask(x.shape[1]), is_causal=self.hint)


class _Sublayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------- who takes part


def present(
    entrants: Iterable[Contestant], *, compiled: bool = True
) -> tuple[list[Contestant], list[str]]:
    """Those that can run here, and for each of the others a line with the reason and remedy."""
    here, lines = [], []
    for c in entrants:
        if c.package and find_spec(c.module) is None:
            lines.append(f"{c.name} skipped: pip install {c.package}")
        elif c.compiled and compiled and not can_compile():
            lines.append(f"{c.name} skipped: layers of this version do not compile one chunk")
        elif compiled or not c.compiled:
            here.append(c)
    return here, lines
