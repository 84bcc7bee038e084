"""A chunk of matrices that make their own values: one product from the right, whatever was read.

With values W v and keys k, all that a chunk writes is W times what its tokens alone say. With
r = η / max(1, ‖k‖²), s = r if the rule normalizes, else η, l = 1 for L2 (else 0), and row t of Γ₋
and γ₋ row t − 1 of Γ and γ, what the write of token t finds,

    (I + r (Γ₋ ∘ k kᵀ)) x = s v − (r γ₋ + l s) k,
    W_C = W A,  A = γ_C I + xᵀ (Γ_C k),     o = W z,  z = γ q + (Γ ∘ q kᵀ) x

(plain descent, without the delta rule, has no system and no r γ₋). So memories that share keys and
gates share A, and their outputs stand side by side in one W. The backward pass is written out.
Rows are [N, T, d], all leading axes one; every product is one `bmm`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.linalg import inverse_unit_lower
from ..memory.memories import Matrix, Weights
from ..memory.rules import Gates, GradientRule, RuleState
from . import fused
from .chunk import Chunk, Given
from .rows import Scalars, steps

WIDE = 4  # widths of so many times the tokens are cheaper without A


def why_not(chunk: Chunk, given: Given) -> str | None:
    """What keeps this form from running the call."""
    W, _, k, v, gates, _ = given
    if not isinstance(chunk.memory, Matrix):
        return f"{type(chunk.memory).__name__} is no Matrix"
    if not chunk.makes_values or chunk.answering is None:
        return "the memories do not make their own values, or not one of them alone answers"
    scalars, rank = [g for g in gates if g is not None], W[0].ndim
    like = rank > 2 and k.ndim == v.ndim == rank and all(g.ndim == rank - 1 for g in scalars)
    if not like or {k.shape[-3], v.shape[-3], *(g.shape[-2] for g in scalars)} != {1}:
        return "the memories do not share keys, gates and what they make values of"
    return too_wide(k) or fused.why_not(chunk, given)


def too_wide(k: Tensor) -> str | None:
    """Whether A costs more than it saves, and why."""
    if k.shape[-1] <= WIDE * k.shape[-2]:
        return None
    return f"keys of {k.shape[-1]} for {k.shape[-2]} tokens: W A costs more than it saves"


def options() -> dict[str, Any]:
    """It needs nothing to be told."""
    return {}


def update(
    chunk: Chunk,
    W: Weights,
    S: RuleState,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    at: Weights,
    offset: int,
) -> tuple[Tensor | None, Weights, RuleState]:
    """See `nestlearn.scan.update`."""
    assert isinstance(chunk.rule, GradientRule)
    assert chunk.answering is not None
    *lead, M, V, K = W[0].shape
    T = k.shape[-2]

    def flat(x: Any, *shape: int) -> Any:
        return None if x is None else x.expand(*lead, *shape).reshape(-1, *shape)

    joint, first = W[0].reshape(-1, M * V, K), range(M)[chunk.answering] * V
    q, k, v = flat(q, T, K), flat(k.squeeze(-3), T, K), flat(v.squeeze(-3), T, K)
    eta, log_alpha = (flat(None if g is None else g.squeeze(-2), T) for g in gates[:2])
    token = q is not None and chunk.read == "token"
    form = Form(chunk.rule, chunk.aim.name == "l2", token, False)
    given = (q if token else None, k, v, eta, log_alpha)
    if torch.is_grad_enabled():
        A, *read = _Transition.apply(form, *given)
    else:
        A, *read = forward(form, *given)[0]
    z, o = read[0] if token else q, None
    if z is not None:
        o = torch.bmm(z, joint[:, first : first + V].mT).view(*lead, T, V)
    return o, (torch.bmm(joint, A).view(W[0].shape),), S


class Form(NamedTuple):
    """rule; l2: the objective is no dot product. token: q is answered at its token. unit: keys have
    norm 1, or 0, so that no step size depends on them.
    """

    rule: GradientRule
    l2: bool
    token: bool
    unit: bool

    def sizes(self, c: Scalars, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r, s, and r γ₋ + l s, each [N, T, 1]."""
        r, s = (c.eta, c.eta) if self.unit else steps(c.eta, k, self.rule)
        of_k = r * c.found if self.rule.delta else torch.zeros_like(r)
        return r, s, of_k + s if self.l2 else of_k


class _Transition(torch.autograd.Function):
    """(q, k, v [N, T, K], η, log α [N, T]) -> (A [N, K, K], z [N, T, K] if q is given)."""

    @staticmethod
    def forward(ctx: Any, form: Form, *given: Any) -> tuple:
        outputs, saved = forward(form, *given)
        ctx.form = form
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor, *dz: Any) -> tuple:
        with torch.autocast(dA.device.type, enabled=False):  # also where a caller's still holds
            back = Backward(ctx.form, *ctx.saved_tensors)
            back.through_transition(dA)
            dq = back.through_read(*dz) if ctx.form.token else None
            back.through_system()
            return None, dq, *back.through_sizes()


def forward(form: Form, q, k, v, eta, log_alpha) -> tuple[tuple, tuple]:
    """The outputs, and what the backward pass needs."""
    c = Scalars(eta, log_alpha)
    r, s, of_k = form.sizes(c, k)
    x, faded, inverse = s * v, None, None
    if form.l2 or form.rule.delta:
        x.addcmul_(of_k, k, value=-1)
    if form.rule.delta:
        faded = c.fade_(torch.bmm(k, k.mT))
        inverse = inverse_unit_lower(r * faded)
        x = torch.bmm(inverse, x)
    A = torch.bmm(x.mT, c.left * k)
    A.diagonal(dim1=-2, dim2=-1).add_(c.gamma[..., -1, :])
    z = share = None
    if q is not None:
        share = torch.bmm(q, k.mT).mul_(c.ratio)
        z = (c.gamma * q).baddbmm_(share, x)
    saved = (q, k, v, eta, log_alpha, x, faded, inverse, share, z, c.gamma, c.ratio)
    return ((A,) if z is None else (A, z)), saved


class Backward:
    """The backward pass, from the last equation to the first; a gradient is d and what it is of.

    dtotal: of Σ log α up to each token.
    """

    def __init__(self, form: Form, *saved: Any):
        self.form = form
        self.q, self.k, self.v, eta, self.log_alpha = saved[:5]
        self.x, self.faded, self.inverse, self.share, self.z, *decays = saved[5:]
        self.c = Scalars(eta, self.log_alpha, *decays)
        self.deta, self.dtotal = torch.zeros_like(eta), torch.zeros_like(eta)

    def through_transition(self, dA: Tensor) -> None:
        """A = γ_C I + xᵀ (Γ_C k)"""
        c, k = self.c, self.k
        self.dx = torch.bmm(c.left * k, dA.mT)
        self.dk = torch.bmm(self.x, dA).mul_(c.left)
        if self.log_alpha is not None:
            share = (k * self.dk).sum(-1)
            self.dtotal -= share
            trace = dA.diagonal(dim1=-2, dim2=-1).sum(-1)
            self.dtotal[:, -1] += share.sum(-1) + c.gamma[:, -1, 0] * trace

    def through_read(self, dz: Tensor) -> Tensor:
        """z = γ q + (Γ ∘ q kᵀ) x; returns dq."""
        c = self.c
        dshare = torch.bmm(dz, self.x.mT)
        if self.log_alpha is not None:
            self.dtotal += (dz * self.z).sum(-1) - (dshare * self.share).sum(-2)
        self.dx.baddbmm_(self.share.mT, dz)
        dnear = dshare.mul_(c.ratio)
        self.dk.baddbmm_(dnear.mT, self.q)
        return (c.gamma * dz).baddbmm_(dnear, self.k)

    def through_system(self) -> None:
        """(I + r (Γ₋ ∘ k kᵀ)) x = s v − (r γ₋ + l s) k"""
        form, c, k = self.form, self.c, self.k
        r, s, of_k = form.sizes(c, k)
        right = torch.bmm(self.inverse.mT, self.dx) if form.rule.delta else self.dx
        along = (right * k).sum(-1)
        ds = (right * self.v).sum(-1)
        self.dr, self.both = torch.zeros_like(ds), None
        if form.l2:
            ds = ds - along
        if form.l2 or form.rule.delta:
            self.dk.addcmul_(of_k, right, value=-1)
        if form.rule.delta:  # dsystem is −right xᵀ; here without the sign
            dsystem = torch.bmm(right, self.x.mT)
            dfaded = dsystem * self.faded
            self.dr = -(dfaded.sum(-1) + along * c.found.squeeze(-1))
            if self.log_alpha is not None:
                self.dtotal += F.pad((r.squeeze(-1) * self.dr)[:, 1:], (0, 1))
                self.dtotal += torch.bmm(r.mT, dfaded).squeeze(-2)
            self.both = c.fade_(dsystem.mul_(-r))
        if form.rule.normalize:  # s = r
            self.dr = self.dr + ds
        else:
            self.deta += ds
        self.dv = s * right

    def through_sizes(self) -> tuple[Any, ...]:
        """r = η / max(1, ‖k‖²), and k kᵀ where there is a system; dk, dv, dη, d log α."""
        k, rule = self.k, self.form.rule
        if self.form.unit:
            self.deta += self.dr
            if self.both is not None:
                self.dk.baddbmm_(self.both + self.both.mT, k)
        elif rule.delta or rule.normalize:
            size = k.square().sum(-1)
            length = size.clamp(min=1.0)
            self.deta += self.dr / length
            dsize = torch.where(
                size > 1.0, -self.dr * self.c.eta.squeeze(-1) / length.square(), 0.0
            )
            if self.both is None:
                self.dk.addcmul_(dsize.unsqueeze(-1), k, value=2)
            else:
                self.both.diagonal(dim1=-2, dim2=-1).add_(dsize)
                self.dk.baddbmm_(self.both + self.both.mT, k)
        dlog_alpha = None
        if self.log_alpha is not None:
            dlog_alpha = self.dtotal.flip(-1).cumsum(-1).flip(-1)
        return self.dk, self.dv, self.deta, dlog_alpha
