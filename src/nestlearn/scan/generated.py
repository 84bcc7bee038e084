"""Whole chunks of matrices that generate what they are written with, as one step of autograd.

    k = unit(W_k z), v = unit(W_v z), η = step_sizes(w_η · W_η z + b_η), α = σ(w_α · W_α z + b_α)

Then all memories of a head are written by the transition that they share (`transition`), and each
is brought back into its shell. The backward pass is written out: on a CPU half of a small chunk's
time is what lies between its products. `card.generated` is the same as kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.linalg import through_unit, unit_with_norm
from ..memory.memories import Matrix, Weights
from ..memory.rules import step_sizes, through_step_sizes
from . import fused, transition
from .chunk import Chunk, Given
from .shell import into_shell_, out_of_shell_


class Form(NamedTuple):
    """chunk: tokens. gates: how many memories say a gate, η or η and α. steps: limits of η. bound:
    the shell in which the last chunk ends. system: what `transition` is told.
    """

    chunk: int
    gates: int
    steps: tuple[float, float]
    bound: tuple[float, float] | None
    system: transition.Form


def why_not(chunk: Chunk, given: Given) -> str | None:
    """What keeps this form from whole chunks; keys, values and gates are not known yet."""
    memory = chunk.memory
    if not isinstance(memory, Matrix) or memory.shapes()[0][0] != memory.shapes()[0][1]:
        return f"{memory!r} is no square Matrix"
    return fused.why_not(chunk, given)


def run(
    chunk: Chunk,
    tokens: int,
    W: Weights,
    z: Tensor,
    q: Tensor,
    constants: Tensor,
    *,
    steps: tuple[float, float],
    bound: tuple[float, float] | None,
) -> tuple[Tensor, Weights]:
    """(o, W) after whole chunks of so many tokens, or after the beginning of one: z, q
    [B, heads, T, d], W [B, heads, memories, d, d]; constants as `writer.constants` makes them.

    bound: the shell, if the last chunk ends here.
    """
    rule: Any = chunk.rule
    system = transition.Form(rule, chunk.aim.name == "l2", chunk.read == "token", unit=True)
    form = Form(min(tokens, z.shape[2]), 2 if rule.decay else 1, steps, bound, system)
    given = (z, q.to(z.dtype), constants.to(z.dtype), W[0])
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    with torch.autocast(z.device.type, enabled=False):
        o, after = _Generated.apply(form, *given) if learns else _forward(form, *given)[0]
    return o.to(q.dtype), (after,)


class _Generated(torch.autograd.Function):
    """(z, q [B, heads, T, d], constants, W [B, heads, memories, d, d]) -> (o, W after)."""

    @staticmethod
    def forward(ctx: Any, form: Form, z: Tensor, q: Tensor, constants: Tensor, W: Tensor) -> tuple:
        outputs, states, kept = _forward(form, z, q, constants, W)
        ctx.form = form
        ctx.save_for_backward(z, q, constants, states, *(x for one in kept for x in one))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dW: Tensor) -> tuple:
        z, q, constants, states, *flat = ctx.saved_tensors
        size = len(Kept._fields)
        kept = [Kept(*flat[i : i + size]) for i in range(0, len(flat), size)]
        with torch.autocast(do.device.type, enabled=False):  # also where a caller's still holds
            return None, *_backward(ctx.form, z, q, constants, states, kept, do, dW)


class Kept(NamedTuple):
    """Of a chunk: k and v side by side [N, C, 2, d] and the norms that they had, the rows of W that
    logits ask for and the logits, the norms of W before its shell and in it; then A and what
    `transition` keeps.
    """

    said: Tensor
    norms: Tensor
    rows: Tensor
    logits: Tensor
    before: Any
    size: Any
    A: Tensor
    q: Any
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Any
    x: Tensor
    faded: Any
    inverse: Any
    share: Any
    z: Any
    gamma: Tensor
    ratio: Tensor


class Constants:
    """What the chunks have in common, of N = B · heads: readouts [N, gates, gates · d], each beside
    zeros, so that one product asks all gates' memories; their biases; the start values' norms.
    """

    def __init__(self, form: Form, constants: Tensor, memories: int):
        flat, gates = constants.flatten(0, 1), form.gates
        scalars = flat[:, :-memories].unflatten(1, (gates, -1))
        self.bias = scalars[..., -1:]
        self.readout = torch.diag_embed(scalars[..., :-1].mT).permute(0, 2, 3, 1).flatten(2)
        self.start = flat[:, -memories:, None, None]


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, heads, T, d] as [T / size, B · heads, size, d]."""
    return x.unflatten(2, (-1, size)).flatten(0, 1).transpose(0, 1).contiguous()


def _tokens(x: Tensor, like: Tensor) -> Tensor:
    """What `_chunks` made, as it was."""
    chunks, _, size, d = x.shape
    return x.transpose(0, 1).reshape(*like.shape[:2], chunks * size, d)


def _forward(
    form: Form, z: Tensor, q: Tensor, constants: Tensor, W: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, list[Kept]]:
    """The outputs, the weights before, between and after the chunks, and what is kept of each."""
    memories, d = W.shape[2:4]
    zs, qs, o = _chunks(z, form.chunk), _chunks(q, form.chunk), []
    c = Constants(form, constants, memories)
    N, gates = zs.shape[1], slice(2 * d, (2 + form.gates) * d)
    states, kept = W.new_empty(len(zs) + 1, N, memories * d, d), []
    states[0].view(W.shape).copy_(W)
    for i, (z, q) in enumerate(zip(zs, qs)):
        joint, after = states[i], states[i + 1]
        said, norms = unit_with_norm(torch.bmm(z, joint[:, : 2 * d].mT).unflatten(2, (2, d)))
        rows = torch.bmm(c.readout, joint[:, gates])
        logits = torch.baddbmm(c.bias, rows, z.mT)
        log_alpha = F.logsigmoid(logits[:, 1]) if form.gates == 2 else None
        eta = step_sizes(logits[:, 0], form.steps, log_alpha)
        k, v = said.unbind(2)
        asked = q if form.system.token else None
        (A, *read), system = transition.forward(form.system, asked, k, v, eta, log_alpha)
        o.append(torch.bmm(read[0] if read else q, joint[:, -d:].mT))
        torch.bmm(joint, A, out=after)
        sizes: tuple[Any, Any] = (None, None)
        if form.bound is not None:
            sizes = into_shell_(after.view(N, memories, d, d), c.start, *form.bound)
        kept.append(Kept(said, norms, rows, logits, *sizes, A, *system))
    last = states[-1].view(W.shape).clone()  # a view would keep all of them as long as a state
    return (_tokens(torch.stack(o), W), last), states, kept


def _backward(
    form: Form, z: Tensor, q: Tensor, constants: Tensor, states: Tensor, kept: list[Kept],
    do: Tensor, dW: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of z, q, constants and W."""
    memories, d = dW.shape[2:4]
    c, gates = Constants(form, constants, memories), slice(2 * d, (2 + form.gates) * d)
    zs, qs, dos = (_chunks(x, form.chunk) for x in (z, q, do))
    dzs, dqs = torch.empty_like(zs), torch.empty_like(qs)
    djoint = dW.clone(memory_format=torch.contiguous_format).view(states[0].shape)
    dreadout, dbias, dstart = (torch.zeros_like(x) for x in (c.readout, c.bias, c.start))
    for i in reversed(range(len(kept))):
        one, joint = kept[i], states[i]
        if form.bound is not None:
            each, deach = (x.view(len(x), memories, d, d) for x in (states[i + 1], djoint))
            dstart += out_of_shell_(each, deach, one.before, one.size, c.start, *form.bound)
        dA, djoint = torch.bmm(joint.mT, djoint), torch.bmm(djoint, one.A.mT)
        asked = torch.bmm(dos[i], joint[:, -d:])
        djoint[:, -d:] += torch.bmm(dos[i].mT, one.z if form.system.token else qs[i])
        back = transition.Backward(form.system, *one[Kept._fields.index("q") :])
        back.through_transition(dA)
        dqs[i] = back.through_read(asked) if form.system.token else asked
        back.through_system()
        dk, dv, deta, dlog_alpha = back.through_sizes()
        dlogits = _through_gates(form, one, deta, dlog_alpha)
        drows = torch.bmm(dlogits, zs[i])
        dreadout.baddbmm_(drows, joint[:, gates].mT)
        dbias += dlogits.sum(-1, keepdim=True)
        djoint[:, gates] += torch.bmm(c.readout.mT, drows)
        dsaid = through_unit(one.said, one.norms, torch.stack((dk, dv), 2)).flatten(2)
        djoint[:, : 2 * d] += torch.bmm(dsaid.mT, zs[i])
        torch.bmm(dlogits.mT, one.rows, out=dzs[i]).baddbmm_(dsaid, joint[:, : 2 * d])
    own = dreadout.unflatten(2, (form.gates, d)).diagonal(dim1=1, dim2=2).mT
    scalars = torch.cat((own, dbias), 2).flatten(1)
    dconstants = torch.cat((scalars, dstart.flatten(1)), 1).view(constants.shape)
    return _tokens(dzs, z), _tokens(dqs, z), dconstants, djoint.view(dW.shape)


def _through_gates(form: Form, one: Kept, deta: Tensor, dlog_alpha: Any) -> Tensor:
    """Gradients of the logits [N, gates, C] from those of η and log α."""
    dlogit, more = through_step_sizes(one.logits[:, 0], form.steps, one.log_alpha, deta)
    if form.gates == 1:
        return dlogit.unsqueeze(1)
    if more is not None:
        dlog_alpha = dlog_alpha + more
    return torch.stack((dlogit, dlog_alpha * torch.sigmoid(-one.logits[:, 1])), 1)
