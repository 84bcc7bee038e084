"""Shapes are law here: rooms 1 and 2 run with their annotations enforced."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)  # two workers share two cores; and one thread is reproducible
_hook = install_import_hook(["nestlearn.memory", "nestlearn.scan"], "beartype.beartype")
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--data", type=Path, default=ROOT.parent / "shared" / "data",
        help="folder with models/stories260K.bin, books/ ... (default: ../shared/data)",
    )  # fmt: skip


@pytest.fixture(scope="session")
def shared_data(request) -> Path:
    """The folder with data sets and a small pretrained model, which are not part of the project."""
    folder = request.config.getoption("--data")
    if not (folder / "models" / "stories260K.bin").is_file():
        pytest.skip(f"{folder} holds no models/stories260K.bin: give the folder with --data")
    return folder
