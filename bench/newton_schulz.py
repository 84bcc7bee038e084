"""Newton–Schulz on a CUDA card, as a share of its matrix rate: python -m bench.newton_schulz

The matrices of a transformer of 140 million parameters, five steps in bfloat16, grouped as the
optimizers do. The rate counts the operations that are done, by torch's own counter; the card's is
that of one product of 8,192 × 8,192 in the same type and run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu import timed
from nestlearn.disk import atomic_write
from nestlearn.optim.orthogonal import newton_schulz

SETS = {  # shape: how many
    "1,024 × 1,024": {(1024, 1024): 44},
    "4,096 × 1,024": {(4096, 1024): 22},
    "the whole model": {(1024, 1024): 44, (4096, 1024): 11, (1024, 4096): 11},
}


def matrices(shapes: dict[tuple[int, int], int], device: str) -> list[torch.Tensor]:
    """As many random float32 matrices of each shape as it says."""
    torch.manual_seed(0)
    return [torch.randn(s, device=device) for s, count in shapes.items() for _ in range(count)]


def rate(run: Callable[[], object], repeats: int) -> float:
    """Floating point operations a second on a CUDA card, the median over repeats."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / statistics.median(timed(run, repeats))


def main(
    out: Annotated[Path, typer.Option(help="For newton-schulz.json.")] = Path("bench/results"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")] = 20,
) -> None:
    """TFLOP/s of Newton–Schulz on sets of equal matrices, beside those of one large product."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA card here: `nestlearn reproduce fig12` runs on the CPU")
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    card = rate(lambda: large @ large, repeats)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    records: list[dict[str, Any]] = [{"matrices": "one product", "tflops": card / 1e12, **about}]
    for name, shapes in SETS.items():
        given = matrices(shapes, "cuda")
        reached = rate(partial(newton_schulz, given, widen=False), repeats)
        records.append(
            {"matrices": name, "tflops": reached / 1e12, "share": reached / card} | about
        )
    for record in records:
        share = f"{record['share']:6.1%} of it" if "share" in record else "the card"
        Console().print(f"{record['matrices']:16} {record['tflops']:7.1f} TFLOP/s  {share}")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(records, indent=1) + "\n"
    atomic_write(out / "newton-schulz.json", partial(Path.write_text, data=text))


if __name__ == "__main__":
    typer.run(main)
