"""Text as token streams: every batch is a pure function of (seed, step), so nothing is lost.

There is no iterator and no stored position: a run that resumes at step n asks for batch n and
gets, bit for bit, what an uninterrupted run gets.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .texts import read_texts

SPLIT_BY_FILE = 20  # from this many files on, whole files are held out for validation
# torch cannot index or compare these; token files often hold the first of them
_UNSIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def keyed_seed(*key: int) -> int:
    """Return a well-mixed 63-bit seed that depends on every integer of the key."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ------------------------------------------------------------------------------- tokenizers


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """One token per UTF-8 byte; ids 0 to 255."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of the text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the bytes; a byte that is no UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write nothing: a model folder without a tokenizer.json reads bytes."""


class SubwordTokenizer:
    """A `tokenizer.json` of the tokenizers library; no special tokens are added.

    FileNotFoundError; ValueError for a file that is no tokenizer; ImportError naming the extra.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer file at {path}; pass a path to tokenizer.json")
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ImportError(
                f'reading {path} needs the tokenizers library: pip install "nestlearn[tokenizer]"'
            ) from error
        self._path = path
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"{path} is no tokenizer.json of the tokenizers library ({error})"
            ) from error
        self.name = f"tokenizer.json sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        # Ids may have gaps, so the count of tokens is not the bound.
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, special tokens included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer.json into the folder."""
        shutil.copyfile(self._path, folder / "tokenizer.json")


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model folder: its tokenizer.json, else bytes.

    ValueError where the tokenizer has more ids than the model's `vocab_size`, or where there is
    none and the model does not read bytes.
    """
    path = Path(folder) / "tokenizer.json"
    tokenizer: Tokenizer = SubwordTokenizer(path) if path.is_file() else ByteTokenizer()
    fits = tokenizer.vocab_size <= vocab_size
    if not fits or (vocab_size != 256 and tokenizer.name == "bytes"):
        raise ValueError(
            f"{folder}: the model has vocab_size {vocab_size}, its tokenizer ({tokenizer.name}) "
            f"{tokenizer.vocab_size}; put the tokenizer.json that it was trained with beside it"
        )
    return tokenizer


# ----------------------------------------------------------------------------------- corpus


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two streams of tokens, to train on and to validate on.

    train, val: integer tensors [tokens], ids in 0..vocab_size-1. train_bytes, val_bytes: the
    bytes of text that they stand for, None where tokens are no text. skipped: files in folders
    that were left out as hidden or no UTF-8 text; no_text: why, of each that is not hidden.
    """

    train: torch.Tensor
    val: torch.Tensor
    vocab_size: int
    name: str = "corpus"
    train_bytes: int | None = None
    val_bytes: int | None = None
    tokenizer: Tokenizer | None = None
    files: int = 0
    skipped: int = 0
    no_text: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            tokens = getattr(self, split)
            if (wide := _UNSIGNED.get(tokens.dtype)) is not None:
                tokens = tokens.to(wide)
                object.__setattr__(self, split, tokens)
            floating = tokens.is_floating_point() or tokens.is_complex()
            if tokens.ndim != 1 or floating or tokens.dtype == torch.bool:
                raise ValueError(
                    f"{split} is a {tokens.dtype} tensor of shape {tuple(tokens.shape)}; "
                    "pass integer ids [tokens]"
                )
            low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"{split} has ids from {low} to {high}, outside vocab_size={self.vocab_size}; "
                    "raise vocab_size"
                )

    def batch(self, step: int, batch: int, length: int, seed: int, stream: int = 1) -> torch.Tensor:
        """Return int64 windows [batch, length + 1] at offsets drawn by (seed, step) alone.

        Inputs are `[:, :-1]`, targets `[:, 1:]`. stream: windows that a row reads one after
        another, each from where the one before it ended, until it starts anew elsewhere (see
        `restarts`); the window of a row is then a function of (seed, row, step). ValueError where
        train is shorter than a window, or than one stream of windows.
        """
        starts = _starts("train", self.train, length, stream)
        if stream > 1:
            offsets = []
            for row in range(batch):
                number, place = divmod(step + _stagger(row, batch, stream), stream)
                key = keyed_seed(seed, row, number, 2)  # a fourth part: no key of a step
                generator = torch.Generator().manual_seed(key)
                start = int(torch.randint(starts, (), generator=generator))
                offsets.append(start + place * length)
            return _windows(self.train, torch.tensor(offsets), length)
        generator = torch.Generator().manual_seed(keyed_seed(seed, step))
        return _windows(self.train, torch.randint(starts, (batch,), generator=generator), length)

    def val_windows(self, count: int, length: int) -> torch.Tensor:
        """Return `count` evenly spaced windows of val, int64 [count, length + 1], always the same.

        They overlap where val is shorter than count windows; ValueError if shorter than one.
        """
        if count < 1:
            raise ValueError(f"count={count}: ask for at least 1 validation window")
        last = _starts("val", self.val, length) - 1
        offsets = torch.tensor([i * last // max(count - 1, 1) for i in range(count)])
        return _windows(self.val, offsets, length)

    def bits_per_byte(self, nats_per_token: float, split: str = "val") -> float | None:
        """Return a loss per token as bits per byte of text, None where tokens are no text."""
        size = getattr(self, f"{split}_bytes")
        tokens = getattr(self, split).numel()
        return nats_per_token / math.log(2) * tokens / size if size else None

    def describe(self) -> dict[str, Any]:
        """Return the corpus in JSON terms, with a sha256 over all its tokens."""
        content = hashlib.sha256()
        for tokens in (self.train, self.val):
            content.update(f"{tokens.dtype} {tokens.numel()} ".encode())
            content.update(tokens.contiguous().view(torch.uint8).numpy().data)
        return {
            "name": self.name,
            "tokenizer": self.tokenizer.name if self.tokenizer else None,
            "vocab_size": self.vocab_size,
            "files": self.files,
            "skipped_files": self.skipped,
            "train_tokens": self.train.numel(),
            "val_tokens": self.val.numel(),
            "train_bytes": self.train_bytes,
            "val_bytes": self.val_bytes,
            "sha256": content.hexdigest(),
        }


def restarts(step: int, batch: int, stream: int, first: int = 0) -> torch.Tensor:
    """Return which rows of `Corpus.batch` start anew at this step, bool [batch].

    At step 0 and before step `first` all do, then about batch / stream rows at every step.
    """
    anew = [(step + _stagger(row, batch, stream)) % stream == 0 for row in range(batch)]
    return torch.tensor(anew) | (step < max(1, first))


def _stagger(row: int, batch: int, stream: int) -> int:
    """How many windows a row is ahead, so that the rows do not all start anew together."""
    return row * stream // batch


def _starts(split: str, tokens: torch.Tensor, length: int, stream: int = 1) -> int:
    """How many windows of length + 1 tokens there are, or streams of so many windows."""
    if length < 1:
        raise ValueError(f"length={length}: a window has at least 1 token")
    if stream < 1:
        raise ValueError(f"stream={stream}: a stream has at least 1 window")
    starts, needed = tokens.numel() - stream * length, stream * length + 1
    if starts >= 1:
        return starts
    what = f"one window of length + 1 = {needed}; give more text or a smaller length"
    if stream > 1:
        what = (
            f"one stream of stream * length + 1 = {stream} * {length} + 1 = {needed}; give more "
            "text, or a smaller stream or length"
        )
    elif split == "val":
        what += " or a larger val_fraction"
    raise ValueError(f"the {split} text has {tokens.numel()} tokens, shorter than {what}")


def _windows(tokens: torch.Tensor, offsets: torch.Tensor, length: int) -> torch.Tensor:
    return tokens[offsets[:, None] + torch.arange(length + 1)].to(torch.int64)


# ----------------------------------------------------------------------------- reading files


def load_text(
    paths: Sequence[str | Path] | str | Path,
    val_fraction: float = 0.05,
    tokenizer: str | Path | None = None,
    seed: int = 0,
) -> Corpus:
    """Read UTF-8 text files and folders (recursive, links too, sorted; `.gz`) into a Corpus.

    paths: several, or one. tokenizer: a path to a tokenizer.json; default bytes as tokens.
    With 20 files or more whole files are held out for validation (a seeded choice), else the tail
    of each file. In folders, hidden files and what is no UTF-8 text are skipped and counted; a file
    met twice counts once, and a byte order mark at its head is no text.
    ValueError for a named file that is no text, for no text at all and for a val_fraction outside
    (0, 1); FileNotFoundError for a missing path.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: choose a share between 0 and 1, e.g. 0.05")
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    coder: Tokenizer = ByteTokenizer() if tokenizer is None else SubwordTokenizer(tokenizer)
    texts, skipped, no_text = read_texts([Path(path) for path in paths])
    if not texts:
        names = ", ".join(map(str, paths)) or "no paths were given"
        why = "".join(f"; {each}" for each in no_text[:3])
        raise ValueError(
            f"no text in the data ({names}; {skipped} files skipped as hidden, binary or not "
            f"UTF-8{why}); pass text files, or folders that hold some"
        )
    if len(texts) >= SPLIT_BY_FILE:
        train, val = _split_files(texts, val_fraction, seed)
    else:
        cuts = [_cut(text, val_fraction) for text in texts]
        train = [text[:cut] for text, cut in zip(texts, cuts)]
        val = [text[cut:] for text, cut in zip(texts, cuts)]
    return Corpus(
        train=_tokens(train, coder),
        val=_tokens(val, coder),
        vocab_size=coder.vocab_size,
        name=", ".join(map(str, paths)) if len(paths) <= 3 else f"{paths[0]} and others",
        train_bytes=sum(map(len, train)),
        val_bytes=sum(map(len, val)),
        tokenizer=coder,
        files=len(texts),
        skipped=skipped,
        no_text=tuple(no_text),
    )


def stdlib_text() -> list[Path]:
    """Return the `.py` files of the running Python's standard library, sorted, without its tests.

    A corpus that every machine has: about 700 files and 12 MB. It differs between Python versions.
    ValueError where this Python keeps its library elsewhere, e.g. zipped.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise ValueError(f"no .py files in the standard library at {root}; pass your own text")
    return sorted(found)


def _cut(text: bytes, val_fraction: float) -> int:
    """Where the tail for validation begins: on a character, never inside one."""
    cut = len(text) - round(len(text) * val_fraction)
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _split_files(
    texts: list[bytes], val_fraction: float, seed: int
) -> tuple[list[bytes], list[bytes]]:
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    room = val_fraction * sum(map(len, texts))
    held_out: set[int] = set()
    for i in order:
        if len(texts[i]) <= room:
            held_out.add(i)
            room -= len(texts[i])
    if not held_out:  # every file is larger than the share
        held_out = {min(order, key=lambda i: len(texts[i]))}
    return (
        [text for i, text in enumerate(texts) if i not in held_out],
        [text for i, text in enumerate(texts) if i in held_out],
    )


def _tokens(texts: list[bytes], coder: Tokenizer) -> torch.Tensor:
    if isinstance(coder, ByteTokenizer):
        content = bytearray(b"".join(texts))
        return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
    ids = [i for text in texts for i in coder.encode(text.decode("utf-8"))]
    return torch.tensor(ids, dtype=torch.int32)
