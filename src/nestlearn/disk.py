"""Files that are whole or absent: atomic writes, and disk errors that name the file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WINDOWS = os.name == "nt"
_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
_FORBIDDEN = {*'<>:"|?*', *map(chr, range(32))}
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10))}


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Re-raise an OSError of the block (or safetensors' own) naming `path` and the remedy."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise _disk_error(int(code[1]), error, Path(path)) from error
    except OSError as error:
        raise _disk_error(error.errno or errno.EIO, error, Path(path)) from error


def _disk_error(code: int, error: Exception, path: Path) -> OSError:
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some space or choose another disk; what stood there before is untouched"
    elif code == errno.ENOENT:
        remedy = f"does the folder {path.parent} exist?"
    else:
        remedy = "what stood there before is untouched"
    return OSError(code, f"cannot write {path}: {error}; {remedy}")


def atomic_write(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Put what `write(temporary_path)` makes, a file or a folder, at `path`: whole or not at all.

    The temporary sibling is synced to disk, then renamed over `path` (a folder only where there
    is none yet). On any failure `path` is as it was and the sibling is removed; OSErrors are
    raised again naming `path`, and for a full disk the remedy.
    """
    path = Path(path)
    check_name(path)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with disk_errors(path):
            write(temp)
            for part in (*temp.rglob("*"), temp):
                sync(part)
            os.replace(temp, path)
            sync(path.parent)
    finally:
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        else:
            temp.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder and what is in it, in one step for whoever looks; no link is followed."""
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.gone")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, has reached the disk.

    Windows opens no folders, and syncs only what is open for writing; and some file systems of a
    network sync no folders: there the names go to the disk when the system sees fit.
    """
    folder, posix = path.is_dir(), hasattr(os, "O_DIRECTORY")
    if folder and not posix:
        return
    handle = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in _NO_FOLDERS):
            raise
    finally:
        os.close(handle)


def check_name(path: Path) -> None:
    """ValueError, on Windows, for a name that it does not take, or takes for something else."""
    if not WINDOWS:
        return
    for part in path.parts[bool(path.anchor) :]:
        reserved = part.split(".")[0].rstrip().upper() in _DEVICES
        bad = reserved or set(part) & _FORBIDDEN or part.endswith((".", " "))
        if bad and part not in (".", ".."):
            raise ValueError(
                f'{part!r} is no file name on Windows: leave out < > : " | ? *, a dot or space at '
                "the end, and names of devices such as con, nul, com1"
            )
