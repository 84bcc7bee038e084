"""The code of docs/optimizers.md runs as it stands there, in its order."""

import os
import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs/optimizers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, names)
    assert os.path.getsize("optimizer.pt") > 1000
