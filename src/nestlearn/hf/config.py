"""A Hope's configuration as transformers', and the file that loads a saved folder anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .. import models
from ..disk import atomic_write
from ..models.config import FLAT, nested
from ..options import names
from .cache import CACHE

_FIELDS = names(models.HopeConfig)
# What transformers itself passes or writes beside the attributes of its base class, and HopeLM.
_ELSE = {
    "attn_implementation", "auto_map", "experts_implementation", "format", "model_type",
    "name_or_path", "num_labels", "quantization_config", "torch_dtype",
}  # fmt: skip
LOADER = "loads_by_nestlearn.py"
_LOADER_TEXT = '''"""Loads this folder's model by the library that wrote it."""

try:
    from nestlearn.hf import HopeConfig, HopeForCausalLM, HopeModel
except ImportError as error:
    raise ImportError(
        f'this model is a Hope, which nestlearn runs: pip install "nestlearn[hf]" ({error})'
    ) from error

__all__ = ["HopeConfig", "HopeForCausalLM", "HopeModel"]
'''
_AUTO_MAP = {
    auto: f"{LOADER.removesuffix('.py')}.{name}"
    for auto, name in (
        ("AutoConfig", "HopeConfig"),
        ("AutoModel", "HopeModel"),
        ("AutoModelForCausalLM", "HopeForCausalLM"),
    )
}


class HopeConfig(PretrainedConfig):
    """The fields of `nestlearn.HopeConfig`, by the same names, as transformers' configuration.

    mixer, channel: options of `nestlearn.options`, words for their defaults, or the JSON that they
    are kept as here; a field of theirs may be said of the whole, as in `nestlearn.HopeConfig`.
    hidden_size, num_hidden_layers and num_attention_heads read `dim`, `layers` and `heads`.
    use_cache: whether a call returns its state. The ids of special tokens go to `generate`.

    Raises ValueError for a field that neither library knows, and for a value that
    `nestlearn.HopeConfig` refuses.
    """

    model_type = "nestlearn-hope"
    attribute_map = {  # noqa: RUF012 (an annotation would make it a field)
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012

    def __init__(
        self,
        *,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ):
        own = {name: options.pop(name) for name in (*_FIELDS, *FLAT) if name in options}
        known = {*PretrainedConfig().to_dict(), *_ELSE}
        unknown = sorted(name for name in options if name not in known and name[0] != "_")
        if unknown:
            raise ValueError(
                f"unknown fields {unknown} in the configuration of a Hope: its own are "
                f"{sorted(_FIELDS)}"
            )
        if tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True: a Hope's embedding and head are two matrices, so leave "
                "it False"
            )
        for name, value in models.HopeConfig(**own).to_dict().items():
            setattr(self, name, value)
        options.pop("format", None)  # of a folder that `nestlearn.HopeLM` wrote
        self.use_cache, self.tie_word_embeddings = use_cache, False
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(**options)

    def __init_subclass__(cls, *args: Any, **options: Any) -> None:
        # transformers makes a dataclass of each subclass, whose constructor knows no fields of ours
        own = cls.__dict__.get("__init__")
        super().__init_subclass__(*args, **options)
        if own is None:
            del cls.__init__

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """As in transformers; also of a file from before there were options."""
        if ({"mixer", "channel", "format"} | FLAT) & config_dict.keys():  # not one just made
            config_dict = nested(config_dict)
        return super().from_dict(config_dict, **options)

    @classmethod
    def from_hope(cls, config: models.HopeConfig, **options: Any) -> HopeConfig:
        """That configuration in transformers' form; options: e.g. pad_token_id."""
        return cls(**config.to_dict(), **options)

    def to_hope(self) -> models.HopeConfig:
        """The configuration that `nestlearn.HopeLM` takes; ValueError for a field set wrongly."""
        return models.HopeConfig(**{n: getattr(self, n) for n in _FIELDS})

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As in transformers; beside it the file by which `trust_remote_code=True` loads the folder
        in a process that has not imported nestlearn.
        """
        if type(self) is HopeConfig:  # a subclass is known to its own module only
            self.auto_map = dict(_AUTO_MAP)  # loading from the hub puts the repository's name here
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            atomic_write(
                Path(save_directory) / LOADER,
                lambda path: path.write_text(_LOADER_TEXT, encoding="utf-8"),
            )
        super().save_pretrained(save_directory, *args, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: the code of a saved Hope is not copied, it is in nestlearn."""
