"""A stacked model on disk, and the fingerprint by which a memory knows its base model.

dir/base/               the pretrained model (and its tokenizer) as transformers saves them
dir/stack.json          levels, options, fingerprint
dir/stack.safetensors   step sizes and start values
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nestlearn.disk import atomic_write, disk_errors
from nestlearn.names import check_stack

from .meta import add_starts
from .plan import DeltaLevel, StackConfig
from .stack import StackedModel

FORMAT, VERSION = "nestlearn-stack", 1
_OTHERS = ("hidden", "scale", "learns")  # fields of older files, always at their defaults


def fingerprint(model: StackedModel) -> str:
    """A sha256 over the base model's weights and the levels' start values: what deltas are
    relative to. Computed anew when one of them has changed; casting the whole stack is no change.
    """
    now = model.version()
    if model.fingerprint is None or model.fingerprint[0] != now:
        model.fingerprint = (now, _digest(model))
    return model.fingerprint[1]


def _digest(model: StackedModel) -> str:
    starts = model.starts.state_dict(prefix="start.")
    return digest_of([*model.base.state_dict().items(), *starts.items()])


def digest_of(tensors: Iterable[tuple[str, Tensor]], head: bytes = b"") -> str:
    """The sha256 of `head` and of tensors, by their names: their bytes as they are."""
    content = hashlib.sha256(head)
    for name, tensor in sorted(tensors):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)
    return content.hexdigest()


def to_dict(config: StackConfig) -> dict[str, Any]:
    """The configuration as JSON has it."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(data: dict[str, Any]) -> StackConfig:
    """The configuration again; TypeError or ValueError for what is none."""
    levels = tuple(DeltaLevel(**_as_now(level)) for level in data["levels"])
    layers = None if data["layers"] is None else tuple(data["layers"])
    return StackConfig(**{**data, "levels": levels, "layers": layers})


def _as_now(level: dict[str, Any]) -> dict[str, Any]:
    """A level as it is saved now, of one of when it was of the same kind as a layer's: such a one
    had options that were not its own, and a bound with a lower side that did not act.
    """
    bound = level["bound"][1] if isinstance(level["bound"], list) else level["bound"]
    return {k: v for k, v in level.items() if k not in _OTHERS} | {"bound": bound}


def save_stack(model: StackedModel, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a stacked model (and its tokenizer) to a new folder, whole or not at all.

    ValueError if there is something already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already: choose another folder")

    name, raw, text = _contents(model)

    def write(temp: Path) -> None:
        temp.mkdir()
        model.base.save_pretrained(temp / "base")
        if tokenizer is not None:
            tokenizer.save_pretrained(temp / "base")
        (temp / name).write_bytes(raw)
        (temp / "stack.json").write_text(text, encoding="utf-8")

    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(folder, write)


def save_rates(model: StackedModel, folder: str | Path) -> None:
    """Write trained step sizes and start values into the folder of the same stacked model: all of
    them or none, like every save.
    """
    folder = Path(folder)
    old = _read_stack(folder)["rates"]
    stored = json.loads((folder / "base" / "config.json").read_bytes()).get("dtype")
    if stored not in (None, str(model.base.dtype).removeprefix("torch.")):
        raise ValueError(
            f"{folder} has the base model in {stored}, and this one was cast to "
            f"{model.base.dtype}: save_stack() it to a new folder"
        )
    name, raw, text = _contents(model)
    atomic_write(folder / name, lambda temp: temp.write_bytes(raw))
    atomic_write(folder / "stack.json", lambda temp: temp.write_text(text, encoding="utf-8"))
    if old != name:
        (folder / old).unlink(missing_ok=True)


def load_stack(folder: str | Path, device: str | torch.device | None = None) -> StackedModel:
    """The stacked model of a folder. FileNotFoundError, ValueError for a damaged one."""
    folder = Path(folder)
    data = _read_stack(folder)
    try:
        config = from_dict(data["stack"])
        tensors = from_safetensors((folder / data["rates"]).read_bytes())
    except Exception as error:  # safetensors raises its own kind
        raise ValueError(f"{folder} is damaged: {error}") from error
    if config.rank is not None and "cache_dtype" not in data["stack"]:
        warnings.warn(
            f"{folder} was stacked when a low rank learned a tenth of what it does now: stack it "
            "anew with the step sizes of full deltas (0.05), or it may learn too fast",
            stacklevel=2,
        )
    base = AutoModelForCausalLM.from_pretrained(folder / "base", local_files_only=True)
    model = StackedModel(base, config).to(device)
    if any(name.startswith("starts.") for name in tensors):
        add_starts(model)
    own = _parameters(model)
    if own.keys() != tensors.keys() or any(own[n].shape != tensors[n].shape for n in own):
        raise ValueError(f"{folder}: {data['rates']} belongs to another stack")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    if _digest(model) != data["fingerprint"]:
        raise ValueError(
            f"{folder}: the base model's weights are not those that were stacked; stack it anew"
        )
    # One that was cast before it was saved is known to memories as what it was.
    model.fingerprint = (model.version(), data.get("known_as", data["fingerprint"]))
    return model


def _read_stack(folder: Path) -> dict[str, Any]:
    path = check_stack(folder) / "stack.json"
    try:
        data = json.loads(path.read_bytes())
        found = (data["format"], data["version"])
        plain = re.fullmatch(r"rates-[0-9a-f]{16}\.safetensors", data["rates"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} describes no stacked model ({error!r})") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is {found}: this nestlearn reads {(FORMAT, VERSION)}")
    if plain is None:
        raise ValueError(f"{path} names the file {data['rates']!r}: it has been altered")
    return data


def _contents(model: StackedModel) -> tuple[str, bytes, str]:
    """The rates' file name and bytes, and the text of stack.json."""
    raw = to_safetensors(
        {name: p.detach().cpu().contiguous().clone() for name, p in _parameters(model).items()}
    )
    name = f"rates-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors"
    data = {
        "format": FORMAT,
        "version": VERSION,
        "stack": to_dict(model.config),
        "fingerprint": _digest(model),
        "rates": name,
    }
    if fingerprint(model) != data["fingerprint"]:
        data["known_as"] = fingerprint(model)
    return name, raw, json.dumps(data, indent=2) + "\n"


def _parameters(model: StackedModel) -> dict[str, nn.Parameter]:
    """The stack's own parameters, without the base model's."""
    own = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in own if not name.startswith("base.")}
