"""The kernels of `transition`, where the mathematics stands: matrices that make their own values.

D is what a chunk's tokens make of all memories of a head, W_C = γ_C W + W D. A head has a program
where k, v, η, α and D are made, a memory has one where it is written.
"""

from __future__ import annotations

import triton.language as tl

from .kernels import _constants, _into_shell, _out_of_shell
from .tiles import (
    _among,
    _dot,
    _dot_t,
    _inverse,
    _jit,
    _log_sigmoid,
    _matrix,
    _part,
    _put,
    _put_among,
    _put_row,
    _put_vector,
    _ratios,
    _row,
    _steps,
    _t_dot,
    _tokens,
    _vector,
)


@_jit
def _transition(
    W, z, constants, said, rows, x, inverses, D, given, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """What the head's memories say of z (k, v in `said`; `rows` holds the norms of k and v before
    that was 1, the logits of η and α, and log α), and what that makes of W: x, (I + L)⁻¹ and D.
    """
    T = kind.BT if kind.full else T
    i, M = tl.program_id(0).to(tl.int64), held[4]
    n, at = i * groups, _constants(i, held)
    z_ = _among(z, i, given, T, kind.K, kind.BT)
    key = _of_unit_norm(_dot_t(z_, _matrix(W, n, kind.V, kind.K), kind), said, rows, i, T, kind)
    value = _dot_t(z_, _matrix(W, n + 1, kind.V, kind.K), kind)
    value = _of_unit_norm(value, said, rows, M + i, T, kind)
    logit = _logit(W, n + 2, z_, constants + at, kind)
    _put_row(rows, 2 * M + i, T, logit)
    decay = tl.zeros_like(logit)
    if kind.decay:
        decay = _logit(W, n + 3, z_, constants + at + kind.V + 1, kind)
        _put_row(rows, 3 * M + i, T, decay)
        _put_row(rows, 4 * M + i, T, _log_sigmoid(decay))
    step, log, g = _said_gates(logit, decay, T, kind)
    r, s = _steps(tl.sum(key * key, 1), step, kind)
    right = s[:, None] * value
    if kind.l2:
        right -= s[:, None] * key
    if kind.delta:
        right -= (r * tl.exp(g - log))[:, None] * key
        system = r[:, None] * _ratios(g - log, g, True) * _dot_t(key, key, kind, True)
        inverse = _inverse(system, kind)
        if inverses is not None:
            _put(inverses, i, kind.BT, kind.BT, inverse)
        right = _dot(inverse, right, kind, True)
    _put(x, i, T, kind.K, right)
    left = tl.exp(tl.sum(log, 0) - g)
    _put(D, i, kind.K, kind.K, _t_dot(right, left[:, None] * key, kind))


@_jit
def _write(
    W, D, log_alpha, constants, V, norms, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """W_C = γ_C W + W D, in its shell."""
    T = kind.BT if kind.full else T
    n = tl.program_id(0).to(tl.int64)
    weight = _matrix(W, n, kind.V, kind.K)
    after = _dot(weight, _matrix(D, n // groups, kind.K, kind.K), kind)
    after += _kept_share(log_alpha, n // groups, T, kind) * weight
    after = _into_shell(after, constants, norms, n, n, N, groups, held, kind)
    _put(V, n, kind.V, kind.K, after)


@_jit
def _answer_through(
    W, q, said, log_alpha, x, o, asking, answering,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """W z, z = γ q + (Γ ∘ q kᵀ) x, or W q at the boundary; of all chunks, W the first of each."""
    T = kind.BT if kind.full else T
    i = tl.program_id(0).to(tl.int64)
    query = _among(q, i, asking, T, kind.K, kind.BT)
    if kind.read == "token":
        g = _totals(log_alpha, i, T, kind)
        seen = _ratios(g, g, False) * _dot_t(query, _tokens(said, i, T, kind.K, kind.BT), kind)
        query = tl.exp(g)[:, None] * query
        query += _dot(seen, _tokens(x, i, T, kind.K, kind.BT), kind)
    weight = _matrix(W, i * groups + reader, kind.V, kind.K)
    _put_among(o, i, answering, T, kind.V, _dot_t(query, weight, kind))


@_jit
def _backward_read_through(
    W, q, said, log_alpha, x, do, dq, dW_read, dx_read, dk_read, dg_read,
    asking, answering, dasking,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """What the answers ask of the first weights, of x, k and log γ; i as in `_answer_through`."""
    T = kind.BT if kind.full else T
    i = tl.program_id(0).to(tl.int64)
    asked = _among(do, i, answering, T, kind.V, kind.BT)
    through = _among(q, i, asking, T, kind.K, kind.BT)
    dz = _dot(asked, _matrix(W, i * groups + reader, kind.V, kind.K), kind)
    if kind.read == "token":
        g = _totals(log_alpha, i, T, kind)
        write = _tokens(x, i, T, kind.K, kind.BT)
        dseen = _dot_t(dz, write, kind)
        seen = _dot_t(through, _tokens(said, i, T, kind.K, kind.BT), kind)
        seen *= _ratios(g, g, False)
        through = tl.exp(g)[:, None] * through + _dot(seen, write, kind)
        _put_row(dg_read, i, T, tl.sum(dz * through, 1) - tl.sum(dseen * seen, 0))
        _put(dx_read, i, T, kind.K, _t_dot(seen, dz, kind))
    _put(dW_read, i, kind.V, kind.K, _t_dot(asked, through, kind))
    if kind.read == "token":
        dseen *= _ratios(g, g, False)
        query = _among(q, i, asking, T, kind.K, kind.BT, True)
        _put(dk_read, i, T, kind.K, _t_dot(dseen, query, kind))
        dz = tl.exp(g)[:, None] * dz
        dz += _dot(dseen, _tokens(said, i, T, kind.K, kind.BT, True), kind)
    _put_among(dq, i, dasking, T, kind.K, dz)


@_jit
def _backward_write(
    W, D, log_alpha, V, constants, norms, dV, dW_read, dconstants, dW, dD, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """To what W_C and the answers ask of W, and each memory's part of what is asked of D."""
    T = kind.BT if kind.full else T
    n = tl.program_id(0).to(tl.int64)
    i = n // groups
    dnew = _out_of_shell(
        dV, V, constants, norms, dconstants, n, n, N, groups, held, kind.V, kind.K, kind
    )
    _put(dD, n, kind.K, kind.K, _t_dot(_matrix(W, n, kind.V, kind.K), dnew, kind))
    dweight = _dot_t(dnew, _matrix(D, i, kind.K, kind.K), kind)
    dweight += _kept_share(log_alpha, i, T, kind) * dnew
    dweight += _part(dW_read, i, n % groups == reader, kind.V, kind.K)
    _put(dW, n, kind.V, kind.K, dweight)


@_jit
def _backward_transition(
    W, z, constants, said, rows, x, inverses, dD, dx_read, dk_read, dg_read, dk, dW, dz,
    dconstants, given, held, dgiven,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """From D, and what the answers ask, to z and what said k, v, η and α of it; adds to dW. dk is a
    place for a while: a program holds few tiles, each is loaded where it is used.
    """
    T = kind.BT if kind.full else T
    i, M = tl.program_id(0).to(tl.int64), held[4]
    logit = _row(rows, 2 * M + i, T, T, kind.BT)
    decay = _row(rows, 3 * M + i, T, T, kind.BT) if kind.decay else tl.zeros_like(logit)
    right, dg = _through_transition(
        dD, said, x, inverses, dx_read, dk_read, dg_read, dk, logit, decay, i, T, groups, kind
    )
    dvalue, dkey, deta, dlog = _through_system(said, x, right, dk, dg, logit, decay, i, M, T, kind)
    at = _constants(i, held)
    out = i * held[2]
    down = _through_said(W, dW, said, rows, dkey, z, given, i * groups, i, i, T, kind)
    down += _through_said(W, dW, said, rows, dvalue, z, given, i * groups + 1, i, M + i, T, kind)
    deta, dlog = _to_logits(logit, decay, deta, dlog, kind)
    z_ = _among(z, i, given, T, kind.K, kind.BT, True)
    down += _through_gate(W, dW, constants + at, dconstants + out, deta, z_, i * groups + 2, kind)
    if kind.decay:
        at += kind.V + 1
        out += kind.V + 1
        down += _through_gate(
            W, dW, constants + at, dconstants + out, dlog, z_, i * groups + 3, kind
        )
    _put_among(dz, i, dgiven, T, kind.K, down)


@_jit
def _through_transition(
    dD, said, x, inverses, dx_read, dk_read, dg_read, dk, logit, decay, i, T, groups,
    kind: tl.constexpr,
):  # fmt: skip
    """A = γ_C I + xᵀ (Γ_C k), and the system: gradients of its right side and of log γ, in dk of
    k.
    """
    MEMORIES: tl.constexpr = 5 if kind.decay else 4
    _, log, g = _said_gates(logit, decay, T, kind)
    total = tl.sum(log, 0)
    left = tl.exp(total - g)[:, None]
    dA = _matrix(dD, i * groups, kind.K, kind.K)
    for j in tl.static_range(1, MEMORIES):
        dA += _matrix(dD, i * groups + j, kind.K, kind.K)
    key = _tokens(said, i, T, kind.K, kind.BT)
    dkey = left * _dot(_tokens(x, i, T, kind.K, kind.BT), dA, kind)
    dg = tl.zeros_like(g)
    if kind.decay:
        row, col = tl.arange(0, dA.shape[0])[:, None], tl.arange(0, dA.shape[1])[None, :]
        trace = tl.sum(tl.sum(tl.where(row == col, dA, 0.0), 1), 0)
        share = tl.sum(key * dkey, 1)
        last = tl.arange(0, kind.BT) == T - 1
        dg = tl.where(last, tl.sum(share, 0) + tl.exp(total) * trace, 0.0) - share
    if kind.read == "token":
        dkey += _tokens(dk_read, i, T, kind.K, kind.BT)
        dg += _row(dg_read, i, T, T, kind.BT)
    _put(dk, i, T, kind.K, dkey)
    dx = left * _dot_t(_tokens(said, i, T, kind.K, kind.BT, True), dA, kind)
    if kind.read == "token":
        dx += _tokens(dx_read, i, T, kind.K, kind.BT)
    if kind.delta:
        dx = _t_dot(_matrix(inverses, i, kind.BT, kind.BT), dx, kind, True)
    return dx, dg


@_jit
def _through_system(said, x, right, dk, dg, logit, decay, i, M, T, kind: tl.constexpr):
    """(I + L) x = s v − (r γ₋ + l s) k, from the gradient of its right side and through L:
    gradients of v, k, η, log α.
    """
    step, log, g = _said_gates(logit, decay, T, kind)
    key = _tokens(said, i, T, kind.K, kind.BT)
    norm2 = tl.sum(key * key, 1)
    r, s = _steps(norm2, step, kind)
    fade = tl.exp(g - log)
    along = tl.sum(right * key, 1)
    ds = tl.sum(right * _tokens(said, M + i, T, kind.K, kind.BT), 1)
    tl.debug_barrier()  # dk was written by other threads
    back, dr, dbefore = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    if kind.l2:
        ds -= along
        back += s
    if kind.delta:
        back += r * fade
        both = -_dot_t(right, _tokens(x, i, T, kind.K, kind.BT), kind) * _ratios(g - log, g, True)
        parts = both * _dot_t(key, key, kind)
        dr += tl.sum(parts, 1) - along * fade
        dbefore = r * dr
        dg += dbefore - tl.sum(r[:, None] * parts, 0)
        both *= r[:, None]
        dkey = _dot(both + tl.trans(both), _tokens(said, i, T, kind.K, kind.BT, True), kind)
        dkey += _tokens(dk, i, T, kind.K, kind.BT)
    else:
        dkey = _tokens(dk, i, T, kind.K, kind.BT)
    dkey -= back[:, None] * right
    inv = 1.0 / tl.maximum(norm2, 1.0)
    if kind.normalize:
        dr += ds
        deta = inv * dr
    else:
        deta = ds + inv * dr
    dkey += tl.where(norm2 >= 1.0, -2.0 * r * inv * dr, 0.0)[:, None] * _tokens(
        said, i, T, kind.K, kind.BT, True
    )
    # log γ_t sums log α up to t; log γ₋_t lacks the last of them
    return s[:, None] * right, dkey, deta, tl.cumsum(dg, 0, reverse=True) - dbefore


@_jit
def _through_said(W, dW, said, rows, dsaid, z, given, n, i, part, T, kind: tl.constexpr):
    """Through W z of unit norm; adds to dW, gives the gradient of z."""
    unit = _tokens(said, part, T, kind.K, kind.BT, True)
    norm = _row(rows, part, T, T, kind.BT)
    dsaid -= tl.sum(dsaid * unit, 1)[:, None] * unit
    dsaid *= tl.where(norm > 0.0, 1.0 / norm, 0.0)[:, None]
    z_ = _among(z, i, given, T, kind.K, kind.BT, True)
    dweight = _matrix(dW, n, kind.V, kind.K) + _t_dot(dsaid, z_, kind)
    _put(dW, n, kind.V, kind.K, dweight)
    return _dot(dsaid, _matrix(W, n, kind.V, kind.K), kind)


@_jit
def _through_gate(W, dW, constants, dconstants, dlogit, z, n, kind: tl.constexpr):
    """Through w · (W z) + b; adds to dW, gives the gradient of z."""
    seen = tl.sum(dlogit[:, None] * z, 0)
    weight = _vector(constants, kind.V)
    matrix = _matrix(W, n, kind.V, kind.K)
    dweight = _matrix(dW, n, kind.V, kind.K) + weight[:, None] * seen[None, :]
    _put(dW, n, kind.V, kind.K, dweight)
    _put_vector(dconstants, kind.V, tl.sum(matrix * seen[None, :], 1))
    tl.store(dconstants + kind.V, tl.sum(dlogit, 0))
    return dlogit[:, None] * tl.sum(matrix * weight[:, None], 0)[None, :]


@_jit
def _to_logits(logit, decay, deta, dlog, kind: tl.constexpr):
    """The gradients of both logits, from those of η and log α."""
    p = tl.sigmoid(logit)
    if kind.eta_max > 1 and kind.decay:  # as in _said_gates
        alpha = tl.sigmoid(decay)
        eta = kind.eta_max * p
        dlog += 0.5 * alpha * tl.where(eta < kind.eta_min, 0.0, eta) * deta
        deta *= 0.5 + 0.5 * alpha
    return deta * kind.eta_max * p * (1 - p), dlog * tl.sigmoid(-decay)


@_jit
def _of_unit_norm(y, said, rows, part, T, kind: tl.constexpr):
    """y / ‖y‖; keeps it and the norm."""
    norm = tl.sqrt(tl.sum(y * y, 1) + 1e-12)
    y /= norm[:, None]
    _put(said, part, T, kind.K, y)
    _put_row(rows, part, T, norm)
    return y


@_jit
def _logit(W, n, z, constants, kind: tl.constexpr):
    """w · (W z) + b = (Wᵀ w) · z + b."""
    pulled = tl.sum(_matrix(W, n, kind.V, kind.K) * _vector(constants, kind.V)[:, None], 0)
    return tl.sum(z * pulled[None, :], 1) + tl.load(constants + kind.V)


@_jit
def _said_gates(logit, decay, T, kind: tl.constexpr):
    """η, log α and log γ, of the logits; nothing beyond the chunk's tokens."""
    inside = tl.arange(0, kind.BT) < T
    eta = kind.eta_max * tl.sigmoid(logit)
    eta = tl.where(inside & (eta >= kind.eta_min), eta, 0.0)
    log = tl.zeros_like(eta)
    if kind.decay:
        log = tl.where(inside, _log_sigmoid(decay), 0.0)
        if kind.eta_max > 1:
            eta *= 0.5 + 0.5 * tl.exp(log)
    return eta, log, tl.cumsum(log, 0)


@_jit
def _totals(log_alpha, i, T, kind: tl.constexpr):
    """log γ."""
    log = _row(log_alpha, i, T, T, kind.BT) if kind.decay else tl.zeros([kind.BT], tl.float32)
    return tl.cumsum(log, 0)


@_jit
def _kept_share(log_alpha, i, T, kind: tl.constexpr):
    """γ_C."""
    return tl.exp(tl.sum(_row(log_alpha, i, T, T, kind.BT), 0)) if kind.decay else 1.0
