"""`nestlearn doctor`: what `nestlearn.selftest` finds on this machine, printed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from nestlearn.cli.options import Device


def doctor(
    model: Annotated[
        Path | None,
        Option(
            metavar="DIR", help="A model's folder: the memory that it needs to read and to learn."
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Show versions, device and backends, and test the laws on this machine.

    Takes about ten seconds. The exit code is 1 if a law fails.

    Example:  nestlearn doctor --model runs/first/model
    """
    import torch

    from nestlearn import selftest
    from nestlearn.train.run import resolve_device

    place, failed = resolve_device(device), 0
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        _section("Versions", selftest.versions())
        _section("Machine", selftest.machine(place))
        _section("Backends", selftest.backends(place))
        if model is not None:
            _section(f"Memory of {model}", selftest.needs(model))
        typer.echo("Laws")
        for name, law in selftest.LAWS.items():
            began = time.perf_counter()
            wrong = selftest.tried(law, place)
            took = time.perf_counter() - began
            typer.echo(f"  {'FAILS' if wrong else 'holds'}  {name} ({took:.1f} s) {wrong}".rstrip())
            failed += bool(wrong)
    count = len(selftest.LAWS)
    if failed:
        typer.echo(f"{failed} of {count} laws fail on {place}: do not trust its results.")
        raise typer.Exit(1)
    typer.echo(f"All {count} laws hold on {place}.")


def _section(title: str, lines: Iterator[tuple[str, str]]) -> None:
    typer.echo(title)
    for name, text in lines:
        typer.echo(f"  {name:<14}{text}")
