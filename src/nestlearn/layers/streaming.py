"""What a layer with a state is: its loop along a stream, its compiled step, its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import state as tree
from ..memory import Weights
from ..scan import Span, scan
from .together import joined, parted


def check_input(x: Tensor, dim: int, reader: nn.Module | None) -> None:
    """Raise ValueError unless x is floating [B, T ≥ 1, dim], finite, and of the dtype of the
    weights of `reader`, a linear map that reads it (None: any dtype). Under autocast any will do.
    """
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}: this layer takes [batch, tokens, {dim}]")
    if x.shape[1] == 0:
        raise ValueError("x has T = 0 tokens: give at least one")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give a floating type")
    if traced():
        return
    own: Any = getattr(reader, "weight", None)  # sharded, quantised ones have types of their own
    foreign = type(own) is nn.Parameter and own.is_floating_point() and own.dtype != x.dtype
    if foreign and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"x has dtype {x.dtype} and the layer's weights {own.dtype}: give x.to({own.dtype}), "
            f"or cast the layer by layer.to({x.dtype})"
        )
    if not x.sum().isfinite() and not x.isfinite().all():  # a sum is one pass, and may overflow
        b, t, _ = (int(i) for i in (~x.isfinite()).nonzero()[0])
        raise ValueError(
            f"x has NaN or infinity, first in sample {b} at token {t}: one such value would stay "
            "in that sample's memory for good, so find where it comes from"
        )


def traced() -> bool:
    """Whether a compiler or a CUDA graph is recording: then values cannot be looked at."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def check_heads(dim: int, heads: int) -> None:
    """Raise ValueError unless `heads` divides `dim`."""
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}: choose a divisor of {dim}")


def check_truncate(truncate: int | None) -> None:
    """Raise ValueError unless `truncate` is None or a number of tokens."""
    if truncate is not None and truncate < 1:
        raise ValueError(f"truncate={truncate}: give 1 token or more, or None for no truncation")


def chosen(given: Any, kind: type, changes: dict[str, Any]) -> Any:
    """The options with these fields changed; ValueError unless they are of that kind."""
    if not isinstance(given, kind):
        name = kind.__name__
        raise ValueError(f"options={given!r}: give nestlearn.options.{name}(...), e.g. its chunk")
    return kind(**{**vars(given), **changes})


class Stepping(nn.Module):
    """A module whose `_step(state, xs, span, starts)` runs along the stream, one span at a time.

    starts: what the step needs of the parameters, made once for a call.
    """

    truncate: int | None
    remat: bool
    # methods for all tokens of a call at once: of each argument the axes that vary in size, of the
    # first one the tokens' last
    _around: ClassVar[Mapping[str, tuple[tuple[int, ...], ...]]] = {}
    _compiled: Mapping[str, Callable] = MappingProxyType({})
    _options: Mapping[str, Any] | None = None  # with which it was compiled

    def _step(self, state: Any, xs: Any, span: Span, starts: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def compile(self, **options: Any) -> None:
        """Compile, in place, by `torch.compile(..., **options)`: the step of one whole chunk, and
        what all tokens of a call pass before and after the memories.

        The step is one graph for all chunks, batches and lengths, where `torch.compile(module)`
        would unroll the loop over chunks; what stands around it is one for batches of one, one for
        larger ones. Single tokens and what is left of a chunk at the end of a call run eagerly, and
        so do layers in which memories have several chunk sizes, and steps that are kernels of our
        own from end to end.
        """
        # what an equal layer shares: "training" changes, a "level" has what parameters start from
        skipped = ("training", "level")
        said = {k: v for k, v in vars(self).items() if k[0] != "_" and k not in skipped}
        alike = repr((said, [(name, *p.shape) for name, p in self.named_parameters()]))
        self._options = options
        self._compiled = {
            name: torch.compile(
                _shared_by(alike, getattr(type(self), name)), fullgraph=name == "_step", **options
            )
            for name in ("_step", *self._around)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code, which no file can hold: a copy compiles its own when it runs."""
        state = super().__getstate__()
        state.pop("_compiled", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._options is not None:
            Stepping.compile(self, **self._options)

    def _again(self, f: Callable, *args: Any) -> Any:
        """f(*args), with `remat` computed again in the backward pass."""
        if self.remat and torch.is_grad_enabled():
            return checkpoint(f, *args, use_reentrant=False)
        return f(*args)

    def _outside(self, name: str, *args: Any) -> Any:
        """One of the methods `_around` the memories, compiled if the layer is."""
        axes = self._around[name]
        if name not in self._compiled or args[0].shape[axes[0][-1]] == 1:
            return self._again(getattr(self, name), *args)
        if not torch.compiler.is_compiling():
            for x, some in zip(args, axes):
                if x is not None:
                    torch._dynamo.maybe_mark_dynamic(x, some)
        return self._again(self._compiled[name], self, *args)

    def _stepping(self, starts: Any, chunk: int | None) -> Callable:
        """The step of a call, compiled if the layer is. chunk: the size that all memories have;
        None where a compiled step has no place.
        """
        step = partial(self._step, starts=starts)
        if chunk is None or "_step" not in self._compiled:
            return step

        def compiled(state: Any, xs: Any, span: Span) -> tuple[Any, Any]:
            if span.start % chunk or span.stop - span.start != chunk:
                return step(state, xs, span)
            state, xs = tree.tree_map(_with_any_batch, (state, xs))
            return self._compiled["_step"](self, state, xs, Span(0, chunk), starts)

        return compiled


@lru_cache(64)
def _shared_by(alike: str, f: Callable) -> Callable:
    """f with code and a name of its own, by which torch.compile keeps graphs: equal layers share
    them, others do not turn each other's widths and factors into variables.
    """
    if not isinstance(f, FunctionType):
        return f
    name = f"{f.__name__}_{crc32(alike.encode()):08x}"
    code = f.__code__.replace(co_name=name)
    own = FunctionType(code, f.__globals__, name, f.__defaults__, f.__closure__)
    own.__kwdefaults__ = f.__kwdefaults__
    return own


def compile_steps(module: nn.Module, **options: Any) -> None:
    """`Stepping.compile` for every such part of the module; the rest stays as it is."""
    for part in module.modules():
        if isinstance(part, Stepping):
            Stepping.compile(part, **options)


def _with_any_batch(x: Tensor) -> Tensor:
    """x, dense, so that its strides do not depend on the call's length."""
    x = x.contiguous()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


class StreamingLayer(nn.Module):
    """A layer whose state is `init_state(batch)` before the first token, checked after that."""

    _template: Template | None = None

    def init_state(self, batch: int, device: Device = None) -> Any:
        """The state before the first token, for `batch` samples; device: None, the parameters'."""
        raise NotImplementedError

    def compile(self, **options: Any) -> None:
        """Compile, in place, the step of one chunk and what is around it: `Stepping.compile`."""
        compile_steps(self, **options)

    def begin(self, state: Any, x: Tensor) -> Any:
        """`state`, or the first one if it is None, for the samples of x.

        Raises ValueError unless it has this layer's structure and shapes, and a row for each.
        """
        if state is None:
            # an offloaded parameter is on no device that could be told from it
            return self.init_state(x.shape[0], x.device)
        if self._template is None:
            with torch.no_grad():
                first = self.init_state(0, x.device)
            shapes = {path: shape_of(leaf) for path, leaf in tree.leaves(first)}
            self._template = type(first), shapes
        check_state(state, self._template, x.shape[0], type(self).__name__)
        return state if traced() else tree.trainable(state)


class Course(NamedTuple):
    """How the memories of a call go along it. starts: what a step needs of the parameters, made
    once for a call. chunk: as in `Stepping._stepping`. chunks, run: as in `nestlearn.scan.scan`;
    after(memories, span, starts), too. joins: a step needs nothing else of the layer's own, and of
    the starts a row for each sample, so that equal layers may go along as one.
    """

    starts: Any
    chunk: int | None
    chunks: tuple[int, ...]
    run: int = 1
    after: Callable | None = None
    joins: bool = False


class Begun(NamedTuple):
    """A call before its memories run: what their steps take, and what the state keeps besides."""

    position: int
    conv: Any
    memories: Any
    xs: Any
    course: Course

    @property
    def joins(self) -> bool:
        """Whether it may run as one with those of equal layers: where all chunks begin anew."""
        return self.course.joins and not any(self.position % n for n in self.course.chunks)


class MemoryLayer(StreamingLayer, Stepping):
    """A layer that writes its memories step by step: `_inputs` of all tokens, steps, `_outputs`.

    Its state is a NamedTuple of the tokens seen, the convolution's inputs and the memories.
    """

    dim: int
    readout: Any  # its gate reads x
    _state: ClassVar[Callable]
    # `_inputs` of x [B, T, dim] and the convolution's state, `_outputs` of o [B, H, T, d] and x
    _around: ClassVar = {"_inputs": ((0, 1), (0,)), "_outputs": ((0, 2), (0, 1))}

    def _course(self, xs: Any, memories: Any) -> Course:
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        begun = self._begun(x, state)
        ys, memories = scan(**self._steps(begun, x.shape[1]))
        return self._ended(x, begun, torch.cat(ys, 2), memories)

    @staticmethod
    def together(layers: Sequence[MemoryLayer], xs: Sequence[Tensor], states: Sequence[Any]):
        """`nestlearn.layers.together.together`, xs [B, T, dim] of one length."""
        begun = [layer._begun(*given) for layer, *given in zip(layers, xs, states)]
        if layers[0].truncate is None and all(b.joins for b in begun):
            memories, given, starts = joined([(b.memories, b.xs, b.course.starts) for b in begun])
            course = begun[0].course._replace(starts=starts)
            one = begun[0]._replace(memories=memories, xs=given, course=course)
            ys, after = scan(**layers[0]._steps(one, xs[0].shape[1]))
            ran = parted((torch.cat(ys, 2), after), [len(x) for x in xs])
        else:
            each = (scan(**a._steps(b, x.shape[1])) for a, b, x in zip(layers, begun, xs))
            ran = [(torch.cat(ys, 2), after) for ys, after in each]
        return [layer._ended(x, b, *y) for layer, x, b, y in zip(layers, xs, begun, ran)]

    def _begun(self, x: Tensor, state: Any) -> Begun:
        """What comes before the memories."""
        check_input(x, self.dim, self.readout.gate)
        position, conv, memories = self.begin(state, x)
        xs, conv = self._outside("_inputs", x, conv)
        memories = tree.tree_map(wide, memories)
        return Begun(position, conv, memories, xs, self._course(xs, memories))

    def _steps(self, begun: Begun, length: int) -> dict[str, Any]:
        """What `nestlearn.scan.scan` is given."""
        starts, chunk, chunks, run, after, _ = begun.course
        return {
            "f": self._stepping(starts, chunk), "state": begun.memories, "xs": begun.xs,
            "length": length, "chunks": chunks, "position": begun.position,
            "truncate": self.truncate, "remat": self.remat, "axis": 2, "run": run,
            "after": None if after is None else partial(after, starts=starts),
        }  # fmt: skip

    def _ended(self, x: Tensor, begun: Begun, o: Tensor, memories: Any) -> tuple[Tensor, Any]:
        """What comes after them."""
        y = self._outside("_outputs", o, x)
        return y, self._state(begun.position + x.shape[1], begun.conv, memories)


# What a state is: its type, and of each leaf the shape (None: it is no tensor). No tensors: these
# would be neither parameters nor buffers of the layer.
Template = tuple[type, dict[str, tuple[int, ...] | None]]
Device = torch.device | str | None


def shape_of(leaf: Any) -> tuple[int, ...] | None:
    """The shape of a state's leaf; None for one that is no tensor."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else None


def check_state(state: Any, template: Template, batch: int, owner: str) -> None:
    """Raise ValueError unless `state` fits the template; axes of length 0 there are free."""
    foreign = f"this is a state of another layer or configuration: give {owner} one of its own"
    kind, expected = template
    if type(state) is not kind:
        raise ValueError(f"state is a {type(state).__name__}; {foreign}")
    given = dict(tree.leaves(state))
    for path in sorted(given.keys() ^ expected.keys()):
        raise ValueError(
            f"state.{path} is {'missing' if path in expected else 'too much'}; {foreign}"
        )
    for path, like in expected.items():
        leaf = given[path]
        if not isinstance(leaf, Tensor) or like is None:
            if isinstance(leaf, Tensor) or like is not None:
                raise ValueError(f"state.{path} is a {type(leaf).__name__}; {foreign}")
            continue
        fits = leaf.ndim == len(like) and all(b in (0, a) for a, b in zip(leaf.shape[1:], like[1:]))
        if not fits:
            raise ValueError(f"state.{path} has shape {tuple(leaf.shape)}; {foreign}")
        if leaf.shape[0] != batch:
            raise ValueError(
                f"state.{path} has {leaf.shape[0]} rows for {batch} samples: choose them with "
                "nestlearn.state.select"
            )


class Starts(nn.ParameterList):
    """The start values of a memory's matrices, made by `make()`. Called, it gives them: what
    fetches a module's parameters when the module runs (offloading) then fetches these.
    """

    def __init__(self, make: Callable[[], Sequence[Tensor]]):
        super().__init__(make())
        self._make = make

    __call__ = nn.Module.__call__  # a ParameterList refuses to be called

    def forward(self) -> Weights:
        return tuple(self)

    def reset_parameters(self) -> None:
        """Draw the start values anew."""
        with torch.no_grad():
            for weight, start in zip(self, self._make()):
                weight.copy_(start)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: gates near 0 and 1 need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
