"""A Hope, as the server uses it: what it reads is what it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn import state as trees
from nestlearn.hf.folder import digest_of
from nestlearn.models.hope import HopeLM, HopeState
from nestlearn.options import Continuum

from .engines import Engine, Entry, Kept, Measure, Reader

FILE = "memory.safetensors"
_BODY = {"base": str, "position": int, "history": list, "bytes": dict}


class HopeMemory(NamedTuple):
    """position: tokens read. state: what they have written. ahead [1, V]: the scores of the next
    token (nan before the first).
    """

    position: int
    state: HopeState
    ahead: Tensor


class HopeEngine(Engine):
    """See `Engine`. Its tokenizer is the run's, or bytes."""

    marker = FILE

    def __init__(self, model: HopeLM, tokenizer: Any, name: str):
        self.model, self.name = model.eval().requires_grad_(False), name
        self.words, self.device = _Words(tokenizer), model.embed.weight.device
        channel = model.config.channel
        self.levels = channel.levels if isinstance(channel, Continuum) else ()
        self.piece = min((x.chunk for x in self.levels if x.chunk is not None), default=64)
        config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        self.base = digest_of(model.state_dict().items(), config.encode())

    def fresh(self) -> HopeMemory:
        like = self.model.embed.weight
        ahead = like.new_full((1, self.model.config.vocab_size), float("nan"))
        return HopeMemory(0, trees.detach(self.model.init_state(1)), ahead)

    def reader(self, memory: HopeMemory | None) -> Reader:
        state = None if memory is None else memory.state

        @torch.no_grad()
        def feed(ids: list[int]) -> Tensor:
            nonlocal state
            logits, state = self.model(self.row(ids), state)
            return logits[0, -1].float()

        return feed

    @torch.no_grad()
    def learn(
        self, memory: HopeMemory, ids: list[int], mask: list[float] | None = None
    ) -> tuple[Tensor, HopeMemory]:
        if mask is not None and set(mask) != {1.0}:
            raise ValueError("a Hope learns from all that it reads: let it learn both sides")
        row = self.row(ids)
        logits, state = self.model(row, memory.state)
        scores = torch.cat([memory.ahead[:, None], logits], 1)[0]
        losses = F.cross_entropy(scores[:-1].float(), row[0], reduction="none")
        return losses, HopeMemory(memory.position + len(ids), state, logits[:, -1])

    def losses(self, memory: HopeMemory | None, ids: list[int]) -> Tensor:
        return self.learn(self.fresh() if memory is None else memory, ids)[0]

    def measures(self, memory: HopeMemory, before: HopeMemory) -> list[Measure]:
        """Of each memory, in all blocks, how far `now` is from `start`."""
        old = _learned(before)
        sums: dict[str, tuple[float, float]] = {}
        for path, delta in _learned(memory).items():
            name = self._level(path)
            norm, moved = sums.get(name, (0.0, 0.0))
            gone = delta - old[path] if path in old else delta
            sums[name] = norm + _square(delta), moved + _square(gone)
        return [Measure(name, a**0.5, b**0.5) for name, (a, b) in sums.items()]

    def _level(self, path: str) -> str:
        parts = path.split(".")
        if "levels" not in parts:
            return "self-modifying"
        number = int(parts[parts.index("levels") + 1])
        return f"level {number}, every {self.levels[number].chunk}"

    def reset(self, memory: HopeMemory, level: int | None) -> HopeMemory:
        if level is not None:
            raise ValueError(f"level={level}: a Hope's memory is reset as a whole, leave it out")
        return self.fresh()

    # --------------------------------------------------------------------------------- on disk

    def load(self, folder: Path) -> Kept:
        return self._load(folder / FILE)

    def _load(self, file: Path) -> Kept:
        body = _body(file)
        if body["base"] != self.base:
            raise ValueError(f"{file} is a memory of another model")
        memory = trees.load(file, self.fresh())
        _check(file, memory, body["position"])
        return Kept(memory, body["history"])

    def save(self, folder: Path, kept: Kept) -> Kept:
        folder.mkdir(parents=True, exist_ok=True)
        body = {
            "base": self.base, "position": kept.memory.position, "history": kept.history,
            "bytes": {"state": trees.nbytes(kept.memory)},
        }  # fmt: skip
        trees.save(kept.memory, folder / FILE, {"memory": json.dumps(body)})
        return kept

    def describe(self, folder: Path) -> Entry:
        return _body(folder / FILE)

    def pack(self, folder: Path) -> bytes:
        return (folder / FILE).read_bytes()

    def unpack(self, file: Path, folder: Path) -> None:
        self._load(file)
        folder.mkdir()
        (folder / FILE).write_bytes(file.read_bytes())


def _learned(memory: HopeMemory) -> dict[str, Tensor]:
    at = dict(trees.leaves(memory.state))
    found = {}
    for path, now in at.items():
        start = at.get(path.replace(".now.", ".start."))
        if ".now." in path and isinstance(now, Tensor) and isinstance(start, Tensor):
            found[path] = now - start
    return found


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


class _Words:
    """A run's tokenizer, called as transformers' are."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids)


def _check(file: Path, memory: HopeMemory, position: int) -> None:
    """ValueError for what no reading leaves behind."""
    found = trees.leaves(memory.state)
    numbers = [x for _, x in found if isinstance(x, Tensor) and x.is_floating_point()]
    numbers += [memory.ahead] if position else []
    if not all(bool(x.isfinite().all()) for x in numbers):
        raise ValueError(f"{file} has numbers that are not finite")
    places = [x for path, x in found if path.endswith("position")]
    if trees.batch_size(memory) != 1 or any(x != position for x in (memory.position, *places)):
        raise ValueError(f"{file} is not the memory of one stream, {position} tokens long")


def _body(file: Path) -> Entry:
    """What a file says of its memory; FileNotFoundError, ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"no memory in {file.parent}")
    try:
        body = json.loads(trees.read_metadata(file)["memory"])
        if any(type(body[name]) is not kind for name, kind in _BODY.items()):
            raise TypeError(f"give {_BODY}")
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} holds no memory of a Hope") from error
    return body
