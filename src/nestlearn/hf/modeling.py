"""`HopeLM` as a model of Hugging Face's transformers: its body, its causal LM.

Nothing is computed here that `nestlearn.models` does not compute; this is the shape that
`from_pretrained`, `generate`, `Trainer` and the libraries around them expect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .. import models
from .cache import CACHE, HopeCache
from .config import HopeConfig
from .packing import packed
from .pretrained import HopePreTrainedModel


class HopeModel(HopePreTrainedModel):
    """A Hope without its head: what its `HopeForCausalLM` reads a text to be, [B, T, dim].

    `HopeForCausalLM.base_model` is one that shares its parameters.
    """

    _keys_to_ignore_on_load_unexpected = [r"head\."]  # noqa: RUF012

    def __init__(self, config: HopeConfig, model: models.HopeLM | None = None):
        super().__init__(config)
        if model is None:
            model = models.HopeLM(config.to_hope())
            model.head = nn.Identity()
        self._hold(model)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Tensor | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """As `HopeForCausalLM.forward`: last_hidden_state [B, T, dim] in place of logits."""
        position_ids = packed(position_ids, more)
        _refuse(self.config, token_type_ids, output_attentions, cache_position)
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = cache is not None or self.config.use_cache
        layers = _or(output_hidden_states, self.config.output_hidden_states)
        done = self._read(
            input_ids, inputs_embeds, attention_mask, cache, use_cache, layers, position_ids
        )
        said: dict[str, Any] = {CACHE: done.cache} if use_cache else {}
        said |= {"hidden_states": done.layers} if layers else {}
        output = BaseModelOutputWithPast(last_hidden_state=done.layers[-1], **said)
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """`nestlearn.HopeLM` (the attribute `model`) as transformers takes it; its state is the cache.

    `generate` takes batches with left padding: no memory is written by padding, and each row gives
    the tokens that it gives alone. Rows of different lengths run one length after the other, at
    every step, so group prompts of like lengths where speed counts.

    Gradient checkpointing is `remat`: chunks are computed again in the backward pass. `compile()`
    compiles the memories' layers. Loading needs `import nestlearn.hf`, or trust_remote_code=True,
    which imports it.
    """

    accepts_loss_kwargs = True  # `num_items_in_batch`, for gradients accumulated over batches

    def __init__(self, config: HopeConfig, model: models.HopeLM | None = None):
        super().__init__(config)
        self._hold(models.HopeLM(config.to_hope()) if model is None else model)
        self.post_init()

    @classmethod
    def from_hope(cls, model: models.HopeLM, **options: Any) -> HopeForCausalLM:
        """Around that model, whose parameters it shares; options: of `HopeConfig`."""
        return cls(HopeConfig.from_hope(model.config, **options), model)

    @property
    def base_model(self) -> nn.Module:
        """The `HopeModel` of the same parameters; no part of this one, which has them already."""
        body = self.__dict__.get("_body")
        if body is None or body.model is not self.model:
            body = self.__dict__["_body"] = HopeModel(self.config, self.model)  # type: ignore[arg-type]
        body.training = self.training
        return body

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What `forward` takes of what transformers prepares."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        taken = (
            "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", CACHE,
            "use_cache", "logits_to_keep", "output_hidden_states", "output_attentions",
        )  # fmt: skip
        return {name: inputs[name] for name in taken if name in inputs}

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        cache: HopeCache | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None, num_items_in_batch: Tensor | int | None = None,
        past_key_values: HopeCache | None = None, inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None, token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        cache_position: Tensor | None = None, **more: Any,
    ) -> CausalLMOutputWithPast | tuple:  # fmt: skip
        """Read input_ids [B, T] after what the cache has read: logits [B, T, vocab_size].

        attention_mask [B, ≥ T]: 0 where a token is padding, on any side; its last T columns are of
        these tokens. Logits at padding mean nothing. cache: goes on from there, and is
        brought up to date unless use_cache is False. use_cache: return the cache (None: if one was
        given, else the configuration's use_cache, but not with labels). labels [B, T]: the tokens
        themselves, −100 where none is to be predicted; padding, the token after it and the first of
        a text never count. shift_labels [B, T]: in their place, what each token is to predict.
        logits_to_keep: the last so many (0: all), or an index [K] of tokens.
        num_items_in_batch: what the summed loss is divided by (None: the number of labels).
        past_key_values: the cache, by its name before transformers 5.24.
        inputs_embeds [B, T, dim]: in place of input_ids. position_ids [B or 1, T]: where they begin
        anew at 0 inside a row, another text begins, with a new memory (packing); a state knows its
        position itself (cu_seq_lens_q or seq_idx say the same).
        token_type_ids: zeros, there are no types. output_hidden_states: the
        stream before each block, and what the head reads.

        Raises ValueError for a mask, cache, positions or labels of another shape, for ids outside
        the vocabulary, and for what a Hope has not (attention maps, types of tokens).
        """
        _refuse(self.config, token_type_ids, output_attentions, cache_position)
        cache = past_key_values if cache is None else cache
        # not among the parameters: `Trainer` takes each one named like labels for a column it needs
        shift_labels = more.pop("shift_labels", None)
        position_ids = packed(position_ids, more)
        learns = labels is not None or shift_labels is not None
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not learns)
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            _check_labels(name, given, shape)
        layers = _or(output_hidden_states, self.config.output_hidden_states)
        done = self._read(
            input_ids, inputs_embeds, attention_mask, cache, use_cache, layers, position_ids
        )
        logits, loss = self.model.head(done.layers[-1]), None
        if learns:
            labels, shift_labels = (None if x is None else x.long() for x in (labels, shift_labels))
            if labels is not None and done.ignored is not None:
                labels = labels.masked_fill(done.ignored, -100)
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch, shift_labels=shift_labels,
            )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        said: dict[str, Any] = {CACHE: done.cache} if use_cache else {}
        said |= {"hidden_states": done.layers} if layers else {}
        output = CausalLMOutputWithPast(loss=loss, logits=logits[:, keep], **said)
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()


def _or(given: bool | None, otherwise: bool | None) -> bool:
    return bool(otherwise if given is None else given)


def _refuse(
    config: PreTrainedConfig, types: Tensor | None, attentions: bool | None, places: Tensor | None
) -> None:
    """ValueError for what a Hope has not, rather than None in silence."""
    if _or(attentions, config.output_attentions):
        raise ValueError("output_attentions=True: a memory has no attention maps; leave it False")
    if types is not None and types.any():
        raise ValueError(
            f"token_type_ids holds {int(types.amax())}: a Hope has no types of tokens, so give "
            "zeros or leave it out"
        )
    if places is not None and (places.diff() != 1).any():
        raise ValueError(
            "cache_position is not of tokens one after the other: a memory is written in order, so "
            "leave it out"
        )


def _check_labels(name: str, labels: Tensor | None, shape: torch.Size) -> None:
    if labels is not None and labels.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)} for ids {tuple(shape)}: give one for each "
            "token" + (", the shift by one is done here" if name == "labels" else "")
        )


AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
