"""Work for cells, in a module of its own: worker processes import it by name."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from nestlearn.experiments.cells import run_cells


def work(cell, tell):
    """Note that the cell ran, in which process and on which card; then do what it says."""
    with open(cell["log"], "a") as log:
        log.write(f"{cell['n']} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    tell(0.5, "half way")
    mood = Path(cell["mood"]).read_text() if "mood" in cell else "well"
    if mood == "fails":
        raise RuntimeError(f"cell {cell['n']} is in no mood")
    if mood == "dies":
        os._exit(3)
    if mood == "crowded":
        _wait_for(cell["log"], 0)
        Path(cell["mood"]).write_text("well")
        raise torch.OutOfMemoryError("the card is full")
    if mood == "waits":
        _wait_for(cell["log"], 1)
        time.sleep(0.5)  # until the parent has heard of cell 1
    if mood == "hangs":
        time.sleep(600)
    return {"value": float(cell["n"]), "headline": f"number {cell['n']}"}


def _wait_for(log, number):
    """Until that cell has begun, whichever begins first."""
    until = time.monotonic() + 60
    while not any(at.startswith(f"{number} ") for at in Path(log).read_text().splitlines()):
        assert time.monotonic() < until, f"cell {number} did not begin"
        time.sleep(0.01)


if __name__ == "__main__":
    run_cells(json.loads(sys.argv[1]), work, Path(sys.argv[2]), workers=1)
