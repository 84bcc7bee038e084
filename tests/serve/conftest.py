"""Shapes are held by the tests of what is served; here they are not looked at, to be quick."""

import pytest
from jaxtyping import config


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)
        yield
