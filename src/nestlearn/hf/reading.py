"""How a model reads under its deltas: windows of tokens over a cache; nothing is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deltas import Deltas
from .door import evaluating, read_on
from .lending import Weights, lend
from .plan import Cache, StackMemory

_EMPTY: Cache = ()
Piece = tuple[Tensor, ...]  # tokens [B, P], weights [B, P], and teach signals [B, P, N, D] if any


def losses(model: Deltas, ids: Tensor, memory: StackMemory | None) -> Tensor:
    """−log p [B, T] of a text by itself, under what the memory has learned; writes nothing."""
    levels = () if memory is None else memory.levels
    memory = model.init_memory(len(ids))
    memory = memory._replace(levels=levels or memory.levels)
    check(model, ids, memory, None, None, None)
    step, parts = model.window - model.again, []
    weights = model.effective(model.fasts(memory))
    with evaluating(model.base):
        for a in range(0, ids.shape[1], step):
            memory = make_room(model, memory, step)
            tokens = ids[:, a : a + step]
            loss, cache = read(model, tokens, memory, weights)
            memory = memory._replace(context=torch.cat([memory.context, tokens], 1), cache=cache)
            parts.append(loss)
    return torch.cat(parts, 1)


def forward(
    model: Deltas, tokens: Tensor, cache: Cache, weights: Weights,
    inputs: dict[nn.Module, Tensor] | None = None,
) -> tuple[Tensor, Cache]:  # fmt: skip
    """Logits [B, T, V] of tokens that follow those in the cache, and the longer cache."""
    kind = model.cache_dtype
    with lend(weights, inputs) as ran:
        logits, cache = read_on(model.base, tokens, _to(cache, model.base.dtype if kind else None))
    model.check_ran(weights, ran)
    return logits, _to(cache, kind)


def _to(cache: Cache, kind: torch.dtype | None) -> Cache:
    return cache if kind is None else tuple((k.to(kind), v.to(kind)) for k, v in cache)


def cache_shapes(model: Deltas) -> list[tuple[int, int, int, torch.dtype]]:
    """Of every layer's cache: heads, sizes of a key and of a value, type; found by one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.lr[0].device)
    with torch.no_grad(), evaluating(model.base):
        _, cache = forward(model, token, (), {})
    return [(k.shape[1], k.shape[3], v.shape[3], k.dtype) for k, v in cache]


def read(
    model: Deltas, tokens: Tensor, memory: StackMemory, weights: Weights,
    inputs: dict[nn.Module, Tensor] | None = None,
) -> tuple[Tensor, Cache]:  # fmt: skip
    """−log p of tokens that follow the memory's context [B, P] (the stream's first: nan)."""
    fed = memory.cache[0][0].shape[2] if memory.cache else 0
    seen = torch.cat([memory.context[:, fed:], tokens[:, :-1]], 1)
    if min(seen.shape[1], tokens.shape[1]) == 0:
        return memory.levels[0].seen.new_full(tokens.shape, float("nan")), memory.cache
    logits, cache = forward(model, seen, memory.cache, weights, inputs)
    target = tokens[:, -seen.shape[1] :]
    scores = logits.mT.to(memory.levels[0].seen.dtype)
    loss = F.cross_entropy(scores, target, reduction="none")
    return F.pad(loss, (tokens.shape[1] - seen.shape[1], 0), value=float("nan")), cache


def make_room(model: Deltas, memory: StackMemory, length: int) -> StackMemory:
    """If the window cannot take so many tokens more: a new one, that begins with the last
    tokens of the old one, read again.
    """
    fed = memory.cache[0][0].shape[2] if memory.cache else 0
    if fed + length <= model.window:
        return memory
    context, cache = memory.context[:, -(model.again + 1) :], _EMPTY
    if model.again:
        _, cache = forward(model, context[:, :-1], (), model.effective(model.fasts(memory)))
    return memory._replace(context=context, cache=cache)


def in_the_bases_type(model: Deltas, memory: StackMemory) -> StackMemory:
    """The memory with a cache of the type that the model keeps: the base may have been cast."""
    if not memory.cache or memory.cache[0][0].dtype == (model.cache_dtype or model.base.dtype):
        return memory
    kinds = [kind for *_, kind in cache_shapes(model)]
    cache = tuple((k.to(kind), v.to(kind)) for (k, v), kind in zip(memory.cache, kinds))
    return memory._replace(cache=cache)


def check(
    model: Deltas, ids: Tensor, memory: StackMemory, mask: Tensor | None, teach: Tensor | None,
    drift: float | None,
) -> Piece:  # fmt: skip
    """The tokens with their weights (and teach signals); ValueError where they do not fit."""
    if ids.ndim != 2 or ids.dtype != torch.long or not ids.numel():
        raise ValueError(f"ids is {ids.dtype} {list(ids.shape)}: pass int64 token ids [B, T]")
    size = model.base.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(f"ids reach {int(ids.min())}..{int(ids.max())}: the model has {size}")
    if len(ids) != len(memory.context):
        raise ValueError(f"{len(ids)} rows for a memory of {len(memory.context)} streams")
    if drift is not None and not drift > 0:
        raise ValueError(f"drift={drift}: give a share above 0, or None")
    like = memory.levels[0].seen
    weight = like.new_ones(ids.shape) if mask is None else mask.to(like)
    if weight.shape != ids.shape or not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(
            f"mask {list(weight.shape)} for ids {list(ids.shape)}: one bool, or a finite weight "
            "of 0 or more, for each token"
        )
    if teach is not None and model.config.objective != "teach":
        raise ValueError('teach=...: only for a model stacked with objective="teach"')
    if teach is None:
        return ids, weight
    shape = (*ids.shape, len(model.blocks), model.base.config.get_text_config().hidden_size)
    if teach.shape != shape:
        raise ValueError(f"teach is {list(teach.shape)}: pass {list(shape)}")
    return ids, weight, teach.to(like)
