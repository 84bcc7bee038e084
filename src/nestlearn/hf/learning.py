"""How a stacked model reads and learns: piece by piece, each cut at absolute positions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestlearn import state as trees
from nestlearn.layers.streaming import wide
from nestlearn.memory import objective as inner_objective

from .anchor import Anchor
from .deltas import Deltas
from .door import evaluating
from .gradients import Sought, constant
from .lending import Effective, Factors, Weights, lend
from .plan import StackMemory
from .reading import Piece, check, in_the_bases_type, make_room, read
from .writes import Fast, LevelState, add, approximate, consolidate, decay, restart, write

Pull = Callable[[Weights], Tensor]  # a divergence [B] in nats a token, under those weights


def unroll(
    model: Deltas, ids: Tensor, memory: StackMemory | None = None, mask: Tensor | None = None,
    *, teach: Tensor | None = None, drift: float | None = None, anchor: Anchor | None = None,
    graph: str | None = None,
) -> tuple[Tensor, StackMemory]:  # fmt: skip
    """`StackedModel.learn`; with graph "full" or "first-order" losses and memory hang on the step
    sizes and start values, through the inner gradients or with these as constants.
    """
    with _recorded(model, graph):
        return _unroll(model, ids, memory, mask, teach, drift, anchor, graph)


def _unroll(
    model: Deltas, ids: Tensor, memory: StackMemory | None, mask: Tensor | None,
    teach: Tensor | None, drift: float | None, anchor: Anchor | None, graph: str | None,
) -> tuple[Tensor, StackMemory]:  # fmt: skip
    memory = model.init_memory(len(ids)) if memory is None else trees.trainable(memory)
    queue = trees.trainable(check(model, ids, memory, mask, teach, drift))
    memory = in_the_bases_type(model, memory)
    if teach is None and model.config.objective == "teach":
        raise ValueError('objective="teach" learns from teach=...: pass the signals')
    if graph is not None and model.config.objective == "skip":
        raise ValueError('objective="skip" trains no step sizes: stack with "outer"')
    if anchor is not None and model.config.objective != "outer":
        raise ValueError(f'objective="{model.config.objective}" takes no anchor: use "outer"')
    if waiting := memory.pending[0].shape[1]:
        queue = tuple(torch.cat(pair, 1) for pair in zip(memory.pending, queue))
    at, parts = memory.position - waiting, []
    active = model.active()
    while True:
        length = model.config.cut_after(at, model.window - model.again) - at
        memory = make_room(model, memory, length)
        piece = tuple(part[:, :length] for part in queue)
        queue = tuple(part[:, length:] for part in queue)
        if piece[0].shape[1] < length:
            break
        pull = None if anchor is None else _pull(model, anchor, memory, at)
        loss, memory = _read_and_gather(model, piece, memory, active, graph, pull)
        at += length
        memory = memory._replace(levels=_write_due(model, memory.levels, at, drift))
        parts.append(loss)
    weights = model.effective(model.fasts(memory))
    parts.append(read(model, piece[0], memory, weights)[0])
    loss = torch.cat(parts, 1)[:, -ids.shape[1] :]
    return loss, memory._replace(position=memory.position + ids.shape[1], pending=piece)


def _recorded(model: Deltas, graph: str | None) -> ExitStack:
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


def _pull(model: Deltas, anchor: Anchor, memory: StackMemory, at: int) -> Pull | None:
    """The anchor's divergence at a position; None while the model is still the pretrained one."""
    if not len(model.starts) and not any(level.fast for level in memory.levels):
        return None
    turn = at // min(level.chunk for level in model.config.levels if level.chunk is not None)
    return lambda weights: anchor.divergence(model, weights, turn, len(memory.context))


def _read_and_gather(
    model: Deltas, piece: Piece, memory: StackMemory, active: list[int], graph: str | None,
    pull: Pull | None,
) -> tuple[Tensor, StackMemory]:  # fmt: skip
    """Read one whole piece, and add its gradient to what the active levels gather."""
    tokens, weight = piece[0], piece[1]
    if not memory.context.shape[1]:
        weight = weight.clone()
        weight[:, 0] = 0.0  # nothing predicts the stream's first token
    fasts = model.fasts(memory)
    levels = memory.levels
    if not active or not bool((weight > 0).any()):
        loss, cache = read(model, tokens, memory, model.effective(fasts))
    else:
        starts = {i: model.start(i, len(tokens)) for i in active if i not in fasts}
        fasts = {**fasts, **starts}
        piece = (tokens, weight, *piece[2:])
        if model.config.objective == "outer":
            loss, cache, found, inputs = _outer(model, piece, memory, fasts, active, graph, pull)
        elif model.config.objective == "skip":
            loss, cache, found, inputs = _skip(model, piece, memory, fasts, active)
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
        sought = Sought(model, fasts, active, graph)
        loss, cache = read(model, tokens, memory, sought.weights, inputs)
        total = (loss.nan_to_num() * weight).sum()
        if pull is not None:
            total = total + (pull(sought.weights) * weight.sum(1)).sum()
        found = sought.gradients(total)
    return loss, cache, found, constant(inputs, graph)


def _skip(model, piece, memory, fasts, active):
    """The gradients of the summed cross-entropy in the last block's output, taken for those in
    every block's: as if a block's output reached the end by the residual stream alone. Nothing goes
    back through the blocks.
    """
    tokens, weight = piece[0], piece[1]
    inputs: dict[nn.Module, Tensor] = {}
    weights, last = model.effective(fasts), model.blocks[-1].layers[-1]
    weights[last] = weights.get(last, Effective(None, ()))._replace(taps=[])  # its level may rest
    with torch.enable_grad():
        loss, cache = read(model, tokens, memory, weights, inputs)
        if not inputs:
            return loss, cache, {}, inputs
        ends = [y for _, y in weights[last].taps or ()]
        (error,) = torch.autograd.grad((loss.nan_to_num() * weight).sum(), ends)
    inputs = constant(inputs, None)
    rank = model.config.rank
    pairs = [(wide(error), wide(x)) for x in inputs.values()]
    full = (Factors(e.mT @ x) for e, x in pairs)
    found = dict(zip(inputs, full if rank is None else approximate([[p] for p in pairs], rank)))
    owned = {i: tuple(found[model.layers[j]] for j in model.owned[i]) for i in active}
    return loss, cache, owned, inputs


def _inside(model, piece, memory, fasts, active, graph):
    """The gradients of what each block alone is to learn: nothing passes between the blocks.

    "local": for the block's input x and output y, the levels' objective L(y_t−1; x_t) / D;
    "teach": ⟨y, the caller's signal⟩.
    """
    tokens, weight = piece[0], piece[1]
    inputs: dict[nn.Module, Tensor] = {}
    loss, cache = read(model, tokens, memory, model.effective(fasts), inputs)
    if not inputs:
        return loss, cache, {}, inputs
    inputs = constant(inputs, graph)
    with torch.enable_grad():
        sought = Sought(model, fasts, active, graph)
        total = loss.new_zeros(())
        with lend(sought.weights):
            for number, block in enumerate(model.blocks):
                x = inputs[block.layers[0]]
                y = block.mlp(x)
                n = x.shape[1]
                if model.config.objective == "teach":
                    total = total + (y * piece[2][:, -n:, number] * weight[:, -n:, None]).sum()
                    continue
                error = inner_objective(model.config.levels[0].objective).value(y[:, :-1], x[:, 1:])
                total = total + (error * weight[:, -n:-1]).sum() / x.shape[-1]
        found = sought.gradients(total)
    return loss, cache, found, inputs


def _gather(
    model: Deltas, i: int, level: LevelState, fast: Fast, found: Fast,
    inputs: dict[nn.Module, Tensor], weight: Tensor,
) -> LevelState:  # fmt: skip
    if model.config.levels[i].rule == "dgd":
        xs = [inputs[model.layers[j]] for j in model.owned[i]]
        used = weight[:, -xs[0].shape[1] :]
        found = add(found, decay(fast, xs, used, model.lr[i], model.forget[i]))
    return level._replace(total=add(level.total, found), seen=level.seen + weight.sum(1))


# ------------------------------------------------------------------------------------ writing


def _write_due(
    model: Deltas, levels: tuple[LevelState, ...], at: int, drift: float | None
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
            new[i] = write(new[i], new[i].fast or model.start(i, batch), model.pace(i, drift))
    for i in order:
        parent = model.parents[i]
        if parent is None or parent not in due or not new[i].fast:
            continue
        first = model.start(i, batch)
        if config.variant == "nested":
            new[i] = restart(new[i], first, model.meta_lr[i])
        else:
            starts = (model.start(parent, batch), first)
            bound = model.pace(parent, drift).bound
            new[parent], new[i] = consolidate(new[parent], new[i], starts, bound)
    return tuple(new)
