"""`HopeLM` as a model of Hugging Face's transformers: its configuration, its causal LM.

Nothing is computed here that `nestlearn.models` does not compute; this is the shape that
`from_pretrained`, `generate` and `Trainer` expect.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import models
from ..layers.cms import Level
from ..layers.mixers import Stepping
from .cache import CACHE, HopeCache, Rows, read

_FIELDS = tuple(f.name for f in fields(models.HopeConfig))
# What transformers itself passes or writes beside the attributes of its base class.
_ELSE = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path",
    "num_labels", "quantization_config", "torch_dtype",
}  # fmt: skip


class HopeConfig(PretrainedConfig):
    """The fields of `nestlearn.HopeConfig`, by the same names, as transformers' configuration.

    levels: `nestlearn.Level`s, or dicts of their fields. hidden_size, num_hidden_layers and
    num_attention_heads read `dim`, `layers` and `heads`. use_cache: whether a call returns its
    state. The ids of special tokens go to `generate`.

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
        own = {name: options.pop(name) for name in _FIELDS if name in options}
        known = {*PretrainedConfig().to_dict(), *_ELSE}
        unknown = sorted(name for name in options if name not in known and name[0] != "_")
        if unknown:
            raise ValueError(
                f"unknown fields {unknown} in the configuration of a Hope: its own are {_FIELDS}"
            )
        if tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True: a Hope's embedding and head are two matrices, so leave "
                "it False"
            )
        if "levels" in own:
            own["levels"] = [asdict(v) if isinstance(v, Level) else v for v in own["levels"]]
        own.setdefault(
            "half_life", models.HopeConfig.half_life
        )  # absent in old files of HopeLM only
        # Through JSON, so that a configuration equals itself after a file.
        for name, value in _plain(models.HopeConfig.from_dict(_plain(own)).to_dict()).items():
            setattr(self, name, value)
        self.use_cache, self.tie_word_embeddings = use_cache, False
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(**options)

    @classmethod
    def from_hope(cls, config: models.HopeConfig, **options: Any) -> HopeConfig:
        """That configuration in transformers' form; options: e.g. pad_token_id."""
        return cls(**config.to_dict(), **options)

    def to_hope(self) -> models.HopeConfig:
        """The configuration that `nestlearn.HopeLM` takes; ValueError for a field set wrongly."""
        return models.HopeConfig.from_dict(_plain({n: getattr(self, n) for n in _FIELDS}))


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(data))


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """`nestlearn.HopeLM` (the attribute `model`) as transformers takes it; its state is the cache.

    `generate` takes batches with left padding: no memory is written by padding, and each row gives
    the tokens that it gives alone. Rows of different lengths run one length after the other, at
    every step, so group prompts of like lengths where speed counts.

    Gradient checkpointing is `remat`: chunks are computed again in the backward pass. `compile()`
    compiles the memories' layers. Loading needs `import nestlearn.hf`, no code from the hub.
    """

    config_class = HopeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `num_items_in_batch`, for gradients accumulated over batches
    _no_split_modules = ["HopeBlock"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be cut back: no assisted generation

    def __init__(self, config: HopeConfig, model: models.HopeLM | None = None):
        super().__init__(config)
        self.model = models.HopeLM(config.to_hope()) if model is None else model
        self.post_init()

    @classmethod
    def from_hope(cls, model: models.HopeLM, **options: Any) -> HopeForCausalLM:
        """Around that model, whose parameters it shares; options: of `HopeConfig`."""
        return cls(HopeConfig.from_hope(model.config, **options), model)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers; ValueError where the file lacks weights (they would be undefined)."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        lacking = sorted(info["missing_keys"])
        if lacking:
            raise ValueError(
                f"the checkpoint lacks {len(lacking)} weights, first {lacking[0]!r}: give one that "
                "HopeForCausalLM.save_pretrained wrote under this configuration"
            )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each layer of a Hope has set its own start values."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

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
                f"mixer={self.config.mixer!r} and channel={self.config.channel!r} has none: "
                "leave it off"
            )
        for part in parts:
            part.remat = enable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` makes no cache, the first call returns one."""
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `forward` takes of what transformers prepares (positions are in the state)."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        taken = ("input_ids", "attention_mask", CACHE, "use_cache", "logits_to_keep")
        return {name: inputs[name] for name in taken if name in inputs}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: HopeCache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Read input_ids [B, T] after what the cache has read: logits [B, T, vocab_size].

        attention_mask [B, ≥ T]: 0 where a token is padding, on any side; its last T columns are of
        these tokens. Logits at padding mean nothing. cache: goes on from there, and is
        brought up to date unless use_cache is False. use_cache: return the cache (None: if one was
        given, else the configuration's use_cache, but not with labels). labels [B, T]: the tokens
        themselves, −100 where none is to be predicted; padding and the token after it never count.
        logits_to_keep: the last so many (0: all), or an index [K] of tokens.
        num_items_in_batch: what the summed loss is divided by (None: the number of labels).
        past_key_values: the cache, by its name before transformers 5.24.

        Raises ValueError for a mask, cache or labels of another shape, and for ids outside the
        vocabulary.
        """
        real = None if attention_mask is None else _real(attention_mask, input_ids)
        if cache is None:
            cache = past_key_values
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and labels is None)
        cache = HopeCache() if cache is None else cache
        groups = self._groups(cache, input_ids)
        logits, groups = read(self.model, input_ids, groups, _needed(real, use_cache))
        if use_cache:
            cache.groups, cache.columns = groups, cache.columns + input_ids.shape[1]

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, _predicted(labels, input_ids, real), vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        said: dict[str, Any] = {CACHE: cache} if use_cache else {}
        output = CausalLMOutputWithPast(loss=loss, logits=logits[:, keep], **said)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _groups(self, cache: HopeCache, ids: Tensor) -> list[Rows]:
        if not isinstance(cache, HopeCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}: give a nestlearn.hf.HopeCache"
            )
        rows = len(ids)
        if not cache.groups:
            return [Rows(list(range(rows)), self.model.init_state(rows))]
        if cache.batch_size != rows:
            raise ValueError(
                f"the cache has {cache.batch_size} rows for {rows} samples: choose them with "
                "its select([...])"
            )
        return cache.groups


def _real(mask: Tensor, ids: Tensor) -> Tensor:
    """Which of the ids [B, T] are no padding, as bool [B, T]."""
    if mask.ndim != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} for ids {tuple(ids.shape)}: give "
            "[batch, tokens], of these tokens or of all so far"
        )
    return mask[:, mask.shape[1] - ids.shape[1] :] != 0


def _needed(real: Tensor | None, use_cache: bool) -> Tensor | None:
    """The mask, or None where the batch may be read as it is.

    A causal model's outputs do not know of padding that follows them, only its memories do: so
    training on right padding costs one pass, not one for each length.
    """
    if real is None or real.all() or not (use_cache or (real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return real


def _predicted(labels: Tensor, ids: Tensor, real: Tensor | None) -> Tensor:
    """The labels; −100 for padding, and for a token that no token of its row comes before."""
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} for ids {tuple(ids.shape)}: give one for each "
            "token, the shift by one is done here"
        )
    if real is None:
        return labels
    return labels.masked_fill(~(real & F.pad(real[:, :-1], (1, 0), value=True)), -100)


AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
