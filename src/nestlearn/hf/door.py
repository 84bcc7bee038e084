"""What a model must show to be stacked: its MLPs, and that weights lent to them take effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .cache import CACHE
from .lending import FAMILIES, Block, Effective, Factors, adoptable, adopted, kernel, lend
from .plan import Cache

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TOKENS = 6  # of a trial: three read at once, then three over the cache


def find_blocks(model: nn.Module) -> list[Block]:
    """The MLPs of a causal LM, from the input on, one for each of its layers.

    ValueError, listing the families, where there are none; and for what cannot learn as a whole:
    mixtures of experts, hybrids, adapters, quantised, offloaded or sharded weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{type(model).__name__} is no model: give AutoModelForCausalLM.from_pretrained(...)"
        )
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    inside = set((model if decoder is None else decoder).modules())  # no vision tower
    blocks: list[Block] = []
    experts = None
    for name, module in model.named_modules():
        if module not in inside:
            continue
        if name.rpartition(".")[2] == "experts":
            experts = experts or name
        parts = next((p for p in FAMILIES if all(hasattr(module, part) for part in p)), None)
        if parts is None or not name.endswith("mlp"):
            continue
        layers = tuple(getattr(module, part) for part in parts)
        paths = tuple(f"{name}.{part}" for part in parts)
        blocks.append(Block(len(blocks), name, module, layers, paths))
    kind = type(model).__name__
    if experts is not None:
        raise ValueError(
            f"{experts} of {kind} is a mixture of experts, which cannot be stacked, nor can a "
            "model that has some: take a dense model"
        )
    if not blocks:
        known = "; ".join(f"{of} ({', '.join(names)})" for names, of in FAMILIES.items())
        raise ValueError(
            f"no MLP blocks found in {kind}; models of these families can be "
            f"stacked, by the names of their linear layers: {known}"
        )
    _check_model(model, blocks)
    return blocks


def _check_model(model: nn.Module, blocks: list[Block]) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {kind} is no model of transformers: pass the PreTrainedModel that it wraps (of an "
            "adapter: merge_and_unload() it first)"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or any(
        hasattr(module, "lora_A") for module in model.modules()
    ):
        raise ValueError(f"{kind} carries an adapter: merge_and_unload() it first")
    text = model.config.get_text_config()
    if other := set(getattr(text, "layer_types", None) or ()) - _ATTENTION:
        raise ValueError(
            f"{kind} has layers of the type {sorted(other)[0]!r}, whose state cannot be cut and "
            "rebuilt like keys and values: take a model with attention in every layer"
        )
    if len(blocks) != text.num_hidden_layers:
        raise ValueError(
            f"{kind} has {text.num_hidden_layers} layers, and {len(blocks)} MLPs of a known form "
            f"({blocks[0].name}, ...): it would learn in part only, so it cannot be stacked"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    places = {str(tensor.device) for _, tensor in tensors}
    if len(places) > 1 or "meta" in places:
        raise ValueError(
            f"{kind} lies on {', '.join(sorted(places))}: load it as a whole onto one device, "
            "without device_map or offloading"
        )
    if of_inference := [name for name, tensor in tensors if tensor.is_inference()]:
        raise ValueError(
            f"{of_inference[0]} was made under torch.inference_mode(), so nothing can be learned "
            "beside it: load the model outside"
        )
    for block in blocks:
        for path, layer in zip(block.paths, block.layers):
            if adopted(layer):
                raise ValueError(f"{block.name} is stacked already: unstack the model first")
            _check_layer(path, layer)


def _check_layer(path: str, layer: nn.Module) -> None:
    """ValueError unless it is a plain linear layer, whose own forward is what is called."""
    kind = type(layer)
    if not adoptable(layer):
        raise ValueError(
            f"{path} is a {kind.__module__}.{kind.__name__}, not a plain linear layer: load the "
            "model without quantisation or adapters (merge_and_unload() one first)"
        )
    if "forward" in vars(layer):
        raise ValueError(
            f"{path} has a forward that was put over its own (a hook of accelerate?), past which "
            "no weights can be lent: load the model without device_map, or call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    check_weight(path, layer)


def check_weight(path: str, layer: nn.Module) -> None:
    """ValueError unless the layer's weights are plain numbers that are here."""
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        what = "no parameter" if weight is None else f"{type(weight).__name__} {weight.dtype}"
        raise ValueError(
            f"{path}.weight is {what}, not plain floating-point weights: load the model without "
            "quantisation, sharding or parametrisation"
        )
    if weight.is_meta:
        raise ValueError(f"{path}.weight is offloaded: load the model as a whole onto one device")


def check_ran(paths: dict[nn.Module, str], ran: dict[nn.Module, int]) -> None:
    """ValueError, naming the first, if a layer that was lent weights did not run."""
    if silent := [path for layer, path in paths.items() if layer not in ran]:
        raise ValueError(
            f"{silent[0]} did not run when the model read, so what it learns would have no effect "
            "(something has replaced it, or computes past it): undo that, or load the model and "
            "stack it anew"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block without dropout or gradient checkpointing; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def read_on(model: Any, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """Logits [B, T, V] of tokens that follow those in the cache, and the longer cache."""
    past = DynamicCache(cache or None)
    out = model(input_ids=tokens, **{CACHE: past}, use_cache=True, return_dict=True)
    return out.logits, tuple((keys, values) for keys, values, *_ in past)


def probe(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Read a few tokens: every adopted layer must run once and get a gradient, and reading in
    pieces, over a cache rebuilt from keys and values, must be reading at once. ValueError if not.
    """
    kind = type(model).__name__
    vocab = model.config.get_text_config().vocab_size
    ids = (torch.arange(3, 3 + _TOKENS, device=model.device) % vocab)[None]
    paths = {layer: path for b in blocks for layer, path in zip(b.layers, b.paths)}
    with torch.inference_mode(False), evaluating(model):
        try:
            whole, ran, grads = _tried(model, ids, list(paths))
            with torch.no_grad():
                first, cache = read_on(model, ids[:, :3], ())
                rest = [(keys.clone(), values.clone()) for keys, values in cache]
                second, cache = read_on(model, ids[:, 3:], tuple(rest))
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"{kind} cannot be stacked: it does not read {_TOKENS} tokens in two pieces over "
                f"keys and values ({type(error).__name__}: {error})"
            ) from error
    if whole.shape != (1, _TOKENS, vocab):
        raise ValueError(
            f"{kind} gives logits {list(whole.shape)} for {_TOKENS} tokens of {vocab}: load it "
            "with AutoModelForCausalLM"
        )
    check_ran(paths, ran)
    for (layer, path), grad in zip(paths.items(), grads):
        if grad is None or ran[layer] != 1:
            what = "gets no gradient" if grad is None else f"runs {ran[layer]} times in one reading"
            raise ValueError(f"{path} {what}, so {kind} cannot be stacked")
    apart = torch.cat([first, second], 1).double() - whole.double()
    share = float(apart.norm() / (whole.double() - whole.double().mean()).norm().clamp(min=1e-30))
    if not share < max(1e-2, torch.finfo(whole.dtype).eps ** 0.5):
        raise ValueError(
            f"{kind} cannot be stacked: read in two pieces its logits differ by {share:.0%} from "
            "those of reading at once, so its cache cannot be rebuilt from keys and values"
        )


def _tried(
    model: PreTrainedModel, ids: Tensor, layers: list[nn.Module]
) -> tuple[Tensor, dict[nn.Module, int], tuple[Tensor | None, ...]]:
    """Logits, how often each layer ran, and the gradients of a delta of nothing in each."""
    lefts, lent = [], {}
    for layer in layers:
        out, width = kernel(layer).shape
        lefts.append(kernel(layer).new_zeros(1, out, 1).requires_grad_())
        right = kernel(layer).new_full((1, 1, width), width**-0.5)
        lent[layer] = Effective(None, (Factors(lefts[-1], right.detach()),))
    with torch.enable_grad(), lend(lent) as ran:
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
        total = logits.float().square().sum()
        grads = (
            torch.autograd.grad(total, lefts, allow_unused=True)
            if total.requires_grad
            else (None,) * len(lefts)
        )
    return logits.detach(), ran, grads
