"""The command line of the bench: `python -m bench --help`, from the repository's root."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from . import contestants as entrants
from . import equivalence, report
from .harness import Measured, Task, Tick, expected, run_rounds, warm_up
from .machine import commit, limit_memory, machine, versions
from .memory import PIECE, do, memory_jobs, memory_records
from .tasks import Settings, share_records, tasks

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_console = Console(stderr=True)
PARTS, LIMITS = "What is measured", "How"

Out = Annotated[
    Path, typer.Option(help="For bench.json, table.md, bench.png; replaces those there.")
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="Seconds: T = 256, one round; no evidence, a trial."),
]
Layers = Annotated[
    bool, typer.Option(help="One layer, forward and backward.", rich_help_panel=PARTS)
]
Decode = Annotated[bool, typer.Option(help="One token at a time.", rich_help_panel=PARTS)]
Memory = Annotated[
    bool | None,
    typer.Option(
        "--memory/--no-memory",
        help="Peak memory of a training step, each in a fresh process (default: on; off "
        "with --quick).",
        rich_help_panel=PARTS,
    ),
]
Model = Annotated[
    bool,
    typer.Option(help="Training steps of the quickstart's models.", rich_help_panel=PARTS),
]
Compiled = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Ours after compile() too (default: on; off with --quick).",
        rich_help_panel=PARTS,
    ),
]
Flat = Annotated[
    bool,
    typer.Option(
        "--flat",
        help="Too: ours at 65,536 tokens against 1,024, and memory of streams of up to a "
        "million (batch 1, recomputed chunks; many minutes more).",
        rich_help_panel=PARTS,
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(help="Tokens (default: 256,1024,4096,16384).", rich_help_panel=LIMITS),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, help="Default 4; even: each order has its mirror.", rich_help_panel=LIMITS),
]
Limit = Annotated[
    float, typer.Option(min=0, help="Seconds per run; slower: —.", rich_help_panel=LIMITS)
]
Batch = Annotated[int, typer.Option(min=1, help="Of a layer.", rich_help_panel=LIMITS)]
ModelBatch = Annotated[int, typer.Option(min=1, help="Of a training step.", rich_help_panel=LIMITS)]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of torch (default: its own).", rich_help_panel=LIMITS)
]


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    out: Out = Path("bench", "results"),
    quick: Quick = False,
    layers: Layers = True,
    decode: Decode = True,
    memory: Memory = None,
    model: Model = True,
    compiled: Compiled = None,
    flat: Flat = False,
    lengths: Lengths = None,
    rounds: Rounds = None,
    limit: Limit = Settings.limit,
    batch: Batch = Settings.batch,
    model_batch: ModelBatch = Settings.model_batch,
    threads: Threads = None,
) -> None:
    """Measure nestlearn's layers beside their peers: tokens/s, latency, memory, share of the peak.

    All run in one process and in rounds, each round in another order, after a warm-up; medians and
    ranges are reported. Before that, what is measured is checked against its definition: if it
    differs, nothing is measured and the exit code is 1. After the
    warm-up it says how long the rounds take; the machine should have nothing else to do. Results
    are written after every round.

    Example:  python -m bench --quick
    """
    if context.invoked_subcommand is not None:
        return
    if threads is not None:
        torch.set_num_threads(threads)
    base = Settings.quick() if quick else Settings()
    settings = replace(
        base,
        lengths=base.lengths if lengths is None else _lengths(lengths),
        rounds=base.rounds if rounds is None else rounds,
        limit=limit, batch=batch, layers=layers, decode=decode, model=model, flat=flat,
        compiled=base.compiled if compiled is None else compiled,
        memory=base.memory if memory is None else memory,
        model_batch=model_batch,
    )  # fmt: skip
    limit_memory()
    # One process compiles the same step for many shapes here; a user's does so for one or two.
    torch._dynamo.config.recompile_limit = 128
    try:
        document = run(settings, out)
    except KeyboardInterrupt:
        _say(f"Stopped: what was measured in whole rounds is in {out}.", "yellow")
        raise typer.Exit(130) from None
    if document is None:
        raise typer.Exit(1)
    typer.echo(report.table(document))
    _say(f"Written to {out}.", "green")


@app.command()
def table(
    file: Annotated[Path, typer.Argument(help="A bench.json.", exists=True, dir_okay=False)],
) -> None:
    """Print the table of a bench.json again."""
    try:
        typer.echo(report.table(report.read(file)))
    except ValueError as error:
        _say(f"Error: {error}", "red")
        raise typer.Exit(2) from None


@app.command(hidden=True)
def child(job: str) -> None:
    """One measurement of memory, for the process that started this one."""
    typer.echo(json.dumps(do(json.loads(job))))


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(n) for n in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise typer.BadParameter(f"{text!r}: give tokens, e.g. 256,1024", param_hint="--lengths")
    return found


# --------------------------------------------------------------------------------------- run


def run(
    settings: Settings, out: Path, who: list[entrants.Contestant] | None = None
) -> report.Document | None:
    """Check, measure and write; None, and nothing written, where the check fails.

    who: the contestants (default: all that are installed).
    """
    here, skipped = entrants.present(
        entrants.contestants() if who is None else who, compiled=settings.compiled
    )
    for line in skipped:
        _say(line, "yellow")
    _say("Checking that what is measured computes what it should ...")
    failures = equivalence.check_equivalence(here)
    if failures:
        _say("Refused: a speed of wrong numbers is none.", "red")
        for failure in failures:
            _say(f"  {failure}", "red")
        return None
    document = _document(settings, here, skipped)
    with _progress() as bar:
        jobs = memory_jobs(here, settings)
        with _phase(bar, "memory", sum(j["length"] + PIECE for j in jobs)) as tick:
            peaks = memory_records(jobs, settings.limit, tick)
        todo = tasks(here, settings)
        with _phase(bar, "warm-up", sum(t.length or 1 for t in todo)) as tick:
            warm_up(todo, settings.limit, tick)

        def save(done: int) -> None:
            document["settings"]["rounds"] = done
            document["records"] = _records(here, todo, settings) + peaks
            report.write(document, out)

        seconds = expected(todo) * settings.rounds
        _say(f"{settings.rounds} rounds, about {max(1, round(seconds / 60))} min.")
        with _phase(bar, "rounds", seconds) as tick:
            run_rounds(todo, settings.rounds, tick, save)
    return document


def _records(
    here: list[entrants.Contestant], todo: list[Task], settings: Settings
) -> list[Measured]:
    return [task.record() for task in todo] + share_records(here, todo, settings)


def _document(
    settings: Settings, here: list[entrants.Contestant], skipped: list[str]
) -> report.Document:
    packages = dict.fromkeys(c.package for c in here if c.package)
    return {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(["torch", "nestlearn", *packages]),
        "settings": asdict(settings) | {"shape": settings.shape._asdict()},
        "baselines": list(entrants.BASELINES),
        "skipped": skipped,
        "records": [],
    }


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:<48}"), BarColumn(bar_width=30), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=_console)


@contextmanager
def _phase(bar: Progress, name: str, total: float) -> Iterator[Tick]:
    """A line of the progress bar: the ticks' second number adds up to the total."""
    line = bar.add_task(name, total=max(total, 1e-9), visible=total > 0)

    def tick(what: str, part: float) -> None:
        bar.update(line, description=f"{name}: {what}"[:48], advance=part)

    yield tick
    bar.update(line, description=name, completed=max(total, 1e-9))


def _say(text: str, style: str = "") -> None:
    _console.print(Text(text, style=style), soft_wrap=True)


def main() -> None:
    """Run the command line; a disk that refuses is one line, exit code 2."""
    try:
        app()
    except OSError as error:
        _say(f"Error: {error}", "red")
        sys.exit(2)


if __name__ == "__main__":
    main()
