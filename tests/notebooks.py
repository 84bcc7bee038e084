"""The notebooks of docs/notebooks/, run without Jupyter: what each code cell prints.

`python tests/notebooks.py` runs all of them in this process and writes their outputs anew.
"""

import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(path: Path) -> list[str]:
    """The code cells in their order, in a folder of their own; what each printed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
        for number, cell in enumerate(code(read(path)), 1):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), names)
            printed.append(out.getvalue())
    return printed


def write(path: Path, printed: list[str]) -> None:
    """The outputs into the file, and nothing else about the run."""
    notebook = read(path)
    for number, (cell, text) in enumerate(zip(code(notebook), printed, strict=True), 1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        cell.update(execution_count=number, outputs=[stream] if text else [])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for path in NOTEBOOKS:
        begin = time.process_time()
        write(path, run(path))
        print(f"{path.name}: {time.process_time() - begin:.0f} s of one core")
