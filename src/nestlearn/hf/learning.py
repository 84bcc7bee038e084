"""How a stacked model reads and learns: piece by piece, each cut at absolute positions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestlearn import state as trees
from nestlearn.memory import objective as inner_objective

from .door import evaluating, read_on
from .families import Weights, lend
from .gradients import constant, gradients, leaves, shared_gradients
from .plan import Cache, Memory
from .writes import Fast, LevelState, Pace, add, consolidate, decay, restart, write

if TYPE_CHECKING:
    from .anchor import Anchor
    from .stack import StackedModel

_EMPTY: Cache = ()
Pull = Callable[[Weights], Tensor]  # a divergence [B] in nats a token, under those weights
Piece = tuple[Tensor, ...]  # tokens [B, P], weights [B, P], and teach signals [B, P, N, D] if any


def unroll(
    model: StackedModel, ids: Tensor, memory: Memory | None = None, mask: Tensor | None = None,
    *, teach: Tensor | None = None, drift: float | None = None, anchor: Anchor | None = None,
    graph: str | None = None,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """`StackedModel.learn`; with graph "full" or "first-order" losses and memory hang on the step
    sizes and start values, through the inner gradients or with these as constants.
    """
    with _recorded(model, graph):
        return _unroll(model, ids, memory, mask, teach, drift, anchor, graph)


def _unroll(
    model: StackedModel, ids: Tensor, memory: Memory | None, mask: Tensor | None,
    teach: Tensor | None, drift: float | None, anchor: Anchor | None, graph: str | None,
) -> tuple[Tensor, Memory]:  # fmt: skip
    memory = model.init_memory(len(ids)) if memory is None else trees.trainable(memory)
    queue = trees.trainable(_check(model, ids, memory, mask, teach, drift))
    memory = _in_the_bases_type(model, memory)
    if teach is None and model.config.objective == "teach":
        raise ValueError('objective="teach" learns from teach=...: pass the signals')
    if anchor is not None and model.config.objective != "outer":
        raise ValueError(f'objective="{model.config.objective}" takes no anchor: use "outer"')
    if waiting := memory.pending[0].shape[1]:
        queue = tuple(torch.cat(pair, 1) for pair in zip(memory.pending, queue))
    at, parts = memory.position - waiting, []
    active = active_levels(model)
    while True:
        length = model.config.cut_after(at, model.window - model.again) - at
        memory = _make_room(model, memory, length)
        piece = tuple(part[:, :length] for part in queue)
        queue = tuple(part[:, length:] for part in queue)
        if piece[0].shape[1] < length:
            break
        pull = None if anchor is None else _pull(model, anchor, memory, at)
        loss, memory = _read_and_gather(model, piece, memory, active, graph, pull)
        at += length
        memory = memory._replace(levels=_write_due(model, memory.levels, at, drift))
        parts.append(loss)
    parts.append(_read(model, piece[0], memory, _current(model, memory))[0])
    loss = torch.cat(parts, 1)[:, -ids.shape[1] :]
    return loss, memory._replace(position=memory.position + ids.shape[1], pending=piece)


def _recorded(model: StackedModel, graph: str | None) -> ExitStack:
    """The modes of an unrolled stream, whatever the caller's are: the base in evaluation mode,
    gradients possible; a fused attention has no second derivative.
    """
    modes = ExitStack()
    modes.enter_context(evaluating(model.base))
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.set_grad_enabled(graph is not None))
    if graph == "full":
        modes.enter_context(sdpa_kernel(SDPBackend.MATH))
    return modes


def _in_the_bases_type(model: StackedModel, memory: Memory) -> Memory:
    """The memory with a cache of the type that the base model reads with: it may have been cast."""
    if not memory.cache or memory.cache[0][0].dtype == model.base.dtype:
        return memory
    kinds = [kind for *_, kind in cache_shapes(model)]
    cache = tuple((k.to(kind), v.to(kind)) for (k, v), kind in zip(memory.cache, kinds))
    return memory._replace(cache=cache)


def losses(model: StackedModel, ids: Tensor, memory: Memory | None) -> Tensor:
    """−log p [B, T] of a text by itself, under what the memory has learned; writes nothing."""
    levels = () if memory is None else memory.levels
    memory = model.init_memory(len(ids))
    memory = memory._replace(levels=levels or memory.levels)
    _check(model, ids, memory, None, None, None)
    step, parts = model.window - model.again, []
    weights = _current(model, memory)
    with evaluating(model.base):
        for a in range(0, ids.shape[1], step):
            memory = _make_room(model, memory, step)
            tokens = ids[:, a : a + step]
            loss, cache = _read(model, tokens, memory, weights)
            memory = memory._replace(context=torch.cat([memory.context, tokens], 1), cache=cache)
            parts.append(loss)
    return torch.cat(parts, 1)


def active_levels(model: StackedModel) -> list[int]:
    """The levels that learn: they have a chunk, and a step size above 0 (or one in training)."""
    return [
        i for i in model.config.faster_first()
        if model.lr[i].requires_grad or bool((model.lr[i] > 0).any())
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ reading


def _forward(
    model: StackedModel, tokens: Tensor, cache: Cache, weights: Weights,
    inputs: dict[nn.Module, Tensor] | None = None,
) -> tuple[Tensor, Cache]:  # fmt: skip
    """Logits [B, T, V] of tokens that follow those in the cache, and the longer cache."""
    with lend(weights, inputs) as ran:
        logits, cache = read_on(model.base, tokens, cache)
    model.check_ran(weights, ran)
    return logits, cache


def cache_shapes(model: StackedModel) -> list[tuple[int, int, int, torch.dtype]]:
    """Of every layer's cache: heads, sizes of a key and of a value, type; found by one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.lr[0].device)
    with torch.no_grad(), evaluating(model.base):
        _, cache = _forward(model, token, (), {})
    return [(k.shape[1], k.shape[3], v.shape[3], k.dtype) for k, v in cache]


def _read(
    model: StackedModel, tokens: Tensor, memory: Memory, weights: Weights,
    inputs: dict[nn.Module, Tensor] | None = None,
) -> tuple[Tensor, Cache]:  # fmt: skip
    """−log p of tokens that follow the memory's context [B, P] (the stream's first: nan)."""
    fed = memory.cache[0][0].shape[2] if memory.cache else 0
    seen = torch.cat([memory.context[:, fed:], tokens[:, :-1]], 1)
    if min(seen.shape[1], tokens.shape[1]) == 0:
        return memory.levels[0].seen.new_full(tokens.shape, float("nan")), memory.cache
    logits, cache = _forward(model, seen, memory.cache, weights, inputs)
    target = tokens[:, -seen.shape[1] :]
    scores = logits.mT.to(memory.levels[0].seen.dtype)
    loss = F.cross_entropy(scores, target, reduction="none")
    return F.pad(loss, (tokens.shape[1] - seen.shape[1], 0), value=float("nan")), cache


def _current(model: StackedModel, memory: Memory) -> Weights:
    return model.effective(_fasts(model, memory))


def _fasts(model: StackedModel, memory: Memory) -> dict[int, Fast]:
    """The levels' deltas where there are any."""
    return {
        i: level.fast or model.start(i, len(memory.context))
        for i, level in enumerate(memory.levels)
        if level.fast or len(model.starts)
    }


def _make_room(model: StackedModel, memory: Memory, length: int) -> Memory:
    """If the window cannot take so many tokens more: a new one, that begins with the last
    tokens of the old one, read again.
    """
    fed = memory.cache[0][0].shape[2] if memory.cache else 0
    if fed + length <= model.window:
        return memory
    context, cache = memory.context[:, -(model.again + 1) :], _EMPTY
    if model.again:
        _, cache = _forward(model, context[:, :-1], (), _current(model, memory))
    return memory._replace(context=context, cache=cache)


# ----------------------------------------------------------------------------------- learning


def _pull(model: StackedModel, anchor: Anchor, memory: Memory, at: int) -> Pull | None:
    """The anchor's divergence at a position; None while the model is still the pretrained one."""
    if not len(model.starts) and not any(level.fast for level in memory.levels):
        return None
    turn = at // min(level.chunk for level in model.config.levels if level.chunk is not None)
    return lambda weights: anchor.divergence(model, weights, turn, len(memory.context))


def _read_and_gather(
    model: StackedModel, piece: Piece, memory: Memory, active: list[int], graph: str | None,
    pull: Pull | None,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Read one whole piece, and add its gradient to what the active levels gather."""
    tokens, weight = piece[0], piece[1]
    if not memory.context.shape[1]:
        weight = weight.clone()
        weight[:, 0] = 0.0  # nothing predicts the stream's first token
    fasts = _fasts(model, memory)
    levels = memory.levels
    if not active or not bool((weight > 0).any()):
        loss, cache = _read(model, tokens, memory, model.effective(fasts))
    else:
        starts = {i: model.start(i, len(tokens)) for i in active if i not in fasts}
        fasts = {**fasts, **starts}
        piece = (tokens, weight, *piece[2:])
        if model.config.objective == "outer":
            loss, cache, found, inputs = _outer(model, piece, memory, fasts, active, graph, pull)
        else:
            loss, cache, found, inputs = _inside(model, piece, memory, fasts, active, graph)
        levels = tuple(
            _gather(model, i, level, fasts[i], found[i], inputs, weight) if i in found else level
            for i, level in enumerate(levels)
        )
    if graph is None:
        loss, cache = loss.detach(), tuple((k.detach(), v.detach()) for k, v in cache)
    context = torch.cat([memory.context, tokens], 1)
    return loss, memory._replace(context=context, cache=cache, levels=levels)


def _outer(model, piece, memory, fasts, active, graph, pull):
    """The gradients of the piece's summed cross-entropy in the active levels' deltas; of the
    anchor's divergence, too, which weighs as much for each token.
    """
    tokens, weight = piece[0], piece[1]
    inputs: dict[nn.Module, Tensor] = {}
    with torch.enable_grad():
        if graph is None and model.config.rank is None:
            # A delta's gradient is that of the sum that it is in: one leaf for all levels.
            weights = model.effective(fasts)
            for lent in weights.values():
                lent.base.requires_grad_()
        else:
            own = {i: leaves(fasts[i], graph) for i in active}
            weights = model.effective({**fasts, **own})
        loss, cache = _read(model, tokens, memory, weights, inputs)
        total = (loss.nan_to_num() * weight).sum()
        if pull is not None:
            total = total + (pull(weights) * weight.sum(1)).sum()
        if graph is None and model.config.rank is None:
            found = shared_gradients(model, total, weights, active)
        else:
            found = gradients(model, total, own, graph)
    return loss, cache, found, constant(inputs, graph)


def _inside(model, piece, memory, fasts, active, graph):
    """The gradients of what each block alone is to learn: nothing passes between the blocks.

    "local": for the block's input x and output y, the levels' objective L(y_t−1; x_t) / D;
    "teach": ⟨y, the caller's signal⟩.
    """
    tokens, weight = piece[0], piece[1]
    inputs: dict[nn.Module, Tensor] = {}
    loss, cache = _read(model, tokens, memory, model.effective(fasts), inputs)
    if not inputs:
        return loss, cache, {}, inputs
    inputs = constant(inputs, graph)
    with torch.enable_grad():
        own = {i: leaves(fasts[i], graph) for i in active}
        total = loss.new_zeros(())
        with lend(model.effective({**fasts, **own})):
            for number, block in enumerate(model.blocks):
                x = inputs[block.layers[0]]
                y = block.mlp(x)
                n = x.shape[1]
                if model.config.objective == "teach":
                    total = total + (y * piece[2][:, -n:, number] * weight[:, -n:, None]).sum()
                    continue
                error = inner_objective(model.config.levels[0].objective).value(y[:, :-1], x[:, 1:])
                total = total + (error * weight[:, -n:-1]).sum() / x.shape[-1]
        found = gradients(model, total, own, graph)
    return loss, cache, found, inputs


def _gather(
    model: StackedModel, i: int, level: LevelState, fast: Fast, found: Fast,
    inputs: dict[nn.Module, Tensor], weight: Tensor,
) -> LevelState:  # fmt: skip
    if model.config.levels[i].rule == "dgd":
        xs = [inputs[model.layers[j]] for j in model.owned[i]]
        used = weight[:, -xs[0].shape[1] :]
        found = add(found, decay(fast, xs, used, model.lr[i], model.forget[i]))
    return level._replace(total=add(level.total, found), seen=level.seen + weight.sum(1))


# ------------------------------------------------------------------------------------ writing


def _write_due(
    model: StackedModel, levels: tuple[LevelState, ...], at: int, drift: float | None
) -> tuple[LevelState, ...]:
    """The writes of the levels whose chunk ends at `at`, then what slower levels' ends bring."""
    config, new = model.config, list(levels)
    order = config.faster_first()
    due = [i for i in order if at % config.levels[i].chunk == 0]  # type: ignore[operator]
    if not due:
        return levels
    batch = len(levels[0].seen)
    for i in due:
        if new[i].total:
            new[i] = write(new[i], new[i].fast or model.start(i, batch), _pace(model, i, drift))
    for i in order:
        parent = model.parents[i]
        if parent is None or parent not in due or not new[i].fast:
            continue
        first = model.start(i, batch)
        if config.variant == "nested":
            new[i] = restart(new[i], first, model.meta_lr[i])
        else:
            starts = (model.start(parent, batch), first)
            bound = _pace(model, parent, drift).bound
            new[parent], new[i] = consolidate(new[parent], new[i], starts, bound)
    return tuple(new)


def _pace(model: StackedModel, i: int, drift: float | None) -> Pace:
    level = model.config.levels[i]
    assert level.chunk is not None
    keep = 1.0 if level.half_life is None else 0.5 ** (level.chunk / level.half_life)
    high = float("inf") if level.bound is None else level.bound
    high = high if drift is None else min(high, drift)
    theta = model.theta[i] if level.rule == "momentum" else None
    bound = tuple(high * model.norms[j] for j in model.owned[i])
    return Pace(model.lr[i], theta, keep, bound)


# ------------------------------------------------------------------------------------- checks


def _check(
    model: StackedModel, ids: Tensor, memory: Memory, mask: Tensor | None, teach: Tensor | None,
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
