"""The loop over spans."""

import torch

from nestlearn.scan import scan


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
