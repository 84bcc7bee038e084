"""Delta gradient descent: eq. 57, for one input, a batch, and accumulated batches."""

import pytest
import torch
import torch.nn.functional as F
from test_formulas import F64, same
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestlearn import optim
from nestlearn.optim.delta import inputs


def linear(inp=4, out=3, **options):
    torch.manual_seed(0)
    return nn.Linear(inp, out, **options).double()


def one_step(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


@pytest.mark.parametrize("solve", ["exact", "trace"])
def test_one_input_is_equation_57(solve):
    """W ← W (I − η′ x xᵀ) − η′ δ xᵀ with η′ = η / (1 + η ‖x‖²)."""
    model, eta = linear(bias=False), 0.7
    optimizer = optim.DGD(model, eta, solve=solve)
    W = model.weight.detach().clone()
    for i in range(5):
        x, t = torch.randn(1, 4, dtype=F64), torch.randn(1, 3, dtype=F64)
        delta = (x @ W.mT - t)[0]  # of ½‖y − t‖²
        step = eta / (1 + eta * x.square().sum())
        W = W @ (torch.eye(4, dtype=F64) - step * x.mT @ x) - step * torch.outer(delta, x[0])
        one_step(model, optimizer, lambda m, x=x, t=t: 0.5 * (m(x) - t).square().sum())
        same(model.weight.detach(), W)
        assert i >= 0


def proximal(W, xs, deltas, eta):
    """argmin mean ½‖W x − u‖² + ‖W − W_t‖² / 2η with u = −δ: its normal equations."""
    eye = torch.eye(W.shape[1], dtype=F64)
    C = xs.mT @ xs / len(xs)
    return (W / eta - deltas.mT @ xs / len(xs)) @ torch.linalg.inv(C + eye / eta)


def test_a_batch_is_the_proximal_step_on_its_mean():
    model, eta = linear(bias=False), 0.7
    x, t = torch.randn(2, 5, 4, dtype=F64), torch.randn(2, 5, 3, dtype=F64)
    W = model.weight.detach().clone()
    deltas = x @ W.mT - t  # of each input's own ½‖y − t‖²
    expected = proximal(W, x.reshape(10, 4), deltas.reshape(10, 3), eta)
    one_step(model, optim.DGD(model, eta), lambda m: 0.5 * (m(x) - t).square().sum(-1).mean())
    same(model.weight.detach(), expected)


def test_accumulated_batches_are_the_one_batch():
    x, t = torch.randn(12, 4, dtype=F64), torch.randn(12, 3, dtype=F64)
    results = []
    for parts in (1, 3):
        model = linear()
        optimizer = optim.DGD(model, 0.7)
        for _ in range(2):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), t.chunk(parts)):
                (F.mse_loss(model(a), b) / parts).backward()
                with torch.no_grad():
                    model(a)  # evaluation is not counted
                model(a)  # nor is a forward pass without a backward one
            optimizer.step()
        results.append(model.weight.detach())
    same(*results)


def test_an_update_forgets_what_it_used():
    """Without zero_grad in between, as with set-to-None by hand, old inputs do not count."""
    model = linear(bias=False)
    optimizer = optim.DGD(model, 0.7)
    other = linear(bias=False)
    x, t = torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64)
    one_step(model, optimizer, lambda m: F.mse_loss(m(10 * x), t))
    other.load_state_dict(model.state_dict())
    for m, run in ((model, optimizer), (other, optim.DGD(other, 0.7))):
        m.zero_grad()
        F.mse_loss(m(x), t).backward()
        run.step()
    same(model.weight.detach(), other.weight.detach())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"groups": 2},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_a_convolution_is_a_matrix_on_patches(options):
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3, bias=False, **options).double()
    x = torch.randn(2, 4, 6, 7, dtype=F64)
    rows = torch.cat(list(inputs(model, x)), 1)  # [groups, N, K]
    W = model.weight.detach().clone().reshape(rows.shape[0], -1, rows.shape[2])
    y = model(x)
    by_rows = (rows @ W.mT).reshape(rows.shape[0], 2, *y.shape[2:], -1)
    same(by_rows.permute(1, 0, 4, 2, 3).reshape(y.shape), y.detach())
    t = torch.randn_like(y)
    N = rows.shape[1]
    one_step(model, optim.DGD(model, 0.7), lambda m: 0.5 * (m(x) - t).square().sum() / N)
    deltas = (y - t).detach().permute(1, 0, 2, 3).reshape(rows.shape[0], -1, N).mT
    expected = [proximal(w, r, d, 0.7) for w, r, d in zip(W, rows, deltas)]
    same(model.weight.detach(), torch.stack(expected).reshape(model.weight.shape))


def test_an_embedding_has_one_hot_inputs():
    torch.manual_seed(0)
    model = nn.Embedding(7, 3).double()
    ids = torch.tensor([[1, 1, 2], [5, 1, 0]])
    t = torch.randn(2, 3, 3, dtype=F64)
    W = model.weight.detach().clone()
    xs = F.one_hot(ids, 7).double().reshape(6, 7)
    expected = proximal(W.mT, xs, (W[ids] - t).reshape(6, 3), 0.7).mT
    one_step(model, optim.DGD(model, 0.7), lambda m: 0.5 * (m(ids) - t).square().sum(-1).mean())
    same(model.weight.detach(), expected)
    same(model.weight.detach()[[3, 4, 6]], W[[3, 4, 6]])  # what did not occur stays


def test_the_fixed_point_is_where_the_layer_says_what_it_should_move_to():
    """δ = −ρ W x: for least squares (1 + ρ) W C = T, between zero and the solution."""
    torch.manual_seed(0)
    x, t = torch.randn(50, 4, dtype=F64), torch.randn(50, 3, dtype=F64)
    best = torch.linalg.lstsq(x, t).solution.mT
    for forget in (0.0, 0.1, 1.0):
        model = linear(bias=False)
        optimizer = optim.DGD(model, 0.4, forget=forget)
        for _ in range(200):
            one_step(model, optimizer, lambda m: 0.5 * (m(x) - t).square().sum(-1).mean())
        same(model.weight.detach(), best / (1 + forget), 1e-8)


def test_descent_and_delta_descent_are_general_descents():
    """Eq. 59 with ⟨W x, u⟩ is gradient descent, with ½‖W x − u‖² it is eq. 57."""
    x, t = torch.randn(9, 4, dtype=F64), torch.randn(9, 3, dtype=F64)

    def after(build):
        model = linear()
        optimizer = build(model)
        for _ in range(3):
            one_step(model, optimizer, lambda m: 0.5 * (m(x) - t).square().sum(-1).mean())
        return model.weight.detach()

    sgd = after(lambda m: torch.optim.SGD(m.parameters(), 0.3))
    dgd = after(lambda m: optim.DGD(m, 0.3))
    same(after(lambda m: optim.GGD(m, 0.3, objective="dot")), sgd)
    same(after(lambda m: optim.GGD(m, 0.3)), dgd)
    assert (sgd - dgd).norm() > 1e-2
    solved = {"inner_steps": 80}
    by_steps = after(lambda m: optim.GGD(m, 0.3, objective=lambda y, u: -(y * u).sum(-1), **solved))
    same(by_steps, sgd)
    l2 = lambda y, u: 0.5 * (y - u).square().sum(-1)  # noqa: E731
    same(after(lambda m: optim.GGD(m, 0.3, objective=l2, **solved)), dgd)
    other = after(lambda m: optim.GGD(m, 0.3, objective=lambda y, u: (y - u).abs().sum(-1)))
    assert (other - dgd).norm() > 1e-2


def test_shared_layers_and_other_parameters():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, ids):
            x = self.embed(ids)
            x = self.inner(self.norm(self.inner(x)))  # twice: the inputs of both count
            return self.head(x + self.attention(x, x, x)[0])

    model = Model()
    optimizer = optim.DGD(model, 0.1)
    assert set(optimizer.plain) == {
        "embed.weight", "inner.bias", "norm.weight", "norm.bias", "attention.in_proj_weight",
        "attention.in_proj_bias", "attention.out_proj.bias",
    }  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 5, (2, 6))
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    (tap,) = (t for t in optimizer.taps if t.module is model.inner)
    assert tap.count == 2 * 12
    optimizer.step()
    unheard = "attention.out_proj.weight"  # its forward is not called
    for name, p in model.named_parameters():
        if name in optimizer.plain or name == unheard:
            torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad, msg=name)
    optimizer.detach()
    assert not model.inner._forward_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_count_once(reentrant):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = optim.DGD(model, 0.1)
    x = torch.randn(6, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert [tap.count for tap in optimizer.taps] == [6, 6]
    torch.testing.assert_close(optimizer.taps[0].sum[0], (x.mT @ x).detach())


def test_mixed_precision_counts_in_float32():
    model = nn.Linear(4, 3)
    optimizer = optim.DGD(model, 0.1)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(y.float().square().mean()).backward()
    (tap,) = optimizer.taps
    torch.testing.assert_close(tap.sum[0], x.mT @ x)
    scaler.step(optimizer)
    assert torch.isfinite(model.weight).all()


def test_a_general_objective_needs_linear_layers():
    model = nn.Conv2d(1, 1, 2)
    optimizer = optim.GGD(model, 0.1, objective=lambda y, u: (y - u).abs().sum(-1))
    model(torch.randn(1, 1, 4, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"nn\.Linear only, not for Conv2d"):
        optimizer.step()
