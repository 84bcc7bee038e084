"""The commands `nestlearn eval` and `nestlearn reproduce`, over the experiments."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from nestlearn.cli import streaming
from nestlearn.cli.options import Device

Seeds = Annotated[
    int | None, Option(min=1, help="Trainings with the best learning rate (default: 3 to 5).")
]
Only = Annotated[
    list[str] | None, Option(metavar="TASK", help="This task alone; repeat the option for more.")
]
Steps = Annotated[
    int | None, Option(min=1, help="Optimizer steps of a training (default: its own).")
]
Workers = Annotated[
    int | None, Option(min=0, help="Trainings side by side (default: one for each core; CUDA: 1).")
]
Quick = Annotated[
    bool, Option("--quick", help="A minute in all: shows that it runs, not how good it is.")
]


evaluation = typer.Typer(
    no_args_is_help=True,
    help="Train a model on a suite of tasks, or read a text with one that is trained."
    "\n\nExample:  nestlearn eval stream --model runs/first --text book.txt",
)


def _suite(name: str, about: str) -> None:
    @evaluation.command(name, help=f"{about}: train a model from scratch on each task, and test it."
        "\n\nEvery task is trained with several learning rates; the best on validation data "
        "counts. Stopped at any moment, the same command goes on with what is missing."
        f"\n\nExample:  nestlearn eval {name} --model hope")  # fmt: skip
    def evaluate(
        model: Annotated[
            str, Option(help="hope, hope-attention, titans, deltanet, transformer, lstm ...")
        ] = "hope",
        out: Annotated[
            Path | None, Option(help="For results and cells (default: runs/eval-SUITE).")
        ] = None,
        only: Only = None,
        seeds: Annotated[int, Option(min=1, help="Trainings with the best learning rate.")] = 1,
        steps: Steps = None,
        workers: Workers = None,
        device: Device = "auto",
        quick: Quick = False,
    ) -> None:
        from nestlearn.experiments import runner

        _print_result(
            lambda: runner.evaluate(
                name, model, out, only=tuple(only or ()), seeds=seeds, steps=steps, workers=workers,
                device=None if device == "auto" else device, quick=quick,
            ),
            quick,
        )  # fmt: skip


for _name, _about in (("formal", "Formal languages"), ("mad", "MAD"), ("mqar", "MQAR")):
    _suite(_name, _about)
evaluation.command("stream")(streaming.stream)


def reproduce(
    name: Annotated[str | None, Argument(metavar="[NAME]", help="An experiment of --list.")] = None,
    show: Annotated[bool, Option("--list", help="List the experiments.")] = False,
    out: Annotated[
        Path | None, Option(help="For results, table, figure, cells (default: results/NAME).")
    ] = None,
    only: Only = None,
    models: Annotated[
        list[str] | None,
        Option(metavar="MODEL", help="This model alone; repeat the option for more."),
    ] = None,
    data: Annotated[
        Path | None, Option(help="Folder of a data set, for an experiment that reads one.")
    ] = None,
    seeds: Seeds = None,
    add: Annotated[
        bool, Option("--add", help="Run the seeds that results.json lacks, at its learning rates.")
    ] = False,
    steps: Steps = None,
    workers: Workers = None,
    device: Device = "auto",
    quick: Quick = False,
) -> None:
    """Run one of the paper's experiments, and print what came out beside the paper's figures.

    Without a name, lists the experiments and their price. Writes results.json, table.md and a
    figure; into results/ only from a clean commit. Stopped at any moment, the same command goes on
    with the trainings that are missing; with --only or --models, what others left in the folder
    stays in the table.

    Example:  nestlearn reproduce table5 --quick
    """
    from nestlearn import experiments
    from nestlearn.experiments import runner

    if show or name is None:
        typer.echo(f"{'experiment':<18}{'on two cores':<16}{'on a card':<16}what it shows")
        for about in map(experiments.named, experiments.NAMES):
            cores, card = about.price
            typer.echo(f"{about.name:<18}{cores:<16}{card:<16}{about.shows}")
        return
    _print_result(
        lambda: runner.run(
            name, out, quick=quick, add=add, only=tuple(only or ()), models=tuple(models or ()),
            data=None if data is None else str(data), seeds=seeds, steps=steps, workers=workers,
            device=None if device == "auto" else device,
        ),
        quick,
    )  # fmt: skip


def _print_result(run: Callable[[], str], quick: bool) -> None:
    try:
        text = run()
    except KeyboardInterrupt:
        say("Stopped: the same command goes on with what is missing.", "yellow")
        raise typer.Exit(130) from None
    show(text)
    if quick:
        say("A quick run: it shows that it runs, not how good anything is.", "yellow")


def show(text: str) -> None:
    """Markdown, drawn where somebody looks."""
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text)) if console.is_terminal else typer.echo(text)


def say(text: str, style: str = "") -> None:
    """One line on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style=style))


def forgive_encodings() -> None:
    """What a console cannot show, or say, is replaced: by then the work is done."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
