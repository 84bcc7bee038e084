"""compile(): few graphs for every batch and length, which answer as the layer does eagerly.

Run by test_compile.py in a process of its own, where nothing checks the shapes of arguments: those
checks cannot be compiled.
"""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nestlearn import ContinuumMemory, HopeConfig, HopeLM, Level, SelfModifyingTitans
from nestlearn.layers import gated_deltanet
from nestlearn.options import Continuum, Titans
from nestlearn.scan import explain

TITANS = Titans(4, depth=2, half_life=None)
LAYERS = {
    "titans": (lambda dim: SelfModifyingTitans(dim, 2, TITANS), 3),
    "titans-matrices": (lambda dim: SelfModifyingTitans(dim, 2, Titans(4, half_life=None)), 3),
    "cms": (lambda dim: ContinuumMemory(dim, [Level(chunk=4, hidden=16), Level(hidden=16)]), 4),
    "cms-all": (lambda dim: ContinuumMemory(dim, [Level(chunk=4, hidden=16, learns="all")]), 3),
    "deltanet": (lambda dim: gated_deltanet(dim, 2, chunk=4), 3),
}  # fmt: skip
GRAPHS = CompileCounterWithBackend("aot_eager")  # one for all tests: equal layers share what it has
gc.set_threshold(100_000)  # a quarter of the time to trace went into looking for garbage
torch._dynamo.config.run_gc_after_compile = False  # the same, after each graph


def both(build, dim=8):
    """A layer in float64, and its twin that is compiled."""
    torch.manual_seed(0)
    layer = build(dim).double()
    compiled = copy.deepcopy(layer)
    compiled.compile(backend=GRAPHS)
    return layer, compiled


def check(layer, compiled, batch, T):
    """Outputs and the gradient of x are alike."""
    x = torch.randn(batch, T, layer.dim, dtype=torch.float64, requires_grad=True)
    expected, y = layer(x)[0], compiled(x)[0]
    grad, found = (torch.autograd.grad(o.square().sum(), x)[0] for o in (expected, y))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-9)


@pytest.fixture
def traced(monkeypatch):
    """What is traced is the point: nothing is made of new graphs."""
    monkeypatch.setattr(GRAPHS, "backend", "eager")


@pytest.mark.parametrize(("build", "number"), LAYERS.values(), ids=LAYERS)
def test_the_same_graphs_for_all_of_one_width(build, number):
    """One for the step, two for what is before and after it; of a level, whose spans are not whole
    here, those two; the same for one that never learns. All chunks, batches and lengths share them,
    and so do equal layers.
    """
    before, counts, layers = GRAPHS.frame_count, [], both(build)
    for batch, T in ((2, 12), (3, 20), (5, 11), (2, 4)):
        check(*layers, batch, T)
        counts.append(GRAPHS.frame_count - before)
    check(*both(build), 2, 8)
    counts.append(GRAPHS.frame_count - before)
    assert counts == [number] * len(counts)


@pytest.mark.usefixtures("traced")
def test_who_asks_what_runs_sees_no_compiled_step():
    _, layer = both(LAYERS["titans-matrices"][0])
    assert explain(layer, torch.randn(2, 21, 8, dtype=torch.float64)) == {"transition": 1}


@pytest.mark.usefixtures("traced")
def test_layers_of_another_width_have_graphs_of_their_own():
    """Of one code they would share a graph with symbols for their widths, which torch cannot trace.
    What keeps them apart is the same for all layers: the one that is quickest to trace holds it.
    """
    build, number = LAYERS["cms"]
    before, counts = GRAPHS.frame_count, []
    for dim in (20, 12, 20):
        check(*both(build, dim), 2, 8)
        counts.append(GRAPHS.frame_count - before)
    assert counts == [number, 2 * number, 2 * number]


def test_whole_spans_are_compiled_too():
    """What stands between a level's products: spans of 64, and what is left of a call."""
    check(*both(lambda dim: ContinuumMemory(dim, [Level(chunk=4, hidden=16)])), 2, 3 * 64 + 9)


@pytest.mark.usefixtures("traced")
def test_one_sample_one_token_many_samples():
    """Each with a graph of its own where it has one, and none of them a failure. Many without
    gradients are those of a model, below.
    """
    eager, layer = both(LAYERS["titans"][0])
    states = {False: None, True: None}
    for batch, T, grad, new in (
        (1, 6, True, True),
        (1, 6, False, True),
        (1, 1, True, False),
        (1, 1, False, False),
        (1, 1, True, False),
        (20, 8, True, True),
        (20, 1, True, False),
        (20, 1, False, True),
    ):
        x = torch.randn(batch, T, 8, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            before = None if new else states[grad]
            y, _ = layer(x, before)
            expected, states[grad] = eager(x, before)
        torch.testing.assert_close(y, expected)


@pytest.mark.usefixtures("traced")
def test_a_compiled_layer_may_be_compiled_from_outside_and_copied():
    torch.manual_seed(0)
    layer = SelfModifyingTitans(8, 2, TITANS).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)  # a chunk, and a part of one
    expected = layer(x)[0]
    layer.compile(backend=GRAPHS)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x)[0], expected)
    other = copy.copy(layer)  # shares all but what is put in its place
    other._modules = {**layer._modules, "readout": copy.deepcopy(layer.readout)}
    with torch.no_grad():
        other.readout.out.weight.add_(1)
    torch.testing.assert_close(layer(x)[0], expected)
    assert (other(x)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_may_be_pickled(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](8), torch.randn(1, 8, 8)
    expected = layer(x)[0]
    layer.compile(backend="eager")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        compiled = [getattr(part, "_compiled", {}).keys() for part in twin.modules()]
        assert compiled == [getattr(part, "_compiled", {}).keys() for part in layer.modules()]
        assert any(compiled)
        assert (twin(x[:, :1])[0] - expected[:, :1]).abs().max() < 1e-5
    if name == "cms":  # the one that is quick to compile
        assert (twin(x)[0] - expected).abs().max() < 1e-5


def test_a_model_compiles_the_layers_of_memories():
    torch._dynamo.reset()
    torch.manual_seed(0)
    channel = Continuum((Level(chunk=4), Level()))
    config = HopeConfig(dim=8, layers=2, heads=2, mixer=Titans(4), channel=channel)
    model = HopeLM(config)
    ids = torch.randint(0, 256, (2, 10))
    with torch.no_grad():
        expected = model(ids)[0]
        graphs = CompileCounterWithBackend("eager")
        model.compile(backend=graphs)
        torch.testing.assert_close(model(ids)[0], expected)
        assert graphs.frame_count == 7  # three of Titans, two of each level; both blocks share them


def test_inductor_gives_the_same():
    """Generated code, not the traced graph alone."""
    torch.manual_seed(0)
    layer = ContinuumMemory(8, [Level(chunk=4, hidden=16, rule="gd", learns="all")])
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        expected = layer(x)[0]
        layer.compile()
        torch.testing.assert_close(layer(x)[0], expected)
