"""What the server asks of a model, whichever kind it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nestlearn.learn import conversation

Entry = dict[str, Any]
Reader = Callable[[list[int]], Tensor]  # reads the next tokens; scores [V] of the one that follows


class Kept(NamedTuple):
    """A memory as it was read or written last: its state, what it has been through, and by what
    the disk is known to hold the same (None: nothing is there yet, or nobody compares).
    """

    memory: Any
    history: list[Entry]
    digest: str | None = None


class Measure(NamedTuple):
    """One level of a memory: how far it is from its start, and from where it was before."""

    name: str
    norm: float
    moved: float


class Engine(Protocol):
    """A model and its tokenizer. Only one thread at a time may use it; a memory is a value, and
    its `position` says how many tokens it has read.

    name: by which requests know it. marker: the file that is there once a memory is. words: its
    tokenizer. device: where ids go. piece: tokens between two writes of its fastest level. ends:
    tokens that end an answer. room: tokens that it can read at once (None: any). studies: whether
    it can study. masks: whether it can read without learning.
    """

    name: str
    marker: str
    words: Any
    device: torch.device
    piece: int
    ends: frozenset[int] = frozenset()
    room: int | None = None
    studies: bool = False
    masks: bool = False

    def prompt(self, turns: list[Any]) -> list[int]:
        """The ids that ask for a reply to a conversation."""
        return conversation.prompt(self.words, turns)

    def encode(self, text: str) -> list[int]:
        """A text's ids, with those that begin one."""
        return conversation.encode(self.words, text)

    def decode(self, ids: list[int]) -> str:
        """The ids' text."""
        return self.words.decode(ids, skip_special_tokens=True)

    def row(self, ids: list[int]) -> Tensor:
        """The ids as a batch of one."""
        return torch.tensor([ids], dtype=torch.long, device=self.device)

    def fresh(self) -> Any:
        """The memory before the first token."""

    def reader(self, memory: Any) -> Reader:
        """One reading, seen by nobody else, with a memory that stays as it is (None: without)."""

    def learn(
        self, memory: Any, ids: list[int], mask: list[float] | None = None
    ) -> tuple[Tensor, Any]:
        """−log p of the stream's next tokens [T], nan for its first, and the memory afterwards.
        mask: the weight of each, 0 for those that are context only (None: learn from all).
        """

    def losses(self, memory: Any, ids: list[int]) -> Tensor:
        """−log p [T] of a text's tokens; nothing is written (None: without a memory)."""

    def measures(self, memory: Any, before: Any) -> list[Measure]:
        """Its levels, and how far they have moved since it was as `before`."""

    def reset(self, memory: Any, level: int | None) -> Any:
        """The memory without what a level has learned, or a new one; ValueError."""

    def load(self, folder: Path) -> Kept:
        """What a folder holds; FileNotFoundError, ValueError."""

    def save(self, folder: Path, kept: Kept) -> Kept:
        """Write it, whole or not at all; ValueError where something else stands there by now."""

    def describe(self, folder: Path) -> Entry:
        """position, bytes and history of what a folder holds, without its tensors."""

    def pack(self, folder: Path) -> bytes:
        """The memory as one safetensors file."""

    def unpack(self, file: Path, folder: Path) -> None:
        """Write such a file's memory to a new folder; ValueError for what is none, or another
        model's, and then nothing was written.
        """

    def study(
        self, folder: Path, text: str, source: str | None, questions: int | None, tell: Any
    ) -> Any:
        """Study a text with the memory of a folder, and save; a `Studied`."""
        raise ValueError(f"{self.name} cannot study")  # `studies` says so before


def engine_for(model: Any, tokenizer: Any, name: str) -> Engine:
    """The engine of a `StackedModel` or a `HopeLM`; ValueError for anything else."""
    from nestlearn.hf.stack import StackedModel
    from nestlearn.models.hope import HopeLM

    from .hope import HopeEngine
    from .stacked import StackedEngine

    if isinstance(model, StackedModel):
        return StackedEngine(model, tokenizer, name)
    if isinstance(model, HopeLM):
        return HopeEngine(model, tokenizer, name)
    raise ValueError(f"a {type(model).__name__} has no memory: give a StackedModel or a HopeLM")
