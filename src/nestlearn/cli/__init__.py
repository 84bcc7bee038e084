"""The command line: typed signatures over the library; nobody imports this room.

A new command is one function under `@app.command()`. Imports of the library stand inside the
commands, in all files of this room, so that `nestlearn --help` answers at once. `main` shows every
error that the library foresees (a wrong value, a missing file, a full disk) as one line and exits
with 2.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from nestlearn.cli import commands, doctor, memory_commands, processes, serving, stacking, training
from nestlearn.cli.commands import say
from nestlearn.cli.options import Device
from nestlearn.names import SHIPPED, model_folder, weights_folder

app = typer.Typer(
    name="nestlearn",
    help="Models that keep learning: Nested Learning and Hope in PyTorch.",
    epilog=(
        "Start here:  nestlearn quickstart --quick   then   "
        "nestlearn train --data my_texts/ --out runs/first"
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from nestlearn import __version__

        typer.echo(f"nestlearn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def quickstart(
    data: Annotated[
        list[Path] | None,
        Option(help="Your own text; without it, the standard library of this Python."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="For models, figure, table (default: runs/quickstart, runs/quick)."),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Half a minute in all.")] = False,
    steps: Annotated[
        int | None, Option(help="Optimizer steps (default: 200, or 30 with --quick).")
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Trainings of each model.")] = 1,
    every_model: Annotated[
        bool, Option("--all", help="Seven models instead of Hope and a Transformer.")
    ] = False,
    size: Annotated[str, Option(help="tiny, small, ...: width and depth.")] = "tiny",
    batch: Annotated[int | None, Option(min=1, help="Windows of a step (default: 8).")] = None,
    length: Annotated[int | None, Option(min=2, help="Bytes of a window (default: 256).")] = None,
    lr: Annotated[
        float | None, Option(help="Peak learning rate of all (default: tuned for tiny).")
    ] = None,
) -> None:
    """Train Hope beside a Transformer, and compare them.

    The same command again goes on where it was stopped; what is done is read back in seconds.

    Example:  nestlearn quickstart --quick
    """
    from nestlearn.cli.quickstart import report, run
    from nestlearn.experiments.language import settings

    config = settings(steps, quick=quick)
    config = replace(config, batch=batch or config.batch, length=length or config.length)
    out = out or Path("runs", "quick" if quick else "quickstart")
    try:
        records = run(data or [], out, config, seeds, every_model, size, lr)
    except KeyboardInterrupt:
        say("Stopped and saved: the same command goes on from here.", "yellow")
        raise typer.Exit(130) from None
    report(records, out, Console())


app.command()(training.train)
app.command()(training.export)


@app.command()
def generate(
    folder: Annotated[Path, Argument(metavar="DIR", help="A finished run's folder, or a model's.")],
    prompt: Annotated[str, Option(help="The text to go on from.")],
    tokens: Annotated[int, Option(min=1, help="How many tokens to add.")] = 200,
    temperature: Annotated[
        float, Option(min=0.0, help="Lower is safer; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, Option(min=1, help="Draw among the k likeliest tokens only.")
    ] = None,
    seed: Annotated[int, Option(help="The same seed draws the same text.")] = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a trained model.

    Example:  nestlearn generate runs/first --prompt "def main" --tokens 300
    """
    if not prompt:
        raise ValueError("the prompt is empty: pass at least one character, --prompt TEXT")
    source = _model_folder(folder)
    import torch

    from nestlearn.models.hope import HopeLM
    from nestlearn.train.data import load_tokenizer
    from nestlearn.train.run import resolve_device

    place = resolve_device(device)
    model = HopeLM.from_pretrained(source).to(place).eval()
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=place)
    generator = torch.Generator(place).manual_seed(seed)
    with torch.no_grad():
        longer = model.generate(
            ids, max_new_tokens=tokens, temperature=temperature, top_k=top_k, generator=generator
        )
    typer.echo(tokenizer.decode(longer[0].tolist()))


def _model_folder(name: Path) -> Path:
    folder = weights_folder(name)
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"the run in {folder} is not finished, so it has no model/ yet; finish it with "
            "nestlearn train ... --resume (fewer --steps end it sooner)"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}; pass the --out of a finished training run, or {SHIPPED}"
        )
    return folder


@app.command()
def levels(
    folder: Annotated[
        Path, Argument(metavar="DIR", help="A run's folder, finished or not, or a model's.")
    ],
    as_json: Annotated[bool, Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show what learns in a model, on what, and how often: its nested levels.

    Of a run's folder in training, with its optimizer; of a model's folder in use.

    Example:  nestlearn levels runs/first
    """
    path = _settings_file(folder)
    import json

    import torch

    from nestlearn.levels import levels as of
    from nestlearn.levels import render, to_json
    from nestlearn.models.hope import HopeLM

    config, training = _settings(path)
    with torch.device("meta"):  # the shapes are enough
        model = HopeLM(config)
    step = training["batch"] * training["length"] if training else None
    found = of(model, tokens_per_step=step)
    if as_json:
        plain = not (sys.stdout.encoding or "").lower().startswith("utf")
        typer.echo(json.dumps(to_json(found), indent=2, ensure_ascii=plain))
        return
    Console().print(render(found))
    for component in (c for level in found for c in level.components if c.kind == "memory"):
        if training and (component.period or 0) > training["length"]:
            say(
                f"{component.name} is never written in training: its period of {component.period} "
                f"is longer than the windows of {training['length']} tokens.",
                "yellow",
            )


def _settings_file(folder: Path) -> Path:
    path = model_folder(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run or model in {folder}: it has no config.json")
    return path


def _settings(path: Path) -> tuple[Any, dict[str, Any] | None]:
    """The model's configuration and, of a run, how it is trained."""
    import json

    from nestlearn.models.config import HopeConfig, saved_config

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "train" in data:
            return HopeConfig.from_dict(data["model"]), data["train"]
        return saved_config(data), None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} describes no run or model of nestlearn ({error})") from error


app.add_typer(commands.evaluation, name="eval")
app.command()(commands.reproduce)
app.command()(doctor.doctor)
app.add_typer(stacking.stack, name="stack")
app.command()(stacking.learn)
app.command()(stacking.study)
app.command()(stacking.chat)
app.add_typer(memory_commands.memory, name="memory")
app.command()(serving.serve)


def main() -> None:
    """Run the command line; foreseen errors are one red line and exit code 2."""
    commands.forgive_encodings()
    try:
        app()
    except processes.FORESEEN as error:
        say(f"Error: {' '.join(str(error).split())}", "bold red")
        sys.exit(2)
