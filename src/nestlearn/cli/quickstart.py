"""The quickstart: Hope beside a Transformer, trained on this machine in minutes.

`run` says what will happen and how long it takes, and runs the experiment "language"; `report`
shows what came out. All of it can be stopped at any moment: the same call goes on, or reads back
what is done.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nestlearn.cli.commands import say
from nestlearn.evals import Record
from nestlearn.experiments import language, runner
from nestlearn.experiments.cells import Cell
from nestlearn.experiments.language import corpus_of, eval_tokens
from nestlearn.experiments.tables import table
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.train import Corpus, TrainConfig
from nestlearn.train.run import resolve_device


def run(
    data: Sequence[Path],
    out: Path,
    config: TrainConfig,
    seeds: int,
    every_model: bool,
    size: str,
    lr: float | None,
) -> list[Record]:
    """Train and measure Hope and a Transformer (every_model: seven models) and return the records.

    data: text files and folders; none: the standard library of this Python. lr: the peak of all
    models (None: each one's own, tuned at size tiny with 8 × 256 tokens a step). ValueError where
    the text is too short for the longer measurement, or `out` holds runs of other text or settings.
    """
    paths = tuple(map(str, data))
    corpus = corpus_of(paths)
    models = language.all_models if every_model else language.quick_models
    entries = [replace(e, lr=e.lr if lr is None else lr) for e in models(corpus.vocab_size, size)]
    prompt = _prompt(corpus) if data else "def "
    cells = language.cells(entries, paths, config, out, prompt)
    about = replace(
        language.EXPERIMENT, name="quickstart", takes=("seeds", "workers"), grid=lambda _: cells
    )
    search = runner.Search(about, runner.ask(about, out, seeds=seeds, workers=0), cells)
    todo = search.missing()
    for cell in todo:
        language.check_folder(cell)
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
    runner.run(about, out, seeds=seeds, workers=0, progress=False)
    return search.records()


def _prompt(corpus: Corpus) -> str:
    """The second word of the validation text: the first may be cut."""
    assert corpus.tokenizer is not None
    text = corpus.tokenizer.decode(corpus.val[:400].tolist())
    words = text.split()
    return f"{words[1]} " if len(words) > 1 else text[:8]


def _seconds(todo: Sequence[Cell], corpus: Corpus, config: TrainConfig) -> float:
    """How long the trainings and measurements take, from one step of each model."""
    models = {cell["model"]: cell for cell in todo}
    took = {name: _step_seconds(cell, corpus, config) for name, cell in models.items()}
    tokens = config.batch * config.length
    read = (config.steps // config.eval_every) * config.eval_windows * config.length
    read += 2 * eval_tokens(config)
    steps = config.steps + read / tokens / 3  # reading: a third of a step
    return sum(steps * took[cell["model"]] + 3 for cell in todo)


def _step_seconds(cell: Cell, corpus: Corpus, config: TrainConfig) -> float:
    """One forward and backward pass, after a first that does not count."""
    device = resolve_device(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = HopeLM(HopeConfig.from_dict(cell["config"])).to(device)
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


def report(records: Sequence[Record], out: Path, console: Console) -> None:
    """Print the table, where everything is, a sample of each model, and what to try next."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(records, language.columns(records)).splitlines()
    )
    title = Text(f"{records[0].task}, after {records[0].steps} steps")
    shown = Table(title=title, min_width=60)
    for name in head:
        shown.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        shown.add_row(*row)
    trained, longer = records[0].detail["value_at"]
    console.print(shown)
    console.print(
        f"Bits per byte: lower is better. {trained} bytes is the trained length; at {longer} the "
        "models read further than they were trained to.\n",
        highlight=False,
    )
    for record in (r for r in records if r.seed == records[0].seed):
        text = "".join(c if c.isprintable() or c == "\n" else "·" for c in record.detail["sample"])
        console.print(
            Panel(Text(text, overflow="fold"), title=record.model, title_align="left", width=90)
        )
    folders = [out / language.folder_name(r.config) for r in records]
    places = [("Figure", out / "comparison.png"), ("Table", out / "table.md")]
    places += [("Model", folder / "model") for folder in folders]
    lines = "".join(f"{what:<8}{path}\n" for what, path in places)
    console.print(Text("\n" + lines), soft_wrap=True)  # soft: a path stays one word
    word = (records[0].detail["sample"].split() or ["The"])[0]
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
    doors = "the layers in your own model, state, results, equations"
    return text.append(f"  The README has the other doors: {doors}.", "not bold")
