"""parallel ≡ naive in float64: outputs, final state and every gradient."""

import functools
import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from nestlearn import SelfModifyingTitans, scan
from nestlearn.memory import (
    FunctionMemory,
    Gates,
    GradientRule,
    Matrix,
    Oja,
    Omega,
    ResidualMLP,
    decay,
    delta,
    every,
    hebbian,
    momentum,
)
from nestlearn.memory import objectives as memory_objectives
from nestlearn.options import Titans
from nestlearn.scan import Chunk, chunk, fused
from nestlearn.scan.writer import into_shell

B, H, C = 2, 2, 6
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
MEMORIES = {
    "matrix": Matrix(5, 4),
    "mlp": ResidualMLP(4, 6),
    "mlp-3": ResidualMLP(4, 5, depth=3),
    "function": FunctionMemory(
        lambda W, x: torch.sin(W[0] @ x) + W[1], lambda: (torch.ones(4, 5), torch.zeros(4))
    ),
}
OPTIONS = ("delta", "normalize", "momentum", "decay")
RULES = {
    f"{'-'.join(o for o, on in zip(OPTIONS, chosen) if on) or 'plain'}-every-{period}":
    GradientRule(**dict(zip(OPTIONS, chosen)), period=period)
    for *chosen, period in itertools.product(*[(False, True)] * 4, (1, 3))
}  # fmt: skip


def stream(memory, rule, T, seed=0, groups=()):
    """Random weights, pairs and gates; every tensor asks for its gradient.

    Steps are small enough that plain gradient descent with L2 and momentum does not diverge.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    W = tuple(0.5 * randn(B, H, *groups, *w.shape[-(w.ndim) :]) for w in memory.init())
    K = getattr(memory, "key_dim", getattr(memory, "dim", 5))
    shared = tuple(1 for _ in groups)
    q, k = randn(B, H, *groups, T, K), 0.5 * randn(B, H, *shared, T, K)
    v = randn(B, H, *groups, T, 4)
    gates = Gates(
        0.2 * torch.rand(B, H, *shared, T, generator=g, dtype=torch.float64),
        (2 + randn(B, H, *shared, T)).sigmoid().log() if rule.decay else None,
        randn(B, H, *shared, T).sigmoid().log() if getattr(rule, "momentum", False) else None,
    )
    leaves = [*W, q, k, v, *(x for x in gates if x is not None)]
    for x in leaves:
        x.requires_grad_()
    return W, q, k, v, gates, leaves


def calls(memory, rule, data, backend, cuts, chunk=C, **options):
    """The stream in calls that end at `cuts` and at multiples of `chunk`: all outputs, and the
    weights and state after each call."""
    W, q, k, v, gates, _ = data
    T = k.shape[-2]
    S, at, outputs, after = rule.init(W), W, [], []
    cuts = sorted({0, T, *cuts, *range(0, T, chunk)})
    for a, b in itertools.pairwise(cuts):
        if a % chunk == 0:
            at = W
        piece = Gates(*(x if x is None else x[..., a:b] for x in gates))
        o, W, S = scan.update(
            Chunk(memory, rule, **options), W, S, q[..., a:b, :], k[..., a:b, :], v[..., a:b, :],
            piece, backend=backend, at=at if a % chunk else None, offset=a % chunk,
        )  # fmt: skip
        outputs.append(o)
        after.append((W, S))
    return torch.cat(outputs, -2), after


def tensors(W, S):
    """The weights and what of the rule's state there is."""
    fields = [x for x in S or () if x is not None]
    return [*W, *(x for field in fields for x in (field if isinstance(field, tuple) else [field]))]


def weighed(results):
    """A sum of all numbers with random factors, whose gradient is looked at."""
    g = torch.Generator().manual_seed(7)
    return sum((torch.randn(r.shape, generator=g, dtype=r.dtype) * r).sum() for r in results)


def gradients(total, leaves):
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros(()) if x is None else x for x in grads]


def run(memory, rule, data, backend, cuts, chunk=C, **options):
    """Outputs, weights and state after the last call, and the gradients of them all."""
    o, after = calls(memory, rule, data, backend, cuts, chunk, **options)
    results = [o, *tensors(*after[-1])]
    return [*results, *gradients(weighed(results), data[-1])]


def same(a, b):
    """Shape by shape and number by number; compared in one call, of which each takes its time."""
    assert [(x.shape, x.dtype) for x in a] == [(y.shape, y.dtype) for y in b]
    one, two = (torch.cat([x.flatten() for x in tensors]) for tensors in (a, b))
    torch.testing.assert_close(one, two, **TOLERANCE)


@dataclass(frozen=True)
class Noting(GradientRule):
    """The rule, which notes the weights and the state after every token."""

    noted: list = field(default_factory=list)

    def step(self, *args):
        after = super().step(*args)
        self.noted.append(after)
        return after


# Lengths around a chunk and over several, and where their calls end beside the ends of chunks. All
# that a call gives is held after each of them: the stream of C + 1 holds that of C, and the one
# that is resumed those that end there.
STREAMS = (
    (1, ()), (C - 1, ()), (C + 1, ()), (3 * C + 5, ()), (3 * C + 5, (2, 4, 5, C + 3, 3 * C - 1, -1))
)  # fmt: skip
BOTH = (memory_objectives.dot_product, memory_objectives.l2)
BY_ROW = replace(  # both at once: an axis before all others says which
    BOTH[0],
    name="both",
    value=lambda y, v: torch.stack([one.value(y[i], v[i]) for i, one in enumerate(BOTH)]),
)


def definition(memory, rule, read):
    """Of each objective and stream the data and what the definition gives: outputs, weights and
    state at the ends of calls, gradients. Objectives and streams are rows of one batch, of which
    nothing beyond a stream's length is looked at.
    """
    shape = (len(BOTH), len(STREAMS))
    T = max(T for T, _ in STREAMS)
    rows = [stream(memory, rule, T, seed) for seed in range(math.prod(shape))]

    def batch(*rows):
        return torch.stack(rows).unflatten(0, shape) if rows[0] is not None else None

    W = tuple(map(batch, *(row[0] for row in rows)))
    q, k, v = (batch(*(row[i] for row in rows)) for i in (1, 2, 3))
    gates = Gates(*map(batch, *(row[4] for row in rows)))
    noting = Noting(**vars(rule))
    data = (W, q, k, v, gates, None)
    o, _ = calls(memory, noting, data, "naive", [], objective=BY_ROW, read=read)
    found = {}
    for i, (one, (T, cuts)) in enumerate(itertools.product(BOTH, STREAMS)):
        row = divmod(i, len(STREAMS))
        states = (tensors(*noting.noted[end - 1]) for end in ends(T, cuts))
        found[one.name, T, cuts] = [
            o[row][..., :T, :],
            *(x[row] for state in states for x in state),
        ]
    slopes = gradients(
        sum(map(weighed, found.values())), [leaf for row in rows for leaf in row[-1]]
    )
    n = len(rows[0][-1])
    return {
        key: (rows[i], [*(x.detach() for x in results), *slopes[i * n : (i + 1) * n]])
        for i, (key, results) in enumerate(found.items())
    }


def ends(T, cuts):
    """Where the calls of a stream end."""
    return sorted({T, *(cut % T for cut in cuts), *range(C, T, C)})


def shortened(data, T):
    W, q, k, v, gates, leaves = data
    return W, q[..., :T, :], k[..., :T, :], v[..., :T, :], gates.map(lambda g: g[..., :T]), leaves


def parity(*switches):
    """Half of all settings of these switches have an even one, and of any switches but one these
    hold every setting.
    """
    return sum(map(bool, switches)) % 2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_parallel_equals_naive(memory, rule):
    """The rule says when the memory is read, so that half of all settings are held; for every other
    memory the other half.
    """
    other = list(MEMORIES.values()).index(memory) % 2
    options = (getattr(rule, name) for name in OPTIONS)
    read = ("token", "boundary")[parity(*options, rule.period > 1, other)]
    if isinstance(memory, FunctionMemory) and (rule.delta or rule.normalize):
        for objective in BOTH:
            with pytest.raises(ValueError, match="FunctionMemory"):
                Chunk(memory, rule, objective=objective.name, read=read)
        return
    for (objective, T, cuts), (data, truth) in definition(memory, rule, read).items():
        piece, written_out = shortened(data, T), not (rule.momentum or rule.period > 1)
        for backend in ("parallel", "auto")[: 1 + written_out]:  # else "auto" is "parallel"
            with scan.chunk.noted() as tokens:
                o, after = calls(
                    memory, rule, piece, backend, ends(T, cuts), objective=objective, read=read
                )
            results = [o, *(x for state in after for x in tensors(*state))]
            same([*results, *gradients(weighed(results), data[-1])], truth)
            if not isinstance(memory, FunctionMemory):
                assert ("fused" in tokens) == (backend == "auto")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_auto_is_parallel_where_no_backward_pass_is_written_out(memory, rule):
    """So that both are held by holding one."""
    if isinstance(memory, FunctionMemory) and (rule.delta or rule.normalize):
        return
    _, q, k, v, gates, _ = data = stream(memory, rule, C)
    written_out = not (rule.momentum or rule.period > 1 or isinstance(memory, FunctionMemory))
    for offset in (0, 2):
        given = chunk.Given(data[0], q, k, v, gates, offset)
        for objective, read in itertools.product(("dot", "l2"), ("token", "boundary")):
            whole = Chunk(memory, rule, objective=objective, read=read)
            form = "fused" if written_out and not offset else "parallel"
            assert chunk.choose(whole, given, "auto")[0] == form


def group(memory, rule, own, reader, shared, seed):
    """Leaves of one chunk of three memories in a group, long and short keys: W, q, k, v, gates."""
    g = torch.Generator().manual_seed(seed)
    T, G, (K, V) = 7, 3, (memory.shapes()[0][1], memory.shapes()[-1][0])

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lead = (B, H, 1 if shared else G)
    W = tuple(0.5 * randn(B, H, G, *shape) for shape in memory.shapes())
    k = 0.7 * randn(*lead, T, K)
    v = randn(*lead, T, K) if own else randn(B, H, G, T, V)
    q = randn(B, H, T, K) if reader is not None else randn(B, H, G, T, K)
    eta = torch.rand(*lead, T, generator=g, dtype=torch.float64)
    log_alpha = randn(*lead, T).sigmoid().log() if rule.decay else None
    leaves = [x.requires_grad_() for x in (*W, q, k, v, eta, log_alpha) if x is not None]
    return W, q, k, v, Gates(eta, log_alpha), leaves


def defined(chunk, data):
    """What the definition gives for groups of memories, the first half of them trained by the dot
    product, the others by l2: the rows of one batch, in which no axis is shared.
    """
    *_, leaves = data[0]
    G = leaves[0].shape[2]

    def batch(rows, may_be_shared=False):
        if rows[0] is None:
            return None
        if may_be_shared:
            rows = [x.expand(*x.shape[:2], G, *x.shape[3:]) for x in rows]
        return torch.stack(rows).unflatten(0, (2, -1))

    W = tuple(map(batch, zip(*(row[0] for row in data))))
    q, k, v = (batch([row[i] for row in data], i > 1) for i in (1, 2, 3))
    gates = Gates(*(batch(rows, True) for rows in zip(*(row[4] for row in data))))
    chunk = replace(chunk, objective=BY_ROW)
    o, after, _ = scan.update(chunk, W, chunk.rule.init(W), q, k, v, gates, backend="naive")
    results = [[x.flatten(0, 1)[i] for x in (o, *after)] for i in range(len(data))]
    slopes = iter(
        torch.autograd.grad(sum(map(weighed, results)), [x for row in data for x in row[-1]])
    )
    return [
        [*(x.detach() for x in found), *itertools.islice(slopes, len(row[-1]))]
        for row, found in zip(data, results)
    ]


SMOOTH = {
    "matrix": Matrix(5, 5),
    "mlp": ResidualMLP(5, 6, gain=2.0),
    "mlp-3-gelu": ResidualMLP(5, 6, depth=3, activation="gelu", residual=False),
    "mlp-tanh": ResidualMLP(5, 7, activation="tanh"),
    "mlp-relu": ResidualMLP(5, 7, activation="relu"),
}


@pytest.mark.parametrize("read", ["token", "boundary"])
@pytest.mark.parametrize(
    "rule", [delta(False), hebbian(), decay(delta(False)), decay(hebbian())], ids=str
)
@pytest.mark.parametrize("memory", SMOOTH.values(), ids=SMOOTH)
def test_groups_own_values_and_a_reader_in_every_form(memory, rule, read):
    """The written-out backward pass and the algebra by autograd against the definition. The other
    switches say whether steps are normalised.
    """
    rows = list(itertools.product(BOTH, (False, True)))  # objective; keys and gates shared
    other = list(SMOOTH.values()).index(memory) % 2
    for own, reader in itertools.product((False, True), (None, -1)):
        normalize = bool(parity(rule.delta, rule.decay, read == "token", own, reader, other))
        composed = GradientRule(rule.delta, rule.decay, normalize=normalize)
        whole = Chunk(memory, composed, read=read, makes_values=own, answering=reader)
        data = [
            group(memory, composed, own, reader, shared, seed)
            for seed, (_, shared) in enumerate(rows)
        ]
        for (aim, _), row, truth in zip(rows, data, defined(whole, data)):
            W, q, k, v, gates, leaves = row
            aimed = replace(whole, objective=aim.name)
            one = isinstance(memory, Matrix) and own and reader == -1 and k.shape[2] == 1
            call = chunk.Given(W, q, k, v, gates, 0)
            assert (chunk.choose(aimed, call, "auto")[0] == "transition") == one
            for backend in ("parallel", "fused", *["transition"] * one):
                o, after, _ = scan.update(
                    aimed, W, composed.init(W), q, k, v, gates, backend=backend
                )
                found = [o, *after]
                same([*found, *torch.autograd.grad(weighed(found), leaves)], truth)


def test_without_autograd_the_same():
    data = stream(ResidualMLP(4, 6), decay(delta()), C)
    W, q, k, v, gates, _ = data
    chunk = Chunk(ResidualMLP(4, 6), decay(delta()))
    args = (chunk, W, chunk.rule.init(W), q, k, v, gates)
    with_graph = scan.update(*args)
    with torch.no_grad():
        without = scan.update(*args)
    same([with_graph[0], *with_graph[1]], [without[0], *without[1]])


@pytest.mark.parametrize("rule", [delta(), momentum(decay(delta()))], ids=["delta", "all"])
def test_memories_that_share_keys_are_one_group(rule):
    """An axis of size 1 in keys and gates is shared; the result is that of separate memories."""
    memory, T = ResidualMLP(4, 6), 2 * C + 3
    W, q, k, v, gates, leaves = stream(memory, rule, T, groups=(3,))
    grouped = run(memory, rule, (W, q, k, v, gates, leaves), "parallel", [])
    for i in range(3):
        one = (
            tuple(w[:, :, i] for w in W), q[:, :, i], k[:, :, 0], v[:, :, i],
            Gates(*(x if x is None else x[:, :, 0] for x in gates)), [],
        )  # fmt: skip
        S, w = rule.init(one[0]), one[0]
        outputs = []
        for a in range(0, T, C):
            piece = slice(a, min(a + C, T))
            o, w, S = scan.update(
                Chunk(memory, rule), w, S, one[1][..., piece, :], one[2][..., piece, :],
                one[3][..., piece, :], Gates(*(x if x is None else x[..., piece] for x in one[4])),
                backend="naive",
            )  # fmt: skip
            outputs.append(o)
        same([grouped[0][:, :, i]], [torch.cat(outputs, -2)])
        same([g[:, :, i] for g in grouped[1:3]], list(w))


def test_gated_deltanet_is_matrix_dot_delta_chunk_1():
    """S_t = S_{t−1} (α_t (I − β k kᵀ)) + β v kᵀ, with the paper's α outside: see docs/choices."""
    T, memory, rule = 9, Matrix(5, 4), decay(delta())
    W, q, k, v, gates, leaves = stream(memory, rule, T)
    k = torch.nn.functional.normalize(k, dim=-1)
    got = run(memory, rule, (W, q, k, v, gates, leaves), "parallel", [], chunk=1)[0]
    S, out = W[0], []
    for t in range(T):
        kt, vt, beta = k[:, :, t], v[:, :, t], gates.eta[:, :, t, None, None]
        alpha = gates.log_alpha[:, :, t, None, None].exp()
        S = alpha * S - beta * (S @ kt[..., None]) * kt[..., None, :]
        S = S + beta * vt[..., None] * kt[..., None, :]
        out.append(S @ q[:, :, t, :, None])
    torch.testing.assert_close(got, torch.cat(out, -1).mT, **TOLERANCE)


def test_chunked_matrix_dot_delta_is_exact_at_any_chunk():
    """With the dot product a matrix memory's errors do not depend on W."""
    memory, rule = Matrix(5, 4), momentum(decay(delta()))
    data = stream(memory, rule, 3 * C + 5)
    online = run(memory, rule, data, "parallel", [], chunk=1)
    same(run(memory, rule, data, "parallel", [], chunk=C), online)


def test_momentum_closed_to_zero_is_no_momentum():
    memory, plain = ResidualMLP(4, 6), decay(delta())
    W, q, k, v, gates, leaves = stream(memory, plain, 2 * C + 1)
    closed = gates._replace(log_theta=torch.full_like(gates.eta, -1e4))
    a = run(memory, plain, (W, q, k, v, gates, leaves), "parallel", [])
    b = run(memory, momentum(plain), (W, q, k, v, closed, leaves), "parallel", [])
    same(a[:3], b[:3])


def test_period_holds_writes_back():
    memory, rule = Matrix(5, 4), every(4, hebbian())
    data = stream(memory, rule, C)
    o = run(memory, rule, data, "naive", [])[0]
    W, q = data[0], data[1]
    torch.testing.assert_close(o[:, :, :3], memory.read(W, q[:, :, :3]), **TOLERANCE)
    assert (o[:, :, 3] - memory.read(W, q[:, :, 3:4])[:, :, 0]).abs().max() > 1e-3


def test_oja_and_omega_by_hand():
    memory, T = Matrix(5, 4), 6
    data = W, q, k, v, gates, _ = stream(memory, Oja(), T)
    o = run(memory, Oja(), data, "auto", [])[0]
    w = W[0]
    for t in range(T):
        kt, vt = k[:, :, t, :, None], v[:, :, t, :, None]
        w = w + gates.eta[:, :, t, None, None] * (vt @ kt.mT - vt @ vt.mT @ w)
        torch.testing.assert_close(o[:, :, t, :, None], w @ q[:, :, t, :, None], **TOLERANCE)

    got = run(memory, Omega(3), data, "auto", [], chunk=2, objective="l2")
    w = W[0]
    for t in range(T):
        first = w if t % 2 == 0 else first
        for i in range(max(0, t - 2), t + 1):
            kt, vt = k[:, :, i, :, None], v[:, :, i, :, None]
            w = w - gates.eta[:, :, i, None, None] * (first @ kt - vt) @ kt.mT
    torch.testing.assert_close(got[1], w, **TOLERANCE)
    same(run(memory, Omega(1), data, "auto", [])[:2], run(memory, hebbian(), data, "auto", [])[:2])


def test_delta_rule_by_hand_with_an_input_of_any_norm():
    """η' = η / max(1, ‖x‖²), in the gradient and in the retention."""
    memory, rule = Matrix(5, 4), delta()
    W, q, k, v, gates, leaves = stream(memory, rule, 1)
    got = run(memory, rule, (W, q, k, v, gates, leaves), "naive", [], objective="l2")[1]
    kt, vt, eta = k[:, :, 0, :, None], v[:, :, 0, :, None], gates.eta[..., None]
    n2 = kt.square().sum(-2, keepdim=True).clamp(min=1)
    expected = W[0] - eta * (W[0] @ kt) @ kt.mT / n2
    expected = expected - eta / n2 * (W[0] @ kt - vt) @ kt.mT
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_a_key_of_zeros_writes_nothing_and_has_finite_gradients():
    memory, rule = ResidualMLP(4, 6), decay(delta())
    W, q, k, v, gates, leaves = stream(memory, rule, C)
    k = torch.zeros_like(k).requires_grad_()
    results = run(memory, rule, (W, q, k, v, gates, [*leaves, k]), "parallel", [])
    assert all(torch.isfinite(r).all() for r in results)
    kept = gates.log_alpha.sum(-1).exp()[..., None, None]
    for before, after in zip(W, results[1:3]):
        torch.testing.assert_close(after, kept * before, **TOLERANCE)


def test_bfloat16_inputs_keep_a_float32_state():
    memory, rule = ResidualMLP(4, 6), decay(delta())
    W, q, k, v, gates, _ = stream(memory, rule, C)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    soft = Gates(*(x if x is None else x.detach().bfloat16() for x in gates))
    W = tuple(w.detach().float() for w in W)
    o, W, _ = scan.update(Chunk(memory, rule), W, rule.init(W), *half, soft)
    assert o.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in W)


def test_a_period_that_does_not_divide_the_chunk():
    memory, rule = ResidualMLP(4, 6), every(4, decay(delta()))
    data = stream(memory, rule, 20)
    same(
        run(memory, rule, data, "parallel", [], chunk=6),
        run(memory, rule, data, "naive", [], chunk=6),
    )


def test_options_that_do_not_fit_are_refused():
    memory, rule = Matrix(5, 4), delta()
    W, q, k, v, gates, _ = stream(memory, rule, 2)
    args = (W, rule.init(W), q, k, v, gates)
    for options, message in (({"read": "late"}, "read='late'"), ({"objective": "l7"}, "'l7'")):
        with pytest.raises(ValueError, match=message):
            Chunk(memory, rule, **options)
    with pytest.raises(ValueError, match="Matrix"):
        Chunk(ResidualMLP(4, 6), Oja())
    plain = Chunk(memory, rule)
    with pytest.raises(ValueError, match="backend='cuda'"):
        scan.update(plain, *args, backend="cuda")
    with pytest.raises(ValueError, match="offset=3 and at=None"):
        scan.update(plain, *args, offset=3)
    with pytest.raises(ValueError, match="log_alpha"):
        scan.update(Chunk(memory, decay(rule)), *args)
    with pytest.raises(ValueError, match="log_theta"):
        scan.update(Chunk(memory, momentum(rule)), *args)
    with pytest.raises(ValueError, match="T = 0"):
        scan.update(plain, *args[:2], q[..., :0, :], k[..., :0, :], v[..., :0, :], gates)
    for backend in ("parallel", "fused"):
        with pytest.raises(ValueError, match="no parallel form"):
            scan.update(Chunk(memory, Oja()), *args, backend=backend)


def test_a_named_backend_that_cannot_run_says_why():
    """And "torch" takes what "auto" would on a machine without a card."""
    rule = momentum(delta())
    W, q, k, v, gates, _ = stream(Matrix(5, 4), rule, C)
    chunk, args = Chunk(Matrix(5, 4), rule), (W, rule.init(W), q, k, v, gates)
    for backend, reason in (
        ("fused", "momentum"),
        ("transition", "own values"),
        ("card", "not on CUDA"),
    ):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run this: .*{reason}"):
            scan.update(chunk, *args, backend=backend)
    ran = {}
    for backend in scan.chunk.BACKENDS[:2]:
        with scan.chunk.noted() as tokens:
            scan.update(chunk, *args, backend=backend)
        ran[backend] = dict(tokens)
    assert ran == {"auto": {"parallel": C}, "torch": {"parallel": C}}


def test_what_runs_a_layer_is_explained():
    """Whole chunks with the backward pass written out, what begins inside a chunk without."""
    for depth, form in ((1, "generated"), (2, "fused")):
        layer = SelfModifyingTitans(8, 2, Titans(4, depth=depth))
        assert scan.explain(layer, torch.randn(1, 6, 8)) == {form: 6}
        _, state = layer(torch.randn(1, 3, 8))
        later = functools.partial(layer, state=state)
        assert scan.explain(later, torch.randn(1, 5, 8)) == {"parallel": 1, form: 4}


def test_what_is_not_shared_or_too_wide_is_no_transition():
    """It says so, whatever the axes, and another form runs the call."""
    own = Chunk(Matrix(4, 4), delta(), makes_values=True, answering=-1)
    W, k, eta = torch.randn(3, 4, 4), torch.randn(1, 5, 4), torch.rand(1, 5)
    for given, form in (
        (((W,), k[0], k, k, Gates(eta)), "transition"),
        (((W,), k[0], k, k, Gates(eta[0])), "fused"),
        (((W[0],), k[0], k[0], k[0], Gates(eta[0])), "fused"),
        (((W,), k[0, :1], k[:, :1], k[:, :1], Gates(eta[:, :1])), "transition"),
    ):
        assert chunk.choose(own, chunk.Given(*given, 0), "auto")[0] == form
    wide, k = replace(own, memory=Matrix(5, 5)), torch.randn(1, 1, 5)
    call = chunk.Given((torch.randn(3, 5, 5),), k[0], k, k, Gates(eta[:, :1]), 0)
    assert chunk.choose(wide, call, "auto")[0] == "fused"


def test_a_backward_pass_inside_an_autocast():
    """Products of autograd's are bfloat16 then, those written out are not."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(16, 2, Titans(8))
    x = torch.randn(2, 20, 16)
    layer(x)[0].square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    y, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.square().sum().backward()
    found = torch.cat([p.grad.flatten() for p in layer.parameters()])
    truth = torch.cat([grad.flatten() for grad in grads])
    assert (found - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("memory", [Matrix(3, 4), ResidualMLP(3, 5, depth=3, gain=1.7)])
def test_answers_have_the_gradient_of_reading(memory):
    """The backward pass written out for generating against autograd's, axes shared or not."""
    g = torch.Generator().manual_seed(0)
    W = tuple(
        torch.randn(2, 3, *s, generator=g, dtype=torch.float64, requires_grad=True)
        for s in memory.shapes()
    )
    z = torch.randn(2, 1, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    truth = memory.read(W, z)
    got = fused.answers(memory, W, z)
    assert torch.allclose(got, truth, rtol=1e-12)
    up = torch.randn(truth.shape, generator=g, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, (z, *W), up), torch.autograd.grad(truth, (z, *W), up)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_shell_has_its_gradient_below_inside_and_above():
    g = torch.Generator().manual_seed(0)
    W0 = torch.randn(3, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([0.1, 0.8, 3.0], dtype=torch.float64).view(3, 1, 1)
    W = (torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64) * sizes).requires_grad_()
    assert torch.autograd.gradcheck(lambda W, W0: into_shell(W, W0, 0.5, 1.5), (W, W0))


class OnCard(torch.Tensor):
    is_cuda = True


def test_triton_can_be_turned_off(monkeypatch):
    """What a CUDA tensor goes through: the kernels where Triton is there, unless turned off."""
    monkeypatch.setattr(chunk, "_TRITON_IS_THERE", True)
    card = torch.zeros(1).as_subclass(OnCard)
    assert chunk.on_card(card)
    scan.use_triton(False)
    try:
        assert not chunk.on_card(card)
    finally:
        scan.use_triton()
    assert chunk.on_card(card)
    assert not chunk.on_card(torch.zeros(1))
