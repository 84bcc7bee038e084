"""What the commands of stacked models share: opening one, its memories, its tokenizer, texts."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestlearn.cli.commands import say

if TYPE_CHECKING:
    from nestlearn.learn import Session


def open_session(
    folder: Path, name: str, device: str = "cpu", *, must_exist: bool = False, **options: Any
) -> Session:
    """The session with the memory `name` of a stacked model's folder; options: Session's."""
    from nestlearn import Session
    from nestlearn.hf.folder import load_stack
    from nestlearn.train.run import resolve_device

    quiet()
    path = place(folder, name)
    if must_exist and not (path / "memory.json").is_file():
        raise FileNotFoundError(f"no memory in {path}: see  nestlearn memory list {folder}")
    model = load_stack(folder, resolve_device(device))
    return Session(model, path, words_of(folder), **options)


def place(folder: Path, name: str) -> Path:
    """Where a memory stands; ValueError for a name that is a path."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is no memory's name: give letters and digits, no path")
    return folder / "memories" / name


def pretrained(name: str, tokenizer: Path | None) -> tuple[Any, Any]:
    """The model and its tokenizer (None where it has none)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nestlearn.hf.llama2c import Llama2cTokenizer, load_llama2c

    quiet()
    if name.endswith(".bin"):
        return load_llama2c(name), Llama2cTokenizer(tokenizer) if tokenizer else None
    if tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer}: only for llama2.c checkpoints (.bin)")
    model = AutoModelForCausalLM.from_pretrained(name)
    try:
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        say(f"No tokenizer with {name} ({type(error).__name__}): texts cannot be read.", "yellow")
        return model, None


def words_of(folder: Path) -> Any:
    """The tokenizer of a stacked model's folder."""
    from transformers import AutoTokenizer

    from nestlearn.hf.llama2c import FILE, Llama2cTokenizer

    base = folder / "base"
    if (base / FILE).is_file():
        return Llama2cTokenizer(base / FILE)
    if not any(base.glob("*token*")):
        raise ValueError(f"{base} has no tokenizer: put the model's tokenizer files there")
    return AutoTokenizer.from_pretrained(base, local_files_only=True)


def encode(tokenizer: Any, paths: list[Path]) -> list[int]:
    """The token ids of text files, one after the other."""
    texts = []
    for path in paths:
        raw = path.read_bytes()
        texts.append((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode())
    return tokenizer.encode("\n".join(texts))


def quiet() -> None:
    """No progress bars of transformers: a tiny model's are longer than its loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()
