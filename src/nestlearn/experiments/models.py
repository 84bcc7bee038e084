"""The models of every table, by name, in one skeleton and with as many parameters as Hope.

A block is x + mixer(norm(x)), then a channel mixer; the channel mixer's width brings each model to
the parameters of the plain "hope" of the same skeleton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.layers import Level
from nestlearn.layers.mixers import StaticProjections
from nestlearn.memory import Matrix, delta
from nestlearn.models.hope import HopeConfig, HopeLM, SwiGLU
from nestlearn.scan import Writer


@dataclass(frozen=True)
class Contender:
    """title: in tables. changes: of Hope's configuration. paper: its row in the paper's tables.

    mixer: makes, for the block of that index, a mixer that the configuration has no name for.
    """

    title: str
    changes: Mapping[str, Any]
    paper: str | None = None
    mixer: Callable[[HopeConfig, int], nn.Module] | None = None


def plain_deltanet(config: HopeConfig, _block: int) -> nn.Module:
    """DeltaNet without a retention gate (Yang et al., 2024): W ← W (I − η k kᵀ) + η v kᵀ.

    Its eigenvalues lie in [1 − eta_max, 1]. Those of the library's gated DeltaNet, W (α I − η k kᵀ)
    as in eq. 88, lie in (α − eta_max, α) and so reach −1 already with steps up to 1: other than in
    α (I − η k kᵀ) a small α makes them negative, and then parity is easy.
    """
    width = config.dim // config.heads
    writer = Writer(Matrix(width, width), delta(), config.chunk)
    return StaticProjections(
        config.dim, config.heads, writer, eta_max=config.eta_max, conv=config.conv,
        truncate=config.truncate, remat=config.remat,
    )  # fmt: skip


_MLP = {"channel": "mlp"}
_DELTA = {"mixer": "deltanet", **_MLP}
_SLOW = {"levels": (Level(chunk=32), Level(chunk=64), Level()), "variant": "sequential"}
_DOT = {
    "levels": tuple(Level(chunk=chunk, objective="dot") for chunk in (4, 16, None)),
    "variant": "independent",
}

CONTENDERS: dict[str, Contender] = {
    "hope": Contender("Hope", {}, "Hope"),
    "hope-attention": Contender("Hope-Attention", {"mixer": "attention"}),
    "titans": Contender("Titans", {"mixer": "titans", **_MLP}, "Titans"),
    "deltanet": Contender("DeltaNet", {**_DELTA, "eta_max": 1.0}, "DeltaNet", plain_deltanet),
    "deltanet-negative": Contender(
        "DeltaNet, steps up to 2", {**_DELTA, "eta_max": 2.0}, mixer=plain_deltanet
    ),
    "deltanet-gated": Contender("DeltaNet, gated", {**_DELTA, "eta_max": 1.0}),
    "linear": Contender("Linear attention", {"mixer": "linear", **_MLP, "eta_max": 1.0}, "Linear"),
    "transformer": Contender("Transformer", {"mixer": "attention", **_MLP}, "Transformer"),
    "transformer-plain": Contender(
        "Transformer, no convolution", {"mixer": "attention", **_MLP, "conv": 0}, "Transformer"
    ),
    "lstm": Contender("LSTM", {"mixer": "lstm", **_MLP}, "LSTM"),
    "hope-deep": Contender("Hope, memories with a hidden layer", {"depth": 2}, "Hope"),
    "hope-mlp": Contender("Hope, static MLP", _MLP),
    "hope-l2": Contender("Hope, L2", {"objective": "l2"}),
    "hope-slow": Contender("Hope, a chain of levels 32 and 64", _SLOW),
    "hope-attention-slow": Contender(
        "Hope-Attention, the same chain", {"mixer": "attention", **_SLOW}
    ),
    "hope-dot": Contender("Hope, levels 4 and 16 by dot product", _DOT),
    "hope-attention-dot": Contender(
        "Hope-Attention, the same by dot product", {"mixer": "attention", **_DOT}
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
    f"hope-{name}": Contender(f"Hope, {title}", change)
    for name, (title, change) in ABLATIONS.items()
}

RIVALS = (  # whom every table of sequence models has beside Hope
    "hope-attention",
    "titans",
    "deltanet",
    "deltanet-negative",
    "linear",
    "transformer",
    "lstm",
)


def contender(name: str) -> Contender:
    """The contender of that name; ValueError lists them."""
    if name not in CONTENDERS:
        raise ValueError(f"model {name!r} is unknown: use one of {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


def build(name: str, vocab_size: int, skeleton: Mapping[str, Any], *, match: bool = True) -> Any:
    """A fresh model of that name: ids [B, T] -> (logits [B, T, vocab_size], state).

    skeleton: fields of `HopeConfig`, as plain JSON (levels as a list of dicts, see
    `nestlearn.Level`); what it does not say is the default of today. The contender's own changes
    come on top. match: give it, by the width of its channel mixer, the parameters of "hope" in that
    skeleton. ValueError for an unknown name or field.
    """
    changes = dict(contender(name).changes)
    today = asdict(HopeConfig(vocab_size))  # from_dict gives what is not said the past's defaults
    base = HopeConfig.from_dict({**today, **skeleton})
    if changes.get("mixer") == "lstm":
        return _lstm(base, parameter_count(base) if match else None)
    config = replace(base, **changes)
    if match and config != base:
        config = with_parameters(config, parameter_count(base))
    model = HopeLM(config)
    if (mixer := contender(name).mixer) is not None:
        for i, block in enumerate(model.blocks):
            block.mixer = mixer(config, i)
    return model


def parameter_count(config: HopeConfig) -> int:
    """The trained values of a model of that configuration."""
    with torch.device("meta"):
        return HopeLM(config).parameter_count()


def with_parameters(config: HopeConfig, target: int) -> HopeConfig:
    """The configuration with the channel mixer's width that brings it nearest to `target`."""

    def at(width: int) -> HopeConfig:
        if config.channel == "mlp":
            return replace(config, mlp_hidden=width)
        levels = tuple(replace(level, hidden=width) for level in config.levels)
        return replace(config, levels=levels)

    what = f"mixer={config.mixer!r} at dim={config.dim}"
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


def _lstm(base: HopeConfig, target: int | None) -> LSTMModel:
    size = (base.vocab_size, base.dim, base.layers)
    if target is None:
        return LSTMModel(*size, 8 * base.dim // 3)

    def count(width: int) -> int:
        with torch.device("meta"):
            return LSTMModel(*size, width).parameter_count()

    return LSTMModel(*size, width_for(count, target, f"an LSTM at dim={base.dim}"))
