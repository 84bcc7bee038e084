"""Streams of text: nothing is scored by what comes later, and every control is its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestlearn.evals import streams
from nestlearn.evals.streams import Cached, Calibrated, Carried, Dynamic, Nearest, Scored, Windows

V, D, N = 11, 6, 70


class Small(nn.Module):
    """A causal model of running means, float64: ids [B, T] -> logits [B, T, V]."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.double()

    def hidden(self, ids):
        x = self.embed(ids)
        return (x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]).tanh()

    def forward(self, ids):
        return self.head(self.hidden(ids))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def ids():
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def windows(model, length=16, again=4, together=1):
    return Windows(
        model=lambda x: (model(x), model.hidden(x)), length=length, again=again, together=together
    )


def carried(model):
    def read(x, before):
        before = x[:, :0] if before is None else before
        every = torch.cat([before, x], 1)
        n = x.shape[1]
        return model(every)[:, -n:], model.hidden(every)[:, -n:], every

    return Carried(model=read, step=16)


KINDS = {
    "windows": windows,
    "windows, three side by side": lambda m: windows(m, together=3),
    "carried": carried,
    "calibration": lambda m: Calibrated(windows(m), rate=0.3),
    "cache": lambda m: Cached(windows(m), size=7, rate=0.5),
    "knn": lambda m: Nearest(windows(m), size=9, rate=0.5, sharpness=3.0),
    "knn over what is said": lambda m: Nearest(
        Windows(model=lambda x: (m(x), None), length=16), size=9
    ),
    "dynamic": lambda m: Dynamic(module=m, length=16, again=4, rate=0.3),
    "one on another": lambda m: Calibrated(Cached(carried(m), size=7), rate=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_score_depends_on_a_later_token_bit_for_bit(kind, model, ids):
    reader = Scored(KINDS[kind](model), begin=0)
    before = streams.nats(reader, ids)
    for at in (0, 3, 15, 16, 17, 40, N - 1):
        other = ids.clone()
        other[at] = (other[at] + 1) % V
        after = streams.nats(reader, other)
        assert torch.equal(before[:at], after[:at])
        assert before[at] != after[at]
        if at < N - 1:
            assert not torch.equal(before[at + 1 :], after[at + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_may_be_cut_anywhere_and_a_state_gone_on_from_twice(kind, model, ids):
    predictor = KINDS[kind](model)
    with torch.no_grad():
        whole, _ = predictor.say(ids)
        state, rows, kept = None, [], None
        for part in ids.split([1, 15, 2, 30, 21, 1]):
            if len(rows) == 3:
                kept = (state, part)
            said, state = predictor.say(part, state)
            rows.append(said.logp)
        torch.testing.assert_close(torch.cat(rows), whole.logp, rtol=1e-10, atol=1e-10)
        again, _ = predictor.say(kept[1], kept[0])
    assert torch.equal(again.logp, rows[3])
    torch.testing.assert_close(whole.logp.exp().sum(1), torch.ones(N).double())


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("again", [0, 4, 11])
def test_windows_begin_where_they_should(model, ids, again, together):
    said = windows(model, 16, again, together).say(ids)[0].logp
    for t in range(N):
        begin = max(0, t // (16 - again) * (16 - again) - again)
        expected = model(ids[None, begin : t + 1])[0, -1].log_softmax(-1)
        torch.testing.assert_close(said[t], expected)
    with pytest.raises(ValueError, match="give 0 to length - 1"):
        windows(model, 16, 16)


@torch.no_grad()
def test_calibration_is_gradient_descent_on_the_scored_tokens(model, ids):
    said = Calibrated(windows(model), rate=0.3).say(ids)[0].logp
    logp = windows(model).say(ids)[0].logp
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    b = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    for t in range(N):
        with torch.enable_grad():
            q = (s.exp() * logp[t] + b).log_softmax(-1)
        torch.testing.assert_close(said[t], q)
        if t + 1 < N:
            with torch.enable_grad():
                grads = torch.autograd.grad(-q[ids[t + 1]], (s, b))
            for own, grad in zip((s, b), grads):
                own -= 0.3 * grad


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cache", "knn"])
def test_what_is_mixed_in_is_its_formula(kind, model, ids):
    said = KINDS[kind](model).say(ids)[0].logp
    logp, hidden = windows(model).say(ids)[0]
    a = torch.tensor(math.log(0.05 / 0.95), dtype=torch.float64, requires_grad=True)
    for t in range(N):
        heard = [(i, int(ids[i + 1])) for i in range(t)][-(7 if kind == "cache" else 9) :]
        other = torch.zeros(V, dtype=torch.float64)
        for i, token in heard:
            weight = 1.0 if kind == "cache" else math.exp(
                3.0 * float(F.cosine_similarity(hidden[t], hidden[i], 0))
            )  # fmt: skip
            other[token] += weight
        with torch.enable_grad():
            share = a.sigmoid() if heard else torch.zeros(())
            q = (1 - share) * logp[t].exp() + share * other / max(float(other.sum()), 1e-9)
        torch.testing.assert_close(said[t], q.log())
        if heard and t + 1 < N:
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(q[ids[t + 1]].log(), a)
            a += 0.5 * grad


def test_dynamic_evaluation_is_sgd_on_scored_windows_and_leaves_the_model_alone(model, ids):
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        said = KINDS["dynamic"](model).say(ids)[0].logp
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="not finite"):
        streams.nats(Scored(Dynamic(module=model, length=16, rate=1e200), 0), ids)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    learner = Small()
    learner.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(learner.parameters(), 0.3)
    for a in range(0, N, 12):
        begin, end = max(0, a - 4), min(a + 12, N)
        logp = learner(ids[None, begin:end])[0, a - begin :].log_softmax(-1)
        torch.testing.assert_close(said[a:end], logp.detach())
        if end < N:
            sgd.zero_grad()
            F.nll_loss(logp, ids[a + 1 : end + 1]).backward()
            sgd.step()


def test_bits_per_byte_counts_bytes(model):
    text = "Ein Öl, ä 😀"
    raw = text.encode()
    sizes = torch.tensor([len(letter.encode()) for letter in text])
    ids = torch.tensor([ord(letter) % V for letter in text])
    assert len(ids) < len(raw)
    found = streams.nats(Scored(windows(model), begin=3), ids)
    direct = 0.0
    with torch.no_grad():
        logp = model(torch.cat([torch.tensor([3]), ids[:-1]])[None])[0].log_softmax(-1)
        for t, token in enumerate(ids):
            direct -= float(logp[t, token]) / math.log(2)
    assert streams.bits_per_byte(found, sizes) == pytest.approx(direct / len(raw))
    uniform = torch.full((20,), math.log(4.0))
    two = torch.full((20,), 2)
    assert streams.bits_per_byte(uniform, two) == pytest.approx(1.0)
    assert streams.tenths(uniform, two) == pytest.approx([1.0] * 10)
    assert len(streams.tenths(uniform[:3], two[:3])) == 3


def test_progress_is_told(model, ids):
    told = []
    streams.nats(Scored(windows(model), 0), ids, lambda done, of: told.append((done, of)))
    assert told == [(12, N), (24, N), (36, N), (48, N), (60, N), (N, N)]


def test_what_cannot_be_scored_is_said(model, ids):
    reader = Scored(windows(model), 0)
    with pytest.raises(ValueError, match="not empty"):
        streams.nats(reader, ids[:0])
    with pytest.raises(ValueError, match="bytes of each token"):
        streams.bits_per_byte(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="of 0 bytes"):
        streams.bits_per_byte(torch.ones(3), torch.zeros(3))
    with torch.no_grad():
        model.embed.weight[int(ids[20])] = math.nan
    first = int((ids == ids[20]).nonzero()[0])
    with pytest.raises(ValueError, match=rf"token {first + 1} of the stream has −log p = nan"):
        streams.nats(reader, ids)
