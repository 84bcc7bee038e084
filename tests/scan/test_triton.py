"""card.given ≡ parallel: outputs, state and gradients, on the card or in Triton's interpreter.

The interpreter must be chosen before triton is imported, and the shape checks of these tests must
not wrap kernels: so the kernels run in a process of their own.
"""

import importlib.util
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import interpreted
import pytest
import torch

from nestlearn.memory import Gates, GradientRule, Matrix, ResidualMLP, every, momentum
from nestlearn.scan import Chunk, parallel
from nestlearn.scan.chunk import Given

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it comes with torch for CUDA", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATRIX, MLP = Matrix(5, 4), ResidualMLP(4, 6, gain=1.7)
ALL = GradientRule(delta=True, decay=True, normalize=True)
RULES = {
    "plain": GradientRule(),
    "normalize-decay": GradientRule(normalize=True, decay=True),
    "delta": GradientRule(delta=True),
    "all": ALL,
}


class Case(NamedTuple):
    """One chunk. shared: leading axes [*c] of keys and gates; same: worst-case keys, all alike."""

    memory: Matrix | ResidualMLP
    rule: GradientRule
    objective: str = "l2"
    read: str | None = "token"
    T: int = 7
    lead: tuple[int, ...] = (1, 2)
    shared: tuple[int, ...] | None = None
    reader: int | None = None
    same: float | None = None
    precision: str | None = None
    dtype: torch.dtype = torch.float32


def data(case):
    """W, q, k, v, η, log α in float64; keys on both sides of norm 1."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lead, T = case.lead, case.T
    shared = lead if case.shared is None else case.shared
    (_, K), (V, _) = case.memory.shapes()[0], case.memory.shapes()[-1]
    W = [randn(*lead, *shape) / shape[-1] ** 0.5 for shape in case.memory.shapes()]
    q = randn(*(lead if case.reader is None else lead[:-1]), T, K)
    k, v = randn(*shared, T, K) / K**0.5, randn(*lead, T, V)
    eta = torch.rand(*shared, T, generator=g, dtype=torch.float64)
    log_alpha = (randn(*shared, T) + 2).sigmoid().log()
    if case.same is not None:
        k = k[..., :1, :].expand_as(k) / k[..., :1, :].norm(dim=-1, keepdim=True) * 1.001
        eta, log_alpha = torch.full_like(eta, case.same), torch.zeros_like(log_alpha)
    q, k, v = (x.to(case.dtype).double() for x in (q, k, v))
    return [*W, q if case.read else None, k, v, eta, log_alpha if case.rule.decay else None]


def said(case, reader=None):
    """The case's chunk."""
    return Chunk(
        case.memory, case.rule, objective=case.objective, read=case.read or "token",
        answering=reader,
    )  # fmt: skip


def run(update, case, dtype, device, grad=True, reader=None):
    """Outputs, state and, if asked for, gradients."""
    leaves = [None if x is None else x.to(device, dtype) for x in data(case)]
    if dtype == torch.float32:
        n = len(case.memory.shapes())
        leaves[n : n + 3] = [None if x is None else x.to(case.dtype) for x in leaves[n : n + 3]]
    leaves = [None if x is None else x.clone().requires_grad_(grad) for x in leaves]
    *W, q, k, v, eta, log_alpha = leaves
    o, W, _ = update(
        said(case, reader), tuple(W), case.rule.init(tuple(W)), q, k, v, Gates(eta, log_alpha),
        at=tuple(W), offset=0,
    )  # fmt: skip
    results = [x for x in (o, *W) if x is not None]
    if not grad:
        return results
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in results]
    return results, torch.autograd.grad(results, [x for x in leaves if x is not None], weights)


def every_memory_reads(case):
    """The case as `parallel` has it without `reader`: all answer, one answer is taken."""

    def update(chunk, W, S, q, *args, **options):
        if q is not None and case.reader is not None:
            q = q.unsqueeze(-3).expand(*case.lead, *q.shape[-2:])
        o, W, S = parallel.update(chunk, W, S, q, *args, **options)
        return o if o is None or case.reader is None else o.select(-3, case.reader), W, S

    return update


def poisoned(*args, **options):
    """An empty buffer whose every number is NaN until it is written."""
    return torch.empty(*args, **options).fill_(float("nan"))


def kernels(case):
    from nestlearn.scan.card import given

    given._empty = poisoned
    given.PRECISION = case.precision
    if DEVICE == "cpu":
        interpreted.prepare()
    return given


def errors(case):
    """Relative errors of outputs, state and gradients against `parallel` in float64."""
    got = run(kernels(case).update, case, torch.float32, DEVICE, reader=case.reader)
    truth = run(every_memory_reads(case), case, torch.float64, "cpu")
    pairs = [(a.double().cpu(), b) for x, y in zip(got, truth) for a, b in zip(x, y)]
    assert all(a.shape == b.shape for a, b in pairs)
    return [float((a - b).norm() / (b.norm() + 1e-30)) for a, b in pairs]


def bits(case):
    """Whether a second run, and one without gradients, give the same bits."""
    update, options = kernels(case).update, {"reader": case.reader}
    one, two = (run(update, case, torch.float32, DEVICE, **options) for _ in range(2))
    bare = run(update, case, torch.float32, DEVICE, grad=False, **options)
    again = all(torch.equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y))
    return again, all(torch.equal(a, b) for a, b in zip(one[0], bare))


def compiled(case, leads):
    """Whether the compiled update gives the bits of the other, whatever the batch."""
    torch._dynamo.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    update = kernels(case).update
    graph = torch.compile(update, backend=backend, fullgraph=True)
    same = []
    for lead in leads:
        some = case._replace(lead=lead, shared=(*lead[:-1], 1))
        for grad in (True, False):
            one, two = (
                run(f, some, torch.float32, DEVICE, grad, reader=case.reader)
                for f in (update, graph)
            )
            pairs = zip((*one[0], *one[1]), (*two[0], *two[1])) if grad else zip(one, two)
            same += [torch.equal(a, b) for a, b in pairs]
    return all(same)


def operators(case):
    """torch's own checks of a custom operator, of both."""
    module, given = kernels(case), [x if x is None else x.float() for x in data(case)]
    W = given[: len(case.memory.shapes())]
    given = [None if x is None else x.to(DEVICE) for x in given]
    if len(W) == 1:
        given.insert(1, None)
    form = f"{'silu' if len(W) > 1 else ''},{case.read or 'none'},1,1,1,1,"
    options = (form, 1.7, case.reader)
    *outputs, kept = module._run(*options, True, *given)
    grads = [torch.randn_like(x) for x in outputs]
    ops, tests = torch.ops.nestlearn, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.chunk.default, (*options, True, *given), test_utils=tests)
    args = (*options, *given, kept, grads)
    torch.library.opcheck(ops.chunk_backward.default, args, test_utils=tests)


def compiled_layer():
    """Errors of a compiled layer's outputs and gradients, its graphs and what it launched."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from nestlearn.layers import SelfModifyingTitans
    from nestlearn.options import Titans
    from nestlearn.scan import chunk, writer
    from nestlearn.scan.card import generated

    kernels(Case(MLP, ALL))
    if DEVICE == "cpu":
        chunk.on_card = writer.on_card = lambda x: True
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("inductor" if DEVICE == "cuda" else "aot_eager")
    torch.manual_seed(0)
    options = Titans(2, depth=2, half_life=None)
    composed = SelfModifyingTitans(4, 1, options, backend="torch").to(DEVICE)
    layer = SelfModifyingTitans(4, 1, options).to(DEVICE)
    layer.load_state_dict(composed.state_dict())
    launched = set()
    launch = generated._launch

    def noted(kernel, *args):
        launched.add(kernel.__name__)
        launch(kernel, *args)

    generated._launch = noted
    xs = [torch.randn(b, t, 4, device=DEVICE, requires_grad=True) for b, t in ((2, 4), (3, 2))]

    def both(layer, x):
        y = layer(x)[0]
        return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]

    expected = [both(composed, x) for x in xs]
    layer.compile(backend=graphs)
    found = [both(layer, x) for x in xs]
    errors = [
        float((a - b).norm() / (b.norm() + 1e-30))
        for x, y in zip(found, expected)
        for a, b in zip(x, y)
    ]
    return errors, graphs.frame_count, launched


def typed(K, H, V):
    """Triton's front end on every kernel, for a card that need not be there; how many they are.

    The interpreter lets a name have one shape in one branch and another in the other; no compiler
    does, and widths that share a tile hide it.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    from nestlearn.scan.card import kernels, transition_kernels
    from nestlearn.scan.card.tiles import Kind, Place

    own, modules = K == V, (kernels, transition_kernels)
    kind = Kind(
        K, H, V, H != K, "silu", 4.0, own, True, True, True, True, "token", 16, "tf32", "tf32x3",
        own=own, shell=own, high=1.0,
    )  # fmt: skip
    names = ("asking", "answering", "dasking", "given", "dgiven")
    tuples = {"held": 5, **dict.fromkeys(names, 6)}
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": kernels.WARPS})
    compiled = 0
    for kernel in vars(modules[K == H]).values():
        arguments = getattr(kernel, "arg_names", ())
        if arguments[-7:-1] != list(Place._fields) or (not own and "constants" in arguments[:4]):
            continue
        types, constants = {}, {}
        for i, name in enumerate(arguments):
            if name == "kind":
                types[name], constants[i,] = "constexpr", kind
            elif name in tuples:
                types[name] = ("i32",) * tuples[name]
            else:
                types[name] = "i32" if name in ("apart", "heads", *Place._fields) else "*fp32"
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        ASTSource(kernel, types, constants).make_ir(
            target, options, backend.get_codegen_implementation(options),
            backend.get_module_map(), context,
        )  # fmt: skip
        compiled += 1
    return compiled


def refused(case, reader=None, offset=0, first_order=False, double=False):
    """What keeps the kernels from the case, if anything does."""
    leaves = [None if x is None else x.to(DEVICE, torch.float32) for x in data(case)]
    *W, q, k, v, eta, log_alpha = leaves
    W = tuple(w.double() if double else w for w in W)
    chunk = replace(said(case, reader), first_order=first_order)
    return kernels(case).why_not(chunk, Given(W, q, k, v, Gates(eta, log_alpha), offset))


@pytest.fixture(scope="module")
def away():
    """Calls a function of this file in the process of the kernels."""
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(torch.set_num_threads, 1).result()  # the process starts here
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        yield lambda f, *args: pool.submit(f, *args).result()


def check(away, case, tolerance=1e-5):
    found = away(errors, case)
    assert all(e <= tolerance for e in found), found  # false for NaN, too


READS = ("token", "boundary", None)
MEMORIES, OBJECTIVES = {"matrix": MATRIX, "mlp": MLP}, ("dot", "l2")
HALF = [  # of all cases; any three choices of the four meet
    chosen
    for chosen in itertools.product(MEMORIES, RULES, OBJECTIVES, READS)
    if sum(map(list.index, map(list, (MEMORIES, RULES, OBJECTIVES, READS)), chosen)) % 2 == 0
]


@pytest.mark.parametrize(("memory", "rule", "objective", "read"), HALF)
def test_triton_equals_chunk(away, memory, rule, objective, read):
    check(away, Case(MEMORIES[memory], RULES[rule], objective, read))


@pytest.mark.parametrize("T", [1, 16, 17, 33, 64])
@pytest.mark.parametrize("memory", [MATRIX, MLP], ids=["matrix", "mlp"])
def test_any_length(away, memory, T):
    check(away, Case(memory, ALL, T=T))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh"])
@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_activations_without_the_skip(away, activation, objective):
    memory = ResidualMLP(4, 6, activation=activation, gain=1.3, residual=False)
    check(away, Case(memory, ALL, objective))


def test_widths_that_fill_their_tiles_and_widths_that_do_not(away):
    check(away, Case(ResidualMLP(16, 32, gain=4.0), ALL, T=16))
    check(away, Case(ResidualMLP(42, 20, gain=4.0), ALL, T=9))
    check(away, Case(Matrix(33, 64), ALL, T=9))


@pytest.mark.parametrize(
    ("widths", "number"), [((16, 32, 16), 8), ((16, 48, 24), 6), ((16, 16, 16), 7)]
)
def test_every_kernel_compiles_for_widths_of_different_tiles(widths, number):
    assert typed(*widths) == number


@pytest.mark.parametrize("read", ["token", "boundary", None])
@pytest.mark.parametrize("reader", [None, 0, -1])
def test_memories_that_share_keys_and_one_that_answers(away, reader, read):
    check(away, Case(MLP, ALL, read=read, lead=(1, 2, 3), shared=(1, 2, 1), reader=reader))


@pytest.mark.parametrize(
    ("lead", "shared"),
    [
        ((4,), (1,)),
        ((), ()),
        ((2, 3, 2), (1, 3, 1)),
        ((2, 3, 2), (2, 1, 2)),
        ((2, 2, 3), (1, 1, 3)),
    ],
)
def test_any_axes_are_shared(away, lead, shared):
    check(away, Case(MATRIX, ALL, lead=lead, shared=shared))


@pytest.mark.parametrize(
    ("memory", "eta", "tolerance"),
    # 64 reflections of one vector: `chunk` itself is off by 1.9e-5 in float32, the kernels by 6e-6
    # in the interpreter (`interpreted`) and 1.6e-5 on a card
    [(Matrix(16, 16), 1.0, 1e-5), (Matrix(16, 16), 2.0, 4e-5), (MLP, 1.0, 1e-5)],
)
def test_keys_that_are_all_alike(away, memory, eta, tolerance):
    """Powers of L would reach 1e18 here; the inverse stays of order 1."""
    check(away, Case(memory, ALL, T=64, lead=(1,), same=eta), tolerance)


def test_one_memory_that_answers_alone(away):
    check(away, Case(MATRIX, ALL, lead=(2, 1), reader=0))


def test_half_precision_inputs(away):
    check(away, Case(MLP, ALL, dtype=torch.bfloat16), tolerance=1e-2)


def test_tf32_is_near_enough(away):
    check(away, Case(ResidualMLP(16, 16, gain=4.0), ALL, T=33, precision="tf32"), tolerance=2e-3)


def test_two_runs_give_the_same_bits(away):
    case = Case(MLP, ALL, T=17, lead=(1, 3), shared=(1, 1), reader=1)
    assert away(bits, case) == (True, True)


@pytest.mark.parametrize("read", ["token", "boundary", None])
@pytest.mark.parametrize("memory", [MATRIX, MLP], ids=["matrix", "mlp"])
def test_the_operators_are_what_they_say(away, memory, read):
    away(operators, Case(memory, ALL, read=read, T=2, lead=(1, 2), shared=(1, 1), reader=-1))


def test_compiled_it_gives_the_same_bits(away):
    assert away(compiled, Case(MLP, ALL, T=2, reader=-1), [(2, 2), (3, 2)])


def test_a_compiled_layer_has_a_graph_before_the_kernels_and_one_after_them(away):
    errors, graphs, launched = away(compiled_layer)
    assert graphs == 2
    assert {"_generate", "_backward_generate"} <= launched
    assert all(e <= 1e-5 for e in errors), errors


def test_what_the_kernels_cannot_run_is_refused(away):
    case = Case(MLP, ALL)
    assert away(refused, case) is None
    assert away(refused, case, -1) is None
    for options in ((None, 3), (None, 0, True), (None, 0, False, True)):
        assert away(refused, case, *options)
    for other in (
        case._replace(rule=momentum(ALL)),
        case._replace(rule=every(4, ALL)),
        case._replace(memory=ResidualMLP(4, 6, depth=3)),
        case._replace(memory=Matrix(65, 4)),
        case._replace(T=65),
    ):
        assert away(refused, other)
