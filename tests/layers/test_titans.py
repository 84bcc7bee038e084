"""Self-modifying Titans against the paper's equations, written out with autograd."""

import pytest
import torch
import torch.nn.functional as F

from nestlearn import HopeConfig, HopeLM, SelfModifyingTitans, state
from nestlearn.layers import gated_deltanet
from nestlearn.memory import dot_product, l2
from nestlearn.options import DeltaNet, Titans

D, H, B, T = 8, 2, 2, 11
W = D // H
TOLERANCE = {"rtol": 0, "atol": 1e-10}


HOW = ("truncate", "remat", "backend")


def titans(heads=H, **changes):
    """A layer whose memories have a hidden layer and do not fade."""
    how = {name: changes.pop(name) for name in HOW if name in changes}
    options = Titans(**{"chunk": 4, "depth": 2, "half_life": None, **changes})
    return SelfModifyingTitans(D, heads, options, **how)


def x(T=T):
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def by_hand(layer, x, chunk, objective, steps):
    """Eqs. 83-90, one sample, one head, one token, one memory at a time."""
    eta_min, eta_max = steps
    z = layer.conv(x)[0]
    q_all = layer.query(z)
    out = torch.zeros(B, H, T, W, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            memories = {
                n: [p[h].detach().clone() for p in layer.start[n]]
                for n in ("k", "v", "eta", "alpha", "mem")
            }
            g = memories["k"][0].shape[0] ** 0.5

            def read(w, a, g=g):
                return a + w[1] @ (F.silu(g * w[0] @ a) / g)

            for t in range(T):
                if t % chunk == 0:
                    first = {n: [w.clone() for w in ws] for n, ws in memories.items()}
                a = F.normalize(z[b, t, h * W : (h + 1) * W], dim=0)
                q = F.normalize(q_all[b, t, h * W : (h + 1) * W], dim=0)
                k = F.normalize(read(first["k"], a), dim=0)
                v = F.normalize(read(first["v"], a), dim=0)
                eta = eta_max * torch.sigmoid(
                    layer.eta.weight[h] @ read(first["eta"], a) + layer.eta.bias[h]
                )
                alpha = torch.sigmoid(
                    layer.alpha.weight[h] @ read(first["alpha"], a) + layer.alpha.bias[h]
                )
                eta = eta if eta >= eta_min else 0 * eta
                if eta_max > 1:
                    eta = eta * (1 + alpha) / 2
                for n, ws in memories.items():
                    target = read(first[n], v).detach()
                    start = [w.clone().requires_grad_() for w in first[n]]
                    with torch.enable_grad():
                        loss = objective.value(read(start, k), target)
                        grads = torch.autograd.grad(loss, start)
                    hidden = F.silu(g * first[n][0] @ k) / g
                    for i, into in enumerate((k, hidden)):
                        step = eta / into.square().sum().clamp(min=1)
                        kept = alpha * ws[i] - step * torch.outer(ws[i] @ into, into)
                        ws[i] = (kept - step * grads[i]).detach()
                out[b, h, t] = read(memories["mem"], q)
    return layer.readout(out, x)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    ("objective", "steps"), [(dot_product, (0.0, 1.5)), (l2, (0.7, 1.5))], ids=["dot", "l2, shut"]
)
def test_the_paper_by_hand(chunk, objective, steps):
    torch.manual_seed(0)
    layer = titans(
        chunk=chunk, objective=objective.name, eta_min=steps[0], eta_max=steps[1], hidden=5,
        bound=None,
    ).double()  # fmt: skip
    torch.nn.init.zeros_(layer.eta.bias)
    torch.nn.init.constant_(layer.alpha.bias, 2.0)
    expected = by_hand(layer, x(), chunk, objective, steps)
    torch.testing.assert_close(layer(x())[0], expected, **TOLERANCE)


OPTIONS = {
    "objective": {"objective": "l2"},
    "chunk": {"chunk": 2},
    "projection_chunk": {"projection_chunk": 2},
    "momentum": {"momentum": True},
    "q adapts": {"adapt": ("k", "v", "eta", "alpha", "q")},
    "k is static": {"adapt": ("v", "eta", "alpha")},
    "v is static": {"adapt": ("k", "eta", "alpha")},
    "eta is static": {"adapt": ("k", "v", "alpha")},
    "alpha is static": {"adapt": ("k", "v", "eta")},
    "eta_max": {"eta_max": 2.0},
    "no DGD": {"dgd": False},
    "DGD in half of the heads": {"dgd": 0.5},
    "no weight decay": {"weight_decay": False},
    "no convolution": {"conv": 0},
    "depth": {"depth": 3},
    "matrix": {"depth": 1},
    "hidden": {"hidden": 7},
    "read": {"read": "boundary"},
    "bound": {"bound": (1.0, 1.0)},
    "half_life": {"half_life": 8},
}


def output(gradients=False, **options):
    torch.manual_seed(0)
    layer = titans(**options).double()
    torch.nn.init.zeros_(layer.eta.bias)
    y, _ = layer(x())
    if not gradients:
        return y
    y.square().sum().backward()
    return torch.cat([y.flatten(), *(p.grad.flatten() for p in layer.parameters())])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_changes_the_output(options):
    assert (output(**options) - output()).abs().max() > 1e-6


def test_how_it_is_computed_does_not_change_the_output():
    for options in ({"backend": "naive"}, {"remat": True}):
        torch.testing.assert_close(output(True, **options), output(True), **TOLERANCE)
    torch.testing.assert_close(output(truncate=4), output(), **TOLERANCE)
    assert (output(True, truncate=4) - output(True)).abs().max() > 1e-6


def test_static_writes_nothing_into_the_projections():
    torch.manual_seed(0)
    layer = titans(adapt=("k",)).double()
    _, state = layer(x())
    assert state.memories[0].now[0].shape == (B, H, 2, W, W)  # M_k and M_mem
    layer = titans(adapt=())
    assert layer(x().float())[1].memories[0].now[0].shape == (B, H, 1, W, W)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"objective": "l2"}, {"dgd": False}])
def test_matrices_all_move_by_the_same_matrix(options):
    """Each is its start value times that, up to what its shell makes of its size."""
    torch.manual_seed(0)
    layer = titans(depth=1, **options).double()
    layer.eta.bias.fill_(0.0)  # large steps
    (now,) = layer(x(30))[1].memories[0].now
    (start,) = layer.start_weights(layer.groups[0])
    assert (now - start).norm() > 0.1 * start.norm()
    moved = torch.linalg.solve(start.expand_as(now), now)
    moved = moved / torch.linalg.matrix_norm(moved, keepdim=True)
    torch.testing.assert_close(moved, moved[:, :, :1].expand_as(moved), **TOLERANCE)


def test_memories_of_one_chunk_size_are_written_together():
    assert [group.names for group in titans().groups] == [("k", "v", "eta", "alpha", "mem")]
    groups = titans(chunk=8, projection_chunk=4).groups
    assert [(group.names, group.writer.chunk) for group in groups] == [
        (("k", "v", "eta", "alpha"), 4),
        (("mem",), 8),
    ]


@pytest.mark.parametrize("chunks", [{}, {"projection_chunk": 2}], ids=["together", "apart"])
def test_each_head_learns_by_its_own_rule(chunks):
    def written(dgd):
        torch.manual_seed(0)
        layer = titans(dgd=dgd, **chunks).double()
        torch.nn.init.zeros_(layer.eta.bias)
        memories = zip(layer.groups, layer(x())[1].memories)
        return {
            (name, head): [w[:, head - group.heads.start, i] for w in fast.now]
            for group, fast in memories
            for i, name in enumerate(group.names)
            for head in range(H)[group.heads]
        }

    both, delta, plain = written(0.5), written(True), written(False)
    assert both.keys() == delta.keys()
    for (name, head), weights in both.items():
        own, other = (delta, plain) if head < H // 2 else (plain, delta)
        torch.testing.assert_close(weights, own[name, head], **TOLERANCE)
        assert (weights[0] - other[name, head][0]).abs().max() > 1e-6


def test_the_shell_holds_after_every_chunk():
    torch.manual_seed(0)
    layer = titans(eta_max=2.0, bound=(0.5, 1.0)).double()
    torch.nn.init.constant_(layer.eta.bias, 3.0)
    state = None
    for _ in range(20):
        _, state = layer(5 * torch.randn(B, 4, D, dtype=torch.float64), state)
        for w, start in zip(state.memories[0].now, layer.start["mem"]):
            ratio = w[:, :, -1].norm(dim=(-2, -1)) / start.norm(dim=(-2, -1))
            assert ratio.max() <= 1.0 + 1e-9
            assert ratio.min() >= 0.5 - 1e-9


def test_half_life_fades_towards_the_start():
    """W ← W_0 + 2^(−C/h) (W − W_0) at the chunk's end: by a quarter where h = C / 2."""
    states = []
    for half_life in (None, 2):
        torch.manual_seed(0)
        layer = titans(bound=None, half_life=half_life).double()
        states.append(layer(x()[:, :4])[1].memories[0].now)
    for w0, *after in zip(layer.start["mem"], *states):
        free, faded = (w[:, :, -1] for w in after)
        torch.testing.assert_close(faded, w0 + (free - w0) / 4, **TOLERANCE)
        assert (free - w0).abs().max() > 1e-3


STEEP = {"chunk": 300, "eta_max": 2.0}


@pytest.mark.parametrize(
    "build",
    [lambda: gated_deltanet(D, H, DeltaNet(**STEEP)), lambda: titans(bound=None, **STEEP)],
    ids=["deltanet", "titans"],
)
def test_a_memory_that_alternates_does_not_grow(build):
    """The largest steps and much decay, 300 tokens in one chunk: α − η stays above −1."""
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        if isinstance(layer, SelfModifyingTitans):
            layer.eta.bias.fill_(20.0)
            layer.alpha.bias.fill_(-2.0)
        else:
            layer.gates.bias.copy_(torch.tensor([20.0, -2.0]).repeat_interleave(H))
        y, state = layer(torch.randn(B, 1, D).expand(B, 300, D))  # one key, again and again
    memory = state.memory if hasattr(state, "memory") else state.memories[0]
    assert y.isfinite().all()
    assert max(w.norm(dim=(-2, -1)).max() for w in memory.now) < 1e3


@pytest.mark.parametrize(("retains", "shut"), [(True, 0.0), (False, 0.0), (False, 0.5)])
def test_deltanet_layer_is_the_recurrence(retains, shut):
    """The layer's memory at chunk 4 ≡ S_t = α S − β (S k − v) kᵀ token by token; α = 1 without."""
    torch.manual_seed(0)
    layer = gated_deltanet(D, H, DeltaNet(chunk=4, weight_decay=retains, eta_min=shut)).double()
    z = layer.conv(x())[0]
    q, k, v = (part.unflatten(-1, (H, W)).transpose(1, 2) for part in layer.qkv(z).chunk(3, -1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    gates = torch.sigmoid(layer.gates(z)).transpose(1, 2)
    beta, alpha = gates.chunk(2, 1) if retains else (gates, torch.ones_like(gates))
    assert 0.2 < (beta > shut).double().mean() <= 1
    beta = torch.where(beta < shut, 0.0, beta)
    S = torch.zeros(B, H, W, W, dtype=torch.float64)
    out = []
    for t in range(T):
        kt, b = k[:, :, t, :, None], beta[:, :, t, None, None]
        S = alpha[:, :, t, None, None] * S + b * (v[:, :, t, :, None] - S @ kt) @ kt.mT
        out.append(S @ q[:, :, t, :, None])
    expected = layer.readout(torch.cat(out, -1).mT, x())
    torch.testing.assert_close(layer(x())[0], expected, **TOLERANCE)


@pytest.mark.parametrize("mixer", [DeltaNet, Titans])
def test_a_shut_gate_leaves_a_memory_alone_and_may_open(mixer):
    """However long; where a small step would have changed it. The gradient is that of the step."""
    grads = []
    for eta_min in (0.0, 0.9):
        torch.manual_seed(0)
        kept = {"weight_decay": False, "eta_min": eta_min}
        if mixer is DeltaNet:
            layer = gated_deltanet(D, H, DeltaNet(4, **kept))
            bias = layer.gates.bias
        else:
            layer = SelfModifyingTitans(D, H, Titans(4, half_life=None, **kept))
            bias = layer.eta.bias
        torch.nn.init.constant_(bias, -20.0)  # η of 2e-9
        layer = layer.double()
        before = layer.init_state(B)
        y, after = layer(x(400), before)
        olds, news = (
            [w for _, w in state.leaves(s) if isinstance(w, torch.Tensor) and w.ndim > 3]
            for s in (before, after)
        )
        assert all(map(torch.equal, olds, news)) is (eta_min > 0)
        y.sum().backward()
        grads.append(bias.grad)
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads, rtol=1e-5, atol=0)


def test_options_may_be_said_by_name():
    torch.manual_seed(0)
    layer = SelfModifyingTitans(8, 2, chunk=4, half_life=None)
    assert layer.writer.chunk == 4
    assert layer.half_life is None
    with pytest.raises(TypeError, match="chunks"):
        SelfModifyingTitans(8, 2, chunks=4)
    with pytest.raises(ValueError, match=r"options=4: give nestlearn\.options\.Titans"):
        SelfModifyingTitans(8, 2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "dim=8 is not divisible by heads=3"),
        ({"dgd": 0.3}, "dgd=0.3 of heads=2: give a share"),
        ({"dgd": 1.5}, r"dgd=1.5: give a share in \[0, 1\]"),
        ({"chunk": 0}, "chunk=0"),
        ({"projection_chunk": -1}, "chunk=-1"),
        ({"adapt": ("k", "z")}, r"\['z'\]"),
        ({"eta_max": 3.0}, r"eta_max=3\.0"),
        ({"eta_min": 1.0}, r"eta_min=1\.0: give a step size from 0 to below eta_max=1\.0"),
        ({"depth": 0}, "depth=0"),
        ({"bound": (2.0, 1.0)}, "bound="),
        ({"conv": -1}, "conv=-1: give 0 taps or more"),
        ({"read": "late"}, "read='late'"),
        ({"objective": "l1"}, "'l1'"),
        ({"truncate": 0}, "truncate=0"),
        ({"half_life": 0}, "half_life=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        titans(**options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SelfModifyingTitans(16, 2, Titans(chunk=4, depth=2, half_life=None)),
        lambda: HopeLM(HopeConfig(11, dim=16, layers=2, heads=2, mixer=Titans(chunk=8))),
    ],
    ids=["layer", "model"],
)
def test_under_autocast_it_trains_as_in_float32(build):
    """bfloat16 products outside the memories; memories, writes and reads of them in float32."""
    torch.manual_seed(0)
    module = build()
    is_model = isinstance(module, HopeLM)
    x = torch.randint(0, 11, (2, 19)) if is_model else torch.randn(2, 19, 16)
    grads = []
    for on in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y, after = module(x)
        assert all(
            leaf.dtype == torch.float32
            for path, leaf in state.leaves(after)
            if isinstance(leaf, torch.Tensor) and "memories" in path
        )
        y.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    plain, auto = grads
    assert (plain - auto).norm() <= 0.05 * plain.norm()
