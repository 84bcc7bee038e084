"""A stacked model, as the server uses it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformers import DynamicCache

from nestlearn.hf.cache import CACHE
from nestlearn.hf.folder import fingerprint
from nestlearn.hf.lending import Weights
from nestlearn.hf.plan import StackMemory
from nestlearn.hf.stack import StackedModel
from nestlearn.hf.writes import inner
from nestlearn.learn import Session, Studied, StudyConfig, describe
from nestlearn.learn.store import load_memory, save_memory

from .engines import Engine, Entry, Kept, Measure, Reader

READY = 4  # memories whose weights are kept at hand
BODY = "nestlearn-memory"  # where a memory's file keeps its memory.json


class StackedEngine(Engine):
    """See `Engine`."""

    marker = "memory.json"
    masks = True

    def __init__(self, model: StackedModel, tokenizer: Any, name: str):
        self.model, self.words, self.name = model, tokenizer, name
        self.device = model.lr[0].device
        self.studies = bool(getattr(tokenizer, "chat_template", None))
        self.room = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
        chunks = [level.chunk for level in model.config.levels if level.chunk is not None]
        self.piece = min(chunks, default=64)
        ends = getattr(model.base.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = frozenset(end for end in ends if end is not None)
        self._ready: OrderedDict[int, tuple[Any, Weights]] = OrderedDict()
        fingerprint(model)

    def fresh(self) -> StackMemory:
        return self.model.init_memory(1)

    def reader(self, memory: StackMemory | None) -> Reader:
        weights = {} if memory is None else self._weights(memory)
        cache = DynamicCache(config=self.model.base.config)

        @torch.no_grad()
        def feed(ids: list[int]) -> Tensor:
            out = self.model(self.row(ids), weights, **{CACHE: cache}, use_cache=True)
            return out.logits[0, -1].float()

        return feed

    def _weights(self, memory: StackMemory) -> Weights:
        """Low-rank deltas stay beside the base's weights, so that a memory costs its own size."""
        key = id(memory.levels)
        if key not in self._ready:
            with torch.no_grad():
                weights = self.model.effective(self.model.fasts(memory))
            self._ready[key] = (memory.levels, weights)  # held, so that the key stays its own
            while len(self._ready) > READY:
                self._ready.popitem(last=False)
        self._ready.move_to_end(key)
        return self._ready[key][1]

    def learn(
        self, memory: StackMemory, ids: list[int], mask: list[float] | None = None
    ) -> tuple[Tensor, StackMemory]:
        weight = None if mask is None else self.model.lr[0].new_tensor([mask])
        losses, memory = self.model.learn(self.row(ids), memory, weight)
        return losses[0].detach(), memory

    def losses(self, memory: StackMemory | None, ids: list[int]) -> Tensor:
        return self.model.losses(self.row(ids), memory)[0]

    def measures(self, memory: StackMemory, before: StackMemory) -> list[Measure]:
        found = []
        for i, level in enumerate(self.model.config.levels):
            often = "never" if level.chunk is None else f"every {level.chunk}"
            now, then = memory.levels[i].fast, before.levels[i].fast
            own, old = inner(now, now), inner(then, then)
            moved = 0.0 if now is then else own + old - 2 * inner(now, then)
            found.append(Measure(f"level {i}, {often}", own**0.5, max(moved, 0.0) ** 0.5))
        return found

    def reset(self, memory: StackMemory, level: int | None) -> StackMemory:
        return self.fresh() if level is None else self.model.reset(memory, level)

    # --------------------------------------------------------------------------------- on disk

    def load(self, folder: Path) -> Kept:
        return Kept(*load_memory(folder, self.model))

    def save(self, folder: Path, kept: Kept) -> Kept:
        digest = save_memory(folder, self.model, kept.memory, kept.history, expected=kept.digest)
        return kept._replace(digest=digest)

    def describe(self, folder: Path) -> Entry:
        return describe(folder)

    def pack(self, folder: Path) -> bytes:
        body = (folder / self.marker).read_text(encoding="utf-8")
        file = folder / json.loads(body)["memory"]["tensors"]["file"]
        return to_safetensors(load_file(file), {BODY: body})

    def unpack(self, file: Path, folder: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                body = (opened.metadata() or {}).get(BODY)
            tensors = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"this is no safetensors file of a memory ({error})") from error
        if body is None:
            raise ValueError("this safetensors file holds no memory of a stacked model")
        raw = to_safetensors(tensors)
        name = f"tensors-{hashlib.sha256(raw).hexdigest()[:32]}.safetensors"
        folder.mkdir()
        (folder / name).write_bytes(raw)
        (folder / self.marker).write_bytes(body.encode())
        load_memory(folder, self.model)

    def study(
        self, folder: Path, text: str, source: str | None, questions: int | None, tell: Any
    ) -> Studied:
        session = Session(self.model, folder, self.words)
        config = StudyConfig() if questions is None else StudyConfig(questions=questions)
        return session.study(text, config, source=source, tell=tell)
