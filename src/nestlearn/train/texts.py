"""Text files and folders as bytes: what is left out is counted, and an error names the file."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path


def read_texts(paths: Sequence[Path]) -> tuple[list[bytes], int, list[str]]:
    """The non-empty texts of files and folders in a fixed order, how many files were skipped, and
    why, of those that are not hidden. ValueError for a named file that is no text.
    """
    texts: list[bytes] = []
    no_text: list[str] = []
    hidden = 0
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no text at {path}: there is no such file or folder")
        for file in _files_of(path) if path.is_dir() else [path]:
            if file.resolve() in seen:
                continue  # overlapping paths must not put one text into train and val
            seen.add(file.resolve())
            if path.is_dir() and file.name.startswith("."):
                hidden += 1
                continue
            try:
                if path.is_dir() and not file.is_file():  # reading a pipe there would not end
                    raise _NoText(f"{file} is a link to nothing, or no file; leave it out")
                text = _read(file)
            except _NoText as error:
                if not path.is_dir():
                    raise
                no_text.append(str(error).partition(";")[0])
                continue
            if text:
                texts.append(text)
    return texts, hidden + len(no_text), no_text


def _files_of(folder: Path) -> list[Path]:
    """All that is in a folder and in the folders that it links to, each read once."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen = {folder.resolve()}
    for parent, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            place = Path(parent, name).resolve()
            if place in seen:  # a loop, or a second way there
                subfolders.remove(name)
            seen.add(place)
        found += [Path(parent, name) for name in names]
    return sorted(found)


class _NoText(ValueError):
    """A file that holds no UTF-8 text: which, why, and what to do."""


def _read(path: Path) -> bytes:
    """The file's text as bytes, without a byte order mark; `_NoText` where it is none."""
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        content.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _NoText(f"{path} is a damaged .gz file ({error}); get it again") from error
    except UnicodeDecodeError as error:
        raise _NoText(
            f"{path} is not UTF-8 text; convert it (iconv -f ORIGINAL -t utf-8) or leave it out: "
            f"byte {error.start} of {len(content)} begins no character"
        ) from error
    if b"\0" in content:  # legal UTF-8, but the mark of a binary file
        raise _NoText(f"{path} is not UTF-8 text; leave it out: it holds zero bytes")
    return content.removeprefix(codecs.BOM_UTF8)
