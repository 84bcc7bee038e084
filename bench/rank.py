"""What a small memory learns beside a full one: python -m bench.rank --help

A pretrained model learns the beginning of a text, once for each form of its memory; the losses
afterwards on that text, on what follows it, and on another text, with the memory's size.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from nestlearn import DeltaLevel, stack_levels, unstack
from nestlearn.cli.stacked import encode, pretrained
from nestlearn.disk import atomic_write

LEVELS = [DeltaLevel(chunk, lr=0.05, rule="gd") for chunk in (64, 512)]
WHOLE: dict[str, Any] = {"window": None, "cache_dtype": None}
SHORT = "rank 4, short context"
FORMS: dict[str, dict[str, Any]] = {
    "full": {"rank": None, **WHOLE},
    "rank 16": {"rank": 16, **WHOLE},
    "rank 8": {"rank": 8, **WHOLE},
    "rank 4": {"rank": 4, **WHOLE},
    SHORT: {"rank": 4, "window": 448, "cache_dtype": "bfloat16"},
}
HEAD = "| memory | the text | what follows | the other text | MB at most | seconds |"


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for nestlearn stack.")],
    data: Annotated[Path, typer.Option(help="The text that is learned, and goes on afterwards.")],
    other: Annotated[Path, typer.Option(help="A text of another kind: what is forgotten.")],
    tokens: Annotated[int, typer.Option(min=2, help="Learned; half as many follow.")] = 640,
    out: Annotated[Path, typer.Option(help="For rank.md.")] = Path("bench/results"),
) -> None:
    """Losses in nats a token after one reading: full deltas, low ranks, and a short context."""
    base, words = pretrained(model, None)
    stream = torch.tensor([encode(words, [data])[: tokens * 3 // 2]])
    texts = [stream[:, :tokens], stream[:, tokens:], torch.tensor([encode(words, [other])[:1024]])]
    lines = [HEAD, "|---|---|---|---|---|---|"]
    nothing = {"nothing learned": FORMS["full"], "nothing, short context": FORMS[SHORT]}
    positions = base.config.get_text_config().max_position_embeddings
    for name, options in {**nothing, **FORMS}.items():
        window = options["window"] and min(options["window"], positions)
        stacked, memory = stack_levels(base, LEVELS, **{**options, "window": window}), None
        began = time.perf_counter()
        if name in FORMS:
            _, memory = stacked.learn(texts[0])
        seconds = time.perf_counter() - began
        found = [float(stacked.losses(text, memory)[:, 1:].mean()) for text in texts]
        shown = " | ".join(f"{loss:.3f}" for loss in found)
        size = f"{sum(stacked.memory_limit().values()) / 1e6:,.1f} | {seconds:,.0f}"
        lines.append(f"| {name} | {shown} | {size if memory else ' | '} |")
        typer.echo(lines[-1])
        base = unstack(stacked)
    text = "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "rank.md", lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
