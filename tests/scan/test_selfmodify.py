"""selfmodify ≡ the composed step: a layer's outputs, states and every gradient, kernel by kernel.

The truth is `backend="fused"` in float64. As in test_triton.py the kernels run in a process of
their own, in Triton's interpreter where there is no card.
"""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from test_triton import DEVICE, away, poisoned  # noqa: F401 - a fixture

from nestlearn.layers import SelfModifyingTitans

FORWARD = ("_generate", "_invert", "_forward")
BACKWARD = ("_backward_read", "_backward_systems", "_backward_factors", "_backward_generate")


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


def build(case, dtype, device, **options):
    """The layer, with gates and steps large enough that everything that is written counts."""
    torch.manual_seed(0)
    dim = case.heads * case.width
    layer = SelfModifyingTitans(dim, case.heads, case.chunk, **{**case.options, **options})
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
    from nestlearn.scan import door, selfmodify, triton

    launches = Counter()
    launch = triton._launch

    def counted(kernel, *args):
        launches[kernel.__name__] += 1
        launch(kernel, *args)

    triton._empty, triton.PRECISION = poisoned, case.precision
    selfmodify._launch = counted
    door.on_card = lambda x: True
    return launches


def distances(found, truth):
    """Of each tensor, relative to its norm."""
    pairs = list(zip((x.detach().double().cpu() for x in found), truth, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return [float(((a - b).norm() / (b.norm() + 1e-30)).detach()) for a, b in pairs]


def errors(case):
    """Of the layer by its kernels, of the composed step in float32, and the launches."""
    truth, composed = (
        results(build(case, dtype, "cpu", backend="fused"), case, dtype, "cpu")
        for dtype in (torch.float64, torch.float32)
    )
    launches = kernels(case)
    torch.set_autocast_enabled("cuda", case.autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    found = results(build(case, torch.float32, DEVICE), case, torch.float32, DEVICE)
    torch.set_autocast_enabled("cuda", False)
    return distances(found, truth), distances(composed, truth), dict(launches)


def check(away, case, tolerance=1e-5, groups=1, inverted=1):  # noqa: F811
    """Errors within the tolerance, or of the composed step's own size: sums that cancel."""
    found, composed, launches = away(errors, case)
    allowed = [max(tolerance, 4 * e) for e in composed]
    assert all(a <= b for a, b in zip(found, allowed)), found  # false for NaN, too
    chunks = sum(-(-T // case.chunk) for T in case.calls)
    again = 2 if case.options.get("remat") else 1
    expected = dict.fromkeys(FORWARD, chunks * groups * again)
    expected |= dict.fromkeys(BACKWARD, chunks * groups)
    expected["_invert"] = chunks * inverted * again
    assert launches == {name: n for name, n in expected.items() if n}


FORMS = {
    "plain": {},
    "matrix": {"depth": 1},
    "hidden": {"hidden": 7},
    "l2": {"objective": "l2"},
    "matrix-l2": {"depth": 1, "objective": "l2"},
    "boundary": {"read": "boundary"},
    "matrix-boundary-l2": {"depth": 1, "read": "boundary", "objective": "l2"},
    "no-decay": {"weight_decay": False},
    "no-decay-wide-steps": {"weight_decay": False, "eta_max": 2.0},
    "wide-steps": {"eta_max": 2.0},
    "matrix-wide-steps": {"depth": 1, "eta_max": 1.5},
    "free": {"bound": None},
    "shrunk": {"bound": (0.25, 0.9)},
    "matrix-grown": {"depth": 1, "bound": (1.1, 2.0)},
    "grown": {"bound": (1.1, 2.0)},
    "first-order-cut": {"truncate": 4},
    "recomputed": {"remat": True},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_kernels_equal_the_composed_step(away, options):  # noqa: F811
    """A whole chunk and the beginning of the next, for which no shell is due."""
    check(away, Case(options))


def test_heads_samples_and_calls_in_a_row(away):  # noqa: F811
    check(away, Case(heads=2, batch=2, calls=(5,)))
    check(away, Case({"depth": 1}, heads=3, batch=2, calls=(4, 9)))


def test_groups_of_heads_with_and_without_the_delta_term(away):  # noqa: F811
    check(away, Case({"dgd": 0.5, "eta_max": 2.0}, heads=2, batch=2, calls=(5,)), groups=2)
    check(away, Case({"dgd": False, "objective": "l2"}), inverted=0)
    check(away, Case({"dgd": False, "depth": 1}), inverted=0)


def test_widths_and_lengths_that_fill_their_tiles_and_others(away):  # noqa: F811
    check(away, Case(width=16, chunk=16, calls=(16,)))
    check(away, Case({"hidden": 20}, width=42, chunk=33, calls=(33,)))
    check(away, Case(width=64, chunk=64, calls=(65,)))
