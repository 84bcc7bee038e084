"""One checkpoint of a run, whole or not there.

    step-000200/      model.safetensors, optimizer.safetensors, meta.json, and carried.safetensors
                      of a run with stream > 1

A checkpoint is written beside its place, synced to disk, then renamed: a kill at any moment
leaves the old one or the new one, whole. `meta.json` holds a sha256 of every file and of itself.
Of several ranks the first writes, and what it writes is whole tensors and all rows: any number of
processes goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from torch.optim import Optimizer

from nestlearn import __version__
from nestlearn import state as tree
from nestlearn.train.parallel import laid_out, whole
from nestlearn.train.ranks import ALONE, Ranks

_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
_CARRIED_FILE = "carried.safetensors"

Record = dict[str, Any]
Identity = dict[str, Any]  # {"train": TrainConfig, "corpus": description, "model": config or None}


def copied_checkpoint(
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    identity: Identity,
    carried: Any = None,
    ranks: Ranks = ALONE,
) -> Callable[[Path], None]:
    """Copy what a checkpoint is to hold; what is returned writes it to a new folder: rank 0 calls
    that by `atomic_write`, in any thread, while the model goes on.

    carried: a state tree that is part of it (None: there is none), with the rows of each rank.
    """
    tensors = {
        "model.safetensors": _copies(model.state_dict(), ranks),
        "optimizer.safetensors": _copies(_optimizer_tensors(model, optimizer), ranks),
    }
    carried = ranks.concat(carried)
    if carried is not None and ranks.first:  # it is written in place
        carried = tree.tree_map(lambda t: t.detach().to("cpu", copy=True), carried)

    def write(temp: Path) -> None:
        temp.mkdir()
        files = {}
        for name, content in tensors.items():
            raw = to_safetensors(content)
            (temp / name).write_bytes(raw)
            files[name] = _fingerprint(raw)
        if carried is not None:
            tree.save(carried, temp / _CARRIED_FILE)
            files[_CARRIED_FILE] = _fingerprint((temp / _CARRIED_FILE).read_bytes())
        meta = {"step": step, **identity, "versions": versions(), "files": files}
        (temp / "meta.json").write_text(
            json.dumps({**meta, "sha256": _digest(meta)}, indent=2), encoding="utf-8"
        )

    return write


def verify_checkpoint(path: Path) -> Record:
    """Return the checkpoint's meta; ValueError naming what is missing, truncated or altered."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        digest = meta.pop("sha256")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: meta.json is missing or unreadable ({error!r})") from error
    if digest != _digest(meta):
        raise ValueError(f"{path}: meta.json has changed since it was written")
    carried = (_CARRIED_FILE,) if _CARRIED_FILE in meta["files"] else ()
    for name in (*_TENSOR_FILES, *carried):
        expected, file = meta["files"][name], path / name
        if not file.is_file():
            raise ValueError(f"{path}: {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{path}: {name} has {size} bytes instead of {expected['bytes']}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected["sha256"]:
            raise ValueError(f"{path}: {name} has changed since it was written (sha256)")
    return meta


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, carried: Any = None, ranks: Ranks = ALONE
) -> None:
    """Load a verified checkpoint into the model and the optimizer; ValueError if they differ.

    carried: the state tree whose tensors take the saved values of this rank's rows, in place; None
    leaves them unread.
    """
    saved = load_file(path / "model.safetensors")
    current = model.state_dict()
    older = {n for n, t in saved.items() if t.ndim == 0 and n in current and current[n].ndim == 1}
    saved |= {name: saved[name].reshape(1) for name in older}  # these had no axis once
    for name in sorted(saved.keys() | current.keys()):
        shapes = [tuple(ts[name].shape) if name in ts else "missing" for ts in (saved, current)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path}: {name} is {shapes[0]} in the checkpoint and {shapes[1]} in the model; "
                "resume with the model that the run was started with"
            )
    model.load_state_dict({name: laid_out(t, current[name]) for name, t in saved.items()})
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, torch.Tensor]] = {}
    numbers = {name: i for i, name in enumerate(_parameter_names(model, optimizer))}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        name, _, part = key.rpartition("/")
        if name not in numbers:
            raise ValueError(
                f"{path}: the optimizer has a state for {name}, which the model does not train; "
                "resume with the model that the run was started with"
            )
        if name in older and part != "step" and tensor.ndim == 0:
            tensor = tensor.reshape(1)
        state.setdefault(numbers[name], {})[part] = laid_out(tensor, parameters[name])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if carried is not None:
        _load_carried(path / _CARRIED_FILE, carried, ranks)


def _load_carried(path: Path, carried: Any, ranks: Ranks) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint was written without carried memory; start the run "
            "again in another folder"
        )
    saved = tree.load(path, like=carried)
    held, batch = tree.batch_size(saved) or 0, (tree.batch_size(carried) or 0) * ranks.size
    if held != batch:
        raise ValueError(f"{path} holds {held} rows, the run has batch={batch}")
    rows = ranks.rows(batch)
    tree.tree_map(lambda mine, theirs: mine.copy_(theirs[rows]), carried, saved)


def versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    return {
        "nestlearn": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def _copies(tensors: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Whole copies on the first rank's CPU: tied weights share storage, which safetensors refuses.

    Tensors in parts are gathered one at a time.
    """
    copies = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if ranks.first:
            copies[name] = gathered.cpu().clone(memory_format=torch.contiguous_format)
    return copies


def _fingerprint(raw: bytes) -> Record:
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _digest(meta: Record) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The parameters' names in the order of the optimizer's numbering."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    names = _parameter_names(model, optimizer)
    return {
        f"{names[number]}/{part}": torch.as_tensor(value)
        for number, parts in optimizer.state_dict()["state"].items()
        for part, value in parts.items()
    }
