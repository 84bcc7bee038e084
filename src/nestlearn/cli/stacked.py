"""What the commands of stacked models share: opening one, its memories, its tokenizer, texts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestlearn.cli.commands import say
from nestlearn.names import check_stack, model_folder

if TYPE_CHECKING:
    from nestlearn.learn import Session


def open_session(
    folder: Path, name: str, device: str = "cpu", *, must_exist: bool = False, **options: Any
) -> Session:
    """The session with the memory `name` of a stacked model's folder; options: Session's."""
    check_stack(folder)
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
    file = _gguf(name)
    whole = model_folder(name).as_posix()
    source, form = (file.parent, {"gguf_file": file.name}) if file else (whole, {})
    model = AutoModelForCausalLM.from_pretrained(source, **form)
    if file:  # its weights are plain numbers now, and are saved as such
        model = _plain(model)
    try:
        return model, AutoTokenizer.from_pretrained(source, **form)
    except (OSError, ValueError, KeyError) as error:
        say(f"No tokenizer with {name} ({type(error).__name__}): texts cannot be read.", "yellow")
        return model, None


def _gguf(name: str) -> Path | None:
    """The GGUF file that is meant: a file, or the only one of a folder without a model."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds several GGUF files: name one of {names}")
        path = found[0] if found else path
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if find_spec("gguf") is None:
        raise ValueError(f"{path} is a GGUF file; to read it: pip install gguf")
    return path


def _plain(model: Any) -> Any:
    """The same model, as if it had never been quantised."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(config)).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def words_of(folder: Path) -> Any:
    """The tokenizer of a stacked model's folder."""
    from nestlearn.hf.llama2c import tokenizer_of

    base = folder / "base"
    if not any(base.glob("*token*")):
        raise ValueError(f"{base} has no tokenizer: put the model's tokenizer files there")
    return tokenizer_of(base)


def encode(tokenizer: Any, paths: list[Path]) -> list[int]:
    """Token ids of text files and folders, in order; an error names the file that is no text."""
    from nestlearn.learn.conversation import encode as ids_of
    from nestlearn.train.texts import read_texts

    texts: list[bytes] = []
    for path in paths:  # each by itself: a file that is named twice is read twice
        read, skipped, no_text = read_texts([path])
        texts += read
        if skipped:
            why = "; ".join(no_text[:3]) or "hidden"
            say(f"{skipped} files in {path} were left out: {why}.", "yellow")
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths))}: give a text file")
    return ids_of(tokenizer, b"\n".join(texts).decode("utf-8"))


def quiet() -> None:
    """No progress bars of transformers: a tiny model's are longer than its loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()
