"""What a model's name stands for, said without loading a library or asking the network."""

from __future__ import annotations

import re
from pathlib import Path

SHIPPED = "nestlearn/tiny"  # the model that is in the package
SHIPPED_WINDOW = 1024  # bytes of its windows in training
_OF_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def model_folder(name: str | Path) -> Path:
    """The folder of that name, or the package's own for "nestlearn/tiny".

    FileNotFoundError for another "nestlearn/..." that is no folder: nobody else has such a model.
    """
    folder = Path(name)
    if folder.exists() or not folder.as_posix().startswith("nestlearn/"):
        return folder
    if folder.as_posix() != SHIPPED:
        raise FileNotFoundError(
            f"no model {folder.as_posix()!r}: the package has {SHIPPED!r}; or give a folder"
        )
    return Path(__file__).parent / "models" / "weights" / "tiny"


def weights_folder(name: str | Path) -> Path:
    """`model_folder`, or model/ in it where it is the folder of a run."""
    folder = model_folder(name)
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def check_source(name: str) -> str:
    """The name; FileNotFoundError for what is not here and can be no name of Hugging Face's hub."""
    if not model_folder(name).exists() and not _OF_HUB.fullmatch(name):
        raise FileNotFoundError(f"no file or folder {name}, and no name of the hub: give one")
    return name


def check_stack(folder: Path) -> Path:
    """The folder of a stacked model; FileNotFoundError where there is none."""
    if not (folder / "stack.json").is_file():
        other = (folder / "config.json").is_file()
        made = f"{folder} --out stacked" if other else f"MODEL --out {folder}"
        what = ", but a model that is none" if other else ""
        raise FileNotFoundError(
            f"no stacked model in {folder}{what}; make one with: nestlearn stack {made}"
        )
    return folder
