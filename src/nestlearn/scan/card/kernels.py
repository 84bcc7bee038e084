"""The kernels of a chunk: `given` launches them for values that are given, `generated` for
memories that generate what they are written with. The mathematics stands in `given`.
"""

from __future__ import annotations

import triton.language as tl

from .tiles import (
    _among,
    _block,
    _dot,
    _dot_t,
    _gates,
    _inverse,
    _jit,
    _log_sigmoid,
    _matrix,
    _part,
    _phi,
    _put,
    _put_among,
    _put_row,
    _put_vector,
    _ratios,
    _row,
    _steps,
    _t_dot,
    _tile,
    _tokens,
    _vector,
)

# One warp group each. With two, Triton 3.6 reads beyond its shared memory where a tile of 64 tokens
# meets one of 16, and only the systems would gain, by 15 % and in batches of one.
WARPS = 4


@_jit
def _generate(
    W1, W2, z, constants, said, rows, hidden, given, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """What M_k, M_v, M_η, M_α say of z, one program each: k, v in `said`; `rows` holds the norms
    of k and v before that was 1, the logits of η and α, and η and log α.
    """
    T = kind.BT if kind.full else T
    ROLES: tl.constexpr = 4 if kind.decay else 3
    program = tl.program_id(0).to(tl.int64)
    i, role = program // ROLES, program % ROLES
    n, M = i * groups + role, held[4]
    z_ = _among(z, i, given, T, kind.K, kind.BT)
    a = _dot_t(z_, _matrix(W1, n, kind.H, kind.K), kind)
    if hidden is not None:
        _put(hidden, program, T, kind.H, a)
    # Functions, since a name has one shape in both branches, and these have their own.
    if role < 2:
        norm = _say(W2, z_, a, said, n, role * M + i, T, kind)
        _put_row(rows, role * M + i, T, norm)
    else:
        at = _constants(i, held) + (role - 2) * (kind.V + 1)
        logit = _say_gate(W2, z_, a, constants + at, n, kind)
        _put_row(rows, role * M + i, T, logit)
        eta = kind.eta_max * tl.sigmoid(logit)
        eta = tl.where(eta < kind.eta_min, 0.0, eta)
        gate = tl.where(role == 2, eta, _log_sigmoid(logit))
        _put_row(rows, (role + 2) * M + i, T, gate)


@_jit
def _say(W2, z, a, said, n, part, T, kind: tl.constexpr):
    """Store a memory's answer, of unit norm; gives the norm it had."""
    y = _dot_t(_phi(a, kind), _matrix(W2, n, kind.V, kind.H), kind)
    if kind.residual:
        y += z
    norm = tl.sqrt(tl.sum(y * y, 1) + 1e-12)
    _put(said, part, T, kind.K, y / norm[:, None])
    return norm


@_jit
def _say_gate(W2, z, a, constants, n, kind: tl.constexpr):
    """The logit that w and b make of a memory's answer."""
    weight = _vector(constants, kind.V)
    # w · (W_2 h) = (W_2ᵀ w) · h: a product less
    logit = tl.sum(_phi(a, kind) * _pulled(W2, n, weight, kind)[None, :], 1)
    if kind.residual:
        logit += tl.sum(z * weight[None, :], 1)
    return logit + tl.load(constants + kind.V)


@_jit
def _invert(
    W1, k, eta, log_alpha, inverses, before,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """(I + L)⁻¹ of the first matrix for each set of keys, then of the second for each memory, with
    what it makes of the keys `before` φ.
    """
    T = kind.BT if kind.full else T
    system = tl.program_id(0).to(tl.int64)
    n = system - N // shared
    if n < 0:
        c = system
        key = _tokens(k, c, T, kind.K, kind.BT)
        norm2 = tl.sum(key * key, 1)
        overlap = _dot_t(key, key, kind, True)
    else:
        c = n // (shared * inner) * inner + n % inner
        weight1 = _matrix(W1, n, kind.H, kind.K)
        a = _dot_t(_tokens(k, c, T, kind.K, kind.BT), weight1, kind)
        if before is not None:
            _put(before, n, T, kind.H, a)
        h = _phi(a, kind)
        norm2 = tl.sum(h * h, 1)
        overlap = _dot_t(h, h, kind, True)
    step, log, g = _gates(eta, log_alpha, c, T, kind)
    r, _ = _steps(norm2, step, kind)
    lower = r[:, None] * _ratios(g - log, g, True) * overlap
    _put(inverses, system, kind.BT, kind.BT, _inverse(lower, kind))


@_jit
def _forward(
    W1, W2, k, v, eta, log_alpha, inverses, constants, V1, V2, w1, w2, before, aims, values, norms,
    held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """The writes w and W after them; of own values all that made them."""
    T = kind.BT if kind.full else T
    n = tl.program_id(0).to(tl.int64)
    c = n // (shared * inner) * inner + n % inner
    step, log, g = _gates(eta, log_alpha, c, T, kind)
    fade = tl.exp(g - log)
    # A program holds few tiles: each is loaded where it is used, and again rather than kept.
    u = _aimed(v, W1, W2, values, n, c, T, kind)
    key = _tokens(k, c, T, kind.K, kind.BT)
    if kind.mlp and kind.delta:
        a = _tokens(before, n, T, kind.H, kind.BT)
    else:
        a = _dot_t(key, _matrix(W1, n, kind.H, kind.K, True), kind)
        if before is not None:
            _put(before, n, T, kind.H, a)
    r, s = _steps(tl.sum(key * key, 1), step, kind)
    if kind.mlp:
        h = _phi(a, kind)
        u, y = _last(u, h, W2, k, n, c, T, kind)
        if aims is not None:
            _put(aims, n, T, kind.V, u)
        r2, s2 = _steps(tl.sum(h * h, 1), step, kind)
        write2 = s2[:, None] * u
        if kind.delta:
            write2 -= (r2 * fade)[:, None] * y
        u = _dot(u, _matrix(W2, n, kind.V, kind.H, True), kind) * _phi(a, kind, 1)
    else:
        if kind.l2:
            u -= a
        if aims is not None:
            _put(aims, n, T, kind.V, u)
    write = s[:, None] * u
    if kind.delta:
        write -= (r * fade)[:, None] * a
    if kind.mlp:
        if kind.delta:
            inverse = _matrix(inverses, N // shared + n, kind.BT, kind.BT)
            write2 = _dot(inverse, write2, kind, True)
        if w2 is not None:
            _put(w2, n, T, kind.V, write2)
        weight = _matrix(W2, n, kind.V, kind.H, True)
        after = _written(weight, h, write2, g, log, kind)
        after = _into_shell(after, constants, norms, N + n, n, N, groups, held, kind)
        _put(V2, n, kind.V, kind.H, after)
    if kind.delta:
        write = _dot(_matrix(inverses, c, kind.BT, kind.BT), write, kind, True)
    if w1 is not None:
        _put(w1, n, T, kind.H, write)
    key = _tokens(k, c, T, kind.K, kind.BT, True)
    weight = _matrix(W1, n, kind.H, kind.K, True)
    after = _written(weight, key, write, g, log, kind)
    after = _into_shell(after, constants, norms, n, n, N, groups, held, kind)
    _put(V1, n, kind.H, kind.K, after)


@_jit
def _answer(
    W1, W2, q, k, log_alpha, w1, w2, before, o, hidden, asking, answering,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """W_t q_t; i counts the readers, of several chunks where W holds the first weights of each."""
    T = kind.BT if kind.full else T
    i = tl.program_id(0).to(tl.int64)
    n = i * groups + reader
    c = n // (shared * inner) * inner + n % inner
    _, _, g = _gates(None, log_alpha, c, T, kind)
    query = _among(q, i, asking, T, kind.K, kind.BT)
    weight = _matrix(W1, n, kind.H, kind.K)
    answer = _read(query, weight, k, w1, c, n, g, T, kind.K, kind.H, False, kind)
    if kind.mlp:
        if hidden is not None:
            _put(hidden, i, T, kind.H, answer)
        z = _phi(answer, kind)
        weight = _matrix(W2, n, kind.V, kind.H)
        answer = _read(z, weight, before, w2, n, n, g, T, kind.H, kind.V, True, kind)
        if kind.residual:
            answer += _among(q, i, asking, T, kind.K, kind.BT, True)
    _put_among(o, i, answering, T, kind.V, answer)


@_jit
def _backward_read(
    W1, W2, q, k, log_alpha, w1, w2, hidden, before, do,
    dq, dW1_read, dW2_read, dw1, dw2, dk_read, dh_read, dg_read, asking, answering, dasking,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """What the answers ask of W_0, the writes w, the inputs x and log γ; i as in `_answer`."""
    T = kind.BT if kind.full else T
    i = tl.program_id(0).to(tl.int64)
    n = i * groups + reader
    c = n // (shared * inner) * inner + n % inner
    _, _, g = _gates(None, log_alpha, c, T, kind)
    asked = _among(do, i, answering, T, kind.V, kind.BT)
    dg = tl.zeros_like(g)
    if kind.mlp:
        if kind.read == "token":
            a = _tokens(hidden, i, T, kind.H, kind.BT)
        else:
            query = _among(q, i, asking, T, kind.K, kind.BT)
            a = _dot_t(query, _matrix(W1, n, kind.H, kind.K), kind)
        z = _phi(a, kind)
        dz, dweight = _asked_of_start(asked, z, _matrix(W2, n, kind.V, kind.H), g, kind)
        _put(dW2_read, i, kind.V, kind.H, dweight)
        if kind.read == "token":
            h = _phi(_tokens(before, n, T, kind.H, kind.BT), kind)
            write = _tokens(w2, n, T, kind.V, kind.BT)
            dz, dg = _asked_of_writes(
                asked, z, h, write, g, dz, dw2, dh_read, i, T, kind.V, kind.H, kind
            )
            a = _tokens(hidden, i, T, kind.H, kind.BT, True)
        asked = dz * _phi(a, kind, 1)
    query = _among(q, i, asking, T, kind.K, kind.BT, True)
    weight = _matrix(W1, n, kind.H, kind.K, True)
    dz, dweight = _asked_of_start(asked, query, weight, g, kind)
    _put(dW1_read, i, kind.H, kind.K, dweight)
    if kind.read == "token":
        key = _tokens(k, c, T, kind.K, kind.BT, True)
        write = _tokens(w1, n, T, kind.H, kind.BT)
        dz, dg1 = _asked_of_writes(
            asked, query, key, write, g, dz, dw1, dk_read, i, T, kind.H, kind.K, kind
        )
        _put_row(dg_read, i, T, dg + dg1)
    if kind.residual:
        dz += _among(do, i, answering, T, kind.V, kind.BT, True)
    _put_among(dq, i, dasking, T, kind.K, dz)


@_jit
def _backward_systems(
    W1, W2, k, v, eta, log_alpha, inverses, w1, w2, before, aims, dV1, dV2, dw1, dw2,
    dk_read, dh_read, dW1_read, dW2_read, V1, V2, constants, norms, dconstants,
    e1, e2, dk, dh, rows, dW1, dW2, held,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """`_unsolve` for each matrix of each memory; of a second one its right side, too. `rows` keeps
    dr and dγ of the first, dη, dγ and dγ₋ of the second, e2 is s e. dW is what W_C and the answers
    ask of W_0.
    """
    T = kind.BT if kind.full else T
    n = (tl.program_id(0) % N).to(tl.int64)
    c = n // (shared * inner) * inner + n % inner
    i = n // groups
    asked = tl.where(n % groups == reader, T, 0)  # tokens that asked this memory
    gates = _gates(eta, log_alpha, c, T, kind)
    # Functions, since a name has one shape in both branches, and these have their own.
    if tl.program_id(0) < N:
        _first_system(
            W1, k, inverses, w1, dV1, dw1, dk_read, dW1_read, V1, constants, norms, dconstants,
            e1, dk, rows, dW1, held, gates, n, c, i, asked, N, T, groups, kind,
        )  # fmt: skip
    elif kind.mlp:
        _second_system(
            W2, v, inverses, w2, before, aims, dV2, dw2, dh_read, dW2_read, V2, constants, norms,
            dconstants, e2, dh, rows, dW2, held, gates, n, i, asked, N, T, N // shared + n, groups,
            kind,
        )  # fmt: skip


@_jit
def _first_system(
    W1, k, inverses, w1, dV1, dw1, dk_read, dW1_read, V1, constants, norms, dconstants,
    e1, dk, rows, dW1, held, gates, n, c, i, asked, N, T, groups, kind: tl.constexpr,
):  # fmt: skip
    key = _tokens(k, c, T, kind.K, kind.BT)
    dnew = _out_of_shell(
        _matrix(dV1, n, kind.H, kind.K), V1, constants, norms, dconstants, n, n, N, groups, held,
        kind.H, kind.K, kind,
    )  # fmt: skip
    e, dx, dr, dg = _unsolve(
        key, gates, W1, w1, inverses, c, dnew, dW1, dW1_read, dw1, dk_read,
        n, T, i, asked, kind.H, kind.K, kind,
    )  # fmt: skip
    _put(e1, n, T, kind.H, e)
    _put(dk, n, T, kind.K, dx)
    _put_row(rows, n, T, dr)
    _put_row(rows, N + n, T, dg)


@_jit
def _second_system(
    W2, v, inverses, w2, before, aims, dV2, dw2, dh_read, dW2_read, V2, constants, norms,
    dconstants, e2, dh, rows, dW2, held, gates, n, i, asked, N, T, system, groups,
    kind: tl.constexpr,
):  # fmt: skip
    """With its right side."""
    h = _phi(_tokens(before, n, T, kind.H, kind.BT), kind)
    dnew = _out_of_shell(
        _matrix(dV2, n, kind.V, kind.H), V2, constants, norms, dconstants, N + n, n, N, groups,
        held, kind.V, kind.H, kind,
    )  # fmt: skip
    e, dx, dr, dg = _unsolve(
        h, gates, W2, w2, inverses, system, dnew, dW2, dW2_read, dw2, dh_read,
        n, T, i, asked, kind.V, kind.H, kind,
    )  # fmt: skip
    step, log, g = gates
    norm2, fade = tl.sum(h * h, 1), tl.exp(g - log)
    r, s = _steps(norm2, step, kind)
    _put(e2, n, T, kind.V, s[:, None] * e)
    u = _tokens(v if aims is None else aims, n, T, kind.V, kind.BT)
    along_u, seen = tl.sum(e * u, 1), tl.zeros_like(dr)
    if kind.delta:
        found = _dot(e, _matrix(W2, n, kind.V, kind.H, True), kind)
        seen = tl.sum(found * h, 1)
        dx -= (r * fade)[:, None] * found
        e *= (r * fade)[:, None]
        tl.debug_barrier()
        dweight = _matrix(dW2, n, kind.V, kind.H) - _t_dot(e, h, kind)
        _put(dW2, n, kind.V, kind.H, dweight)
    dstep, dg, dbefore, along = _right_side(along_u, seen, norm2, r, fade, dr, dg, kind)
    _put(dh, n, T, kind.H, dx + along[:, None] * h)
    _put_row(rows, 2 * N + n, T, dstep)
    _put_row(rows, 3 * N + n, T, dg)
    _put_row(rows, 4 * N + n, T, dbefore)


@_jit
def _backward_factors(
    W1, W2, k, v, eta, log_alpha, before, aims, values, e1, e2, dh, rows, dg_read,
    dW1, dW2, dk, dv, deta, dlog,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """Through u and W_0 x, which the chunk's first weights made of keys and values; adds to dW."""
    T = kind.BT if kind.full else T
    n = tl.program_id(0).to(tl.int64)
    c = n // (shared * inner) * inner + n % inner
    step, log, g = _gates(eta, log_alpha, c, T, kind)
    fade = tl.exp(g - log)
    # A program holds few tiles: each is loaded where it is used, and again rather than kept.
    if kind.mlp:
        dstep, dg, dbefore = _through_mlp(
            W1, W2, k, v, before, aims, values, e1, e2, dh, rows, dW1, dW2, dk, dv,
            step, fade, n, c, N, T, kind,
        )  # fmt: skip
    else:
        dstep, dg, dbefore = _through_matrix(
            W1, k, v, aims, e1, rows, dW1, dk, dv, step, fade, n, c, N, T, kind
        )
    _put_row(deta, n, T, dstep)
    if kind.decay:
        if kind.read == "token":
            asked = tl.where(n % groups == reader, T, 0)
            dg += _row(dg_read, n // groups, asked, T, kind.BT)
        # log γ_t sums log α up to t; log γ₋_t lacks the last of them
        _put_row(dlog, n, T, tl.cumsum(dg, 0, reverse=True) - dbefore)


@_jit
def _through_mlp(
    W1, W2, k, v, before, aims, values, e1, e2, dh, rows, dW1, dW2, dk, dv,
    step, fade, n, c, N, T, kind: tl.constexpr,
):  # fmt: skip
    """Stores gradients of weights, keys and values; returns those of η, log γ and log γ₋."""
    key = _tokens(k, c, T, kind.K, kind.BT)
    norm2 = tl.sum(key * key, 1)
    r, s = _steps(norm2, step, kind)
    pulled = _dot(
        _tokens(v if aims is None else aims, n, T, kind.V, kind.BT),
        _matrix(W2, n, kind.V, kind.H), kind,
    )  # fmt: skip
    a = _tokens(before, n, T, kind.H, kind.BT)
    e = _tokens(e1, n, T, kind.H, kind.BT)
    slope = _phi(a, kind, 1)
    dr, dg = _row(rows, n, T, T, kind.BT), _row(rows, N + n, T, T, kind.BT)
    dstep, dg, dbefore, along = _right_side(
        tl.sum(e * pulled * slope, 1), tl.sum(e * a, 1), norm2, r, fade, dr, dg, kind
    )
    dstep += _row(rows, 2 * N + n, T, T, kind.BT)
    dg += _row(rows, 3 * N + n, T, T, kind.BT)
    dbefore += _row(rows, 4 * N + n, T, T, kind.BT)
    du = s[:, None] * e
    da = du * pulled * _phi(a, kind, 2)
    if kind.delta:
        da -= (r * fade)[:, None] * e
    du *= slope
    u = _tokens(v if aims is None else aims, n, T, kind.V, kind.BT, True)
    dweight = _matrix(dW2, n, kind.V, kind.H) + _t_dot(u, du, kind)
    du = _dot_t(du, _matrix(W2, n, kind.V, kind.H, True), kind)
    du += _tokens(e2, n, T, kind.V, kind.BT)
    dhidden = _tokens(dh, n, T, kind.H, kind.BT)
    if kind.l2 or kind.own:  # u = v − W_2 h, or v = W_2 h of v
        x = _phi(_tokens(values, n, T, kind.H, kind.BT), kind) if kind.own else tl.zeros_like(a)
        if kind.l2:
            x -= _phi(_tokens(before, n, T, kind.H, kind.BT, True), kind)
        dweight += _t_dot(du, x, kind)
        down = _dot(du, _matrix(W2, n, kind.V, kind.H), kind)
        if kind.l2:
            dhidden -= down
    _put(dW2, n, kind.V, kind.H, dweight)
    da += dhidden * _phi(_tokens(before, n, T, kind.H, kind.BT), kind, 1)
    key = _tokens(k, c, T, kind.K, kind.BT, True)
    dkey = _tokens(dk, n, T, kind.K, kind.BT) + along[:, None] * key
    if kind.l2 and kind.residual:
        dkey -= du
    dweight = _matrix(dW1, n, kind.H, kind.K) + _t_dot(da, key, kind)
    dkey += _dot(da, _matrix(W1, n, kind.H, kind.K), kind)
    _put(dk, n, T, kind.K, dkey)
    if kind.own:
        down *= _phi(_tokens(values, n, T, kind.H, kind.BT, True), kind, 1)
        dweight += _t_dot(down, _tokens(v, c, T, kind.K, kind.BT), kind)
        down = _dot(down, _matrix(W1, n, kind.H, kind.K, True), kind)
        if kind.residual:
            down += du
        _put(dv, n, T, kind.K, down)
    else:
        _put(dv, n, T, kind.V, du)
    _put(dW1, n, kind.H, kind.K, dweight)
    return dstep, dg, dbefore


@_jit
def _through_matrix(
    W1, k, v, aims, e1, rows, dW1, dk, dv, step, fade, n, c, N, T, kind: tl.constexpr
):
    """As `_through_mlp`; all that W passes on is e W, scaled."""
    key = _tokens(k, c, T, kind.K, kind.BT)
    norm2 = tl.sum(key * key, 1)
    r, s = _steps(norm2, step, kind)
    e = _tokens(e1, n, T, kind.H, kind.BT)
    along_u = tl.sum(e * _tokens(v if aims is None else aims, n, T, kind.V, kind.BT), 1)
    dr, dg = _row(rows, n, T, T, kind.BT), _row(rows, N + n, T, T, kind.BT)
    seen = tl.zeros_like(dr)
    if kind.l2 or kind.delta or kind.own:
        found = _dot(e, _matrix(W1, n, kind.H, kind.K), kind)
        seen = tl.sum(found * key, 1)
    if kind.l2 and not kind.own:
        along_u -= seen
    dstep, dg, dbefore, along = _right_side(along_u, seen, norm2, r, fade, dr, dg, kind)
    dkey = _tokens(dk, n, T, kind.K, kind.BT) + along[:, None] * key
    if kind.l2 or kind.delta:
        share = tl.zeros_like(s)
        if kind.delta:
            share += r * fade
        if kind.l2:
            share += s
        dkey -= share[:, None] * found
        dweight = _matrix(dW1, n, kind.H, kind.K) - _t_dot(share[:, None] * e, key, kind)
    elif kind.own:
        dweight = _matrix(dW1, n, kind.H, kind.K)
    if kind.own:
        _put(dv, n, T, kind.K, s[:, None] * found)
        dweight += _t_dot(s[:, None] * e, _tokens(v, c, T, kind.K, kind.BT), kind)
    else:
        _put(dv, n, T, kind.V, s[:, None] * e)
    if kind.l2 or kind.delta or kind.own:
        _put(dW1, n, kind.H, kind.K, dweight)
    _put(dk, n, T, kind.K, dkey)
    return dstep, dg, dbefore


@_jit
def _backward_generate(
    W1, W2, z, constants, said, rows, hidden, dsaid, dgates, dW1, dW2, dz, dconstants,
    given, held, dgiven, apart,
    N, T, shared, inner, groups, reader, kind: tl.constexpr,
):  # fmt: skip
    """From the gradients of k, v, η, log α, one of each memory that took them, through what said
    them: adds to its dW, gives each role's part of dz, `apart` from each other.
    """
    T = kind.BT if kind.full else T
    ROLES: tl.constexpr = 4 if kind.decay else 3
    program = tl.program_id(0).to(tl.int64)
    i, role = program // ROLES, program % ROLES
    n, M = i * groups + role, held[4]
    a = _tokens(hidden, program, T, kind.H, kind.BT)
    if role < 2:
        skip = _tokens(dsaid, role * N + i * groups, T, kind.K, kind.BT)
        for j in tl.static_range(1, ROLES + 1):
            skip += _tokens(dsaid, role * N + i * groups + j, T, kind.K, kind.BT)
        x = _tokens(said, role * M + i, T, kind.K, kind.BT)
        norm = _row(rows, role * M + i, T, T, kind.BT)
        skip -= tl.sum(skip * x, 1)[:, None] * x
        skip *= tl.where(norm > 0.0, 1.0 / norm, 0.0)[:, None]
        dweight = _matrix(dW2, n, kind.V, kind.H) + _t_dot(skip, _phi(a, kind), kind)
        _put(dW2, n, kind.V, kind.H, dweight)
        down = _dot(skip, _matrix(W2, n, kind.V, kind.H), kind) * _phi(a, kind, 1)
    else:
        dlogit = _to_logit(rows, dgates, i, role, N, M, T, groups, kind)
        z_ = _among(z, i, given, T, kind.K, kind.BT)
        seen = tl.sum(dlogit[:, None] * z_, 0)
        at = _constants(i, held) + (role - 2) * (kind.V + 1)
        weight = _vector(constants + at, kind.V)
        skip = dlogit[:, None] * weight[None, :]
        seen_h = tl.sum(dlogit[:, None] * _phi(a, kind), 0)
        down = dlogit[:, None] * _pulled(W2, n, weight, kind)[None, :] * _phi(a, kind, 1)
        answer = tl.sum(_matrix(W2, n, kind.V, kind.H, True) * seen_h[None, :], 1)
        if kind.residual:
            answer += seen
        dweight = _matrix(dW2, n, kind.V, kind.H) + weight[:, None] * seen_h[None, :]
        _put(dW2, n, kind.V, kind.H, dweight)
        at = i * held[2] + (role - 2) * (kind.V + 1)
        _put_vector(dconstants + at, kind.V, answer)
        tl.store(dconstants + at + kind.V, tl.sum(dlogit, 0))
    z_ = _among(z, i, given, T, kind.K, kind.BT, True)
    dweight = _matrix(dW1, n, kind.H, kind.K) + _t_dot(down, z_, kind)
    _put(dW1, n, kind.H, kind.K, dweight)
    down = _dot(down, _matrix(W1, n, kind.H, kind.K), kind)
    if kind.residual:
        down += skip
    _put_among(dz + role * apart, i, dgiven, T, kind.K, down)


@_jit
def _to_logit(rows, dgates, i, role, N, M, T, groups, kind: tl.constexpr):
    """The gradient of the logit of η (role 2) or α (3), from those of all memories' η and log α."""
    logit = _row(rows, role * M + i, T, T, kind.BT)
    deta, dlog = tl.zeros_like(logit), tl.zeros_like(logit)
    MEMORIES: tl.constexpr = 5 if kind.decay else 4
    for j in tl.static_range(MEMORIES):
        deta += _row(dgates, i * groups + j, T, T, kind.BT)
        if kind.decay:
            dlog += _row(dgates, N + i * groups + j, T, T, kind.BT)
    if kind.eta_max > 1 and kind.decay:  # as in _gates
        alpha = tl.exp(_row(rows, 5 * M + i, T, T, kind.BT))
        dlog += 0.5 * alpha * _row(rows, 4 * M + i, T, T, kind.BT) * deta
        deta *= 0.5 + 0.5 * alpha
    p = tl.sigmoid(logit)
    return tl.where(role == 2, deta * kind.eta_max * p * (1 - p), dlog * tl.sigmoid(-logit))


@_jit
def _pulled(W2, n, weight, kind: tl.constexpr):
    """W_2ᵀ w."""
    return tl.sum(_matrix(W2, n, kind.V, kind.H) * weight[:, None], 0)


@_jit
def _unsolve(
    x, gates, W, w, inverses, system, dnew, dW, dW_read, dw, dx_read, n, T, i, asked,
    OUT: tl.constexpr, IN: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """From the gradients of W_C and w (what the answers asked) to e, that of the right side, and to
    x, r and log γ as far as W_C, the answers and L hold them; the right side's own follow later.
    """
    step, log, g = gates
    # W_C = γ_C W_0 + Σ_s (γ_C/γ_s) w_s x_sᵀ
    total = tl.sum(log, 0)
    left = tl.exp(total - g)
    dweight = tl.exp(total) * dnew
    if kind.read != "none":
        dweight += _part(dW_read, i, asked > 0, OUT, IN)
    _put(dW, n, OUT, IN, dweight)
    dinput = left[:, None] * _dot(_tokens(w, n, T, OUT, kind.BT), dnew, kind)
    dg = -tl.sum(x * dinput, 1)
    kept = tl.sum(tl.sum(_matrix(W, n, OUT, IN) * dnew, 1), 0)
    last = tl.arange(0, kind.BT) == T - 1
    dg += tl.where(last, tl.exp(total) * kept - tl.sum(dg, 0), 0.0)
    e = left[:, None] * _dot_t(x, dnew, kind)
    if kind.read == "token":
        e += _tile(dw, i, asked, T, OUT, kind.BT, _block(OUT))
        dinput += _tile(dx_read, i, asked, T, IN, kind.BT, _block(IN))
    dr = tl.zeros_like(g)
    if kind.delta:
        # (I + L) w = f:  e = df = (I + L)⁻ᵀ dw,  dL = −e wᵀ
        e = _t_dot(_matrix(inverses, system, kind.BT, kind.BT), e, kind, True)
        r, _ = _steps(tl.sum(x * x, 1), step, kind)
        write = _tokens(w, n, T, OUT, kind.BT, True)
        dlower = -_dot_t(e, write, kind) * _ratios(g - log, g, True)
        parts = dlower * _dot_t(x, x, kind)
        dr += tl.sum(parts, 1)
        dg -= tl.sum(r[:, None] * parts, 0)
        dlower *= r[:, None]
        dinput += _dot(dlower + tl.trans(dlower), x, kind)
    return e, dinput, dr, dg


@_jit
def _right_side(along_u, seen, norm2, r, fade, dr, dg, kind: tl.constexpr):
    """From e · u and e · W_0 x, e the gradient of s u − r γ₋ (W_0 x), to the gradients of η, log γ
    and log γ₋, and the factor of x in its own gradient through ‖x‖²; adds to dr and dg.
    """
    dbefore = tl.zeros_like(dr)
    if kind.delta:
        dr -= fade * seen
        dbefore = r * dr
        dg += dbefore
    inv = 1.0 / tl.maximum(norm2, 1.0)
    dstep = along_u
    if kind.normalize:
        dr += dstep
        dstep = inv * dr
    else:
        dstep += inv * dr
    along = tl.where(norm2 >= 1.0, -2.0 * r * inv * dr, 0.0)
    return dstep, dg, dbefore, along


@_jit
def _aimed(v, W1, W2, values, n, c, T, kind: tl.constexpr):
    """The values that are given, or the memory's own, M(v) at the chunk's first weights."""
    if kind.own:
        x = _tokens(v, c, T, kind.K, kind.BT)
        u = _dot_t(x, _matrix(W1, n, kind.H, kind.K), kind)
        if kind.mlp:
            if values is not None:
                _put(values, n, T, kind.H, u)
            u = _dot_t(_phi(u, kind), _matrix(W2, n, kind.V, kind.H), kind)
            if kind.residual:
                u += _tokens(v, c, T, kind.K, kind.BT, True)
    else:
        u = _tokens(v, n, T, kind.V, kind.BT)
    return u


@_jit
def _last(u, h, W2, k, n, c, T, kind: tl.constexpr):
    """u and W_0 x of an MLP's second matrix, from v and its input h."""
    y = u
    if kind.l2 or kind.delta:
        y = _dot_t(h, _matrix(W2, n, kind.V, kind.H), kind)
    if kind.l2:
        u -= y
        if kind.residual:
            u -= _tokens(k, c, T, kind.K, kind.BT, True)
    return u, y


@_jit
def _written(weight, x, write, g, log, kind: tl.constexpr):
    """W_C."""
    total = tl.sum(log, 0)
    left = tl.exp(total - g)
    return tl.exp(total) * weight + _t_dot(left[:, None] * write, x, kind)


@_jit
def _into_shell(W, constants, norms, m, n, N, groups, held, kind: tl.constexpr):
    """W, matrix m of all, scaled so that its norm is within the bounds of its start's; keeps it."""
    if kind.shell:
        norm = tl.sqrt(tl.sum(tl.sum(W * W, 1), 0))
        if norms is not None:
            tl.store(norms + m, norm)
        at = _constants(n // groups, held) + _start_norm(m, n, N, groups, held)
        start = tl.load(constants + at)
        size = tl.minimum(tl.maximum(norm, kind.low * start), kind.high * start)
        W *= size / tl.maximum(norm, 1e-12)
    return W


@_jit
def _out_of_shell(
    dW, V, constants, norms, dconstants, m, n, N, groups, held,
    OUT: tl.constexpr, IN: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """The gradient before `_into_shell`, from that after it; stores that of the start's norm."""
    dstart = 0.0
    if dconstants is not None:
        at = _start_norm(m, n, N, groups, held)
    if kind.shell:
        W = _matrix(V, n, OUT, IN)
        norm = tl.load(norms + m)
        start = tl.load(constants + _constants(n // groups, held) + at)
        low, high = kind.low * start, kind.high * start
        size = tl.minimum(tl.maximum(norm, low), high)
        scale = size / tl.maximum(norm, 1e-12)
        size = tl.maximum(size, 1e-12)
        along = tl.sum(tl.sum(W * dW, 1), 0) / size
        dstart = along * tl.where(norm < low, kind.low, tl.where(norm > high, kind.high, 0.0))
        pull = tl.where((norm < low) | (norm > high), scale * along / size, 0.0)
        dW = scale * dW - pull * W
    if dconstants is not None:
        tl.store(dconstants + n // groups * held[2] + at, dstart)
    return dW


@_jit
def _constants(i, held):
    """Where those of sample i // heads and head i % heads begin, `held` = (heads, the stride of
    samples, how many they are, the first norm of a start value, and how many parts lie between what
    two roles say).
    """
    return i // held[0] * held[1] + i % held[0] * held[2]


@_jit
def _start_norm(m, n, N, groups, held):
    """Which of the constants is the norm of memory n's matrix m // N."""
    return held[3] + m // N * groups + n % groups


@_jit
def _read(
    z, weight, x, w, c, n, g, T,
    IN: tl.constexpr, OUT: tl.constexpr, HIDDEN: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """W_t z_t, or W_0 z_t at the boundary; of x, part c, φ is the input if HIDDEN."""
    answer = _dot_t(z, weight, kind)
    if kind.read == "token":
        x = _tokens(x, c, T, IN, kind.BT)
        if HIDDEN:
            x = _phi(x, kind)
        seen = _ratios(g, g, False) * _dot_t(z, x, kind)
        answer = tl.exp(g)[:, None] * answer
        answer += _dot(seen, _tokens(w, n, T, OUT, kind.BT), kind)
    return answer


@_jit
def _asked_of_start(asked, z, weight, g, kind: tl.constexpr):
    """Gradients of z and W_0 from γ_t W_0 z_t, or from W_0 z_t at the boundary."""
    if kind.read == "token":
        asked = tl.exp(g)[:, None] * asked
    return _dot(asked, weight, kind), _t_dot(asked, z, kind)


@_jit
def _asked_of_writes(
    asked, z, x, write, g, dz, dw, dx, i, T,
    OUT: tl.constexpr, IN: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Adds Σ_s (γ_t/γ_s) (x_s·z_t) w_s: stores gradients of w and x, gives those of z, log γ."""
    dg = tl.sum(z * dz, 1)
    seen = _ratios(g, g, False) * _dot_t(z, x, kind)
    _put(dw, i, T, OUT, _t_dot(seen, asked, kind))
    dseen = _dot_t(asked, write, kind)
    seen *= dseen
    dg += tl.sum(seen, 1) - tl.sum(seen, 0)
    dseen *= _ratios(g, g, False)
    dz += _dot(dseen, x, kind)
    _put(dx, i, T, IN, _t_dot(dseen, z, kind))
    return dz, dg
