"""A run's folder: whole checkpoints, the log, and the refusals that protect them.

    out/config.json                   what was run: TrainConfig, corpus, model, versions
    out/log.jsonl                     one JSON record per step
    out/checkpoints/step-000200/      model.safetensors, optimizer.safetensors, meta.json, and
                                      carried.safetensors of a run with stream > 1

A checkpoint is written beside its place, synced to disk, then renamed: a kill at any moment
leaves the old one or the new one, whole. `meta.json` holds a sha256 of every file and of itself.
Of several ranks the first writes, and what it writes is whole tensors and all rows: any number of
processes goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from nestlearn import __version__
from nestlearn import state as tree
from nestlearn.disk import atomic_write, disk_errors, sync
from nestlearn.train.parallel import laid_out, whole
from nestlearn.train.ranks import ALONE, Ranks

KEEP = 2
# A run may go on with other values of these: they move the schedule, the reports or the place of
# the work, not what a step means. Only with all of them unchanged it goes on bit for bit.
MAY_CHANGE = frozenset(
    {
        *("steps", "warmup", "eval_every", "eval_windows", "checkpoint_every", "device"),
        *("accumulate", "parallel", "profile"),
    }
)
_MAY_MOVE = frozenset({"name", "files", "skipped_files"})  # the corpus' sha256 is what counts
_ADDED = {"stream": 1}  # settings that older runs lack, with the value that they ran with
_RUN_FILES = ("config.json", "log.jsonl", "checkpoints", "model")
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
_CARRIED_FILE = "carried.safetensors"
_STALE = re.compile(r"\.(config\.json|log\.jsonl|loss\.png|model|step-\d+)\.[0-9a-f]{8}\.tmp")
_log = logging.getLogger("nestlearn")

Record = dict[str, Any]
Identity = dict[str, Any]  # {"train": TrainConfig, "corpus": description, "model": config or None}


# -------------------------------------------------------------------------- one checkpoint


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Identity,
    carried: Any = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `folder/step-<step>` whole or not at all and return its path; OSErrors name it.

    carried: a state tree that is part of it (None: there is none), with the rows of each rank.
    """
    tensors = {
        "model.safetensors": _copies(model.state_dict(), ranks),
        "optimizer.safetensors": _copies(_optimizer_tensors(model, optimizer), ranks),
    }
    carried = ranks.concat(carried)
    path = folder / f"step-{step:06d}"

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

    def publish() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, write)
        return path

    return ranks.first_says(publish)


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
        expected = meta["files"][name]
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path}: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{path}: {name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected["sha256"]:
            raise ValueError(f"{path}: {name} has changed since it was written (sha256)")
    return meta


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: Any = None,
    ranks: Ranks = ALONE,
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
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
        like = parameters[numbers[name]]
        state.setdefault(numbers[name], {})[part] = laid_out(tensor, like)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
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


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order of the optimizer's numbering."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    names = _parameter_names(model, optimizer)
    return {
        f"{names[number]}/{part}": torch.as_tensor(value)
        for number, parts in optimizer.state_dict()["state"].items()
        for part, value in parts.items()
    }


# ---------------------------------------------------------------------------- the run's folder


class RunFolder:
    """Where one run writes: `start` or `resume` it, then `append` records and `save` steps."""

    def __init__(self, out: Path, identity: Identity, ranks: Ranks = ALONE) -> None:
        self.out, self.ranks = out, ranks
        self.identity: Identity = json.loads(json.dumps(identity))  # tuples as JSON has them
        self.checkpoints = out / "checkpoints"
        self.saved_step: int | None = None

    def start(self) -> None:
        """Claim the folder; ValueError if it already holds a run."""
        self.ranks.first_says(self._claim)

    def _claim(self) -> None:
        present = [name for name in _RUN_FILES if (self.out / name).exists()]
        if present:
            raise ValueError(
                f"{self.out} already holds a run ({', '.join(present)}); go on with it by "
                "resume=True (--resume), or choose another folder"
            )
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._write_config()

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, carried: Any = None
    ) -> tuple[int, list[Record]]:
        """Load the newest whole checkpoint; return its step and the log up to it.

        carried: a state tree that is loaded in place with it (None: the run carries none).
        A damaged checkpoint is reported, moved aside as `damaged-...` and the one before is used;
        a run that was stopped before its first checkpoint begins again at step 0. ValueError
        where nothing is usable, or where the run was started with another configuration.
        """
        path, step, damaged = self.ranks.first_says(lambda: self._usable(model))
        if path is not None:
            load_checkpoint(path, model, optimizer, carried, self.ranks)
            self.saved_step = step
        return step, self.ranks.first_says(lambda: self._tidy(step, damaged))

    def _usable(self, model: nn.Module) -> tuple[Path | None, int, list[Path]]:
        """The checkpoint to go on from (None: there is none yet), its step, the damaged ones."""
        path, meta, damaged = self.newest()
        started = _as_now(meta if path else self._read_config(), model)
        _check_identity(self.out, started, self.identity)
        step, most = int(meta.get("step", 0)), self.identity["train"]["steps"]
        if step > most:
            raise ValueError(
                f"{path} stands at step {step}, past steps={most}; raise steps to go on"
            )
        return path, step, damaged

    def _tidy(self, step: int, damaged: list[Path]) -> list[Record]:
        for folder in damaged:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        self._clean()
        self._write_config()
        return self._truncate_log(step)

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict in the newest checkpoint."""
        return load_file(self._present()[0] / "model.safetensors")

    def append(self, record: Record) -> None:
        """Add one record to log.jsonl."""
        if not self.ranks.first:
            return
        with (
            disk_errors(self.out / "log.jsonl"),
            (self.out / "log.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, carried: Any = None
    ) -> Path:
        """Write the checkpoint of this step, unless it is there, and keep the newest two."""
        path = self.checkpoints / f"step-{step:06d}"
        if self.saved_step != step:
            if self.ranks.first:
                with disk_errors(self.out / "log.jsonl"):  # the log reaches the disk first
                    sync(self.out / "log.jsonl")
            path = save_checkpoint(
                self.checkpoints, step, model, optimizer, self.identity, carried, self.ranks
            )
            self.saved_step = step
            for old in self._present()[KEEP:] if self.ranks.first else ():
                shutil.rmtree(old)
        return path

    def _present(self) -> list[Path]:
        """The checkpoints, newest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.iterdir() if re.fullmatch(r"step-\d{6,}", p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)

    def newest(self) -> tuple[Path | None, Record, list[Path]]:
        """The newest whole checkpoint (None where there are none), its meta, the damaged ones."""
        damaged: list[Path] = []
        for path in self._present():
            try:
                meta = verify_checkpoint(path)
            except ValueError as error:
                _log.warning("damaged checkpoint, trying the one before: %s", error)
                damaged.append(path)
            else:
                return path, meta, damaged
        if damaged:
            raise ValueError(
                f"no usable checkpoint in {self.checkpoints}: "
                f"{', '.join(p.name for p in damaged)} damaged; restore one from a copy, or start "
                "the run again in another folder"
            )
        return None, {}, []

    def _clean(self) -> None:
        """Remove what an earlier process was killed while writing."""
        for folder in (self.out, self.checkpoints):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _STALE.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_config(self) -> Identity:
        path = self.out / "config.json"
        if not path.is_file():
            raise ValueError(f"{self.out} holds no run to resume; start it without resume")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}) and there is no checkpoint yet; start the run again "
                "in another folder"
            ) from error

    def _write_config(self) -> None:
        text = json.dumps({**self.identity, "versions": versions()}, indent=2) + "\n"
        atomic_write(self.out / "config.json", lambda temp: temp.write_text(text, encoding="utf-8"))

    def _truncate_log(self, step: int) -> list[Record]:
        path = self.out / "log.jsonl"
        records = read_log(path) if path.is_file() else []
        records = [record for record in records if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in records)
        atomic_write(path, lambda temp: temp.write_text(text, encoding="utf-8"))
        return records


def read_log(path: str | Path) -> list[Record]:
    """Return the records of a log.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _as_now(started: Identity, model: nn.Module) -> Identity:
    """The same with the model's configuration as this version writes it: its form has changed."""
    read = getattr(getattr(model, "config", None), "from_dict", None)
    if read is None or not started.get("model"):
        return started
    return {**started, "model": json.loads(json.dumps(read(started["model"]).to_dict()))}


def _check_identity(out: Path, started: Identity, now: Identity) -> None:
    differences = []
    for part in ("train", "corpus", "model"):
        old, new = started.get(part) or {}, now.get(part) or {}
        if part == "train":
            old, new = _ADDED | old, _ADDED | new
        free = {"train": MAY_CHANGE, "corpus": _MAY_MOVE, "model": frozenset[str]()}[part]
        differences += [
            f"{part}.{key} was {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted((old.keys() | new.keys()) - free)
            if old.get(key) != new.get(key)
        ]
    if differences:
        raise ValueError(
            f"{out} was started with another configuration: {'; '.join(differences)}; resume with "
            "the old values, or start a new run in another folder"
        )
