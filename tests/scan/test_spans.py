"""Many chunks at once ≡ one after another ≡ token by token: outputs, state, gradients, float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from nestlearn.memory import Gates, GradientRule, Matrix, delta, every
from nestlearn.memory.objectives import dot_product, l2
from nestlearn.scan import Chunk, FastWeights, Span, Writer, plain_spans, spans, update
from nestlearn.scan.spans import LevelState

B, K, V = 2, 5, 3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
BOTH = (l2, dot_product)
RULES = {"gd": (False, False), "dgd": (True, False), "momentum": (False, True)}


def writer(chunk, rule="dgd", objective="l2", **options):
    replaces, momentum = RULES[rule]
    rule = GradientRule(replaces, momentum=momentum, normalize=True)
    options = {"bound": (0.25, 1.05), "bound_every": chunk * -(-64 // chunk), **options}
    return Writer(Matrix(K, V), rule, chunk, objective=objective, read="boundary", **options)


def stream(T, momentum, seed=0, size=1.5):
    """Features (some longer than 1), values, gates; every tensor asks for its gradient."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    W0, last, h, v = randn(V, K), randn(B, 1, K), size * randn(B, T, K) / K**0.5, randn(B, T, V)
    eta = 0.3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    theta = torch.full((B, T), 0.4, dtype=torch.float64).log() if momentum else None
    leaves = [W0, last, h, v, eta, *([] if theta is None else [theta])]
    for x in leaves:
        x.requires_grad_()
    return W0, last, h, v, Gates(eta, None, theta), leaves


def run(writer, data, cuts):
    """The stream in calls that end at `cuts` and at ends of chunks, as layers make them."""
    W0, last, h, v, gates, leaves = data
    T, C, position = h.shape[1], writer.chunk, cuts[0]
    fast, ys = writer.begin((W0,), B), []
    ends = {position, position + T, *cuts}
    if writer.backend == "naive":
        ends |= set(range(-(-position // C) * C, position + T, C))
    for x in list(ends):
        ends |= {x // C * C, -(-x // C) * C}
    for a, b in itertools.pairwise(sorted(x for x in ends if position <= x <= position + T)):
        part = slice(a - position, b - position)
        xs = h[:, part], v[:, part], gates.map(lambda g, part=part: g[:, part])
        y, (last, fast, _) = spans.write(writer, W0, LevelState(last, fast), xs, Span(a, b))
        ys.append(y)
    results = [torch.cat(ys, 1), *tensors(fast)]
    return results, torch.autograd.grad(weighed(results), leaves, allow_unused=True)


def tensors(fast):
    return [*fast.now, *fast.start, *(fast.rule.momentum or ())]


def weighed(results):
    """A sum of all numbers with random factors, whose gradient is looked at."""
    g = torch.Generator().manual_seed(1)
    return sum((torch.randn(x.shape, dtype=torch.float64, generator=g) * x).sum() for x in results)


def defined(writer, rows, lengths):
    """`run` of the definition for streams of one length, of which so many tokens are looked at; the
    first half of them trained by L2, the others by the dot product: the rows of one batch.
    """
    each = replace(
        l2,
        name="each row's own",
        value=lambda y, v: torch.cat([o.value(*pair) for o, *pair in zip(BOTH, *halves(y, v))]),
    )
    writer = replace(writer, backend="naive", objective=each)
    C, T = writer.chunk, max(lengths)
    W0 = torch.cat([row[0].expand(B, V, K) for row in rows])
    last, h, v = (torch.cat(parts) for parts in list(zip(*rows))[1:4])
    gates = Gates(*(g[0] if g[0] is None else torch.cat(g) for g in zip(*(row[4] for row in rows))))
    fast, ys, states = FastWeights((W0,), (W0,), writer.rule.init((W0,))), [], {}
    for a, b in itertools.pairwise(sorted({0, *lengths, *range(0, T, C)})):
        part = gates.map(lambda g, a=a, b=b: g[:, a:b])
        xs = h[:, a:b], v[:, a:b], part
        y, (last, fast, _) = spans.write(writer, W0, LevelState(last, fast), xs, Span(a, b))
        ys.append(y)
        states[b] = tensors(fast)
    y = torch.cat(ys, 1).split(B)
    results = [
        [y[i][:, :length], *(x.split(B)[i] for x in states[length])]
        for i, length in enumerate(lengths)
    ]
    leaves = [leaf for row in rows for leaf in row[-1]]
    slopes = torch.autograd.grad(sum(map(weighed, results)), leaves, allow_unused=True)
    n = len(leaves) // len(rows)
    return [(found, slopes[i * n : (i + 1) * n]) for i, found in enumerate(results)]


def halves(*tensors):
    return (x.chunk(2) for x in tensors)


def equal(one, two):
    """All numbers are compared in one call, of which each takes its time."""
    pairs = list(zip(itertools.chain(*one), itertools.chain(*two), strict=True))
    assert all(a is b for a, b in pairs if a is None or b is None)
    pairs = [pair for pair in pairs if pair[0] is not None]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    one, two = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs))
    assert one.isfinite().all()
    torch.testing.assert_close(one, two, **TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("half_life", [None, 20, 300])  # fades every chunk, with the bound
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_spans_equal_the_definition(chunk, half_life, rule):
    """Lengths around chunks and spans, from the stream's start."""
    w = writer(chunk, rule, half_life=half_life)
    size = spans.span_size(w, spans.ON_CPU)
    around = {1, chunk - 1, chunk, chunk + 1, size - 1, size + 1, 3 * size + 5} - {0}
    cases = list(itertools.product(BOTH, sorted(around)))
    rows = [stream(3 * size + 5, rule == "momentum", seed) for seed in range(len(cases))]
    truths = defined(w, rows, [T for _, T in cases])
    for (one, T), (W0, last, h, v, gates, leaves), truth in zip(cases, rows, truths, strict=True):
        data = W0, last, h[:, :T], v[:, :T], gates.map(lambda g, T=T: g[:, :T]), leaves
        equal(run(replace(w, objective=one.name), data, [0]), truth)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cuts", [[0, 3], [0, 37, 70], [0, 64, 65], [0, 1, 2, 3, 150]])
def test_a_stream_may_be_cut_anywhere(cuts, rule):
    """Inside of a chunk, inside of a span, at their ends."""
    w = writer(8, rule, half_life=300)
    data = stream(197, rule == "momentum")
    equal(run(w, data, cuts), run(replace(w, backend="naive"), data, [0]))


@pytest.mark.parametrize("rule", ["gd", "dgd"])
@pytest.mark.parametrize("options", [{}, {"half_life": 300}, {"bound": None}])
def test_a_chain_of_two_products(monkeypatch, rule, options):
    """What a card does: all that stands before a state is multiplied beforehand."""
    w = writer(8, rule, **options)
    data = stream(197, False)
    expected = run(replace(w, backend="naive"), data, [0, 37, 70])
    monkeypatch.setattr(plain_spans, "_is_chain", lambda rows: True)
    equal(run(w, data, [0, 37, 70]), expected)


@pytest.mark.parametrize(("chunk", "most"), [(512, 1), (3, 64), (48, 64), (1, 7), (16, 256)])
def test_the_span_changes_nothing(monkeypatch, chunk, most):
    w = writer(chunk, bound_every=chunk * -(-200 // chunk), half_life=2048)
    data = stream(600, False)
    expected = run(replace(w, backend="naive"), data, [0])
    monkeypatch.setattr(spans, "ON_CPU", most)
    equal(run(w, data, [0]), expected)


@pytest.mark.parametrize("bound", [None, (0.25, 1.05), (1.2, 3.0)])
def test_the_bound_acts_from_both_sides(bound):
    w = writer(4, bound=bound, bound_every=16)
    data = stream(70, False)
    both = run(w, data, [0]), run(replace(w, backend="naive"), data, [0])
    equal(*both)
    free = run(replace(w, bound=None), data, [0])
    assert (bound is None) == torch.equal(both[0][0][0], free[0][0])


def test_first_order_goes_chunk_by_chunk():
    w = writer(4, first_order=True)
    data = stream(30, False)
    equal(run(w, data, [0]), run(replace(w, backend="naive"), data, [0]))
    full = run(replace(w, first_order=False), data, [0])
    assert (run(w, data, [0])[1][0] - full[1][0]).abs().max() > 1e-3


def test_by_dot_product_it_is_every():
    """W with writes that show every C tokens (`every`), a chunk as long as the span."""
    w = writer(4, objective="dot", bound=None)
    W0, last, h, v, gates, _ = data = stream(24, False)
    k = torch.cat([last, h[:, :-1]], 1)
    W = (W0.expand(B, V, K),)
    rule = every(4, delta())
    # `update` reads after a token's write, a level before it: the answers are one token apart
    o, W, _ = update(Chunk(Matrix(K, V), rule), W, rule.init(W), k, k, v, gates, backend="naive")
    (_, now, *_), _ = run(w, data, [0])
    torch.testing.assert_close(W[0], now, **TOLERANCE)
    for t in range(24):
        if (t + 1) % 4:
            torch.testing.assert_close(
                o[:, t], (run(w, stream_at(data, t, k), [0])[0][0])[:, t], **TOLERANCE
            )


def stream_at(data, t, k):
    """The same stream, where token t asks with its key."""
    W0, last, h, v, gates, leaves = data
    asked = torch.cat([h[:, :t], k[:, t : t + 1], h[:, t + 1 :]], 1)
    return W0, last, asked, v, gates, leaves


def test_half_precision_products_stay_near(monkeypatch):
    """bfloat16 products with float32 sums, as on a card: inverse, states and steps stay wide."""
    data = stream(192, False)
    expected, slopes = run(writer(16), data, [0])
    plain = torch.bmm, torch.baddbmm

    def bmm(a, b, out_dtype=None, out=None):
        return plain[0](a.to(out_dtype or a.dtype), b.to(out_dtype or a.dtype), out=out)

    def baddbmm(x, a, b, out_dtype, out):
        return plain[1](x, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "bmm", bmm)  # the CPU has no products with another output type
    monkeypatch.setattr(torch, "baddbmm", baddbmm)
    monkeypatch.setattr(spans, "_products", lambda h: torch.bfloat16)
    *inputs, gates, _ = data
    inputs = [x.detach().float().requires_grad_() for x in (*inputs, gates.eta)]
    low, rough = run(writer(16), (*inputs[:4], Gates(inputs[4]), inputs), [0])
    for x, y in itertools.chain(zip(low, expected), zip(rough, slopes)):
        assert (x.double() - y).norm() < 0.02 * y.norm()


def test_autocast_does_not_reach_the_systems():
    """On a CPU all is float32, whatever autocast says of products around."""
    w, data = writer(16), stream(80, False)
    *inputs, gates, _ = data
    inputs = [x.detach().float().requires_grad_() for x in (*inputs, gates.eta)]
    data = (*inputs[:4], Gates(inputs[4]), inputs)
    expected = run(w, data, [0])
    with torch.autocast("cpu", torch.bfloat16):
        found = run(w, data, [0])
    for a, b in itertools.chain(zip(found[0], expected[0]), zip(found[1], expected[1])):
        assert torch.equal(a, b)


def test_inverse_by_halves(monkeypatch):
    system = torch.rand(3, 128, 128, dtype=torch.float64).tril(-1) * 0.1
    one = torch.eye(128, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(plain_spans._inverse(system) @ (one + system), one.expand(3, -1, -1))
