"""The loop over spans."""

from itertools import pairwise

import pytest
import torch

from nestlearn.scan import loop, scan


def test_spans_are_split_once():
    """A slice's gradient is as long as the call, so slicing at every span costs T² backward."""
    x = torch.randn(2, 40, 3, requires_grad=True)
    seen = []

    def step(state, x, span):
        seen.append(x.grad_fn)
        return x * span.start, state

    ys, _ = scan(step, None, x, length=40, chunks=(4,), position=2)
    assert [y.shape[1] for y in ys] == [2, *[4] * 9, 2]
    assert len(set(seen)) == 1
    torch.cat(ys, 1).sum().backward()
    expected = [2.0] * 2 + [float(4 * (t // 4)) for t in range(4, 42)]
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor(expected))


@pytest.mark.parametrize(
    ("position", "length", "options", "expected"),
    [
        (0, 40, {"run": 4}, [16, 16, 8]),
        (2, 40, {"run": 4}, [2, 16, 16, 4, 2]),  # what is not a whole chunk stands alone
        (2, 1, {"run": 4}, [1]),
        (2, 2, {"run": 4}, [2]),
        (0, 3, {"run": 4}, [3]),
        (0, 40, {"run": 4, "truncate": 8}, [8] * 5),
        (4, 24, {"run": 4, "truncate": 20}, [16, 8]),
        (0, 12, {"run": 4, "truncate": 6}, [4, 2, 2, 4]),  # no run over a cut inside a chunk
        (0, 24, {"run": 4, "chunks": (4, 8)}, [8] * 3),  # no run over the end of a larger chunk
        (0, 80, {"run": 16, "remat": True}, [32, 32, 16]),
        (0, 40, {"run": 3, "truncate": 20}, [12, 8, 12, 8]),  # runs begin anew at a cut
    ],
)
def test_runs_of_whole_chunks(position, length, options, expected):
    x = torch.randn(1, length, 1, requires_grad=True)
    spans = []

    def step(state, x, span):
        spans.append(span)
        return x, state

    ys, _ = scan(
        step, x.sum(), x, **{"length": length, "position": position, "chunks": (4,), **options}
    )
    assert [y.shape[1] for y in ys] == expected == [stop - start for start, stop in spans]
    assert spans[0].start == position
    assert all(a.stop == b.start for a, b in pairwise(spans))


@pytest.mark.parametrize("options", [{}, {"truncate": 4}, {"run": 16}, {"run": 16, "truncate": 8}])
def test_remat_keeps_every_eighth_chunk(monkeypatch, options):
    """However short the spans are."""
    kept = []

    def counted(f, state, indices, **_):
        kept.append(indices)
        return f(state, indices)

    monkeypatch.setattr(loop, "checkpoint", counted)
    x = torch.randn(1, 100, 1, requires_grad=True)
    scan(lambda s, x, _: (x, s), x.sum(), x, length=100, chunks=(4,), remat=True, **options)
    assert len(kept) == 4  # of 25 chunks
