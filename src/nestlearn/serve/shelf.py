"""A user's memories on disk.

    NAME/                  the memory, as `Session` or `state.save` writes it
    NAME/points/000001/    as it was before a change: links to the same files, so they cost nothing

What is here is whole after any kill: memories are replaced in one step, points and new memories
are made beside and renamed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestlearn.disk import atomic_write, check_name, discard

from .engines import Engine, Entry, Kept
from .limits import Limits
from .turns import Turns
from .wire import Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_POINT = re.compile(r"\d{6}")
_LITTER = re.compile(r"\.[\w-]+\.[0-9a-f]{8}\.(tmp|gone)")
CACHED = 16  # memories that are kept at hand


def checked(name: Any) -> str:
    """The name; Refused for what is none: nothing that could be a path passes."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(
            400, f"{str(name)[:80]!r} is no memory's name: give 1 to 64 letters, digits, - or _, "
            "a letter or digit first", "invalid_name",
        )  # fmt: skip
    try:
        check_name(Path(name))
    except ValueError as error:
        raise Refused(400, str(error), "invalid_name") from error
    return name


class Shelf:
    """The memories of one user, in that user's own folder.

    Names that are not there are refused with 404; a memory that is being changed with 409. The
    model is used in `turns`, because to read a memory is to check it against the model.
    """

    def __init__(self, engine: Engine, root: Path, limits: Limits, turns: Turns):
        self.engine, self.root, self.limits, self.turns = engine, root, limits, turns
        self._kept: dict[str, tuple[Any, Kept]] = {}
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    # --------------------------------------------------------------------------------- looking

    def names(self) -> list[str]:
        """Those that are there, sorted."""
        if not self.root.is_dir():
            return []
        there = (path.name for path in self.root.iterdir() if NAME.fullmatch(path.name))
        return sorted(name for name in there if (self.root / name / self.engine.marker).is_file())

    def folder(self, name: Any) -> Path:
        """Where a memory is; Refused, 404, where there is none."""
        folder = self.root / checked(name)
        if not (folder / self.engine.marker).is_file():
            raise Refused(404, f"no memory {name!r}", "memory_not_found", param="memory")
        return folder

    def open(self, name: str) -> Kept:
        """The memory as it was saved last; ValueError for a damaged one."""
        folder = self.folder(name)
        stamp = _stamp(folder / self.engine.marker)
        with self._lock:
            found = self._kept.get(name)
        if found is not None and found[0] == stamp:
            return found[1]
        with self.turns, _readable(name, folder):
            kept = self.engine.load(folder)
        self._remember(name, stamp, kept)
        return kept

    def about(self, name: str) -> Entry:
        """name, position, bytes, history, and the points that it can be rolled back to."""
        folder = self.folder(name)
        with _readable(name, folder):
            told = self.engine.describe(folder)
        points = []
        for path in self._points(folder):
            with contextlib.suppress(ValueError, OSError):  # one that is damaged is no point
                was = self.engine.describe(path)
                last = was["history"][-1] if was["history"] else {}
                points.append(
                    {"point": int(path.name), "position": was["position"]}
                    | {key: last.get(key) for key in ("what", "time", "source")}
                )
        return {
            "id": name, "object": "memory", "position": told["position"],
            "bytes": sum(told["bytes"].values()), "history": told["history"], "points": points,
            "busy": name in self._busy,
        }  # fmt: skip

    # -------------------------------------------------------------------------------- changing

    @contextmanager
    def changing(self, *names: str) -> Iterator[None]:
        """Nobody else changes these meanwhile; Refused, 409, where somebody does."""
        with self._lock:
            if taken := self._busy & set(names):
                raise Refused(409, f"memory {min(taken)!r} is being changed", "memory_busy")
            self._busy |= set(names)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= set(names)

    def save(self, name: str, kept: Kept) -> Kept:
        """Write it; what it was before becomes a point by `keep` alone."""
        folder = self.root / name
        kept = self.engine.save(folder, kept)
        self._remember(name, _stamp(folder / self.engine.marker), kept)
        return kept

    def keep(self, name: str) -> None:
        """Make a point of what stands there, unless the newest one is the same."""
        folder = self.root / name
        points = self._points(folder)
        marker = self.engine.marker
        if points and (points[-1] / marker).samefile(folder / marker):
            return
        number = int(points[-1].name) + 1 if points else 1
        (folder / "points").mkdir(exist_ok=True)
        atomic_write(folder / "points" / f"{number:06d}", lambda temp: _link(folder, temp))
        for path in self._points(folder)[: -self.limits.points]:
            discard(path)

    def create(self, name: str) -> None:
        """A new memory that has read nothing."""
        with self.changing(checked(name)):
            with self.turns:
                fresh = self.engine.fresh()
            self._new(name, Kept(fresh, [entry_of("create")]))

    def fork(self, name: str, new: Any) -> None:
        """A copy under a new name, and ways of their own from there."""
        kept = self.open(name)
        history = [*kept.history, entry_of("fork", source=name)]
        with self.changing(checked(new)):
            self._new(new, Kept(kept.memory, history))

    def reset(self, name: str, level: int | None) -> None:
        """Forget what a level has learned, or everything; that can be rolled back."""
        with self.changing(name):
            kept = self.open(name)
            with self.turns:
                memory = self.engine.reset(kept.memory, level)
            self.keep(name)
            history = [*kept.history, entry_of("reset", level=level)]
            self.save(name, kept._replace(memory=memory, history=history))

    def rollback(self, name: str, point: int) -> None:
        """As it was at a point, history included; what it was until now becomes a point."""
        with self.changing(name):
            folder = self.folder(name)
            there = folder / "points" / f"{point:06d}"
            if there not in self._points(folder):
                raise Refused(404, f"memory {name!r} has no point {point}", "point_not_found")
            with self.turns, _readable(name, folder):
                was = self.engine.load(there)
            now = self.open(name)
            self.keep(name)
            history = [*was.history, entry_of("rollback", to=point)]
            self.save(name, Kept(was.memory, history, now.digest))

    def delete(self, name: str) -> None:
        """For good, with its points."""
        with self.changing(name):
            folder = self.folder(name)
            with self._lock:
                self._kept.pop(name, None)
            discard(folder)

    def pack(self, name: str) -> bytes:
        """One safetensors file of it."""
        return self.engine.pack(self.folder(name))

    def unpack(self, name: str, file: Path, *, replace: bool) -> None:
        """A memory of such a file; with `replace` in place of one, which becomes a point.

        Refused for a file that is none, or another model's: nothing was changed then.
        """
        with self.changing(checked(name)):
            found = self._unpacked(name, file)
            kept = Kept(found.memory, [*found.history, entry_of("upload")])
            if name in self.names() and replace:
                now = self.open(name)
                self.keep(name)
                self.save(name, kept._replace(digest=now.digest))
            else:
                self._new(name, kept)

    # ---------------------------------------------------------------------------------- inside

    def _unpacked(self, name: str, file: Path) -> Kept:
        self.root.mkdir(parents=True, exist_ok=True)
        beside = self.root / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with self.turns:
                self.engine.unpack(file, beside)
                return self.engine.load(beside)
        except (ValueError, KeyError, TypeError) as error:
            text = str(error).replace(str(beside), "the file").replace(str(file), "the file")
            raise Refused(400, f"not a memory of this model: {text}", "invalid_file") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _new(self, name: str, kept: Kept) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        if len(self.names()) >= self.limits.memories:
            raise Refused(
                409, f"you have {self.limits.memories} memories, the most that one user may "
                "have: delete one", "too_many_memories",
            )  # fmt: skip
        if (self.root / name).exists():
            raise Refused(409, f"there is a memory {name!r} already", "memory_exists")
        atomic_write(self.root / name, lambda temp: self.engine.save(temp, kept))

    def _sweep(self) -> None:
        """Remove what a kill left behind an hour ago."""
        for path in self.root.iterdir():
            if _LITTER.fullmatch(path.name) and path.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(path, ignore_errors=True)

    def _remember(self, name: str, stamp: Any, kept: Kept) -> None:
        with self._lock:
            self._kept.pop(name, None)
            self._kept[name] = (stamp, kept)
            while len(self._kept) > CACHED:
                self._kept.pop(next(iter(self._kept)))

    def _points(self, folder: Path) -> list[Path]:
        there = folder / "points"
        found = there.iterdir() if there.is_dir() else ()
        return sorted(path for path in found if _POINT.fullmatch(path.name))


@contextmanager
def _readable(name: str, folder: Path) -> Iterator[None]:
    """Refused, 409, for a damaged memory, or one of another model; without the server's paths."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error).replace(str(folder), f"memory {name!r}")
        raise Refused(409, text, "memory_unreadable", param="memory") from error


def entry_of(what: str, **facts: Any) -> Entry:
    """A line of a memory's history."""
    return {"what": what, "time": round(time.time()), **facts}


def _stamp(path: Path) -> tuple[int, int, int]:
    """Another whenever the file is replaced."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise Refused(404, f"no memory {path.parent.name!r}", "memory_not_found") from error
    return found.st_ino, found.st_mtime_ns, found.st_size


def _link(folder: Path, temp: Path) -> None:
    temp.mkdir()
    for path in folder.iterdir():
        kept = path.suffix in (".json", ".safetensors") and path.is_file()
        if kept and not path.name.startswith((".", "study-")):
            try:
                os.link(path, temp / path.name)
            except OSError:  # a file system without links
                shutil.copyfile(path, temp / path.name)
