"""Low-rank deltas as a card works with them: many matrices at once, by eigenvectors."""

import pytest
import torch

from nestlearn.hf import writes
from nestlearn.hf.lending import Factors


def _factors(seed, rank=6):
    drawn = torch.Generator().manual_seed(seed)
    right = torch.linalg.qr(torch.randn(3, 60, rank, generator=drawn)).Q.mT
    return Factors(torch.randn(3, 40, rank, generator=drawn) * torch.logspace(0, -3, rank), right)


@pytest.fixture
def on_a_card(monkeypatch):
    """What is computed on a card, here."""
    return lambda: monkeypatch.setattr(writes, "_loops", lambda x: True)


@pytest.mark.parametrize("spanned", [0, 1, 5, 12])
def test_a_basis_is_orthonormal_and_spans(spanned, on_a_card):
    drawn = torch.Generator().manual_seed(spanned)
    x = torch.randn(4, 50, spanned, generator=drawn) @ torch.randn(4, spanned, 12, generator=drawn)
    x = x * torch.logspace(0, -4, 12)
    on_a_card()
    basis = writes._basis(x)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(12).expand(4, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis @ (basis.mT @ x), x, atol=1e-5 * float(x.norm()), rtol=0)


def test_sums_and_approximations_are_those_of_one_matrix_after_the_other(on_a_card):
    terms = [(1.0, (_factors(0), _factors(1))), (-0.5, (_factors(2), _factors(3)))]
    drawn = torch.Generator().manual_seed(4)
    pairs = [
        [(torch.randn(3, 20, 40, generator=drawn), torch.randn(3, 20, width, generator=drawn))]
        for width in (60, 60, 30)
    ]
    alone = [writes.approximate([pair], 6)[0].dense() for pair in pairs]
    sums = [d.dense() for d in writes._sums(terms)]
    together = [d.dense() for d in writes.approximate(pairs, 6)]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    on_a_card()
    torch.testing.assert_close([d.dense() for d in writes._sums(terms)], sums, atol=1e-5, rtol=1e-4)
    card = [d.dense() for d in writes.approximate(pairs, 6)]
    for one, two in zip(card, alone, strict=True):
        assert float((one - two).norm()) < 1e-3 * float(two.norm())
