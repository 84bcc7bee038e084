"""The kernels of `transition`, where the mathematics stands: matrices that make their own values.

D is what a chunk's tokens make of all memories of a head, W_C = γ_C W + W D. A head has a program
where D is made, a memory has one where it is written and says k, v, η or α of the next chunk.
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
def _write(
    W, V, D, log_alpha, norms, z, said, rows, constants, given, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """W_C = γ_C W + W D, in its shell (or W, if there is no D), and what the memory says of the
    next chunk's z: k, v in `said`; `rows` holds the norms of k and v before that was 1, the logits
    of η and α, and log α.
    """
    T = kind.BT if kind.full else T
    ROLES: tl.constexpr = 4 if kind.decay else 3
    n, M = tl.program_id(0).to(tl.int64), held[4]
    i, role = n // groups, n % groups
    weight = _matrix(W, n, kind.V, kind.K)
    if D is not None:
        share = _kept_share(log_alpha, i, T, kind)
        weight = share * weight + _dot(weight, _matrix(D, i, kind.K, kind.K), kind)
        weight = _into_shell(weight, constants, norms, n, n, N, groups, held, kind)
        _put(V, n, kind.V, kind.K, weight)
    if z is not None:
        z_ = _among(z, i, given, T, kind.K, kind.BT)
        if role < 2:
            _say(_dot_t(z_, weight, kind), said, rows, role * M + i, T, kind)
        elif role < ROLES:
            at = constants + _constants(i, held) + (role - 2) * (kind.V + 1)
            # w · (W z) + b = (Wᵀ w) · z + b
            pulled = tl.sum(weight * _vector(at, kind.V)[:, None], 0)
            logit = tl.sum(z_ * pulled[None, :], 1) + tl.load(at + kind.V)
            _put_row(rows, role * M + i, T, logit)
            if role == 3:
                _put_row(rows, 4 * M + i, T, _log_sigmoid(logit))


@_jit
def _transition(
    said, rows, x, inverses, D, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """What a chunk makes of all memories of a head: x, (I + L)⁻¹ and D."""
    T = kind.BT if kind.full else T
    i, M = tl.program_id(0).to(tl.int64), held[4]
    key = _tokens(said, i, T, kind.K, kind.BT)
    step, log, g = _said_gates(rows, i, M, T, kind)
    r, s = _steps(tl.sum(key * key, 1), step, kind)
    right = s[:, None] * _tokens(said, M + i, T, kind.V, kind.BT)
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
    W, V, D, log_alpha, norms, z, dsaid, dgates, dV, dW_read, dW, dD, constants, dconstants,
    given, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """From W_C, and what it said of the next chunk's z, to W: with what the answers ask of it, and
    each memory's part of what is asked of D.
    """
    T = kind.BT if kind.full else T
    n, M = tl.program_id(0).to(tl.int64), held[4]
    i, role = n // groups, n % groups
    dweight = _matrix(dV, n, kind.V, kind.K)
    if z is not None:
        z_ = _among(z, i, given, T, kind.K, kind.BT)
        dweight += _through_said(dsaid, dgates, constants, z_, i, role, M, T, held, kind)
    if D is not None:
        dnew = _out_of_shell(
            dweight, V, constants, norms, dconstants, n, n, N, groups, held, kind.V, kind.K, kind
        )
        _put(dD, n, kind.K, kind.K, _t_dot(_matrix(W, n, kind.V, kind.K), dnew, kind))
        dweight = _dot_t(dnew, _matrix(D, i, kind.K, kind.K), kind)
        dweight += _kept_share(log_alpha, i, T, kind) * dnew
        dweight += _part(dW_read, i, role == reader, kind.V, kind.K)
    _put(dW, n, kind.V, kind.K, dweight)


@_jit
def _backward_transition(
    said, rows, x, inverses, dD, dx_read, dk_read, dg_read, dsaid, dgates, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """From D, and what the answers ask, to what the memories said, before it was of unit norm, and
    the logits. A program holds few tiles: each is loaded where it is used.
    """
    T = kind.BT if kind.full else T
    i, M = tl.program_id(0).to(tl.int64), held[4]
    right, dg = _through_transition(
        dD, said, rows, x, inverses, dx_read, dk_read, dg_read, dsaid, i, M, T, groups, kind
    )
    dvalue, dkey, deta, dlog = _through_system(said, rows, x, right, dsaid, dg, i, M, T, kind)
    tl.debug_barrier()  # all have read dk
    _put(dsaid, i, T, kind.K, _through_unit(said, rows, dkey, i, T, kind))
    _put(dsaid, M + i, T, kind.V, _through_unit(said, rows, dvalue, M + i, T, kind))
    deta, dlog = _to_logits(rows, deta, dlog, i, M, T, kind)
    _put_row(dgates, i, T, deta)
    if kind.decay:
        _put_row(dgates, M + i, T, dlog)


@_jit
def _backward_say(
    W, z, constants, dsaid, dgates, dz, dconstants, given, held, dgiven, heads,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """From what the memories said to z, and to the constants that made gates of it; of all chunks,
    W the first of each.
    """
    T = kind.BT if kind.full else T
    i, M = tl.program_id(0).to(tl.int64), held[4]
    n, z_ = i * groups, _among(z, i, given, T, kind.K, kind.BT)
    down = _dot(_tokens(dsaid, i, T, kind.V, kind.BT), _matrix(W, n, kind.V, kind.K), kind)
    down += _dot(_tokens(dsaid, M + i, T, kind.V, kind.BT), _matrix(W, n + 1, kind.V, kind.K), kind)
    for gate in tl.static_range(2 if kind.decay else 1):
        dlogit = _row(dgates, gate * M + i, T, T, kind.BT)
        part = gate * (kind.V + 1)
        matrix = _matrix(W, n + 2 + gate, kind.V, kind.K)
        answer = tl.sum(matrix * tl.sum(dlogit[:, None] * z_, 0)[None, :], 1)
        _put_vector(dconstants + i * held[2] + part, kind.V, answer)
        tl.store(dconstants + i * held[2] + part + kind.V, tl.sum(dlogit, 0))
        weight = _vector(constants + _constants(i % heads, held) + part, kind.V)
        down += dlogit[:, None] * tl.sum(matrix * weight[:, None], 0)[None, :]
    _put_among(dz, i, dgiven, T, kind.K, down)


@_jit
def _through_transition(
    dD, said, rows, x, inverses, dx_read, dk_read, dg_read, dk, i, M, T, groups, kind: tl.constexpr
):  # fmt: skip
    """A = γ_C I + xᵀ (Γ_C k), and the system: gradients of its right side and of log γ, in dk of
    k.
    """
    MEMORIES: tl.constexpr = 5 if kind.decay else 4
    _, log, g = _said_gates(rows, i, M, T, kind)
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
def _through_system(said, rows, x, right, dk, dg, i, M, T, kind: tl.constexpr):
    """(I + L) x = s v − (r γ₋ + l s) k, from the gradient of its right side and through L:
    gradients of v, k, η, log α.
    """
    step, log, g = _said_gates(rows, i, M, T, kind)
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
    # log γ_t sums log α up to t; log γ₋_t lacks the last of them
    return s[:, None] * right, dkey, deta, tl.cumsum(dg, 0, reverse=True) - dbefore


@_jit
def _through_said(dsaid, dgates, constants, z, i, role, M, T, held, kind: tl.constexpr):
    """What W passes on to what it said of z: (W z) or w · (W z)."""
    ROLES: tl.constexpr = 4 if kind.decay else 3
    if role < 2:
        dweight = _t_dot(_tokens(dsaid, role * M + i, T, kind.V, kind.BT), z, kind)
    else:
        gate = tl.minimum(role, ROLES - 1) - 2
        dlogit = _row(dgates, gate * M + i, tl.where(role < ROLES, T, 0), T, kind.BT)
        weight = _vector(constants + _constants(i, held) + gate * (kind.V + 1), kind.V)
        dweight = weight[:, None] * tl.sum(dlogit[:, None] * z, 0)[None, :]
    return dweight


@_jit
def _through_unit(said, rows, dsaid, part, T, kind: tl.constexpr):
    """The gradient before `_say`, from that of what it kept."""
    unit = _tokens(said, part, T, kind.K, kind.BT, True)
    norm = _row(rows, part, T, T, kind.BT)
    dsaid -= tl.sum(dsaid * unit, 1)[:, None] * unit
    return tl.where(norm > 0.0, 1.0 / norm, 0.0)[:, None] * dsaid


@_jit
def _to_logits(rows, deta, dlog, i, M, T, kind: tl.constexpr):
    """The gradients of both logits, from those of η and log α."""
    logit = _row(rows, 2 * M + i, T, T, kind.BT)
    p, falling = tl.sigmoid(logit), tl.zeros_like(logit)
    if kind.decay:
        decay = _row(rows, 3 * M + i, T, T, kind.BT)
        if kind.eta_max > 1:  # as in _said_gates
            alpha = tl.sigmoid(decay)
            eta = kind.eta_max * p
            dlog += 0.5 * alpha * tl.where(eta < kind.eta_min, 0.0, eta) * deta
            deta *= 0.5 + 0.5 * alpha
        falling = tl.sigmoid(-decay)
    return deta * kind.eta_max * p * (1 - p), dlog * falling


@_jit
def _say(y, said, rows, part, T, kind: tl.constexpr):
    """Keep y / ‖y‖, and the norm."""
    norm = tl.sqrt(tl.sum(y * y, 1) + 1e-12)
    _put(said, part, T, kind.K, y / norm[:, None])
    _put_row(rows, part, T, norm)


@_jit
def _said_gates(rows, i, M, T, kind: tl.constexpr):
    """η, log α and log γ, of the logits; nothing beyond the chunk's tokens."""
    inside = tl.arange(0, kind.BT) < T
    eta = kind.eta_max * tl.sigmoid(_row(rows, 2 * M + i, T, T, kind.BT))
    eta = tl.where(inside & (eta >= kind.eta_min), eta, 0.0)
    log = tl.zeros_like(eta)
    if kind.decay:
        log = _row(rows, 4 * M + i, T, T, kind.BT)
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
