"""What defines a Hope, and where a folder keeps it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..layers.streaming import check_heads
from ..options import (
    Channel,
    Continuum,
    Mixer,
    SwiGLU,
    Titans,
    check,
    from_json,
    named,
    names,
    to_json,
)

FORMAT = "nestlearn-hope-1"
TYPE = "nestlearn-hope"  # by which transformers knows it
WEIGHTS = "model.safetensors"
SIZES = {  # dim, layers, heads
    "tiny": (128, 3, 4),
    "small": (256, 6, 4),
    "medium": (512, 12, 8),
    "large": (768, 12, 12),
}


@dataclass(frozen=True, init=False)
class HopeConfig:
    """All that defines a model; `HopeConfig.size("tiny")` derives it from one dial.

    mixer: options of `nestlearn.options`: `Titans`, `Attention`, `StaticTitans`, `DeltaNet` or
    `Linear`; or for their defaults a word, "hope", "attention", "titans" (static ones), "deltanet"
    or "linear". channel: `Continuum` or `SwiGLU`; or "cms" or "mlp". A field of theirs may be said
    here as well: `HopeConfig(chunk=32, levels=(...))`; one that neither has changes nothing, with a
    warning. truncate: the outer gradient through the memories stops at multiples of so many tokens
    (None: nowhere). remat: memories compute each chunk again in the backward pass.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 3
    heads: int = 4
    mixer: Mixer = Titans()
    channel: Channel = Continuum()
    truncate: int | None = None
    remat: bool = False

    def __init__(
        self, vocab_size: int = 256, dim: int = 128, layers: int = 3, heads: int = 4,
        mixer: Mixer | str = Titans(), channel: Channel | str = Continuum(),
        truncate: int | None = None, remat: bool = False, **parts: Any,
    ):  # fmt: skip
        mixer, channel = _with(named("mixer", mixer), named("channel", channel), parts)
        given = (vocab_size, dim, layers, heads, mixer, channel, truncate, remat)
        for field, value in zip(fields(self), given):
            object.__setattr__(self, field.name, value)
        check(self)
        check_heads(dim, heads)

    @classmethod
    def size(cls, name: str, **changes: Any) -> HopeConfig:
        """The configuration of that size ("tiny", "small", "medium", "large"), with changes."""
        if name not in SIZES:
            raise ValueError(f"size {name!r} is unknown: use one of {sorted(SIZES)}")
        dim, layers, heads = SIZES[name]
        return cls(**{"dim": dim, "layers": layers, "heads": heads, **changes})

    def with_half_life(self, tokens: int | None) -> HopeConfig:
        """The same model with memories and levels that fade to their start by half in so long.

        ValueError for a model in which nothing fades towards a start.
        """
        mixer, channel = self.mixer, self.channel
        if not isinstance(mixer, Titans) and not isinstance(channel, Continuum):
            raise ValueError(
                f"half_life={tokens}: {type(mixer).__name__} and {type(channel).__name__} have "
                "none, leave it out"
            )
        if isinstance(mixer, Titans):
            mixer = replace(mixer, half_life=tokens)
        if isinstance(channel, Continuum):
            levels = tuple(replace(level, half_life=tokens) for level in channel.levels)
            channel = replace(channel, levels=levels)
        return replace(self, mixer=mixer, channel=channel)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data; mixer and channel with their kind."""
        return {**vars(self), "mixer": to_json(self.mixer), "channel": to_json(self.channel)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HopeConfig:
        """The inverse of `to_dict`; ValueError names a field that this version does not know.

        Data in which neither mixer nor channel has fields is from before they had: see `nested`.
        """
        data = nested(data)
        unknown = set(data) - names(cls)
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} in the model's configuration")
        return cls(**data)


def _with(mixer: Any, channel: Any, parts: dict[str, Any]) -> tuple[Mixer, Channel]:
    """The two with those of their fields changed; what neither has is said, not dropped.

    `mlp_hidden`, from before there were options, is `SwiGLU.hidden`. All change at once, as one
    alone may not fit what the others replace.
    """
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for name, value in parts.items():
        if name not in FLAT:
            raise TypeError(f"HopeConfig has no {name!r}, nor has {mixer} or {channel}")
        if name == "mlp_hidden" and isinstance(channel, SwiGLU):
            theirs["hidden"] = value
        elif name in names(type(mixer)):
            ours[name] = value
        elif name in names(type(channel)):
            theirs[name] = value
        else:
            kinds = f"{type(mixer).__name__} and {type(channel).__name__}"
            warnings.warn(f"{name}={value!r} changes nothing: {kinds} have none", stacklevel=4)
    return replace(mixer, **ours), from_json(type(channel), {**vars(channel), **theirs})


FLAT = {  # the fields that there were beside those of today before there were options
    "chunk", "projection_chunk", "hidden", "depth", "dgd", "weight_decay", "objective", "momentum",
    "eta_max", "read", "bound", "half_life", "adapt", "conv", "rotary", "levels", "variant",
    "meta_gradient", "mlp_hidden",
}  # fmt: skip


def nested(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before there were options, all of it fields of one class, as it is now;
    one from since then as it is.

    What did not apply to its mixer or channel is left out, as the model did with it. What is not
    said had another meaning than now: nothing faded, and both matrices of a level learned.
    ValueError for an unknown mixer or channel.
    """
    if any(isinstance(data.get(name), dict) for name in ("mixer", "channel")):
        return data
    said = {"half_life": None, **data}
    if "levels" in data:
        said["levels"] = [{"learns": "all", "half_life": None, **level} for level in data["levels"]]
    mixer = type(named("mixer", data.get("mixer", "hope")))
    channel = type(named("channel", data.get("channel", "cms")))

    def own(kind: type, said: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind.__name__, **{n: v for n, v in said.items() if n in names(kind)}}

    rest = {n: v for n, v in data.items() if n not in FLAT}
    width = {"hidden": data.get("mlp_hidden")}
    return {**rest, "mixer": own(mixer, said), "channel": own(channel, said | width)}


class NoHope(ValueError):
    """The model is whole, and of another kind."""


def saved_config(data: dict[str, Any]) -> HopeConfig:
    """Of the data of a config.json, that of `HopeLM` or that of transformers' model."""
    kind = data.get("format", FORMAT if data.get("model_type") == TYPE else None)
    if kind is None and "model_type" in data:
        raise NoHope(
            f"a {data['model_type']} model, no Hope: `nestlearn stack` makes one of it that goes "
            "on learning"
        )
    if kind != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if "format" in data:
        own = {name: value for name, value in data.items() if name not in ("format", "model_type")}
    else:
        own = {name: data[name] for name in names(HopeConfig) | FLAT if name in data}
    return HopeConfig.from_dict(own)


def model_type(folder: Path) -> str | None:
    """The model_type of a folder's config.json; None where there is none that can be read."""
    try:
        data = json.loads((folder / "config.json").read_bytes())
        return str(data.get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return None


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
