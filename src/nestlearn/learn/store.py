"""Memories on disk: a folder that is always the old memory or the new one, never a broken one.

    name/memory.json              what it is: base model, stack, position, sizes, history, sha256
    name/tensors-<hash>.safetensors   the tensors, under a name that their content gives

Tensors are written first, under their new name; then memory.json, which names them, is replaced
in one step; then the old tensors go. A lock on the folder keeps two processes apart. Nothing of a
file is used before its checksum and every shape, type and number has been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from nestlearn import state as trees
from nestlearn.disk import atomic_write, discard, disk_errors
from nestlearn.hf.folder import fingerprint, from_dict, to_dict
from nestlearn.hf.lending import Factors, kernel
from nestlearn.hf.plan import StackMemory
from nestlearn.hf.reading import cache_shapes
from nestlearn.hf.stack import StackedModel
from nestlearn.hf.writes import Fast, LevelState

FORMAT, VERSION = "nestlearn-memory", 1
_TENSORS = re.compile(r"tensors-[0-9a-f]{32}\.safetensors")
_STALE = re.compile(r"\.(memory\.json|tensors-[0-9a-f]{32}\.safetensors)\.[0-9a-f]{8}\.tmp")
_OWN = re.compile(  # beside those two: studies, and a server's points to go back to
    r"memory\.json|points|study-[0-9a-f]{16}\.json|\.study-[0-9a-f]{16}\.json\.[0-9a-f]{8}\.tmp"
)
_KEYS: dict[str, type] = {
    "base": str, "stack": dict, "position": int, "writes": list, "bytes": dict, "tensors": dict,
    "history": list,
}  # fmt: skip
_PARTS = ("fast", "total", "velocity", "start")

Entry = dict[str, Any]


class Stored(NamedTuple):
    """A memory as it was read: the state, what it learned from, and its file's digest."""

    memory: StackMemory
    history: list[Entry]
    digest: str


def save_memory(
    folder: str | Path, model: StackedModel, memory: StackMemory, history: list[Entry],
    *, expected: str | None = None,
) -> str:  # fmt: skip
    """Write one stream's memory; the digest of what is there now.

    expected: the digest of what the caller read or wrote last, None if there was nothing.
    ValueError if something else stands there by now; OSError when the disk refuses: then what
    stood there is untouched.
    """
    folder = Path(folder)
    if len(memory.context) != 1:
        raise ValueError(f"a memory of {len(memory.context)} streams: save each by itself")
    tensors = {path: _copy(t) for path, t in trees.leaves(memory) if isinstance(t, Tensor)}
    raw = to_safetensors(tensors)
    sha = hashlib.sha256(raw).hexdigest()
    name = f"tensors-{sha[:32]}.safetensors"
    body = {
        "format": FORMAT,
        "version": VERSION,
        "base": fingerprint(model),
        "stack": to_dict(model.config),
        "position": memory.position,
        "writes": [int(level.writes) for level in memory.levels],
        "bytes": sizes(memory),
        "tensors": {"file": name, "bytes": len(raw), "sha256": sha},
        "history": history,
    }
    content = _to_json(body)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, shared=False):
        if _digest_on_disk(folder) != expected:
            raise ValueError(
                f"{folder} is there already: it holds a memory that this session has not read, or "
                "that was changed since; give another name, or load() it again"
            )
        if not (folder / name).is_file() or (folder / name).read_bytes() != raw:
            atomic_write(folder / name, lambda temp: temp.write_bytes(raw))
        atomic_write(folder / "memory.json", lambda temp: temp.write_bytes(content))
        for path in folder.iterdir():
            old = _TENSORS.fullmatch(path.name) and path.name != name
            if old or _STALE.fullmatch(path.name):
                path.unlink()
    return hashlib.sha256(content).hexdigest()


def check_place(folder: str | Path) -> None:
    """OSError where no memory can be written: to be asked before a long text is learned."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a memory's folder: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: {place} is read-only")


def check_free(folder: str | Path) -> None:
    """ValueError where a memory is: to be asked before one is copied there."""
    if (Path(folder) / "memory.json").exists():
        raise ValueError(
            f"{folder} is there already, a memory: give another name, or delete that one first "
            "(nestlearn memory delete)"
        )


def check_memory(folder: str | Path) -> int:
    """The bytes on disk of a memory that may be deleted, a damaged one too: nothing is deleted.

    FileNotFoundError where there is none; ValueError for a link, and for a folder with files in it
    that are none of a memory's.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, no memory: remove the link itself")
    if not (folder / "memory.json").is_file():
        raise FileNotFoundError(f"no memory in {folder}")
    for name in sorted(path.name for path in folder.iterdir()):
        if not any(kind.fullmatch(name) for kind in (_OWN, _TENSORS, _STALE)):
            raise ValueError(f"{folder} holds {name!r}, no part of a memory: move it away first")
    found = (path.lstat() for path in folder.rglob("*"))
    files = {(f.st_dev, f.st_ino): f.st_size for f in found if not stat.S_ISDIR(f.st_mode)}
    return sum(files.values())  # points are links to the same files


def delete_memory(folder: str | Path) -> int:
    """Remove a memory for good, its studies and points with it; the bytes that it took.

    Errors as in `check_memory`; OSError when the disk refuses: then it is as it was.
    """
    folder = Path(folder)
    with _locked(folder, shared=False):
        freed = check_memory(folder)
        with disk_errors(folder):
            discard(folder)
    return freed


def load_memory(folder: str | Path, model: StackedModel) -> Stored:
    """Read a memory of this model; nothing is changed, and nothing in it is executed.

    FileNotFoundError where there is none; ValueError for a damaged file, another format version,
    another base model, or another stack.
    """
    folder = Path(folder)
    with _locked(folder, shared=True):
        body, digest = _read_json(folder)
        if body["base"] != fingerprint(model):
            raise ValueError(
                f"{folder} is a memory of another base model (or of other start values): its "
                f"fingerprint is {str(body['base'])[:12]}, this model's {fingerprint(model)[:12]}"
            )
        if _stack(body) != to_dict(model.config):
            raise ValueError(
                f"{folder} was learned with another stack: {_differences(body, model)}; stack "
                "the model as it was"
            )
        tensors = _read_tensors(folder, body["tensors"])
    try:
        memory = _build(tensors, body["position"], model)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _damaged(folder, str(error)) from error
    return Stored(memory, body["history"], digest)


def describe(folder: str | Path) -> Entry:
    """What memory.json says; errors as in `load_memory`. The tensors are not read."""
    folder = Path(folder)
    with _locked(folder, shared=True):
        return _read_json(folder)[0]


def sizes(memory: StackMemory) -> dict[str, int]:
    """Bytes of every level (its deltas, momentum, gathered gradients) and of the context."""
    each = {f"level {i}": trees.nbytes(level) for i, level in enumerate(memory.levels)}
    return {**each, "context": trees.nbytes(memory) - sum(each.values())}


# -------------------------------------------------------------------------------- the files


def _to_json(body: Entry) -> bytes:
    text = json.dumps(body, sort_keys=True, indent=1)
    sha = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{sha}",\n"memory": {text}}}\n'.encode()


def _read_json(folder: Path) -> tuple[Entry, str]:
    path = folder / "memory.json"
    if not path.is_file():
        raise FileNotFoundError(f"no memory in {folder}")
    raw = path.read_bytes()
    try:
        body = json.loads(raw)["memory"]
        same = _to_json(body) == raw  # to the byte: so the sha256 is right, too
        found = (body["format"], body["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"memory.json cannot be read ({error!r})") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{folder} is {found}: this nestlearn reads {(FORMAT, VERSION)}")
    if not same or any(not isinstance(body.get(key), kind) for key, kind in _KEYS.items()):
        raise _damaged(folder, "memory.json has changed since it was written")
    return body, hashlib.sha256(raw).hexdigest()


def _read_tensors(folder: Path, entry: Entry) -> dict[str, Tensor]:
    name = entry.get("file")
    if not isinstance(name, str) or not _TENSORS.fullmatch(name):
        raise _damaged(folder, f"memory.json names the file {name!r}")
    if not (folder / name).is_file():
        raise _damaged(folder, f"{name} is missing")
    raw = (folder / name).read_bytes()
    if len(raw) != entry.get("bytes"):
        raise _damaged(folder, f"{name} has {len(raw)} bytes instead of {entry.get('bytes')}")
    if hashlib.sha256(raw).hexdigest() != entry.get("sha256"):
        raise _damaged(folder, f"{name} has changed since it was written (sha256)")
    try:
        return from_safetensors(raw)
    except Exception as error:  # safetensors raises its own kind
        raise _damaged(folder, f"{name} holds no tensors ({error})") from error


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder} is damaged: {what}; restore it from a copy")


def _digest_on_disk(folder: Path) -> str | None:
    path = folder / "memory.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@contextmanager
def _locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder, where the system can: a kill gives it back."""
    try:
        import fcntl
    except ImportError:
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _copy(tensor: Tensor) -> Tensor:
    # Deltas that share storage with a start value: safetensors refuses them.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _stack(body: Entry) -> Any:
    """The stack's options as they are saved now; unchanged where they are of none."""
    try:
        return to_dict(from_dict(body["stack"]))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return body["stack"]


def _differences(body: Entry, model: StackedModel) -> str:
    old, new = _stack(body), to_dict(model.config)
    keys = [key for key in new if not isinstance(old, dict) or old.get(key) != new[key]]
    return ", ".join(keys) or "other options"


# -------------------------------------------------------------- from checked tensors to a memory


def _build(tensors: dict[str, Tensor], position: Any, model: StackedModel) -> StackMemory:
    """The state tree of these tensors; ValueError for the first that does not fit the model."""
    if type(position) is not int or position < 0:
        raise ValueError(f"position={position!r}")
    fresh, rest = model.init_memory(1), dict(tensors)
    like = fresh.levels[0].seen

    def take(path: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        tensor = rest.pop(path)
        fits = len(tensor.shape) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, tensor.shape)
        )
        # Of a stack in another precision: the same memory, as this one computes it.
        if tensor.is_floating_point() and dtype.is_floating_point:
            tensor = tensor.to(dtype)
        if not fits or tensor.dtype != dtype:
            raise ValueError(f"{path} is {tensor.dtype} {list(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} has numbers that are not finite")
        return tensor.to(like.device)

    def fast(path: str, owned: list[int]) -> Fast:
        if f"{path}.0.left" not in rest:
            return ()
        rank, found = model.config.rank, []
        for n, j in enumerate(owned):
            out, width = kernel(model.layers[j]).shape
            left = take(f"{path}.{n}.left", (1, out, width if rank is None else rank), like.dtype)
            right = (
                None if rank is None else take(f"{path}.{n}.right", (1, rank, width), like.dtype)
            )
            found.append(Factors(left, right))
        return tuple(found)

    levels = []
    for i, owned in enumerate(model.owned):
        parts = {part: fast(f"levels.{i}.{part}", owned) for part in _PARTS}
        seen = take(f"levels.{i}.seen", (1,), like.dtype)
        writes = take(f"levels.{i}.writes", (1,), torch.long)
        levels.append(LevelState(**parts, seen=seen, writes=writes))

    context = _tokens(take("context", (1, None), torch.long), model)
    shapes, fed = cache_shapes(model), max(context.shape[1] - 1, 0)
    cache = tuple(
        (
            take(f"cache.{n}.0", (1, heads, fed, k), kind),
            take(f"cache.{n}.1", (1, heads, fed, v), kind),
        )
        for n, (heads, k, v, kind) in enumerate(shapes if "cache.0.0" in rest else ())
    )
    pending = [_tokens(take("pending.0", (1, None), torch.long), model)]
    waiting = pending[0].shape[1]
    pending.append(take("pending.1", (1, waiting), like.dtype))
    if "pending.2" in rest:
        pending.append(take("pending.2", (1, waiting, None, None), like.dtype))
    if rest:
        raise ValueError(f"it holds {sorted(rest)[0]}, which has no place in a memory")
    _check_places(position, context.shape[1], waiting, bool(cache), model)
    return StackMemory(position, context, cache, tuple(pending), tuple(levels))


def _tokens(tokens: Tensor, model: StackedModel) -> Tensor:
    size = model.base.config.get_text_config().vocab_size
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"it holds tokens that the model's vocabulary of {size} lacks")
    return tokens


def _check_places(position: int, context: int, waiting: int, cached: bool, model: StackedModel):
    """ValueError if position, context and the waiting tokens cannot belong together."""
    cut = position - waiting
    end = model.config.cut_after(cut, model.window - model.again)
    if not (0 <= cut <= position < end and context <= min(cut, model.window + 1)):
        raise ValueError(f"{context} and {waiting} tokens do not belong to position {position}")
    if cached != (context > 1) or (cut > 0) != (context > 0):
        raise ValueError("its context is incomplete")
