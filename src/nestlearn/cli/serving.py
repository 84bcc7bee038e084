"""The command `nestlearn serve`: a model, opened whichever kind it is, behind a page and an API."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from nestlearn.cli import options
from nestlearn.cli.commands import say

CHUNKS, RATE = (64, 512), 0.05  # levels of a plain model, those of `nestlearn stack`


def serve(
    model: options.Served = "nestlearn/tiny",
    memories: options.Memories = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    tokens: options.TokensFile = None,
    device: options.ServingDevice = "auto",
    max_tokens: options.PromptTokens = 4096,
    max_text: options.TextTokens = 200_000,
    max_body: options.BodySize = 1024,
    max_upload: options.UploadSize = 256,
    max_requests: options.Requests = 240,
    max_beside: options.Beside = 32,
    max_learners: options.Learners = 1,
    max_memories: options.MemoryCount = 100,
    max_points: options.Points = 20,
    max_seconds: options.Seconds = 300,
) -> None:
    """Serve a model that remembers: a web page, and an endpoint for OpenAI's clients.

    Prints the URL. The page shows what a memory does while it reads, and what the model says with
    it and without. Ctrl-C stops; what was being learned is saved. Needs the extra
    nestlearn\\[serve].

    Example:  nestlearn serve stacked/ --port 8000
    """
    needed = ("starlette", "transformers", "uvicorn")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ImportError(f'no {" and no ".join(missing)} here: pip install "nestlearn[serve]"')
    from nestlearn.serve import Limits, engine_for
    from nestlearn.serve.app import run
    from nestlearn.serve.users import check_host, read_tokens

    known = None if tokens is None else read_tokens(tokens)
    check_host(host, known)
    limits = Limits(
        body=max_body * 2**10, upload=max_upload * 2**20, tokens=max_tokens, text=max_text,
        requests=max_requests, beside=max_beside, learners=max_learners, memories=max_memories,
        points=max_points, seconds=float(max_seconds),
    )  # fmt: skip
    opened, words, home = _opened(model, device)
    root = memories or home / ("memories" if known is None else "users")
    engine = engine_for(opened, words, _name(model))

    def ready(url: str) -> None:
        typer.echo(f"{engine.name} at {url}  (API: {url}/v1)")
        who = "one local user" if known is None else f"{len(set(known.values()))} users"
        say(f"{who}; memories in {root}; Ctrl-C stops", "green")

    run(engine, root, host=host, port=port, limits=limits, tokens=known, ready=ready)


def _opened(name: str, device: str) -> tuple[Any, Any, Path]:
    """The model, its tokenizer, and a folder for memories: the model's, if it is the user's."""
    from nestlearn.cli.stacked import pretrained, quiet, words_of
    from nestlearn.models.config import TYPE, model_type
    from nestlearn.names import model_folder, weights_folder
    from nestlearn.train.run import resolve_device

    place, folder = resolve_device(device), model_folder(name)
    home = folder if Path(name).is_dir() else Path()
    inner = weights_folder(name)
    if (folder / "stack.json").is_file():
        from nestlearn.hf.folder import load_stack

        quiet()
        return load_stack(folder, place), words_of(folder), home
    if model_type(inner) == TYPE:
        from nestlearn.models.hope import HopeLM
        from nestlearn.train.data import load_tokenizer

        hope = HopeLM.from_pretrained(inner).to(place)
        return hope, load_tokenizer(inner, hope.config.vocab_size), home
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"the run in {folder} is not finished: nestlearn train ... --resume")
    if folder.is_dir() and model_type(folder) is None and not any(folder.glob("*.gguf")):
        raise FileNotFoundError(f"no model in {folder}: it has no stack.json and no config.json")
    base, words = pretrained(name, None)
    if words is None:
        raise ValueError(f"{name} has no tokenizer: put the model's tokenizer files there")
    from nestlearn import DeltaLevel, stack_levels

    levels = [DeltaLevel(chunk, lr=RATE, rule="gd") for chunk in CHUNKS]
    stacked = stack_levels(base.to(place), levels)
    say(f"Levels of {' and '.join(map(str, CHUNKS))} tokens stand on {name}, which stays as it is.")
    return stacked, words, home


def _name(model: str) -> str:
    """What requests call the model: the end of its path, in letters that no URL minds."""
    end = Path(model).resolve().name if Path(model).exists() else model.rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", end).strip("-.") or "model"
