"""The laws that every optimizer obeys."""

import copy
import io
import pickle
import re
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestlearn import optim


@dataclass
class Entry:
    """How an optimizer is built, and learning rates for the quadratic, Rosenbrock, the network."""

    build: type
    lrs: tuple[float, float, float]
    options: dict = field(default_factory=dict)
    floor: float = 3e-3  # what is left of the quadratic
    scales: tuple[float, float] = (1.0, 1.0)  # of the first two losses

    def __call__(self, model, lr=0.01, **options):
        target = model if issubclass(self.build, optim.DGD) else model.parameters()
        return self.build(target, lr=lr, **{"weight_decay": 0.0, **self.options, **options})


SLOW = {"period": 3, "momentum": 0.9}
ENTRIES = {
    "DGD": Entry(optim.DGD, (0.3, 3e-3, 0.3), {"forget": 1e-4}),
    "DGD with momentum": Entry(optim.DGD, (0.1, 1e-3, 0.03), {"forget": 1e-4, "momentum": 0.9}),
    "DGD by trace": Entry(optim.DGD, (0.3, 3e-3, 0.3), {"forget": 1e-4, "solve": "trace"}),
    "GGD": Entry(optim.GGD, (0.3, 3e-3, 0.3), {"objective": "dot"}),
    "GM": Entry(optim.GM, (0.1, 1e-3, 0.03)),
    "GM, L2": Entry(optim.GM, (0.1, 3e-3, 0.1), {"objective": "l2"}),
    "DeltaMomentum": Entry(optim.DeltaMomentum, (0.3, 3e-3, 0.1)),
    "DeltaMomentum, literal": Entry(
        optim.DeltaMomentum, (10.0, 10.0, 0.03), {"mode": "literal"}, scales=(0.01, 1e-4)
    ),
    "DeepMomentum": Entry(optim.DeepMomentum, (0.3, 0.01, 0.3)),
    "DeepMomentum by element": Entry(optim.DeepMomentum, (0.3, 0.01, 0.3), {"tokens": "element"}),
    "DeepMomentum, dot": Entry(optim.DeepMomentum, (0.3, 0.01, 0.3), {"objective": "dot"}),
    "Muon": Entry(optim.Muon, (0.3, 0.3, 0.03)),
    "AdaMuon": Entry(optim.AdaMuon, (0.3, 0.3, 0.03)),
    "M3": Entry(optim.M3, (0.3, 0.3, 0.03), SLOW),
    "M3, exact": Entry(optim.M3, (0.3, 0.3, 0.03), {**SLOW, "exact": True}),
    "M3, second moment": Entry(optim.M3, (0.3, 0.3, 0.03), {**SLOW, "second_moment": True}),
    # its steps shrink before it is there; the vectors' Adam needs β1 < √β2: above, when gradients
    # fade, its steps grow without bound
    "M3, literal": Entry(
        optim.M3, (0.1, 3.0, 0.03), {**SLOW, "mode": "literal", "betas": (0.6, 0.5)}, floor=0.2
    ),
}
GROUPED = {n: e for n, e in ENTRIES.items() if not issubclass(e.build, optim.DGD)}
every = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


class Network(nn.Module):
    """A bit of everything: an embedding, a matrix, a kernel, vectors, a scalar."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 12)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm, self.gain = nn.LayerNorm(12), nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(24, 5)

    def forward(self, ids):
        x = torch.tanh(self.hidden(self.embed(ids)))
        x = self.conv(self.norm(x)[:, None]).amax(2).flatten(1)
        return self.gain * self.head(x)


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


def batch(i, size=32):
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(0, 11, (size, 1), generator=generator)
    return ids.expand(size, 6), ids[:, 0] % 5


def backward(model, i, sign=1.0):
    ids, classes = batch(i)
    loss = F.cross_entropy(model(ids), classes)
    (sign * loss).backward()
    return loss


def train(model, optimizer, steps, start=0, sign=1.0):
    losses = []
    for i in range(start, start + steps):
        optimizer.zero_grad()
        losses.append(float(backward(model, i, sign).detach()))
        optimizer.step()
    return losses


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------- it optimises


@every
def test_converges_on_a_quadratic(entry):
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    target, scales = torch.randn(6, 5), torch.linspace(0.5, 1, 6)[:, None]
    optimizer = entry(model, entry.lrs[0])
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(1 - t / 150, 1e-3))
    losses = []
    for _ in range(150):
        y = model(torch.cat([torch.eye(4), torch.zeros(1, 4)])).mT  # W + b and b: [6, 5]
        loss = 0.5 * (scales * (y - target).square()).sum()
        optimizer.zero_grad()
        (entry.scales[0] * loss).backward()
        optimizer.step()
        falling.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < entry.floor * losses[0], losses[::50]


@every
def test_makes_progress_on_rosenbrock(entry):
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.2], [1.0]]))
    optimizer = entry(model, entry.lrs[1])
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 200)
    for i in range(200):
        a, b = model(torch.ones(1, 1))[0]
        loss = (1 - a) ** 2 + 100 * (b - a**2) ** 2
        first = float(loss.detach()) if i == 0 else first
        optimizer.zero_grad()
        (entry.scales[1] * loss).backward()
        optimizer.step()
        falling.step()
    assert float(loss.detach()) < 0.3 * first


@every
def test_trains_a_network(entry):
    model = network()
    losses = train(model, entry(model, entry.lrs[2]), 60)
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5]), losses[::10]


# ------------------------------------------------------------------------------------- it repeats


@every
def test_is_deterministic(entry):
    runs = []
    for _ in range(2):
        model = network()
        train(model, entry(model), 5)
        torch.rand(3)  # whatever others draw
        runs.append(weights(model))
    assert equal(*runs)


@every
def test_a_saved_state_goes_on_bit_for_bit_at_every_phase(entry):
    whole = network()
    optimizer = entry(whole)
    saved = {}
    for i in range(8):
        file = io.BytesIO()
        torch.save((whole.state_dict(), optimizer.state_dict()), file)
        saved[i] = file
        train(whole, optimizer, 1, i)
    for i, file in saved.items():
        model = network(1)
        resumed = entry(model, lr=0.5)  # the saved group says otherwise
        file.seek(0)
        of_model, of_optimizer = torch.load(file)
        model.load_state_dict(of_model)
        resumed.load_state_dict(of_optimizer)
        train(model, resumed, 8 - i, i)
        assert equal(weights(model), weights(whole)), i


@every
def test_a_loaded_state_is_a_copy_and_keeps_its_types(entry):
    model, other = network().bfloat16(), network().bfloat16()
    one, two = entry(model), entry(other)
    train(model, one, 4)
    two.load_state_dict(one.state_dict())
    for p, q in zip(model.parameters(), other.parameters()):
        for name, value in one.state[p].items():
            assert two.state[q][name].dtype == value.dtype
            assert torch.equal(two.state[q][name], value)
            assert two.state[q][name].data_ptr() != value.data_ptr()
            assert value.dtype == torch.float32
    other.load_state_dict(model.state_dict())
    train(other, two, 3, 4)
    train(model, one, 3, 4)
    assert equal(weights(model), weights(other))


@every
def test_an_older_state_is_completed_or_refused(entry):
    model, other = network(), network()
    one, two = entry(model), entry(other)
    train(model, one, 3)
    other.load_state_dict(model.state_dict())
    saved = copy.deepcopy(one.state_dict())
    for group in saved["param_groups"]:  # of a version before these options
        for name in set(group) - {"params", "lr"}:
            del group[name]
    two.load_state_dict(saved)
    train(model, one, 3, 3)
    train(other, two, 3, 3)
    assert equal(weights(model), weights(other))
    broken = copy.deepcopy(one.state_dict())
    number = next(iter(broken["state"]), None)
    if number is None:
        return
    name = next(name for name in broken["state"][number] if name != "step" or len(
        broken["state"][number]) == 1)  # fmt: skip
    del broken["state"][number][name]
    broken["state"][number]["foreign"] = torch.zeros(())
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(ValueError, match=f"of a parameter of shape .* has no .*{name}"):
        two.load_state_dict(broken)
    after = two.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for i, parts in before["state"].items():
        assert all(torch.equal(part, after["state"][i][key]) for key, part in parts.items())


def test_another_optimizers_state_is_refused():
    model = network()
    adam = torch.optim.AdamW(model.parameters())
    train(model, adam, 2)
    with pytest.raises(ValueError, match=r"has no .*, but .*exp_avg"):
        ENTRIES["M3"](model).load_state_dict(adam.state_dict())
    bad = ENTRIES["Muon"](model)
    state = bad.state_dict()
    state["param_groups"][0]["lr"] = -1
    with pytest.raises(ValueError, match="lr=-1"):
        bad.load_state_dict(state)
    assert bad.param_groups[0]["lr"] != -1


def test_optimizers_can_be_pickled_and_copied():
    for name in ("M3", "Muon", "DeltaMomentum", "DeepMomentum"):
        model = network()
        optimizer = ENTRIES[name](model)
        train(model, optimizer, 4)
        for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
            assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
            params = [p for g in twin.param_groups for p in g["params"]]
            for p, q in zip(params, model.parameters()):
                q.grad = p.grad = torch.ones_like(p)
            twin.step()


# ------------------------------------------------------------------------------ torch's contracts


@every
def test_gradients_are_read_and_not_changed(entry):
    model = network()
    optimizer = entry(model)
    for i in range(5):
        optimizer.zero_grad()
        backward(model, i)
        before = [p.grad.clone() for p in model.parameters()]
        places = [p.grad.data_ptr() for p in model.parameters()]
        optimizer.step()
        assert equal(before, [p.grad for p in model.parameters()])
        assert places == [p.grad.data_ptr() for p in model.parameters()]


@every
def test_maximize_is_minimising_the_negative(entry):
    up, down = network(), network()
    train(up, entry(up, maximize=True), 5, sign=-1.0)
    train(down, entry(down), 5)
    for a, b in zip(weights(up), weights(down)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every
def test_closures(entry):
    by_hand, closed = network(), network()
    losses = train(by_hand, entry(by_hand), 4)
    optimizer = entry(closed)
    for i, expected in enumerate(losses):

        def closure(i=i):
            optimizer.zero_grad()
            return backward(closed, i)

        with torch.no_grad():
            assert float(optimizer.step(closure)) == expected
    assert equal(weights(by_hand), weights(closed))


@every
def test_missing_gradients(entry):
    model = network()
    optimizer = entry(model)
    for i in range(5):
        optimizer.zero_grad()
        backward(model, i)
        if i < 3:
            model.hidden.weight.grad = None
        before = model.hidden.weight.detach().clone()
        optimizer.step()
        assert torch.equal(before, model.hidden.weight) == (i < 3)
    assert float(optimizer.state[model.hidden.weight]["step"]) == 2
    assert float(optimizer.state[model.head.weight]["step"]) == 5


@pytest.mark.parametrize("entry", GROUPED.values(), ids=GROUPED)
def test_groups_have_their_own_options(entry):
    model = network()
    named = dict(model.named_parameters())
    still = [named.pop("hidden.weight")]
    before = still[0].detach().clone()
    optimizer = entry.build(
        [{"params": list(named.values())}, {"params": still, "lr": 0.0}], lr=0.01, **entry.options
    )
    train(model, optimizer, 3)
    assert torch.equal(before, still[0])
    optimizer.param_groups[1]["lr"] = 0.1
    train(model, optimizer, 1)
    assert not torch.equal(before, still[0])


@every
def test_weight_decay_is_decoupled(entry):
    """Without a gradient's force a weight shrinks by lr λ, and no memory hears of it."""
    model = network()
    optimizer = entry(model, lr=0.1, weight_decay=0.5)
    before = model.head.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), 0.95 * before)


@every
def test_gradient_scaling_and_compiled_models(entry):
    plain, scaled = network(), network()
    train(plain, entry(plain), 3)
    optimizer = entry(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=100)
    compiled = torch.compile(scaled, backend="eager")
    for i in range(4):
        optimizer.zero_grad()
        ids, classes = batch(i)
        loss = F.cross_entropy(compiled(ids), classes) * (float("inf") if i == 3 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # the last one, which is not finite, is skipped
        scaler.update()
    for a, b in zip(weights(plain), weights(scaled)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- errors

BAD = [
    ("M3", {"lr": -1.0}, r"lr=-1\.0: choose a learning rate of 0 or more"),
    ("M3", {"momentum": 1.0}, r"momentum=1\.0: choose a share of the past"),
    ("M3", {"period": 0}, r"period=0: choose an integer of 1 step or more"),
    ("M3", {"alpha": -0.5}, r"alpha=-0\.5"),
    ("M3", {"slow": 1.5}, r"slow=1\.5"),
    ("M3", {"mode": "exact"}, r"mode='exact': use one of \('practical', 'literal'\)"),
    ("Muon", {"ns_steps": 0}, r"ns_steps=0: choose 1 to 99 steps"),
    ("Muon", {"adjust": "rms"}, r"adjust='rms': use one of"),
    ("Muon", {"precision": "float16"}, r"precision='float16': use one of"),
    ("Muon", {"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
    ("AdaMuon", {"eps": -1.0}, r"eps=-1\.0"),
    ("DeltaMomentum", {"delta": 1.95}, r"delta=1\.95: choose less than 1 \+ momentum"),
    ("DeltaMomentum", {"features": "square"}, r"features='square': use one of"),
    ("DeepMomentum", {"depth": 1}, r"depth=1: choose 2 or more"),
    ("DeepMomentum", {"tokens": "column"}, r"tokens='column'"),
    ("DeepMomentum", {"hidden": 0}, r"hidden=0"),
    ("DGD", {"forget": -1.0}, r"forget=-1\.0"),
    ("DGD", {"solve": "cholesky"}, r"solve='cholesky'"),
    ("GGD", {"objective": "l1"}, r"objective='l1': use dot, l2 or a function"),
    ("GGD", {"inner_steps": 0}, r"inner_steps=0"),
    ("GGD", {"value": 2.0}, r"value=2\.0: give a function"),
    ("GM", {"objective": "l1"}, r"objective='l1'"),
    ("GM", {"objective": lambda m, g: m.sum()}, r"solve='exact' knows dot and l2"),
    ("GM", {"solve": 0}, r"solve=0: choose 1 or more inner steps"),
    ("M3", {"weight_decay": -0.1}, r"weight_decay=-0\.1"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"), BAD, ids=lambda x: re.sub(" at 0x[0-9a-f]+", "", str(x))[:40]
)
def test_bad_values_are_named_with_their_remedy(name, options, message):
    with pytest.raises(ValueError, match=message):
        ENTRIES[name](network(), **{"lr": 0.1, **options})


def test_bad_groups_and_gradients():
    matrix = nn.Parameter(torch.zeros(6, 4))
    optimizer = optim.M3([matrix])
    for group, message in [
        ({"split": 4}, r"split=4 does not fit a parameter of shape \(6, 4\): its 6 rows"),
        ({"split": (3, 2)}, r"must be shared out completely"),
        ({"rule": "vector"}, r"rule='vector'"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(6, 4))], **group})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="view_as_real"):
        optim.Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = optim.M3(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse=False.*SparseAdam"):
        optimizer.step()
    chain = optim.chain(optim.transforms.momentum(0.9), optim.transforms.momentum(0.5))
    optimizer = optim.Chain([matrix], chain)
    matrix.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"keep a state named \['momentum'\]"):
        optimizer.step()


def test_groups_of_a_model():
    model = network()
    model.norm.weight.requires_grad_(False)
    found = {}
    for group in optim.groups(model, lr=0.1):
        names = {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
        found[frozenset(names)] = {k: v for k, v in group.items() if k != "params"}
    assert found == {
        frozenset({"hidden.weight"}): {
            "lr": 0.1, "rule": "matrix", "stacked": False, "split": 1,
        },
        frozenset({"embed.weight", "head.weight", "conv.weight"}): {
            "lr": 0.1, "rule": "auxiliary"
        },
        frozenset({"hidden.bias", "conv.bias", "norm.bias", "gain", "head.bias"}): {
            "lr": 0.1, "rule": "auxiliary", "weight_decay": 0.0,
        },
    }  # fmt: skip
    optim.M3(optim.groups(model))
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "wqkv": nn.Linear(16, 48)})
    split = [g["split"] for g in optim.groups(attention, split={"wqkv": (16, 32)}) if "split" in g]
    assert split == [3, 1, (16, 32)]
    stack = nn.ParameterDict({"experts": nn.Parameter(torch.zeros(3, 16, 16))})
    assert optim.groups(stack)[0]["stacked"]
    with pytest.raises(ValueError, match=r"split names \['qkv'\]"):
        optim.groups(model, split={"qkv": 3})
    with pytest.raises(ValueError, match="no trainable parameters"):
        optim.groups(network().requires_grad_(False))
