"""The quickstart: Hope beside a Transformer, trained on this machine in minutes.

`run` says what will happen and how long it takes, calls `language.compare`, and `report` shows what
came out. All of it can be stopped at any moment: the same call goes on, or reads back what is done.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nestlearn.models.hope import HopeLM
from nestlearn.recipes.language import (
    STRETCH,
    Entry,
    Record,
    all_models,
    compare,
    eval_tokens,
    quick_models,
    table,
)
from nestlearn.train import Corpus, TrainConfig, load_text, stdlib_text
from nestlearn.train.run import resolve_device

STEPS, QUICK_STEPS = 200, 30


def settings(steps: int | None = None, *, quick: bool = False) -> TrainConfig:
    """How the quickstart trains; `quick`: fewer and smaller steps, half a minute in all."""
    batch, length, windows = (4, 128, 4) if quick else (8, 256, 16)
    steps = (QUICK_STEPS if quick else STEPS) if steps is None else steps
    return TrainConfig(
        steps=steps,
        batch=batch,
        length=length,
        warmup=min(50, max(steps, 0) // 5),
        eval_every=max(1, steps // (5 if quick else 8)),
        eval_windows=windows,
        checkpoint_every=max(1, steps // 4),
    )


def run(
    data: Sequence[str | Path],
    out: Path,
    config: TrainConfig,
    *,
    seeds: int = 1,
    every_model: bool = False,
    size: str = "tiny",
    lr: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and measure Hope and a Transformer (every_model: seven models) and return the records.

    data: text files and folders; none: the standard library of this Python. lr: the peak of all
    models (None: each one's own, tuned at size tiny with 8 × 256 tokens a step). ValueError where
    the text is too short for the longer measurement, or `out` holds runs of other text or settings.
    """
    corpus = load_text(list(data) or stdlib_text())
    if not data:
        corpus = replace(corpus, name="the standard library of Python")
    corpus.val_windows(1, STRETCH * config.length)  # a short text fails before any training
    _check(out, corpus)
    entries = (all_models if every_model else quick_models)(corpus.vocab_size, size)
    entries = [replace(e, lr=e.lr if lr is None else lr) for e in entries]
    done = cells(out)
    todo = [e for seed in range(seeds) for e in entries if (e.name, seed) not in done]
    names = ", ".join(entry.name for entry in entries)
    say(f"Text: {corpus.name}, {corpus.train.numel():,} bytes to train on; bytes are the tokens.")
    say(
        f"Models: {names}; all of one size. Each trains for {config.steps} steps of "
        f"{config.batch} × {config.length} bytes, {seeds} seed{'s' * (seeds > 1)}."
    )
    if todo:
        say(f"This takes about {_words(_seconds(todo, corpus, config))} here, all in {out}.")
    else:
        say(f"All of it is done: reading it from {out}.")
    prompt = _prompt(corpus) if data else "def "
    return compare(entries, corpus, config, out, seeds=seeds, prompt=prompt, say=say)


def cells(out: Path) -> dict[tuple[str, int], Path]:
    """The folders of the finished trainings in `out`, by model and seed."""
    records = {
        path.parent: json.loads(path.read_text(encoding="utf-8"))
        for path in out.glob("*/cell.json")
    }
    return {(record["model"], record["seed"]): folder for folder, record in records.items()}


def _check(out: Path, corpus: Corpus) -> None:
    for path in out.glob("*/config.json"):
        text = json.loads(path.read_text(encoding="utf-8")).get("corpus", {})
        if text.get("sha256") != corpus.describe()["sha256"]:
            raise ValueError(
                f"{path.parent} was trained on other text ({text.get('name')}): give another "
                "--out, or delete it"
            )


def _prompt(corpus: Corpus) -> str:
    """The second word of the validation text: the first may be cut."""
    assert corpus.tokenizer is not None
    text = corpus.tokenizer.decode(corpus.val[:400].tolist())
    words = text.split()
    return f"{words[1]} " if len(words) > 1 else text[:8]


def _seconds(todo: list[Entry], corpus: Corpus, config: TrainConfig) -> float:
    """How long the trainings and measurements take, from one step of each model."""
    took = {entry.name: _step_seconds(entry, corpus, config) for entry in todo}
    tokens = config.batch * config.length
    read = (config.steps // config.eval_every) * config.eval_windows * config.length
    steps = (
        config.steps + (read + 2 * eval_tokens(config)) / tokens / 3
    )  # reading: a third of a step
    return sum(steps * took[entry.name] + 3 for entry in todo)


def _step_seconds(entry: Entry, corpus: Corpus, config: TrainConfig) -> float:
    """One forward and backward pass, after a first that does not count."""
    device = resolve_device(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = HopeLM(entry.config).to(device)
    ids = corpus.batch(0, config.batch, config.length, config.seed).to(device)
    took = math.inf
    for _ in range(2):
        began = time.perf_counter()
        F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten()).backward()
        float(next(model.parameters()).detach().sum())  # waits for an accelerator
        took = min(took, time.perf_counter() - began)
    return took


def _words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds / 5)) * 5} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


# ------------------------------------------------------------------------------------- report


def report(records: list[Record], out: Path, console: Console) -> None:
    """Print the table, where everything is, a sample of each model, and what to try next."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(records).splitlines()
    )
    title = Text(f"{records[0]['task']}, after {records[0]['steps']} steps")
    shown = Table(title=title, min_width=60)
    for name in head:
        shown.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        shown.add_row(*row)
    trained, longer = records[0]["value_at"]
    console.print(shown)
    console.print(
        f"Bits per byte: lower is better. {trained} bytes is the trained length; at {longer} the "
        "models read further than they were trained to.\n",
        highlight=False,
    )
    for record in (r for r in records if r["seed"] == records[0]["seed"]):
        text = "".join(c if c.isprintable() or c == "\n" else "·" for c in record["sample"])
        console.print(
            Panel(Text(text, overflow="fold"), title=record["model"], title_align="left", width=90)
        )
    at = cells(out)
    folders = [at[r["model"], r["seed"]] for r in records]
    places = [("Figure", out / "comparison.png"), ("Table", out / "table.md")]
    places += [("Model", folder / "model") for folder in folders]
    lines = "".join(f"{what:<8}{path}\n" for what, path in places)
    console.print(Text("\n" + lines), soft_wrap=True)  # soft: a path stays one word
    word = (records[0]["sample"].split() or ["The"])[0]
    console.print(_next(folders[0], word), soft_wrap=True)


def _next(folder: Path, word: str) -> Text:
    place = shlex.quote(str(folder))
    lines = [
        (f"nestlearn generate {place} --prompt {shlex.quote(word + ' ')}", "let the model go on"),
        (f"nestlearn levels {place}", "what learns in it, and how often"),
        ("nestlearn train --data my_texts/ --out runs/mine", "train on your own text"),
        ("nestlearn quickstart --all --seeds 3 --out runs/all", "where the difference comes from"),
    ]
    width = max(len(command) for command, _ in lines)
    text = Text("Try next\n", style="bold")
    for command, purpose in lines:
        text.append(f"  {command:<{width}}", style="not bold cyan").append(f"   {purpose}\n", "dim")
    doors = (
        "The README has the other doors: the layers in your own model, state, results, equations."
    )
    return text.append(f"  {doors}", "not bold")


__all__ = ["cells", "report", "run", "settings"]
