"""How a trained Hope does on a stream hundreds of times longer than its training windows.

    python -m nestlearn.recipes.stream runs/all/hope-seed0 --tokens 100000

reads the validation text as one stream, once for each half-life of the memories, and prints the
loss of each tenth of it beside that of a model that starts anew every 1,024 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from nestlearn.disk import atomic_write
from nestlearn.models.hope import HopeLM
from nestlearn.train import load_text, stdlib_text

HALF_LIVES = (None, 4096, 2048, 1024, 512, 256)
FRESH = 1024


@torch.no_grad()
def stream_loss(model: HopeLM, ids: torch.Tensor, restart: int | None = None) -> torch.Tensor:
    """Nats per token along ids [N + 1]; the state starts anew every `restart` tokens, if given."""
    state, losses = None, []
    for a in range(0, len(ids) - 1, FRESH):
        if restart is not None and a % restart == 0:
            state = None
        x, y = ids[a : a + FRESH], ids[a + 1 : a + FRESH + 1]
        logits, state = model(x[: len(y)].unsqueeze(0), state)
        losses.append(F.cross_entropy(logits[0].float(), y, reduction="none"))
    return torch.cat(losses)


def main(
    folder: Annotated[Path, typer.Argument(help="A finished run of the standard library's text.")],
    tokens: Annotated[int, typer.Option(help="Length of the stream.")] = 100_000,
    out: Annotated[Path | None, typer.Option(help="Write the losses here, as JSON.")] = None,
) -> None:
    """Read one long stream with each half-life and print the loss along it."""
    ids = load_text(stdlib_text()).val[: tokens + 1].long()
    rows: dict[str, list[float]] = {}
    settings = [(h, None) for h in HALF_LIVES] + [(None, FRESH)]
    for half_life, restart in track(settings, description="half-lives"):
        model = HopeLM.from_pretrained(folder / "model", half_life=half_life).eval()
        losses = stream_loss(model, ids, restart)
        name = f"starts anew every {restart}" if restart else f"half-life {half_life or 'none'}"
        rows[name] = [round(float(part.mean()), 4) for part in losses.chunk(10)]
        rows[name].append(round(float(losses.mean()), 4))
    table = Table(title=Text(f"{folder}: nats per byte in each tenth of {tokens:,} tokens"))
    for name in ("memories", *(str(i + 1) for i in range(10)), "all"):
        table.add_column(name, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    Console().print(table)
    if out is not None:
        text = json.dumps({"folder": folder.name, "tokens": tokens, "nats": rows}, indent=1)
        atomic_write(out, lambda path: path.write_text(text + "\n", encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
