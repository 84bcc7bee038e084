"""scan.generated ≡ the composed step: a layer's outputs, states and gradients, in float64."""

import pytest
import torch

from nestlearn.layers import SelfModifyingTitans
from nestlearn.options import Titans
from nestlearn.scan import explain

HOW = ("truncate", "remat")
CASES = {
    "plain": {},
    "l2": {"objective": "l2"},
    "no-decay-wide-steps": {"weight_decay": False, "eta_max": 2.0},
    "shut": {"eta_max": 2.0, "eta_min": 0.04},  # gates begin about there
    "boundary": {"read": "boundary"},
    "free": {"bound": None},
    "grown": {"bound": (1.1, 2.0)},
    "shrunk": {"bound": (0.25, 0.9)},
    "two-groups-of-heads": {"dgd": 0.5},
    "plain-descent": {"dgd": False},
    "fades-after-every-chunk": {"half_life": 8},
    "fades-after-some": {"half_life": 48},
    "recomputed": {"remat": True},
    "cut": {"truncate": 8},
}


def layer_of(backend="auto", **options):
    torch.manual_seed(0)
    how = {name: options.pop(name) for name in HOW if name in options}
    layer = SelfModifyingTitans(
        16, 2, Titans(4, **{"half_life": None, **options}), backend=backend, **how
    )
    with torch.no_grad():
        layer.eta.bias.copy_(torch.tensor([0.5, -0.5]))
        if layer.alpha is not None:
            layer.alpha.bias.copy_(torch.tensor([2.0, 4.0]))
    return layer.double()


def results(layer, lengths=(22, 7, 1)):
    """Outputs and states of calls in a row, the second from inside a chunk; then gradients."""
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(2, T, 16, generator=g).double().requires_grad_() for T in lengths]
    found, state = [], None
    for x in xs:
        y, state = layer(x, state)
        found.append(y)
    found += [w for fast in state.memories for w in fast.now]
    by = [torch.randn(x.shape, generator=g).double() for x in found]
    return [*found, *torch.autograd.grad(found, [*xs, *layer.parameters()], by)]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_whole_chunks_equal_the_composed_step(options):
    ours, composed = results(layer_of(**options)), results(layer_of("torch", **options))
    for a, b in zip(ours, composed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with torch.no_grad():  # a chunk at a time
        x = torch.randn(2, 22, 16).double()
        torch.testing.assert_close(
            layer_of(**options)(x)[0], layer_of("torch", **options)(x)[0], rtol=1e-11, atol=1e-11
        )


def test_what_runs_it():
    x = torch.randn(1, 10, 16).double()
    assert explain(layer_of(), x) == {"generated": 10}
    assert explain(layer_of(), x[:, :1]) == {"fused": 1}  # W A would cost more than it saves
    assert "generated" not in explain(layer_of("transition"), x)
    for options in ({"depth": 2}, {"momentum": True}, {"adapt": ("k",)}, {"projection_chunk": 2}):
        assert "generated" not in explain(layer_of(**options), x), options


def test_float32_is_as_near_as_the_composed_step():
    truth, errors = results(layer_of("torch")), []
    for backend in ("auto", "torch"):
        layer = layer_of(backend).float()
        x = torch.randn(2, 22, 16, generator=torch.Generator().manual_seed(1))
        errors.append((layer(x)[0] - truth[0]).norm() / truth[0].norm())
    assert errors[0] < 2 * errors[1] < 2e-6, errors


def test_no_samples_are_as_good_as_some():
    layer, x = layer_of(), torch.randn(0, 22, 16).double().requires_grad_()
    y, _ = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_a_state_keeps_nothing_but_itself():
    (now,) = layer_of()(torch.randn(1, 64, 16).double())[1].memories[0].now
    assert now.untyped_storage().nbytes() == now.numel() * now.element_size()
