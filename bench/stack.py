"""What learning costs a stacked model: python -m bench.stack --help

A Llama with random weights reads a stream of tokens (forward passes with a cache, no gradients),
learns it, and generates with and without a memory, in turns; medians over rounds and their ratios.
With --model, a pretrained model in the default stack reads a text, learns it, and studies its
beginning: tokens a second of each.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)  # fmt: skip

from nestlearn import DeltaLevel, Session, stack_levels, unstack
from nestlearn.disk import atomic_write
from nestlearn.hf.cache import CACHE

THREE = [DeltaLevel(chunk=chunk, lr=0.01, rule="gd") for chunk in (64, 256, 1024)]
ONE = [DeltaLevel(chunk=256, lr=0.01, rule="gd")]
SKIP: dict[str, Any] = {"objective": "skip", "learns": "out"}
LEVELS = {
    "one level of 256": ONE,
    "the same, outputs alone": ONE,
    "the same, by the last block's gradient": ONE,
    "one level of 256, DGD": [DeltaLevel(chunk=256, lr=0.01, rule="dgd")],
    "levels of 256 and 1,024": THREE[1:],
    "levels of 64, 256 and 1,024": THREE,
    "the same over the depth": THREE,
}


def llama(dim: int, layers: int) -> Any:
    """A base model of that size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=dim, intermediate_size=8 * dim // 3, num_hidden_layers=layers,
        num_attention_heads=dim // 64, num_key_value_heads=dim // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def read(base: Any, ids: torch.Tensor, window: int, piece: int) -> None:
    """Forward passes over the stream, `piece` tokens at a time, a new window when one is full."""
    cache = DynamicCache()
    for i, part in enumerate(ids.split(piece, 1)):
        if i * piece % window == 0:
            cache = DynamicCache()
        base(input_ids=part, **{CACHE: cache}, use_cache=True)


def main(
    out: Annotated[Path, typer.Option(help="For stack.json.")] = Path("bench/results"),
    dim: Annotated[int, typer.Option(help="Width, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 8,
    tokens: Annotated[int, typer.Option(help="Read and learned in a round.")] = 4096,
    rounds: Annotated[int, typer.Option(min=2, help="Of each measurement.")] = 5,
    model_folder: Annotated[
        Path | None, typer.Option("--model", help="A pretrained model's folder, in place of Llama.")
    ] = None,
    text: Annotated[Path, typer.Option(help="Its text.")] = Path("docs/velmora.txt"),
) -> None:
    """Time of learning over reading, and of generating with a memory over without."""
    console, rows = Console(width=110), []
    if model_folder is not None:
        return pretrained(model_folder, text, tokens, rounds, out, console)
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(1))
    for name, levels in LEVELS.items():
        options: dict[str, Any] = {"spread": "depth"} if "depth" in name else {}
        options |= SKIP if "gradient" in name else {"learns": "out"} if "alone" in name else {}
        model = stack_levels(llama(dim, layers), levels, **options)
        base = llama(dim, layers)
        _, memory = model.learn(ids[:, :1024])
        options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
        row = {"levels": name, "parameters": sum(p.numel() for p in base.parameters())}
        for what, ours, theirs in (
            ("learn ÷ read", partial(model.learn, ids), partial(read, base, ids, 1024, 256)),
            (
                "generate with a memory ÷ without",
                partial(model.generate, ids[:, :64], memory, **options),
                partial(base.generate, ids[:, :64], **options),
            ),
        ):
            seconds = in_turns((ours, theirs), rounds)
            ratios = sorted(a / b for a, b in zip(*seconds))
            row[what] = statistics.median(ratios)
            row[f"{what}, quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
            row[f"{what}, seconds"] = [statistics.median(s) for s in seconds]
        console.print(
            f"{name:30} learn ÷ read {row['learn ÷ read']:.2f}   "
            f"generate ÷ base {row['generate with a memory ÷ without']:.2f}", highlight=False
        )  # fmt: skip
        rows.append(row)
    return written(rows, out / "stack.json")


def pretrained(
    folder: Path, file: Path, tokens: int, rounds: int, out: Path, console: Console
) -> None:
    """Tokens a second that a pretrained model reads, learns and studies."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words, said = AutoTokenizer.from_pretrained(folder), file.read_text(encoding="utf-8")
    ids = torch.tensor([words.encode(said)])
    ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    rows: list[dict[str, Any]] = []
    for name, chunks, lr, options in (
        ("reading", (256,), 0.0, {}),
        ("learning", (64, 512), 0.05, {}),
        ("learning, every 256", (256,), 0.05, {}),
        ("outputs alone", (256,), 0.1, {"learns": "out"}),
        ("the last block's gradient", (256,), 0.1, SKIP),
    ):
        levels = [DeltaLevel(chunk, lr=lr, rule="gd") for chunk in chunks]
        model = stack_levels(base, levels, **options)
        (seconds,) = in_turns((partial(model.learn, ids),), rounds)
        later = float(model.learn(ids)[0][:, tokens // 2 :].mean())
        rows.append({"what": name, "tokens/s": tokens / statistics.median(seconds), "later": later})
        base = unstack(model)
    model = stack_levels(base, [DeltaLevel(chunk, lr=0.05, rule="gd") for chunk in (64, 512)])
    page = str(words.decode(ids[0, :150].tolist()))
    began = time.perf_counter()
    Session(model, tokenizer=words).study(page)
    studying = len(words.encode(page)) / (time.perf_counter() - began)
    rows.append({"what": "studying", "tokens/s": studying})
    for row in rows:
        share = row["tokens/s"] / rows[0]["tokens/s"]
        loss = f"{row['later']:10.4f} nats, the later half" if "later" in row else ""
        console.print(
            f"{row['what']:28}{row['tokens/s']:8.1f} tokens/s {share:8.3f} of reading{loss}"
        )
    written(rows, out / "stack-pretrained.json")


def written(rows: list[dict[str, Any]], file: Path) -> None:
    """As JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    atomic_write(file, partial(Path.write_text, data=text))


def in_turns(runs: tuple[Callable[[], Any], ...], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, after one that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 1):
        for run, own in zip(runs, times):
            began = time.perf_counter()
            run()
            if i:
                own.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    typer.run(main)
