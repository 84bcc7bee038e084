"""Sequence mixers beside self-modifying Titans, with the same interface, and the parts they share.

Every layer here is `(x [B, T, D], state=None) -> (y [B, T, D], state)`; the state is a NamedTuple
with a batch axis, and a stream may be split anywhere between two calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar, NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import state as tree
from ..memory import Gates, Matrix, ResidualMLP, Weights, decay, delta, hebbian
from ..memory import momentum as with_momentum
from ..memory.linalg import unit
from ..options import DeltaNet, Linear, StaticTitans
from ..scan import FastWeights, Span, Writer, scan


def check_input(x: Tensor, dim: int) -> None:
    """Raise ValueError unless x is floating [B, T ≥ 1, dim] and finite."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}: this layer takes [batch, tokens, {dim}]")
    if x.shape[1] == 0:
        raise ValueError("x has T = 0 tokens: give at least one")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give a floating type")
    if not traced() and not x.isfinite().all():
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
    return replace(given, **changes)


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

    def _faded(self, state: Any, starts: Any) -> Any:
        """The state after a pause at a multiple of `fade_every` tokens; only where there is one."""
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

    def _scan(
        self, state: Any, xs: Any, starts: Any, *, length: int, chunks: tuple[int, ...],
        position: int, axis: int = 1, run: int = 1, in_kernels: bool = False,
        remat: bool | None = None, fade_every: int | None = None,
    ) -> tuple[list[Tensor], Any]:  # fmt: skip
        def written(state: Any, xs: Any, span: Span) -> tuple[Any, Any]:
            first, last = span
            whole = first % chunks[0] == 0 and last - first == chunks[0] and len(set(chunks)) == 1
            if "_step" not in self._compiled or in_kernels or not whole:
                return self._step(state, xs, span, starts)
            state, xs = tree.tree_map(_with_any_batch, (state, xs))
            return self._compiled["_step"](self, state, xs, Span(0, chunks[0]), starts)

        def step(state: Any, xs: Any, span: Span) -> tuple[Any, Any]:
            y, state = written(state, xs, span)
            fades = fade_every is not None and span.ends(fade_every)
            return y, self._faded(state, starts) if fades else state

        ends = chunks if fade_every is None else (*chunks, fade_every)
        return scan(
            step, tree.tree_map(wide, state), xs, length=length, chunks=ends,
            position=position, truncate=self.truncate, axis=axis, run=run,
            remat=self.remat if remat is None else remat,
        )  # fmt: skip


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


# `_inputs` of x [B, T, dim] and the convolution's state, `_outputs` of o [B, H, T, d] and x
AROUND = {"_inputs": ((0, 1), (0,)), "_outputs": ((0, 2), (0, 1))}


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


class BiasedLinear(nn.Linear):
    """A linear map of dim whose bias starts at `biases`, each for so many heads."""

    def __init__(self, dim: int, biases: Sequence[float], heads: int = 1):
        self.biases, self.heads = tuple(biases), heads  # Linear's own constructor resets
        super().__init__(dim, len(biases) * heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias.copy_(torch.tensor(self.biases).repeat_interleave(self.heads))


class ShortConvolution(nn.Module):
    """Causal depth-wise convolution of `width` taps; state [B, D, width − 1], the last inputs."""

    def __init__(self, dim: int, width: int = 4):
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: a convolution has 1 tap or more")
        self.width = width
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Taps whose answer to noise has its size."""
        with torch.no_grad():
            self.weight.normal_().div_(math.sqrt(self.width))

    def init_state(self, batch: int, device: Device = None) -> Tensor:
        """Zeros: before the first token there is nothing."""
        dim, width = self.weight.shape
        return self.weight.new_zeros(batch, dim, width - 1, device=device)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        past = self.init_state(x.shape[0], x.device) if state is None else state
        seen = torch.cat([past.to(x.dtype), x.mT], -1)
        y = F.conv1d(seen, self.weight.to(x.dtype).unsqueeze(1), groups=x.shape[2])
        return F.silu(y).mT, seen[..., seen.shape[-1] - self.width + 1 :].contiguous()


class Readout(nn.Module):
    """What follows a memory's answer: RMS norm per head, a gate from the input, a projection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, H, T, D / H], x [B, T, D] -> [B, T, D]."""
        o = rearrange(self.norm(o), "b h t d -> b t (h d)")
        return self.out(o * F.silu(self.gate(x)))


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: gates near 0 and 1 need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step_sizes(logits: Tensor, eta_max: float, log_alpha: Tensor | None) -> Tensor:
    """η in (0, eta_max); beyond 1 and with a retention α, in (0, eta_max (1 + α) / 2).

    Then α − η, the smallest eigenvalue of a transition, stays above −1: where it does not, a memory
    that is to alternate grows without end.
    """
    eta = eta_max * torch.sigmoid(logits)
    if eta_max <= 1 or log_alpha is None:
        return eta
    return eta * (1 + log_alpha.exp()) / 2


def logit(p: float) -> float:
    """The bias whose sigmoid is p."""
    return math.log(p / (1 - p))


class AttentionState(NamedTuple):
    """position: tokens seen. conv: inputs of the convolution. k, v [B, H, position, D / H]."""

    position: int
    conv: Tensor | None
    k: Tensor
    v: Tensor


class Attention(StreamingLayer):
    """Causal softmax attention with rotary positions, in the skeleton of the memories.

    `conv=0` and `gate=False` is the attention of a plain Transformer++. `rotary=False` leaves the
    positions out. Cost grows with the length of the stream, and so does the state.
    """

    def __init__(
        self, dim: int, heads: int, *, conv: int = 0, gate: bool = False, rotary: bool = True
    ):
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.rotary = dim, heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConvolution(dim, conv) if conv else None
        self.readout = Readout(dim, heads) if gate else None
        self.out = None if gate else nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int, device: Device = None) -> AttentionState:
        """The state before the first token: an empty cache."""
        conv = None if self.conv is None else self.conv.init_state(batch, device)
        size = (batch, self.heads, 0, self.dim // self.heads)
        empty = self.qkv.weight.new_zeros(size, device=device)
        return AttentionState(0, conv, empty, empty)

    def forward(
        self, x: Tensor, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        check_input(x, self.dim)
        state = self.begin(state, x)
        T, past = x.shape[1], state.position
        z, conv = x, None
        if self.conv is not None:
            z, conv = self.conv(x, state.conv)
        q, k, v = rearrange(self.qkv(z), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        if self.rotary:
            q, k = _rotate(q, past), _rotate(k, past)
        if past > 0:
            k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
        if past == 0:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        if self.readout is not None:
            y = self.readout(o, x)
        else:
            assert self.out is not None
            y = self.out(rearrange(o, "b h t d -> b t (h d)"))
        return y, AttentionState(past + T, conv, k, v)


def _rotate(x: Tensor, past: int) -> Tensor:
    """Rotary position embedding of [..., T, d], the first token at position `past`."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = torch.outer(
        torch.arange(past, past + x.shape[-2], device=x.device, dtype=dtype), frequency
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class MixerState(NamedTuple):
    """position: tokens seen. conv: inputs of the convolution. memory: the fast weights."""

    position: int
    conv: Tensor | None
    memory: FastWeights


class StaticProjections(StreamingLayer, Stepping):
    """One memory per head, written with keys, values and gates from static projections.

    The base of the baselines: `static_titans`, `gated_deltanet` and `linear_attention` below choose
    the memory and the rule. eta_max bounds the step: 2 gives the delta rule negative eigenvalues.
    """

    _around: ClassVar = AROUND

    def __init__(
        self, dim: int, heads: int, writer: Writer, *, eta_max: float = 1.0, conv: int = 4,
        truncate: int | None = None, remat: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, heads)
        check_truncate(truncate)
        self.dim, self.heads, self.writer, self.eta_max = dim, heads, writer, eta_max
        self.truncate, self.remat = truncate, remat
        rule = writer.rule
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConvolution(dim, conv) if conv else None
        kinds = 1 + rule.decay + getattr(rule, "momentum", False)
        self.gates = BiasedLinear(dim, [0.0, *[5.0] * rule.decay, 0.0][:kinds], heads)
        if not isinstance(writer.memory, Matrix | ResidualMLP):
            raise ValueError(f"memory {writer.memory!r}: give a Matrix or a ResidualMLP")
        if isinstance(writer.memory, Matrix) and writer.bound is not None:
            raise ValueError(
                "bound: a matrix memory starts at zero, so no multiple of it bounds it"
            )
        if not 0 < eta_max <= 2:
            raise ValueError(f"eta_max={eta_max}: give a step bound in (0, 2]")
        self.start = Starts(partial(start_weights, writer.memory, heads))
        self.readout = Readout(dim, heads)

    def init_state(self, batch: int, device: Device = None) -> MixerState:
        """The state before the first token."""
        conv = None if self.conv is None else self.conv.init_state(batch, device)
        return MixerState(0, conv, self.writer.begin(self.start(), batch))

    def forward(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        check_input(x, self.dim)
        state = self.begin(state, x)
        pairs, conv = self._outside("_inputs", x, state.conv)
        ys, memory = self._scan(
            state.memory, pairs, self.start(), length=x.shape[1],
            chunks=(self.writer.chunk,), position=state.position, axis=2,
        )  # fmt: skip
        y = self._outside("_outputs", torch.cat(ys, 2), x)
        return y, MixerState(state.position + x.shape[1], conv, memory)

    def _inputs(self, x: Tensor, conv: Tensor | None):
        """q, k, v [B, H, T, D / H], gates [B, H, T]; the convolution's state."""
        z = x
        if self.conv is not None:
            z, conv = self.conv(x, conv)
        q, k, v = rearrange(self.qkv(z), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        q, k = unit(q)[0], unit(k)[0]
        gates = list(rearrange(wide(self.gates(z)), "b t (n h) -> n b h t", h=self.heads))
        eta = gates.pop(0)
        log_alpha = F.logsigmoid(gates.pop(0)) if self.writer.rule.decay else None
        eta = step_sizes(eta, self.eta_max, log_alpha)
        log_theta = F.logsigmoid(gates.pop(0)) if gates else None
        return (q, k, v, Gates(eta, log_alpha, log_theta)), conv

    def _outputs(self, o: Tensor, x: Tensor) -> Tensor:
        return self.readout(o, x)

    def _step(self, memory: FastWeights, xs: tuple, span: Span, W0: Weights):
        q, k, v, gates = xs
        return self.writer.write(memory, q, k, v, gates, span, W0)


def start_weights(memory: Matrix | ResidualMLP, *lead: int) -> list[Tensor]:
    """Start values of a memory: zeros for a matrix, unit pre-activations for an MLP."""
    weights = []
    for out, into in memory.shapes():
        scale = 0.0 if isinstance(memory, Matrix) else 1 / math.sqrt(max(out, into))
        weights.append(torch.randn(*lead, out, into) * scale)
    return weights


def static_titans(
    dim: int, heads: int, options: StaticTitans = StaticTitans(), *,
    truncate: int | None = None, remat: bool = False, **changes: Any,
) -> StaticProjections:  # fmt: skip
    """Titans: one residual MLP memory per head, static projections, momentum, retention (L2)."""
    options = chosen(options, StaticTitans, changes)
    width = dim // heads
    hidden = options.hidden or width
    memory = ResidualMLP(width, hidden, gain=math.sqrt(hidden))
    rule = with_momentum(decay(hebbian(normalize=True)))
    writer = Writer(memory, rule, options.chunk, objective="l2", bound=(0.25, 2.0))
    return StaticProjections(dim, heads, writer, conv=options.conv, truncate=truncate, remat=remat)


def gated_deltanet(
    dim: int, heads: int, options: DeltaNet = DeltaNet(), *,
    truncate: int | None = None, remat: bool = False, **changes: Any,
) -> StaticProjections:  # fmt: skip
    """Gated DeltaNet: a matrix memory, the delta rule with retention; exact at any chunk size."""
    options = chosen(options, DeltaNet, changes)
    writer = Writer(Matrix(dim // heads, dim // heads), decay(delta()), options.chunk)
    return StaticProjections(
        dim, heads, writer, eta_max=options.eta_max, conv=options.conv,
        truncate=truncate, remat=remat,
    )  # fmt: skip


def linear_attention(
    dim: int, heads: int, options: Linear = Linear(), *,
    truncate: int | None = None, remat: bool = False, **changes: Any,
) -> StaticProjections:  # fmt: skip
    """Linear attention: a matrix memory that only adds."""
    options = chosen(options, Linear, changes)
    writer = Writer(Matrix(dim // heads, dim // heads), hebbian(), options.chunk)
    return StaticProjections(
        dim, heads, writer, eta_max=options.eta_max, conv=options.conv,
        truncate=truncate, remat=remat,
    )  # fmt: skip
