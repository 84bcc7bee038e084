"""What defines a Hope, and where a folder keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..layers import Level

FORMAT = "nestlearn-hope-1"
TYPE = "nestlearn-hope"  # by which transformers knows it
WEIGHTS = "model.safetensors"
MIXERS = ("hope", "attention", "titans", "deltanet", "linear")
SIZES = {  # dim, layers, heads
    "tiny": (128, 3, 4),
    "small": (256, 6, 4),
    "medium": (512, 12, 8),
    "large": (768, 12, 12),
}


@dataclass(frozen=True)
class HopeConfig:
    """All that defines a model; `HopeConfig.size("tiny")` derives it from one dial.

    mixer: "hope" (self-modifying Titans), "attention", "titans", "deltanet" or "linear".
    channel: "cms" or "mlp" (SwiGLU). mlp_hidden: width of the SwiGLU. levels: of the CMS, fast to
    slow. conv: taps of the short convolution (0: none). rotary: positions of the attention (False:
    none). The other fields are the options of the same name of `nestlearn.SelfModifyingTitans` and
    `nestlearn.ContinuumMemory`.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 3
    heads: int = 4
    mixer: str = "hope"
    channel: str = "cms"
    chunk: int = 64
    projection_chunk: int | None = None
    hidden: int | None = None
    depth: int = 1
    dgd: float = True
    weight_decay: bool = True
    objective: str = "dot"
    momentum: bool = False
    eta_max: float = 1.0
    read: str = "token"
    bound: tuple[float, float] | None = (0.25, 1.0)
    half_life: int | None = 2048
    adapt: tuple[str, ...] = ("k", "v", "eta", "alpha")
    conv: int = 4
    rotary: bool = True
    levels: tuple[Level, ...] = (Level(chunk=4), Level(chunk=16), Level())
    variant: str = "independent"
    meta_gradient: str = "full"
    mlp_hidden: int | None = None
    truncate: int | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer!r}: use one of {MIXERS}")
        if self.mlp_hidden is not None and self.mlp_hidden < 1:
            raise ValueError(f"mlp_hidden={self.mlp_hidden}: give a width of 1 or more")
        if self.channel not in ("cms", "mlp"):
            raise ValueError(f"channel={self.channel!r}: use 'cms' or 'mlp'")
        for name in ("vocab_size", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")

    @classmethod
    def size(cls, name: str, **changes: Any) -> HopeConfig:
        """The configuration of that size ("tiny", "small", "medium", "large"), with changes."""
        if name not in SIZES:
            raise ValueError(f"size {name!r} is unknown: use one of {sorted(SIZES)}")
        dim, layers, heads = SIZES[name]
        return cls(**{"dim": dim, "layers": layers, "heads": heads, **changes})

    def with_half_life(self, tokens: int | None) -> HopeConfig:
        """The same model with memories and levels that fade to their start by half in so long."""
        levels = tuple(replace(level, half_life=tokens) for level in self.levels)
        return replace(self, half_life=tokens, levels=levels)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HopeConfig:
        """The inverse of `to_dict`; ValueError names a field that this version does not know."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} in the model's configuration")
        data = {"half_life": None, **data}  # before there was a default, nothing faded
        if "levels" in data:
            # before there was a choice, both matrices of a level learned
            data["levels"] = tuple(Level(**{"learns": "all", **_tuples(x)}) for x in data["levels"])
        return cls(**_tuples(data))


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that a configuration holds."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def saved_config(data: dict[str, Any]) -> HopeConfig:
    """Of the data of a config.json, that of `HopeLM` or that of transformers' model."""
    kind = data.get("format", FORMAT if data.get("model_type") == TYPE else None)
    if kind != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if "format" in data:
        own = {name: value for name, value in data.items() if name not in ("format", "model_type")}
    else:
        own = {f.name: data[f.name] for f in fields(HopeConfig) if f.name in data}
    return HopeConfig.from_dict(own)


def weight_files(folder: Path) -> list[Path]:
    """The one file of the weights, or the several of a large model."""
    for name in ("config.json", WEIGHTS):
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / part for part in sorted({*parts})]
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: give a folder that save_pretrained wrote"
            )
    return [folder / WEIGHTS]
