"""The commands `nestlearn memory ...`: look at memories, copy, reset, delete them, make them
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from nestlearn.cli.commands import say
from nestlearn.cli.stacked import open_session, place
from nestlearn.cli.stacking import Dir, Stacked

Name = Annotated[str, Argument(metavar="NAME", help="A memory of it.")]

memory = typer.Typer(
    no_args_is_help=True,
    help="Look at what a stacked model has learned, copy, reset or delete it, or make it part of a "
    "model."
    "\n\nExample:  nestlearn memory list stacked/",
)


@memory.command("list")
def list_memories(folder: Stacked) -> None:
    """The memories of a stacked model: how much they read, how large they are."""
    from nestlearn.learn import describe

    table = Table("memory", "tokens", "writes", "MB", "learned last from")
    root = folder / "memories"
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            told = describe(path)
        except (ValueError, FileNotFoundError) as error:
            table.add_row(Text(path.name), "", "", "", Text(str(error), style="red"))
            continue
        last = next((r.get("source") for r in reversed(told["history"]) if r.get("source")), "")
        size, writes = sum(told["bytes"].values()) / 1e6, " ".join(map(str, told["writes"]))
        cells = (f"{told['position']:,}", writes, f"{size:.1f}")
        table.add_row(Text(path.name), *cells, Text(str(last or "")))  # Text: [] is no markup
    Console().print(table)


@memory.command()
def show(folder: Dir, name: Name) -> None:
    """What a memory has been through, and how large its levels are."""
    from nestlearn.learn import describe

    told = describe(place(folder, name))
    typer.echo(f"{name}: {told['position']:,} tokens of base model {told['base'][:12]}")
    for part, size in told["bytes"].items():
        typer.echo(f"  {part}: {size / 1e6:.2f} MB")
    for record in told["history"]:
        facts = ", ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in record.items()
            if key not in ("what", "time") and value is not None
        )
        typer.echo(f"  {record['what']}: {facts}")


@memory.command()
def diff(
    folder: Stacked, name: Name, other: Annotated[str, Argument(help="Another memory.")]
) -> None:
    """How far two memories are apart, level by level."""
    one = open_session(folder, name, read_only=True)
    table = Table()
    for header in ("level", name, other, "distance", "cosine"):
        table.add_column(Text(header))
    for level, norm, beside, distance, cosine in one.diff(place(folder, other)):
        numbers = (norm, beside, distance, cosine)
        table.add_row(str(level), *(f"{number:.4f}" for number in numbers))
    Console().print(table)


@memory.command()
def fork(folder: Stacked, name: Name, new: Annotated[str, Argument(help="The copy.")]) -> None:
    """Copy a memory; both go their own ways from there."""
    from nestlearn.learn.store import check_free

    check_free(place(folder, new))
    open_session(folder, name, read_only=True).fork(place(folder, new))
    say(f"{new} knows what {name} knows.", "green")


@memory.command()
def reset(
    folder: Stacked,
    name: Name,
    level: Annotated[int | None, Option(min=0, help="Only this level.")] = None,
) -> None:
    """Forget what a level has learned, or all."""
    session = open_session(folder, name, must_exist=True)
    session.reset(level)
    session.save()
    say(f"{name}: {'everything' if level is None else f'level {level}'} forgotten.", "green")


@memory.command()
def delete(
    folder: Stacked,
    names: Annotated[list[str], Argument(metavar="NAME...", help="Memories of it.")],
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete memories for good, with their studies; asks before. All of them, or none."""
    from nestlearn.learn import delete_memory
    from nestlearn.learn.store import check_memory

    root = folder / "memories"
    if not root.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{root} is a link out of {folder}: what is there is not deleted")
    paths = {name: place(folder, name) for name in names}
    size, all_ = sum(map(check_memory, paths.values())), ", ".join(paths)
    if not yes and not typer.confirm(f"Delete {all_} for good ({size / 1e6:.1f} MB)?", err=True):
        say("Nothing was deleted.")
        raise typer.Exit(1)
    freed = sum(map(delete_memory, paths.values()))
    say(f"{all_}: deleted, {freed / 1e6:.1f} MB freed.", "green")


@memory.command()
def merge(
    folder: Stacked,
    name: Name,
    level: Annotated[int, Option(min=0, help="The level to write into the weights.")],
    out: Annotated[Path, Option(help="The new folder, with the memory in it.")],
) -> None:
    """Write a level into the weights: a new stacked model, whose memory has that level free."""
    from nestlearn.hf.folder import save_stack

    session = open_session(folder, name, read_only=True)
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder")
    twin = session.fork()
    twin.merge(level)
    save_stack(twin.model, out, session.tokenizer)
    twin.save(place(out, name))
    say(f"{out} is a stacked model with level {level} of {name} in its weights.", "green")


@memory.command()
def export(
    folder: Stacked, name: Name, out: Annotated[Path, Option(help="The new model's folder.")]
) -> None:
    """Write all levels into the weights: a plain transformers model that knows what NAME knows."""
    from nestlearn.hf.stack import unstack

    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder")
    twin = open_session(folder, name, read_only=True).fork()
    for level in range(len(twin.model.config.levels)):
        twin.merge(level)
    unstack(twin.model).save_pretrained(out)
    if twin.tokenizer is not None:
        twin.tokenizer.save_pretrained(out)
    say(f"{out} is a plain model for transformers' from_pretrained.", "green")
