"""Models that read a stream, opened from a folder, and the ways to read it: `scored-first`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.evals import Logits, streams
from nestlearn.evals.streams import Reader, Text, Windows
from nestlearn.models.config import TYPE, HopeConfig, model_type
from nestlearn.models.hope import HopeLM
from nestlearn.names import SHIPPED, SHIPPED_WINDOW, model_folder
from nestlearn.train.data import load_tokenizer


class Row(NamedTuple):
    """A way to read: what it is, its dial, and the values of it that are tried."""

    title: str
    dial: str
    values: tuple[float, float, float]


ROWS = {
    "windows": Row("as it is, in windows", "temperature", (1.0, 1.1, 1.3)),
    "carried": Row("its state carried", "temperature", (1.0, 1.1, 1.3)),
    "levels": Row("levels that learn", "step size", (0.01, 0.03, 0.1)),
    "calibration": Row("calibration only", "rate", (1e-3, 1e-2, 1e-1)),
    "cache": Row("unigram cache", "tokens kept", (500, 2000, 8000)),
    "knn": Row("kNN over hidden vectors", "sharpness", (10.0, 20.0, 40.0)),
    "dynamic": Row("dynamic evaluation, SGD", "rate", (3e-3, 1e-2, 3e-2)),
}
CHUNKS = (64, 512)  # of levels put on a pretrained model
LONGEST = 1024  # tokens of a window, of a model that takes longer ones
KEPT = 2000  # hidden vectors
BLOCK = 2048  # tokens of a call of `learn`, or of a carried state
TOGETHER, LOGITS = 8, 2**26  # windows side by side, and numbers that they may say


@dataclass(frozen=True)
class Learning:
    """A stacked model that learns from what it reads, as `Session.learn` does."""

    stacked: Any
    begin: int
    step: int = BLOCK

    def read(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        first = [] if state is not None else [self.begin]  # it is not scored, nor learned from
        losses, state = self.stacked.learn(torch.cat([ids.new_tensor(first), ids])[None], state)
        return losses[0, len(first) :], state


@dataclass
class Opened:
    """A model, its tokenizer, and how it reads.

    read(ids [B, T]) -> (logits, hidden); carry(ids, state) -> (logits, hidden, state), None of a
    model without a state of its own; stack(step size) -> a stacked model, None where none can be
    made. begin: the id before a text's first. window: tokens of its trained windows. vocabulary:
    how many tokens it knows.
    """

    module: nn.Module
    encode: Callable[[str], Text]
    begin: int
    window: int
    vocabulary: int
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    carry: Callable[[Tensor, Any], tuple[Tensor, Tensor | None, Any]] | None = None
    stack: Callable[[float | None], Any] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows that this model has."""
        without = {"carried": self.carry is None, "levels": self.stack is None}
        return tuple(row for row in ROWS if not without.get(row))

    def text(self, text: str, most: int | None = None) -> Text:
        """The first tokens of a text; ValueError for an empty one."""
        ids, sizes = self.encode(text)
        if not len(ids):
            raise ValueError("the text is empty: there is nothing to read")
        return Text(ids[:most].to(self.device), sizes[:most])

    def reader(self, row: str, dial: float | None = None) -> Reader:
        """How a row reads; dial: None for the usual one. ValueError for a row it does not have."""
        if row not in self.rows:
            raise ValueError(f"row {row!r}: this model has {', '.join(self.rows)}")
        if row == "levels":
            assert self.stack is not None
            return Learning(self.stack(dial), self.begin)
        dial = ROWS[row].values[1] if dial is None else dial
        return streams.Scored(self._predictor(row, dial), self.begin)

    def _predictor(self, row: str, dial: float) -> Any:
        cut = {"length": self.window, "again": self.window // 4}
        together = max(1, min(TOGETHER, LOGITS // (self.window * self.vocabulary)))
        windows = Windows(model=self.read, temperature=dial, together=together, **cut)
        if row == "windows":
            return windows
        if row == "dynamic":
            return streams.Dynamic(module=Logits(self.module), rate=dial, **cut)
        if row == "carried":
            assert self.carry is not None
            return streams.Carried(self.carry, BLOCK, dial)
        plain = replace(windows, temperature=1.0)
        if row == "calibration":
            return streams.Calibrated(plain, rate=dial)
        if row == "cache":
            return streams.Cached(plain, size=int(dial))
        return streams.Nearest(plain, size=KEPT, sharpness=dial)


def opened(path: str | Path, device: str = "cpu", window: int | None = None) -> Opened:
    """The model of a stack's folder, a Hope's (a run, a checkpoint, a saved model) or a pretrained
    one's. FileNotFoundError where there is none; ValueError for a window that it cannot read.
    """
    path = model_folder(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: give a run, a stack, or a pretrained model")
    if window is not None and window < 2:
        raise ValueError(f"window={window}: give 2 tokens or more")
    stacked = (path / "stack.json").is_file()
    found = (_stack if stacked else _hope if is_hope(path) else _pretrained)(path, device, window)
    found.module.eval()
    found.device = torch.device(device)
    return found


# ---------------------------------------------------------------------------------------- Hope


def is_hope(path: Path) -> bool:
    """Whether a folder is a Hope's: a finished run, a checkpoint, or a saved model."""
    run = (path / "meta.json").is_file() or (path / "checkpoints").is_dir()
    return run or model_type(path) == TYPE


def _hope(path: Path, device: str, window: int | None) -> Opened:
    model, folder, settings = _loaded(path)
    model.to(device)
    shipped = SHIPPED_WINDOW if path == model_folder(SHIPPED) else None
    window = window or settings.get("train", {}).get("length", shipped)
    if window is None:
        told = "does not say on which length it was trained: give a window (--window)"
        raise ValueError(f"{path} {told}")
    tokenizer = load_tokenizer(folder, model.config.vocab_size)

    def encode(text: str) -> Text:
        ids = tokenizer.encode(text)
        size = len(text.encode())
        return Text(torch.tensor(ids), torch.ones(size) if size == len(ids) else even(ids, text))

    def carry(ids: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        hidden, state = model(ids, state, output="hidden")
        return model.head(hidden), hidden, state

    begin = tokenizer.encode("\n")[-1]
    known = model.config.vocab_size
    return Opened(model, encode, begin, window, known, lambda ids: carry(ids, None)[:2], carry)


def _loaded(path: Path) -> tuple[HopeLM, Path, dict[str, Any]]:
    """The model, the folder of its tokenizer, and its run's settings as far as they are known."""
    if (path / "checkpoints").is_dir() and not (path / "model").is_dir():
        path = max((path / "checkpoints").glob("step-*"), default=path)
    if (path / "meta.json").is_file():
        from safetensors.torch import load_file

        from nestlearn.train.checkpoint import verify_checkpoint

        settings = verify_checkpoint(path)
        model = HopeLM(HopeConfig.from_dict(settings["model"]))
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model, path, settings
    folder = path / "model" if (path / "model").is_dir() else path
    said = folder.parent / "config.json"
    settings = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    return HopeLM.from_pretrained(folder), folder, settings


# ------------------------------------------------------------------------- Hugging Face's models


def _pretrained(path: Path, device: str, window: int | None) -> Opened:
    from transformers import AutoModelForCausalLM

    from nestlearn import DeltaLevel, stack_levels, unstack

    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base = base.to(device)
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", LONGEST)
    window = min(longest, window or LONGEST)
    stacks: list[Any] = []

    def stack(lr: float | None) -> Any:
        if stacks:
            unstack(stacks.pop())
        step = ROWS["levels"].values[1] if lr is None else lr
        levels = [DeltaLevel(chunk, lr=step, rule="gd") for chunk in CHUNKS]
        stacks.append(stack_levels(base, levels, window=window, cache_dtype=None))
        return stacks[-1]

    return _transformer(base, path, window, stack)


def _stack(path: Path, device: str, window: int | None) -> Opened:
    from nestlearn.hf.folder import load_stack

    stacked = load_stack(path, device)
    if window not in (None, stacked.window):
        raise ValueError(f"window={window}: {path} was stacked with {stacked.window}")

    @torch.no_grad()
    def stack(lr: float | None) -> Any:
        for own in stacked.lr if lr is not None else ():
            own.fill_(lr)
        return stacked

    return _transformer(stacked.base, path / "base", stacked.window, stack)


def _transformer(
    base: Any, folder: Path, window: int, stack: Callable[[float | None], Any]
) -> Opened:
    def read(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        out = base(input_ids=ids, use_cache=False, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    encode, begin = _words(folder)
    marks = (base.config.bos_token_id, base.config.eos_token_id, begin)
    begin = next(mark for mark in marks if isinstance(mark, int))
    known = base.config.get_text_config().vocab_size
    return Opened(base, encode, begin, window, known, read, stack=stack)


def _words(folder: Path) -> tuple[Callable[[str], Text], int]:
    """What encodes a text without marks, and the id of a newline."""
    from nestlearn.hf.llama2c import tokenizer_of

    words = tokenizer_of(folder)

    def encode(text: str) -> Text:
        if not getattr(words, "is_fast", False):
            ids = words.encode(text, add_special_tokens=False)
            return Text(torch.tensor(ids, dtype=torch.long), even(ids, text))
        told = words(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in told["offset_mapping"]]
        return Text(torch.tensor(told["input_ids"], dtype=torch.long), sizes(ends, text))

    return encode, words.encode("\n", add_special_tokens=False)[-1]


# ---------------------------------------------------------------------------------------- bytes


def even(ids: Sequence[int], text: str) -> Tensor:
    """The bytes of the text dealt evenly to its tokens, where nothing says which are whose."""
    marks = torch.arange(len(ids) + 1) * len(text.encode()) // max(1, len(ids))
    return marks.diff()


def sizes(ends: Sequence[int], text: str) -> Tensor:
    """The bytes of each token [N], from where it ends in the text, in letters. What is between two
    tokens, or behind the last, is the later one's.
    """
    marks = [0, *accumulate(len(letter.encode()) for letter in text)]
    reached = [marks[end] for end in accumulate(ends, max)]
    return torch.tensor([0, *reached[:-1], marks[-1]][: len(reached) + 1]).diff()
