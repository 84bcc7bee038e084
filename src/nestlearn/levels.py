"""The nested-learning view (section 3): a model and its optimizer as levels of memories.

An *associative memory* (eq. 6) maps keys to values and is trained by an objective on a context.
Its *update frequency* (def. 2) is the number of its updates for each unit of time, here a token.
A is *faster* than B (def. 3) if its frequency is higher or, at equal frequency, if B's state at
time t needs A's state at time t. A *level* (def. 4) holds what has equal frequency and
independent states; a model with its optimizer is a nested system of such levels.

What is counted, where the definitions leave room:

* An update is a change that the memory's readers can see. A memory that answers through the first
  weights of its chunk is updated once per chunk, though its product of decays runs token by token.
  Where it answers through each write, it is updated at every token, and `gradient_period` says how
  seldom the weights are refreshed at which its inner gradients are taken.
* "Needs" means that the update itself reads the other state, as weights read their momentum. That
  an input was computed by another memory does not count: every block of a deep model would be a
  level of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import nn

from .layers import Attention, ContinuumMemory, SelfModifyingTitans, StaticProjections
from .layers.continuum import LevelMLP
from .models.hope import SwiGLU
from .optim.declared import NAMES as OPTIMIZERS
from .optim.declared import Declared, declared

if TYPE_CHECKING:
    from rich.console import Group
    from torch.optim.optimizer import Optimizer

SYMBOLS = {"k": "M_k", "v": "M_v", "eta": "M_η", "alpha": "M_α", "q": "M_q", "mem": "M_mem"}
_READ_BY_OTHERS = ("momentum", "optimizer")  # kinds that the weights of equal frequency need
_EMPTY: dict[str, Any] = {"parameters": 0, "state_per_sample": 0, "state_per_token": 0}
_LAYERS = (Attention, ContinuumMemory, SelfModifyingTitans, StaticProjections, SwiGLU)


@dataclass(frozen=True)
class Component:
    """One associative memory: (objective, context, parameters) and how often it is updated.

    kind: "memory" (fast weights), "cache" (keys and values, uncompressed), "buffer" (the last
    inputs), "momentum" (of a memory), "start" (a start value that moves along the stream),
    "optimizer" or "weights". period: tokens between two updates; None, it is never updated.
    gradient_period: tokens between two refreshes of the weights at which its gradients are taken;
    None, it takes none. parameters: values that all samples share (the model's, or the
    optimizer's). state_per_sample: values of each sample; state_per_token: those that each token
    of a sample adds. objective: what it is trained on; None, it stores without one. blocks: where
    it stands, all numbers being sums over them; () outside of the blocks.
    """

    name: str
    kind: str
    period: int | None
    gradient_period: int | None
    parameters: int
    state_per_sample: int
    state_per_token: int
    objective: str | None
    context: str
    rule: str
    blocks: tuple[int, ...] = ()

    @property
    def frequency(self) -> float:
        """Updates for each token (def. 2); 0 if it is never updated."""
        return 0.0 if self.period is None else 1 / self.period


@dataclass(frozen=True)
class Level:
    """Components of equal frequency and independent states (def. 4); number 1 is the fastest."""

    number: int
    period: int | None
    components: tuple[Component, ...]


def levels(
    model: nn.Module, *, tokens_per_step: int | None = None, optimizer: str | Optimizer = "AdamW"
) -> list[Level]:
    """The levels of a model and its optimizer (defs. 2–4), fast to slow.

    Read off the modules of `nestlearn.layers` wherever they stand in the model; every other
    parameter belongs to pre-training, the level whose context is the whole data set.
    tokens_per_step: tokens of one optimizer step (batch × length). Without it the model is in use
    and not in training: its parameters are never updated and there is no optimizer. optimizer: one
    that is built, or a name in OPTIMIZERS ("M3", "AdamW", "SGD", ...) for its default options. What
    it remembers of the gradients is faster than the weights, whose state needs it, unless it is
    written less often than they are, as M3's slow momentum. Parameters without `requires_grad`,
    or not in the optimizer, are never updated.

    Raises ValueError for another optimizer, or fewer tokens than 1.
    """
    if tokens_per_step is not None and tokens_per_step < 1:
        raise ValueError(
            f"tokens_per_step={tokens_per_step}: give batch × length, 1 token or more, or None for "
            "a model in use"
        )
    run = declared(model, optimizer)
    found = [
        replace(component, blocks=_block(path))
        for path, module in model.named_modules()
        for component in _stream(module)
    ]
    found += _pretraining(model, tokens_per_step, run)
    if tokens_per_step is not None:
        found += [
            Component(
                f"{run.name}: {m.name}", "optimizer", tokens_per_step * m.period, tokens_per_step,
                count, 0, 0, m.objective, "gradients g", m.rule,
            )
            for m, count in run.memories
            if count
        ]  # fmt: skip
    return _grouped(_merged(found))


def _merged(found: list[Component]) -> list[Component]:
    """One component for those that differ in their blocks and their sizes only."""
    merged: dict[Component, Component] = {}
    for c in found:
        key = replace(c, **_EMPTY, blocks=())
        old = merged.get(key, key)
        sums: dict[str, Any] = {size: getattr(old, size) + getattr(c, size) for size in _EMPTY}
        merged[key] = replace(c, **sums, blocks=tuple(sorted({*old.blocks, *c.blocks})))
    return list(merged.values())


def _grouped(components: list[Component]) -> list[Level]:
    """Levels by def. 3: by frequency, and at equal frequency first what others need."""

    def speed(c: Component) -> tuple[float, bool]:
        return -c.frequency, c.kind not in _READ_BY_OTHERS

    groups = groupby(sorted(components, key=speed), key=speed)
    levels = [tuple(group) for _, group in groups]
    return [Level(i, group[0].period, group) for i, group in enumerate(levels, 1)]


def _block(path: str) -> tuple[int, ...]:
    """The first number on the path of a module or parameter."""
    return tuple(int(part) for part in path.split(".") if part.isdigit())[:1]


# ------------------------------------------------------------------- what moves with the stream


def _stream(module: nn.Module) -> Iterator[Component]:
    """The components of one layer whose state belongs to a sample."""
    if isinstance(module, SelfModifyingTitans):
        yield from _titans(module)
    elif isinstance(module, StaticProjections):
        size = _numel(module.start)
        exact = module.writer.objective == "dot" and len(module.start) == 1
        yield from _memory("M", module.writer, size, pair=("k", "v"), exact=exact)
    elif isinstance(module, Attention):
        yield Component(
            "keys and values", "cache", 1, None, 0, 0, 2 * module.dim,
            "Σ exp⟨q, k⟩ ‖o − v‖²", "the sequence", "append; solved anew for each q",
        )  # fmt: skip
    elif isinstance(module, ContinuumMemory):
        yield from _continuum(module)
    conv = getattr(module, "conv", None)
    if isinstance(module, _LAYERS) and conv is not None:
        yield _buffer("convolution inputs", module.dim * (conv.width - 1), conv.width - 1)


def _titans(module: SelfModifyingTitans) -> Iterator[Component]:
    for names, writer, heads in module.groups:
        share = heads.stop - heads.start
        where = "" if share == module.heads else f" (heads {heads.start + 1}–{heads.stop})"
        for name in names:
            # the other memories are read by the layer at their chunk's first weights
            read = writer.read if name == "mem" else "boundary"
            size = _numel(module.start[name]) * share // module.heads
            yield from _memory(SYMBOLS[name] + where, writer, size, ("k", "v̂"), read)


def _continuum(module: ContinuumMemory) -> Iterator[Component]:
    kept = 0
    for i, mlp in enumerate(module.mlps, 1):
        if not isinstance(mlp, LevelMLP) or mlp.level.chunk is None:
            continue  # never written: it belongs to pre-training
        size, name = sum(w.numel() for w in mlp.learning), f"CMS MLP {i}"
        key = "φ(W₁ z₋₁)" if mlp.linear else "z₋₁"
        yield from _memory(name, mlp.writer, size, (key, "P z"))
        kept += mlp.memory.hidden if mlp.linear else module.dim
        if mlp.parent is not None:
            yield Component(
                f"start of {name}", "start", mlp.parent, None, 0, size, 0,
                "‖W₀ − W‖²", f"{mlp.parent} tokens",
                "W₀ ← W₀ + λ (W − W₀), then W ← W₀",
            )  # fmt: skip
    if kept:
        yield _buffer("CMS previous inputs", kept, 1)


def _memory(
    name: str, writer: Any, size: int, pair: tuple[str, str], read: str | None = None,
    exact: bool = False,
) -> Iterator[Component]:  # fmt: skip
    """Fast weights under a `Writer`, and their momentum if the rule has one.

    exact: the inner gradient does not depend on the weights, so that no chunk makes it older.
    """
    rule, (k, v) = writer.rule, pair
    by_token = (read or writer.read) == "token"
    period = getattr(rule, "period", 1) if by_token else writer.chunk
    gradient_period = 1 if exact else writer.chunk
    kind = getattr(writer.objective, "name", writer.objective)
    objective = {"dot": f"−⟨M({k}), {v}⟩", "l2": f"½‖M({k}) − {v}‖²"}.get(kind, kind)
    yield Component(
        name, "memory", period, gradient_period, 0, size, 0,
        objective, "the sequence", _rule(rule),
    )  # fmt: skip
    if getattr(rule, "momentum", False):
        yield Component(
            f"momentum of {name}", "momentum", 1, gradient_period, 0, size, 0,
            "−⟨S, ∇L⟩", "its gradients", "S ← θ S − η ∇L",
        )  # fmt: skip


def _rule(rule: Any) -> str:
    if not hasattr(rule, "delta"):
        return f"{type(rule).__name__} rule"
    steps = ["delta rule (DGD)" if rule.delta else "gradient descent"]
    steps += ["retention α"] * rule.decay + ["momentum θ"] * rule.momentum
    return ", ".join(steps)


def _buffer(name: str, size: int, tokens: int) -> Component:
    last = "the last token" if tokens == 1 else f"the last {tokens} tokens"
    return Component(name, "buffer", 1, None, 0, size, 0, None, last, "shift")


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------- what pre-training learns


def _pretraining(model: nn.Module, tokens_per_step: int | None, run: Declared) -> list[Component]:
    """The model's parameters, in groups by their part in it."""
    modules = dict(model.named_modules())
    found = []
    for path, parameter in model.named_parameters():
        step = run.steps.get(id(parameter)) if parameter.requires_grad else None
        period = tokens_per_step if step else None
        rule = (step if period else "fixed") if step else "frozen"
        found.append(
            Component(
                _part(path, modules), "weights", period, period, parameter.numel(), 0, 0,
                "the outer loss", "all data", rule, _block(path),
            )
        )  # fmt: skip
    return found


def _part(path: str, modules: dict[str, nn.Module]) -> str:
    """What a parameter is for: the name of its group."""
    names = path.split(".")
    if "norm" in names:
        return "norms"
    for i in range(len(names) - 1, -1, -1):
        owner = modules[".".join(names[:i])]
        if isinstance(owner, _LAYERS):
            return _part_of_layer(owner, names[i:])
        if isinstance(owner, nn.Embedding):
            return "embedding"
    return "output head" if names[0] == "head" else "other weights"


def _part_of_layer(owner: nn.Module, rest: list[str]) -> str:
    if isinstance(owner, SwiGLU):
        return "MLP (SwiGLU)"
    if isinstance(owner, ContinuumMemory):
        if rest[0] != "mlps":
            return "CMS weights of the sum"
        if owner.levels[int(rest[1])].chunk is None:
            return f"CMS MLP {int(rest[1]) + 1}, never written"
        return "CMS start values" if rest[2] == "start" else "CMS targets P, steps η"
    if rest[0] != "start":
        return "mixer projections, gates"
    if isinstance(owner, SelfModifyingTitans) and rest[1] not in (*owner.adapt, "mem"):
        return f"{SYMBOLS[rest[1]]}, never written"
    return "memory start values"


# ------------------------------------------------------------------------------------- showing


def to_json(levels: list[Level]) -> list[dict[str, Any]]:
    """The levels as plain JSON data, with every component's frequency."""
    data = [asdict(level) for level in levels]
    for level, told in zip(levels, data):
        told["components"] = [{**asdict(c), "frequency": c.frequency} for c in level.components]
    return data


def render(levels: list[Level]) -> Group:
    """The levels as text for `rich.print`; memories that differ in name only share a row."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    weights = [c for level in levels for c in level.components if c.kind == "weights"]
    step = next((c.period for c in weights if c.period), None)
    rows = [[_row(c) for c in _same_but_name(level.components)] for level in levels]
    cells = [_HEAD, *(row for part in rows for row in part)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    for level, part in zip(levels, rows):
        table = Table(box=None, show_header=level.number == 1, pad_edge=False, header_style="dim")
        table.expand = True  # then the ratios align the tables of all levels
        for name, width, share in zip(_HEAD, [*widths, None, None, None], _SHARES):
            table.add_column(name, width=width, ratio=share, overflow="fold")
        table.columns[2].justify = "right"
        for i, row in enumerate(part):
            same = i > 0 and row[3:] == part[i - 1][3:]
            table.add_row(*map(Text, row[:3]), *map(Text, _DITTO if same else row[3:]))
        title = Text(_title(level, step), style="bold cyan")
        shown += [Text(), title, table]
    shown += [Text(), Text(_LEGEND, style="dim")]
    return Group(*shown)


_HEAD = ("Component", "Blocks", "Values", "Objective", "Context", "Rule")
_DITTO = ("″", "″", "″")
_SHARES = (None, None, None, 15, 14, 22)  # of the width that the first three leave
_LEGEND = (
    "∇ every n tokens: the inner gradients are taken at weights that are refreshed so often. "
    "Equal frequency, two levels: the upper one's state is needed for the lower one's update."
)


def _title(level: Level, step: int | None) -> str:
    if level.period is None:
        every = "never updated"
    else:
        every = "every token" if level.period == 1 else f"every {level.period:,} tokens"
    kinds = {c.kind for c in level.components}
    if level.period is not None and step and kinds & {"weights", "optimizer"}:
        steps = level.period // step
        every += ", an optimizer step" if steps == 1 else f", {steps:,} optimizer steps"
    whose = "shared by all samples" if kinds <= {"weights", "optimizer"} else "of each sample"
    return f"Level {level.number} · {every} · {whose}"


def _row(c: Component) -> tuple[str, ...]:
    rule = c.rule
    if c.gradient_period not in (None, c.period):
        rule += f"; ∇ every {c.gradient_period:,} tokens"
    size = c.state_per_sample or c.parameters
    values = f"{c.state_per_token:,} a token" if c.state_per_token else f"{size:,}"
    return c.name, _range(c.blocks), values, c.objective or "–", c.context, rule


def _same_but_name(components: tuple[Component, ...]) -> list[Component]:
    rows: dict[Component, Component] = {}
    for c in components:
        key = replace(c, name="", **_EMPTY)
        if c.kind != "memory" or key not in rows:
            rows[key if c.kind == "memory" else c] = c
            continue
        old = rows[key]
        size = old.state_per_sample + c.state_per_sample
        rows[key] = replace(old, name=f"{old.name}, {c.name}", state_per_sample=size)
    return list(rows.values())


def _range(blocks: tuple[int, ...]) -> str:
    if len(blocks) > 1 and blocks == tuple(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}–{blocks[-1]}"
    return ", ".join(map(str, blocks))


__all__ = ["OPTIMIZERS", "Component", "Level", "levels", "render", "to_json"]
