"""A run's folder: whole checkpoints, the log, and the refusals that protect them.

out/config.json                   what was run: TrainConfig, corpus, model, versions
out/log.jsonl                     one JSON record per step
out/checkpoints/step-000200/      see `nestlearn.train.checkpoint`
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from nestlearn.disk import atomic_write, disk_errors, sync
from nestlearn.train.checkpoint import (
    Identity,
    Record,
    copied_checkpoint,
    load_checkpoint,
    verify_checkpoint,
    versions,
)
from nestlearn.train.ranks import ALONE, Ranks

KEEP = 2
# A run may go on with other values of these: they move the schedule, the reports or the place of
# the work, not what a step means. Only with all of them unchanged it goes on bit for bit.
MAY_CHANGE = {
    "train": {
        "steps", "warmup", "eval_every", "eval_windows", "checkpoint_every", "device",
        "accumulate", "parallel", "profile",
    },
    "corpus": {"name", "files", "skipped_files"},  # its sha256 is what counts
    "model": set(),
}  # fmt: skip
# settings that older runs lack, with the value that they ran with
_ADDED = {"stream": 1, "stream_from": 0}
_RUN_FILES = ("config.json", "log.jsonl", "checkpoints", "model")
_STALE = re.compile(r"\.(config\.json|log\.jsonl|loss\.png|model|step-\d+)\.[0-9a-f]{8}\.tmp")
_log = logging.getLogger("nestlearn")


class RunFolder:
    """Where one run writes: `start` or `resume` it, then `append` records and `save` steps."""

    def __init__(self, out: Path, identity: Identity, ranks: Ranks = ALONE) -> None:
        self.out, self.ranks = out, ranks
        self.identity: Identity = json.loads(json.dumps(identity))  # tuples as JSON has them
        self.checkpoints, self.log = out / "checkpoints", out / "log.jsonl"
        self.saved_step: int | None = None
        self._writing: Future[None] | None = None  # rank 0's, of the newest checkpoint

    def start(self) -> None:
        """Claim the folder; ValueError if it already holds a run."""
        self.ranks.first_says(self._claim)

    def _claim(self) -> None:
        if present := [name for name in _RUN_FILES if (self.out / name).exists()]:
            raise ValueError(
                f"{self.out} already holds a run ({', '.join(present)}); go on with it by "
                "resume=True (--resume), or choose another folder"
            )
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._write_config()

    def resume(
        self, model: nn.Module, optimizer: Optimizer, carried: Any = None
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

    def append(self, record: Record) -> None:
        """Add one record to log.jsonl."""
        if self.ranks.first:
            with disk_errors(self.log), self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        carried: Any = None,
        *,
        later: bool = False,
    ) -> Path:
        """Write the checkpoint of this step, unless it is there, and keep the newest two.

        later: what it holds is copied, and written while the run goes on; see `settle`.
        """
        if self.saved_step != step:
            self.settle()
            if self.ranks.first:
                with disk_errors(self.log):  # the log reaches the disk first
                    sync(self.log)
            write = copied_checkpoint(step, model, optimizer, self.identity, carried, self.ranks)
            if self.ranks.first:
                thread = ThreadPoolExecutor(1)
                self._writing = thread.submit(self._publish, self.path(step), write)
                thread.shutdown(wait=False)  # it ends with this; an exit of the program waits
            self.saved_step = step
        if not later:
            self.settle()
        return self.path(step)

    def _publish(self, path: Path, write: Callable[[Path], None]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        atomic_write(path, write)
        for old in self._present()[KEEP:]:
            shutil.rmtree(old)

    def settle(self) -> None:
        """Wait until the newest checkpoint is written; every rank raises what was in the way."""
        writing, self._writing = self._writing, None
        try:
            self.ranks.first_says(lambda: writing.result() if writing else None)
        except Exception:
            self.saved_step = None
            raise

    @property
    def failed(self) -> bool:
        """Whether `settle` will raise, as far as this rank knows by now."""
        return bool(self._writing and self._writing.done() and self._writing.exception())

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        """Let this rank's writing end, well or not: for when the run has failed."""
        wait([self._writing] if self._writing else [])

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step is, if it is kept."""
        return self.checkpoints / f"step-{step:06d}"

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
        records = read_log(self.log) if self.log.is_file() else []
        records = [record for record in records if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in records)
        atomic_write(self.log, lambda temp: temp.write_text(text, encoding="utf-8"))
        return records


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's state dict in a checkpoint."""
    return load_file(checkpoint / "model.safetensors")


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
    for part, free in MAY_CHANGE.items():
        old, new = started.get(part) or {}, now.get(part) or {}
        if part == "train":
            old, new = _ADDED | old, _ADDED | new
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
