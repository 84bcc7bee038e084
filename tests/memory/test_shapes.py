"""The annotations of shapes are enforced in these tests: conftest.py."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory import linalg


def test_arguments_of_another_shape_are_refused():
    assert linalg.inverse_unit_lower(torch.zeros(2, 3, 3)).shape == (2, 3, 3)
    for wrong in (torch.zeros(2, 3, 4), torch.zeros(3), torch.zeros(2, 3, 3, dtype=torch.int64)):
        with pytest.raises(BeartypeCallHintViolation, match="strictly_lower"):
            linalg.inverse_unit_lower(wrong)


def test_a_letter_means_one_size_in_arguments_and_result():
    @jaxtyping.jaxtyped(typechecker=beartype)
    def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
        return (a @ b).mT

    assert product(torch.zeros(2, 3), torch.zeros(3, 2)).shape == (2, 2)
    assert product(torch.zeros(4, 3), torch.zeros(3, 4)).shape == (4, 4)
    with pytest.raises(BeartypeCallHintViolation, match="parameter b="):
        product(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(BeartypeCallHintViolation, match="return"):
        product(torch.zeros(2, 3), torch.zeros(3, 5))


def test_checks_can_be_turned_off(unchecked):
    with pytest.raises(RuntimeError):  # torch's own
        linalg.inverse_unit_lower(torch.zeros(2, 3, 4))
