"""What a Hope with and one without a head share as models of transformers: files, start values,
reading a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import models
from ..layers.streaming import Stepping
from ..names import model_folder
from .cache import HopeCache, Rows, read
from .config import HopeConfig
from .packing import beginnings, needed, read_packed, real_tokens


class Read(NamedTuple):
    """layers: what the head reads, last, after the stream before each block where it was asked for.
    cache: brought up to date; None where none is returned. ignored [B, T]: tokens that no token of
    their text comes before, and padding (None: the first column alone, which a shift leaves out).
    """

    layers: tuple[Tensor, ...]
    cache: HopeCache | None
    ignored: Tensor | None


class HopePreTrainedModel(PreTrainedModel):
    """What `HopeModel` and `HopeForCausalLM` share: their attribute `model` is a `HopeLM`."""

    config_class = HopeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be cut back: no assisted generation
    model: models.HopeLM

    def _hold(self, model: models.HopeLM) -> None:
        """Take it as it is: what has its values is not to be drawn again."""
        self.model = model
        for part in model.modules():
            if not any(p.is_meta for p in part.parameters(recurse=False)):
                part._is_hf_initialized = True  # type: ignore[assignment]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """As in transformers, and of a folder that `HopeLM.save_pretrained` wrote, or by the name
        "nestlearn/tiny" (FileNotFoundError for another of that kind); ValueError where the file
        lacks weights (they would be random).
        """
        name = pretrained_model_name_or_path
        source = str(model_folder(name)) if str(name).startswith("nestlearn/") else name
        loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **options)
        model, info = loaded
        lacking = sorted(info["missing_keys"])
        if lacking:
            raise ValueError(
                f"the checkpoint lacks {len(lacking)} weights, first {lacking[0]!r}: give one that "
                f"{cls.__name__}.save_pretrained wrote under this configuration"
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(  # type: ignore[override]
        model: PreTrainedModel, state_dict: dict | None, files: list[str] | None, *args: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        """As in transformers; of older files, in which some parameters had no axis, too."""
        for name in _axisless(files or []):
            path, _, own = name.rpartition(".")
            part = next(
                (m for m in (path, f"model.{path}") if m in dict(model.named_modules())), None
            )
            if part is not None:
                old = getattr(model.get_submodule(part), own)
                setattr(model.get_submodule(part), own, nn.Parameter(old.detach().new_empty(())))
        done = PreTrainedModel._load_pretrained_model(model, state_dict, files, *args, **options)
        for parameter in model.parameters():
            if parameter.ndim == 0:
                parameter.data = parameter.data.reshape(1)
        return done

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """As in transformers; a head that was tied to the embedding is written as it is."""
        weights = self.state_dict() if state_dict is None else state_dict
        if self.model.tied and "model.head.weight" in weights:
            state_dict = {**weights, "model.head.weight": weights["model.head.weight"].clone()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The module's own start values, but for parameters that a file has given."""
        given = [
            (p, p.clone())
            for p in module.parameters(recurse=False)
            if getattr(p, "_is_hf_initialized", False)
        ]
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        for parameter, value in given:
            parameter.copy_(value)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: the code of a saved Hope is not copied, it is in nestlearn."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """As in transformers; the model then takes ids below the new size."""
        embeddings = super().resize_token_embeddings(*args, **options)
        self.model.config = self.config.to_hope()
        return embeddings

    def compile(self, **options: Any) -> None:
        """Compile the memories' layers, in place: see `nestlearn.HopeLM.compile`."""
        self.model.compile(**options)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether chunks are computed again in the backward pass; transformers sets it.

        Raises ValueError when set for a model without memories, which has no chunks.
        """
        return any(part.remat for part in self.modules() if isinstance(part, Stepping))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        parts = [part for part in self.modules() if isinstance(part, Stepping)]
        if enable and not parts:
            raise ValueError(
                "gradient checkpointing recomputes the chunks of memories, and a model of "
                f"{self.config.mixer['kind']} and {self.config.channel['kind']} has none: leave it "
                "off"
            )
        for part in parts:
            part.remat = enable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` makes no cache, the first call returns one."""
        return False

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        cache: Any,
        use_cache: bool,
        layers: bool,
        positions: Tensor | None,
    ) -> Read:
        """Read the tokens after what the cache has read, and bring it up to date if it is used."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        x: Any = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        real = None if attention_mask is None else real_tokens(attention_mask, (batch, length))
        begins = None if positions is None else beginnings(positions, (batch, length), real)
        cache = HopeCache() if cache is None else cache
        groups, output = _groups(cache, batch), "layers" if layers else "hidden"
        if begins is None:
            said, groups = read(self.model, x, groups, needed(real, use_cache), output)
        else:
            said, groups = read_packed(self.model, x, groups, real, begins, use_cache, output)
        if use_cache:
            cache.groups, cache.columns = groups, cache.columns + length
        ignored = None
        if real is not None:
            ignored = ~(real & F.pad(real[:, :-1], (1, 0), value=True))
        if begins is not None:
            ignored = begins if ignored is None else ignored | begins
        return Read(said, cache if use_cache else None, ignored)


def _axisless(files: list[str]) -> list[str]:
    """The names of tensors without an axis."""
    names = []
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as tensors:
                found = [name for name in tensors.keys() if not tensors.get_slice(name).get_shape()]  # noqa: SIM118
            names += found
    return names


def _groups(cache: HopeCache, batch: int) -> list[Rows]:
    if not isinstance(cache, HopeCache):
        raise ValueError(f"the cache is a {type(cache).__name__}: give a nestlearn.hf.HopeCache")
    if not cache.groups:
        return [Rows(list(range(batch)), None)]
    if cache.batch_size != batch:
        raise ValueError(
            f"the cache has {cache.batch_size} rows for {batch} samples: choose them with "
            "its select([...])"
        )
    return cache.groups
