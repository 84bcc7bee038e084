"""Parameters and gradients at the edges: without values, of one, huge, tiny; states of before."""

import copy

import pytest
import torch
from test_optimizer_laws import ENTRIES, GROUPED, equal, network, train, weights
from torch import nn

from nestlearn import optim

BOUNDED = {n: e for n, e in GROUPED.items() if "literal" not in n}
grouped = pytest.mark.parametrize("entry", GROUPED.values(), ids=GROUPED)
bounded = pytest.mark.parametrize("entry", BOUNDED.values(), ids=BOUNDED)


def stepped(entry, shape, size=1.0, dtype=torch.float32, rank=None):
    """The sum of three steps from zero, gradients of that size and rank."""
    draw = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = entry.build([p], lr=0.1, **{"weight_decay": 0.0, **entry.options})
    for _ in range(3):
        g = torch.randn(shape, generator=draw)
        p.grad = ((g if rank is None else g[:, :1] @ g[:1]) * size).to(dtype)
        optimizer.step()
    return p.detach().double()


@grouped
def test_parameters_without_values_are_left_alone(entry):
    shapes = ((0, 5), (5, 0), (0,), (2, 0, 3))
    empty = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    full = nn.Parameter(torch.ones(3, 4))
    optimizer = entry.build([*empty, full], lr=0.1, **entry.options)
    for p in (*empty, full):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not torch.equal(full, torch.ones(3, 4))


@grouped
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1,), ()])
def test_one_row_one_column_one_value(entry, shape):
    assert stepped(entry, shape, 0.1).isfinite().all()


@bounded
def test_a_gradients_size_has_no_square(entry):
    """float32 ≡ float64 where the square of a gradient, or what stands beside it, is not held."""
    near = 1e-3 if entry is ENTRIES["M3"] else 1e-4  # M3 packs its memories of float32 alone
    sizes = (1e-25, 1e6, 1e15) if entry is ENTRIES["M3, second moment"] else (1e-25, 1e6, 1e25)
    for shape, rank in (((4, 9), None), ((9, 4), 1)):
        for size in sizes:
            found = stepped(entry, shape, size, rank=rank)
            truth = stepped(entry, shape, size, torch.float64, rank)
            assert (found - truth).norm() <= near * truth.norm(), (shape, size)


def test_a_second_moment_without_a_square_moves_on():
    entry = ENTRIES["M3, second moment"]
    huge, plain = stepped(entry, (4, 9), 1e25), stepped(entry, (4, 9))
    assert 0.5 < huge.norm() / plain.norm() < 2


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_the_implicit_step_of_large_gradients_is_the_argmin(shape):
    """Against the stacked least squares ‖m √η gᵀ + √η I‖² + ‖m − α m_t‖², in float64."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    optimizer, m = optim.GM([p], lr=0.01, momentum=0.9, objective="l2"), torch.zeros(shape).double()
    for _ in range(3):
        g = torch.randn(shape) * 1e6
        p.grad = g
        optimizer.step()
        left = torch.cat([g.double() * 0.1, torch.eye(shape[1]).double()])
        right = torch.cat([-0.1 * torch.eye(shape[0]).double(), 0.9 * m.mT])
        m = torch.linalg.lstsq(left, right).solution.mT
        found = optimizer.state[p]["momentum"].double()
        assert (found - m).norm() <= 1e-4 * m.norm()
    p.grad = torch.full(shape, torch.nan)
    optimizer.step()
    assert p.isnan().all()


def test_inputs_of_no_samples_and_of_no_width():
    for layer, x in (
        (nn.Linear(5, 4), torch.zeros(0, 5)),
        (nn.utils.skip_init(nn.Linear, 0, 4), torch.zeros(3, 0)),
        (nn.Embedding(5, 4), torch.zeros(0, dtype=torch.long)),
        (nn.Conv2d(1, 2, 3), torch.zeros(0, 1, 4, 4)),
    ):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        optimizer = optim.DGD(layer)
        layer(x).sum().backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in layer.parameters())


def test_who_looks_at_layers_takes_the_model():
    net = nn.Linear(3, 3)
    for make in (optim.DGD, optim.GGD, optim.groups):
        with pytest.raises(
            TypeError, match=f"{make.__name__} takes the model itself, not generator"
        ):
            make(net.parameters())


def test_what_cannot_be_stepped_is_refused_before_anything_moves():
    still, table = nn.Parameter(torch.ones(3, 4)), nn.Embedding(5, 4, sparse=True)
    optimizer = optim.Muon([{"params": [still]}, {"params": table.parameters()}])
    still.grad = torch.ones(3, 4)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(5, 4\) is sparse"):
        optimizer.step()
    assert torch.equal(still, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"sparse: give parameter\.to_dense"):
        optim.Muon([nn.Parameter(torch.eye(3).to_sparse())])
    with pytest.raises(ValueError, match=r"betas=\(0\.9, 0\.95, 0\.9\): choose two numbers"):
        optim.Muon([still], betas=(0.9, 0.95, 0.9))


# -------------------------------------------------------------------------------- states of before


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_state_without_an_option_is_completed(entry):
    """As a version saved it that did not know the option yet: what stands here goes on."""
    model = network()
    optimizer = entry(model)
    train(model, optimizer, 4)
    saved = optimizer.state_dict()
    bare = copy.deepcopy(saved)
    for group in bare["param_groups"]:
        for name in group.keys() - {"params"}:
            del group[name]
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = entry(other)
    resumed.load_state_dict(bare)
    assert [g.keys() for g in bare["param_groups"]] == [{"params"}]  # theirs is not written to
    train(model, optimizer, 4, 4)
    train(other, resumed, 4, 4)
    assert equal(weights(model), weights(other))


def test_the_form_of_a_slow_memory_is_read_off_its_state():
    model, other = network(), network()
    exact, packed = ENTRIES["M3, exact"](model), ENTRIES["M3"](other)
    train(model, exact, 4)
    saved = exact.state_dict()
    for group in saved["param_groups"]:
        del group["exact"]
    other.load_state_dict(model.state_dict())
    packed.load_state_dict(saved)
    train(model, exact, 4, 4)
    train(other, packed, 4, 4)
    assert equal(weights(model), weights(other))


def test_a_mean_square_that_was_saved_goes_on_as_its_root():
    model = network()
    optimizer = ENTRIES["DeepMomentum"](model)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["size"] = state.pop("rms").square()
    other = network()
    resumed = ENTRIES["DeepMomentum"](other)
    resumed.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.parameters()):
        assert resumed.state[q].keys() == optimizer.state[p].keys()
        torch.testing.assert_close(resumed.state[q]["rms"], optimizer.state[p]["rms"])


def test_a_state_that_cannot_go_on_is_refused_and_nothing_is_changed():
    model = network()
    muon = ENTRIES["Muon"](model)
    train(model, muon, 2)
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    bad_option, bad_shape = (copy.deepcopy(muon.state_dict()) for _ in range(2))
    bad_option["param_groups"][0]["ns_steps"] = 0
    bad_shape["state"][1]["momentum"] = torch.ones(2)
    before = copy.deepcopy(muon.state_dict())
    for given, message in (
        (adam.state_dict(), r"shape \(\) has no first, second, but \['exp_avg', 'exp_avg_sq'"),
        (bad_option, r"ns_steps=0: choose"),
        (bad_shape, r"has momentum of shape \(2,\), not \(11, 8\): load it into the optimizer"),
    ):
        with pytest.raises(ValueError, match=message):
            muon.load_state_dict(given)
        assert muon.state_dict()["param_groups"] == before["param_groups"]
        for number, state in muon.state_dict()["state"].items():
            assert equal(state.values(), before["state"][number].values())
