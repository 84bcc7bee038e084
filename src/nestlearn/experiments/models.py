"""The models of every table, by name, in one skeleton and with as many parameters as Hope.

A block is x + mixer(norm(x)), then a channel mixer; the channel mixer's width brings each model to
the parameters of the plain "hope" of the same skeleton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.models.hope import HopeConfig, HopeLM, SwiGLU
from nestlearn.options import (
    Attention,
    Channel,
    Continuum,
    DeltaNet,
    Level,
    Linear,
    Mixer,
    StaticTitans,
    Titans,
    from_json,
    names,
)
from nestlearn.options import SwiGLU as MLP


@dataclass(frozen=True)
class Contender:
    """title: in tables. mixer, options: its mixer, and what it changes of it beside what the
    skeleton says (None: an LSTM, which is no Hope). channel: None, Hope's continuum memory. paper:
    its row in the paper's tables.
    """

    title: str
    mixer: type[Mixer] | None = Titans
    options: Mapping[str, Any] = field(default_factory=dict)
    channel: Channel | None = None
    paper: str | None = None


# DeltaNet of Yang et al. (2024) has no retention: W ← W (I − η k kᵀ) + η v kᵀ, eigenvalues in
# [1 − eta_max, 1]. Those of gated DeltaNet as in eq. 88, W (α I − η k kᵀ), reach −1 with steps up
# to 1: other than in α (I − η k kᵀ) a small α makes them negative, and then parity is easy.
PLAIN = {"weight_decay": False}

_SLOW = Continuum((Level(chunk=32), Level(chunk=64), Level()), "sequential")
_DOT = Continuum(tuple(Level(chunk=chunk, objective="dot") for chunk in (4, 16, None)))

CONTENDERS: dict[str, Contender] = {
    "hope": Contender("Hope", paper="Hope"),
    "hope-attention": Contender("Hope-Attention", Attention),
    "titans": Contender("Titans", StaticTitans, channel=MLP(), paper="Titans"),
    "deltanet": Contender("DeltaNet", DeltaNet, {"eta_max": 1.0} | PLAIN, MLP(), "DeltaNet"),
    "deltanet-negative": Contender(
        "DeltaNet, steps up to 2", DeltaNet, {"eta_max": 2.0} | PLAIN, MLP()
    ),
    "deltanet-gated": Contender("DeltaNet, gated", DeltaNet, {"eta_max": 1.0}, MLP()),
    "linear": Contender("Linear attention", Linear, {"eta_max": 1.0}, MLP(), "Linear"),
    "transformer": Contender("Transformer", Attention, channel=MLP(), paper="Transformer"),
    "transformer-plain": Contender(
        "Transformer, no convolution", Attention, {"conv": 0}, MLP(), "Transformer"
    ),
    "lstm": Contender("LSTM", None, channel=MLP(), paper="LSTM"),
    "hope-deep": Contender(
        "Hope, memories with a hidden layer", Titans, {"depth": 2}, None, "Hope"
    ),
    "hope-mlp": Contender("Hope, static MLP", channel=MLP()),
    "hope-l2": Contender("Hope, L2", Titans, {"objective": "l2"}),
    "hope-slow": Contender("Hope, a chain of levels 32 and 64", channel=_SLOW),
    "hope-attention-slow": Contender("Hope-Attention, the same chain", Attention, channel=_SLOW),
    "hope-dot": Contender("Hope, levels 4 and 16 by dot product", channel=_DOT),
    "hope-attention-dot": Contender(
        "Hope-Attention, the same by dot product", Attention, channel=_DOT
    ),
}

ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # what Hope is made of, one change each
    "half-dgd": ("DGD in half of the heads", {"dgd": 0.5}),
    "no-dgd": ("DGD in no head", {"dgd": False}),
    "eta2": ("steps up to 2", {"eta_max": 2.0}),
    "no-decay": ("no retention gate", {"weight_decay": False}),
    "static": ("no self-modification", {"adapt": ()}),
    "boundary": ("boundary reads", {"read": "boundary"}),
    "momentum": ("momentum", {"momentum": True}),
}
CONTENDERS |= {
    f"hope-{name}": Contender(f"Hope, {title}", Titans, change)
    for name, (title, change) in ABLATIONS.items()
}

FAMILIES: dict[str, dict[str, Any]] = {  # of language models, as changes of Hope's configuration
    "Hope": {},
    "Hope-Attention": {"mixer": Attention()},
    "DeltaNet with levels": {"mixer": DeltaNet()},
    "DeltaNet": {"mixer": DeltaNet(), "channel": MLP()},
    "Titans": {"mixer": StaticTitans(), "channel": MLP()},
    "Transformer": {"mixer": Attention(), "channel": MLP()},
    "Static projections with levels": {"mixer": Titans(adapt=())},
    "Hope, static MLP": {"channel": MLP()},
}


def families(*names: str) -> dict[str, dict[str, Any]]:
    """These families; what follows in a name is how they train: "Hope, streams of 8 windows"."""
    return {name: FAMILIES.get(name) or FAMILIES[name.split(",")[0]] for name in names}


RIVALS = (  # whom every table of sequence models has beside Hope
    "hope-attention", "titans", "deltanet", "deltanet-negative", "linear", "transformer", "lstm",
)  # fmt: skip


def contender(name: str) -> Contender:
    """The contender of that name; ValueError lists them."""
    if name not in CONTENDERS:
        raise ValueError(f"model {name!r} is unknown: use one of {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


def build(name: str, vocab_size: int, skeleton: Mapping[str, Any], *, match: bool = True) -> Any:
    """A fresh model of that name: ids [B, T] -> (logits [B, T, vocab_size], state).

    skeleton: as plain JSON fields of `HopeConfig`, and options that go to every mixer and channel
    which has them: chunk, conv, rotary, levels ... What it does not say is the default of today;
    the contender's own options come on top. match: give it, by the width of its channel mixer, the
    parameters of "hope" in that skeleton; an LSTM has them always. ValueError for an unknown name
    or option.
    """
    own = contender(name)
    base = _config(CONTENDERS["hope"], vocab_size, skeleton)
    if own.mixer is None:
        return _lstm(base, parameter_count(base))
    config = _config(own, vocab_size, skeleton)
    if match and config != base:
        config = with_parameters(config, parameter_count(base))
    return HopeLM(config)


def _config(own: Contender, vocab_size: int, skeleton: Mapping[str, Any]) -> HopeConfig:
    kinds = (Titans, Attention, Continuum)  # these have all options that a skeleton may have
    sizes = {k: v for k, v in skeleton.items() if k in names(HopeConfig) - {"mixer", "channel"}}
    shared = {k: v for k, v in skeleton.items() if k not in sizes}
    if unknown := sorted(shared.keys() - set().union(*map(names, kinds))):
        raise ValueError(f"unknown fields {unknown} in the skeleton of a model")

    def made(kind: type, options: Mapping[str, Any]) -> Any:
        own = {k: v for k, v in shared.items() if k in names(kind)}
        return from_json(kind, {**own, **options})

    assert own.mixer is not None
    channel = made(Continuum, {}) if own.channel is None else own.channel
    return HopeConfig(vocab_size, **sizes, mixer=made(own.mixer, own.options), channel=channel)


@cache
def parameter_count(config: HopeConfig) -> int:
    """The trained values of a model of that configuration, whose blocks are all alike."""
    with torch.device("meta"):
        one = HopeLM(replace(config, layers=1))
    block = sum(p.numel() for p in one.blocks.parameters())
    return one.parameter_count() + (config.layers - 1) * block


def with_parameters(config: HopeConfig, target: int) -> HopeConfig:
    """The configuration with the channel mixer's width that brings it nearest to `target`."""

    def at(width: int) -> HopeConfig:
        channel = config.channel
        if isinstance(channel, MLP):
            return replace(config, channel=MLP(width))
        levels = tuple(replace(level, hidden=width) for level in channel.levels)
        return replace(config, channel=replace(channel, levels=levels))

    what = f"{type(config.mixer).__name__} at dim={config.dim}"
    return at(width_for(lambda width: parameter_count(at(width)), target, what))


def width_for(count: Callable[[int], int], target: int, what: str) -> int:
    """The multiple of 8 at which count(width), a line, is nearest to `target`."""
    one, two = count(16), count(32)
    width = 16 + round(16 * (target - one) / (two - one) / 8) * 8
    if width < 8:
        raise ValueError(
            f"{target:,} parameters are too few for {what}: the rest of the model alone has more"
        )
    return width


class LSTMBlock(nn.Module):
    """x + LSTM(norm(x)), then SwiGLU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mixer = nn.LSTM(dim, dim, batch_first=True)
        self.channel = SwiGLU(dim, hidden)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.norm(x), state)
        return self.channel(x + mixed)[0], state


class LSTMModel(nn.Module):
    """The skeleton with nn.LSTM for a mixer: ids [B, T] -> (logits [B, T, V], state)."""

    def __init__(self, vocab_size: int, dim: int, layers: int, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(LSTMBlock(dim, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x, states = self.embed(ids), []
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, after = block(x, before)
            states.append(after)
        return self.head(self.norm(x)), states

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())


def _lstm(base: HopeConfig, target: int) -> LSTMModel:
    size = (base.vocab_size, base.dim, base.layers)

    def count(width: int) -> int:
        with torch.device("meta"):
            return LSTMModel(*size, width).parameter_count()

    return LSTMModel(*size, width_for(count, target, f"an LSTM at dim={base.dim}"))
