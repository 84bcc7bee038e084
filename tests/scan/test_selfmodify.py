"""card.generated ≡ the composed step: a layer's outputs, states and gradients, kernel by kernel.

The truth is `backend="torch"` in float64. As in test_triton.py the kernels run in a process of
their own, in Triton's interpreter where there is no card.
"""

from collections import Counter
from typing import Any, NamedTuple

import interpreted
import pytest
import torch
from test_triton import DEVICE, away, poisoned  # noqa: F401 - a fixture

from nestlearn import state as tree
from nestlearn.layers import SelfModifyingTitans
from nestlearn.options import Titans

HOW = ("truncate", "remat", "backend")  # beside the options
FORWARD = ("_generate", "_invert", "_forward")
BACKWARD = ("_backward_systems", "_backward_factors", "_backward_generate")
OF_MATRICES = {  # in the forward pass; launches of a chunk and of a run of chunks
    "_transition": (True, 1, 0), "_write": (True, 1, 1), "_backward_write": (False, 1, 1),
    "_backward_transition": (False, 1, 0), "_answer_through": (True, 0, 1),
    "_backward_read_through": (False, 0, 1), "_backward_say": (False, 0, 1),
}  # fmt: skip


class Case(NamedTuple):
    """A layer, and calls of so many tokens each, one after the other."""

    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    width: int = 5
    chunk: int = 4
    calls: tuple[int, ...] = (6,)
    heads: int = 1
    batch: int = 1
    precision: str | None = None
    autocast: bool = False


def build(case, dtype, device, backend="auto"):
    """The layer, with gates and steps large enough that everything that is written counts."""
    torch.manual_seed(0)
    dim = case.heads * case.width
    own = {"depth": 2, "half_life": None, **case.options}
    how = {"backend": backend, **{name: own.pop(name) for name in HOW if name in own}}
    layer = SelfModifyingTitans(dim, case.heads, Titans(case.chunk, **own), **how)
    with torch.no_grad():
        layer.eta.bias.copy_(torch.linspace(0.5, -0.5, case.heads))
        if layer.alpha is not None:
            layer.alpha.bias.copy_(torch.linspace(2.0, 4.0, case.heads))
    return layer.to(device, dtype)


def results(layer, case, dtype, device):
    """Outputs and the state's tensors, then gradients of x and of every parameter."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    xs = [randn(case.batch, T, case.heads * case.width).requires_grad_() for T in case.calls]
    ys, state = [], None
    for x in xs:
        y, state = layer(x, state)
        ys.append(y)
    found = [*ys, *(w for fast in state.memories for w in fast.now)]
    grads = torch.autograd.grad(
        found, [*xs, *layer.parameters()], [randn(*x.shape).to(x.dtype) for x in found]
    )
    return [*found, *grads]


def kernels(case):
    """The modules as the kernels' tests want them, and where every launch is counted."""
    from nestlearn.scan import chunk, writer
    from nestlearn.scan.card import generated, given, transition

    launches = Counter()
    launch = given._launch
    if DEVICE == "cpu":
        interpreted.prepare()

    def counted(kernel, *args):
        launches[kernel.__name__] += 1
        launch(kernel, *args)

    given._empty, given.PRECISION = poisoned, case.precision
    generated._launch = transition._launch = counted
    chunk.on_card = writer.on_card = lambda x: True
    return launches


def distances(found, truth):
    """Of each tensor, relative to its norm."""
    pairs = list(zip((x.detach().double().cpu() for x in found), truth, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return [float(((a - b).norm() / (b.norm() + 1e-30)).detach()) for a, b in pairs]


def errors(case):
    """Of the layer by its kernels, and the launches."""
    truth = results(build(case, torch.float64, "cpu", backend="torch"), case, torch.float64, "cpu")
    launches = kernels(case)
    torch.set_autocast_enabled("cuda", case.autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    found = results(build(case, torch.float32, DEVICE), case, torch.float32, DEVICE)
    torch.set_autocast_enabled("cuda", False)
    return distances(found, truth), dict(launches)


def check(away, case, tolerance=3e-5, groups=1, inverted=1, runs=None):  # noqa: F811
    """Errors within the tolerance. All but the gradient of a bias, one sum that cancels, are
    within 1e-5. runs: of chunks that were answered together, as many as there are chunks unless
    said.
    """
    found, launches = away(errors, case)
    large = [(i, e) for i, e in enumerate(found) if not e <= tolerance]  # NaN, too
    assert not large, large
    chunks = -(-sum(case.calls) // case.chunk)  # begun: what goes on inside one is composed
    again, runs = 2 if case.options.get("remat") else 1, chunks if runs is None else runs
    if case.options.get("depth") == 1:
        assert launches == {
            name: (chunk * chunks + run * runs) * groups * (again if forward else 1)
            for name, (forward, chunk, run) in OF_MATRICES.items()
        }
        return
    expected = dict.fromkeys(FORWARD, chunks * groups * again)
    expected |= dict.fromkeys(BACKWARD, chunks * groups)
    expected["_invert"] = chunks * inverted * again
    expected |= {"_answer": runs * groups * again, "_backward_read": runs * groups}
    assert launches == {name: n for name, n in expected.items() if n}


FORMS = {  # others are among RUNS: a matrix, as it is and with wide steps; no decay; cuts
    "plain": {},
    "hidden": {"hidden": 7},
    "l2": {"objective": "l2"},
    "matrix-boundary-l2": {"depth": 1, "read": "boundary", "objective": "l2"},
    "no-decay-wide-steps": {"weight_decay": False, "eta_max": 2.0},
    "wide-steps": {"eta_max": 2.0},
    "shut": {"eta_max": 2.0, "eta_min": 0.04},  # gates begin about there
    "free": {"bound": None},
    "shrunk": {"bound": (0.25, 0.9)},
    "matrix-grown": {"depth": 1, "bound": (1.1, 2.0)},
    "grown": {"bound": (1.1, 2.0)},
    "matrix-no-decay-wide-steps": {"depth": 1, "weight_decay": False, "eta_max": 2.0},
    "matrix-shut-l2": {"depth": 1, "eta_max": 2.0, "eta_min": 0.04, "objective": "l2"},
    "matrix-free": {"depth": 1, "bound": None, "half_life": 8},
    "recomputed": {"remat": True},
    "fading": {"half_life": 8},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_kernels_equal_the_composed_step(away, options):  # noqa: F811
    """A whole chunk and the beginning of the next, for which no shell is due."""
    check(away, Case(options))


def test_heads_samples_and_calls_in_a_row(away):  # noqa: F811
    check(away, Case(heads=2, batch=2, chunk=8, calls=(8,)))
    check(away, Case({"depth": 1}, heads=2, calls=(5, 3)))


RUNS = {
    "one": (Case({"depth": 1}, heads=2, batch=2, calls=(12,)), 1),
    "several": (Case({"depth": 1, "eta_max": 2.0}, calls=(10, 6)), 3),
    "cut": (Case({"truncate": 8}, calls=(12,)), 2),
    "recomputed": (Case({"depth": 1, "remat": True}, chunk=1, calls=(9,)), 2),
    "boundary": (Case({"read": "boundary", "weight_decay": False}, calls=(8,)), 1),
    "matrices-boundary": (
        Case({"depth": 1, "read": "boundary", "weight_decay": False, "dgd": False}, calls=(8,)),
        1,
    ),
    "fading": (Case({"depth": 1, "half_life": 48}, chunk=2, calls=(18, 12)), 4),
    "fading-after-every-chunk": (Case({"depth": 1, "half_life": 8}, calls=(12,)), 3),
}


@pytest.mark.parametrize(("case", "runs"), RUNS.values(), ids=RUNS)
def test_whole_chunks_in_a_row_are_answered_together(away, case, runs):  # noqa: F811
    check(away, case, runs=runs)


def test_groups_of_heads_with_and_without_the_delta_term(away):  # noqa: F811
    check(away, Case({"dgd": 0.5, "objective": "l2"}, heads=2, calls=(8,)), groups=2, runs=1)
    check(away, Case({"dgd": False, "depth": 1}))
    check(away, Case({"dgd": False}), inverted=0)


def test_widths_and_lengths_that_fill_their_tiles_and_others(away):  # noqa: F811
    check(away, Case({"hidden": 20}, width=42, chunk=33, calls=(33,)))
    check(away, Case(width=64, chunk=64, calls=(64,)))
    check(away, Case({"depth": 1}, width=42, chunk=33, calls=(33,)))
    check(away, Case({"depth": 1}, width=64, chunk=64, calls=(64,)))


def test_bfloat16_is_near_enough(away):  # noqa: F811
    """The gradients of what makes α are sums that cancel: 3e-2; all others stay below 1e-2."""
    check(away, Case(width=16, chunk=16, calls=(17,), precision="bf16"), tolerance=4e-2)
    check(away, Case(width=16, chunk=16, calls=(16,), precision="tf32"), tolerance=2e-3)
    matrices = Case({"depth": 1}, width=16, chunk=16, calls=(17,), precision="bf16")
    check(away, matrices, tolerance=4e-2)


def seen_precisions(case):
    """Of the kernels' products and systems; what they would compute is left out."""
    from nestlearn.scan.card import generated, given, transition

    found = set()
    kernels(case)
    before = generated._launch, given._launch, given._empty

    def noted(_, __, kind, *___):
        found.add((kind.dot, kind.system))

    generated._launch = transition._launch = given._launch = noted
    given._empty = torch.zeros
    torch.set_autocast_enabled("cuda", case.autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    y = build(case, torch.float32, DEVICE)(torch.randn(1, 4, case.width, device=DEVICE))[0]
    torch.set_autocast_enabled("cuda", False)
    y.sum().backward()  # outside autocast, as a training step does it
    generated._launch, given._launch, given._empty = before
    transition._launch = generated._launch
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"adapt": ("k", "eta", "alpha")}, {"depth": 1}],
    ids=["generated", "given", "matrices"],
)
def test_autocast_decides_the_precision(away, options):  # noqa: F811
    assert away(seen_precisions, Case(options, width=64, autocast=True)) == {("bf16", "tf32")}
    assert away(seen_precisions, Case(options, width=32, autocast=True)) == {("tf32x3",) * 2}
    forced = Case(options, autocast=True, precision="ieee")
    assert away(seen_precisions, forced) == {("ieee", "tf32x3")}


def bits(case):
    """Whether a second run, and one without gradients, give the same bits."""
    kernels(case)
    one, two = (
        results(build(case, torch.float32, DEVICE), case, torch.float32, DEVICE) for _ in range(2)
    )
    g = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, case.calls[0], case.width, generator=g, dtype=torch.float64)
    with torch.no_grad():
        bare = build(case, torch.float32, DEVICE)(x.to(DEVICE, torch.float32))[0]
    return all(map(torch.equal, one, two)), torch.equal(one[0], bare)


@pytest.mark.parametrize("depth", [1, 2])
def test_two_runs_give_the_same_bits(away, depth):  # noqa: F811
    assert away(bits, Case({"depth": depth})) == (True, True)


def fallen_back(options, double=False, chunks=(3, 5)):
    """Launches of these kernels by a layer that they cannot run, in calls of such lengths."""
    case = Case(options)
    launches = kernels(case)
    layer = build(case, torch.float64 if double else torch.float32, DEVICE)
    state = None
    for T in chunks:
        x = torch.randn(1, T, layer.dim, dtype=layer.eta.bias.dtype, device=DEVICE)
        y, state = layer(x, state)
        assert y.isfinite().all()
    return dict(launches)


OTHERS = {
    "momentum": {"momentum": True},
    "adaptive-query": {"adapt": ("k", "v", "eta", "alpha", "q")},
    "static-value": {"adapt": ("k", "eta", "alpha")},
    "two-chunk-sizes": {"projection_chunk": 2},
    "three-matrices": {"depth": 3},
    "backend": {"backend": "parallel"},
    "too-wide": {"hidden": 65},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_what_the_kernels_cannot_run_is_composed(away, options):  # noqa: F811
    assert not {"_generate", "_transition"} & set(away(fallen_back, options))


def test_only_whole_beginnings_of_chunks_run_in_kernels(away):  # noqa: F811
    """Three tokens, then the chunk's last and the four of the next: the second span is composed."""
    assert away(fallen_back, {})["_generate"] == 2
    assert "_generate" not in away(fallen_back, {}, True)


def other_states(case):
    """Whether states of the same numbers, bfloat16 or transposed, answer alike; the launches."""
    launches = kernels(case)
    layer = build(case, torch.float32, DEVICE)
    x = torch.randn(case.batch, case.calls[0], layer.dim, device=DEVICE)
    narrow = tree.tree_map(lambda w: w.bfloat16(), layer.init_state(case.batch))
    turned = tree.tree_map(lambda w: w.float().mT.contiguous().mT, narrow)
    ys = [layer(x, state)[0] for state in (narrow, turned)]
    return torch.equal(*ys), dict(launches)


def test_states_of_another_type_or_layout_run_in_kernels(away):  # noqa: F811
    same, launches = away(other_states, Case({"conv": 0, "depth": 1}, calls=(4,)))
    assert same
    assert launches["_transition"] == 2
