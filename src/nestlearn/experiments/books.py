"""Language models on books: the text, one training, and what is measured of it.

FOLDER holds books of Project Gutenberg (or others), split by whole books: train-0.txt.xz,
valid.txt.xz, test.txt.xz. Tokens are bytes, or pieces of a BPE that is trained on the training
books. Validation books choose, test books give the figures.
"""

from __future__ import annotations

import lzma
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn import state as tree
from nestlearn.experiments import experiment, tables
from nestlearn.experiments.experiment import Cell, Column, Options, Record, Tell
from nestlearn.experiments.figures import Along, Panel, lines
from nestlearn.experiments.fit import plan
from nestlearn.experiments.models import parameter_count, with_parameters
from nestlearn.experiments.provenance import fingerprint
from nestlearn.experiments.tables import PARAMETERS, RATE, SEEDS, detail, mean, metric, words
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Attention
from nestlearn.train import Corpus, evaluate, train

BOOKS = ("train-0.txt.xz", "valid.txt.xz", "test.txt.xz")
BYTES = 256
STRETCH = 4  # the second measurement: windows so many times longer than the trained ones
NEAR, FAR = "bits a byte at the trained length", "at four times it"
STREAMS = (100_000, 1_000_000)  # bytes
SINKS, CACHED = 4, 2  # tokens; bytes of a number of a cache on a card
TAUGHT = 20_000_000  # bytes of the training books from which the pieces are found


class Text(NamedTuple):
    """Training and validation books, and the test books' tokens and bytes."""

    corpus: Corpus
    test: Tensor
    test_bytes: int

    def bits(self, nats: float, split: str = "test") -> float:
        """Nats a token as bits a byte."""
        if split != "test":
            return self.corpus.bits_per_byte(nats, split) or math.nan
        return nats / math.log(2) * len(self.test) / self.test_bytes


@lru_cache(1)
def read(folder: Path, vocabulary: int = BYTES) -> Text:
    """The books as bytes, or in pieces of a BPE of that size."""
    raw = [lzma.decompress((folder / name).read_bytes()) for name in BOOKS]
    if vocabulary == BYTES:
        ids = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in raw]
    else:
        ids = _pieces(raw, vocabulary)
    train, val, test = map(len, raw)
    corpus = Corpus(ids[0], ids[1], vocabulary, name="Gutenberg", train_bytes=train, val_bytes=val)
    return Text(corpus, ids[2], test)


def _pieces(raw: list[bytes], vocabulary: int) -> list[Tensor]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    lines = [part.decode("utf-8").splitlines(keepends=True) for part in raw]
    share = min(1.0, TAUGHT / max(1, len(raw[0])))
    coder.train_from_iterator(lines[0][: math.ceil(share * len(lines[0]))], trainer)
    found = []
    for part in lines:
        ids = [i for one in coder.encode_batch(part) for i in one.ids]
        found.append(torch.tensor(ids, dtype=torch.int32))
    return found


def text_of(data: str | None) -> dict[str, str]:
    """A cell's part: the folder of books, and a hash of them; ValueError if they are not there."""
    if data is None or not all((Path(data) / name).is_file() for name in BOOKS):
        given = "--data is not given" if data is None else f"--data {data}"
        raise ValueError(
            f"{given}: give a folder with {', '.join(BOOKS)}, plain text packed by xz, no book in "
            "two of them; Project Gutenberg (www.gutenberg.org) has books, and your own will do"
        )
    return {"folder": data, "books": fingerprint(Path(data) / name for name in BOOKS)}


def cells(
    asked: Options, tasks: Mapping[str, Cell], models: Iterable[str], usual: tuple[int, int, int],
    quick: tuple[int, int, int] = (3, 2, 64), what: tuple[str, str] = ("task", "model"),
) -> list[Cell]:  # fmt: skip
    """As `experiment.cells`, of trainings on books. usual, quick: steps, batch and length."""
    steps, batch, length = asked.pick(quick, usual)
    base = {"steps": asked.steps or steps, "batch": batch, "length": length, **text_of(asked.data)}
    return experiment.cells(asked, tasks, models, what, **base)


def sized(
    change: Mapping[str, Any], size: tuple[int, int, int], vocabulary: int = BYTES
) -> HopeConfig:
    """Hope with a change, and the parameters of Hope. size: width, layers, heads."""
    base = HopeConfig(vocabulary, dim=size[0], layers=size[1], heads=size[2])
    config = replace(base, **change)
    return config if config == base else with_parameters(config, parameter_count(base))


def bounded(config: HopeConfig, hope: HopeConfig) -> HopeConfig:
    """The configuration, in which attention sees a window, and sinks, so many that its state has
    the bytes of that of `hope`.
    """
    if not isinstance(config.mixer, Attention):
        return config
    room = state_bytes(hope) - state_bytes(config)
    window = room // (2 * config.dim * config.layers * CACHED) - SINKS
    return replace(config, mixer=replace(config.mixer, window=max(1, window), sinks=SINKS))


def state_bytes(config: HopeConfig) -> int:
    with torch.device("meta"):
        return tree.nbytes(HopeLM(config).init_state(1))


def windows(model: str) -> int:
    """How many windows a model's stream of text goes on for: "Hope, streams of 8 windows"."""
    words = model.split()
    return int(words[words.index("of") + 1]) if "of" in words else 1


def losses(
    model: HopeLM, text: Tensor, length: int, count: int, batch: int, dtype: str
) -> tuple[float, float]:
    """Nats per token in `count` windows of STRETCH lengths, read in pieces of one and whole."""
    held = Corpus(text, text, model.config.vocab_size)
    long = held.val_windows(count, STRETCH * length)
    pieces = torch.cat([long[:, i * length : (i + 1) * length + 1] for i in range(STRETCH)])
    near, _ = evaluate(model, pieces, batch, dtype)
    far, _ = evaluate(model, long, max(1, batch // STRETCH), dtype)
    return near, far


def trained(
    cell: Cell, config: HopeConfig, tell: Tell, stream: int = 1, alone: float = 0.0
) -> tuple[HopeLM, dict[str, Any]]:
    """Train a cell's model; "value" is minus the validation loss at the trained length, "test" and
    "validation" are nats a token at that length and at STRETCH times it.

    stream: windows that a row of the batch reads one after another. alone: the first share of the
    steps, in which every window starts anew all the same.
    """
    text = read(Path(cell["folder"]), config.vocab_size)
    steps, T, batch = cell["steps"], cell["length"], cell["batch"]
    on_card = cell["device"].startswith("cuda")
    settings = plan(
        cell, length=T, warmup=max(1, steps // 6), stream=stream, stream_from=int(alone * steps)
    )
    torch.manual_seed(cell["seed"])
    model = HopeLM(config)
    windows = 16 if batch >= 8 else batch
    curve: list[list[float]] = []
    seconds = 0.0

    def on_step(record: dict[str, Any]) -> None:
        nonlocal seconds
        took = batch * T / record["tokens_per_second"]
        if record["step"] > 3:  # before that a graph is made
            seconds += took
        if record["step"] % max(1, steps // 6) == 0:
            near, far = losses(model, text.corpus.val, T, windows, batch, settings.dtype)
            curve.append([record["step"] * batch * T, seconds, near, far])
            model.train()
            tell(record["step"] / steps, f"{near:.3f} {far:.3f}")

    log = train(model, text.corpus, settings, None, progress=False, on_step=on_step)
    val, tested = (
        losses(model, ids, T, 4 * windows, batch, settings.dtype)
        for ids in (text.corpus.val, text.test)
    )
    late = sorted(r["grad_norm"] for r in log[settings.warmup :])
    speed = statistics.median([r["tokens_per_second"] for r in log[3:]] or [0.0])
    return model, {
        "value": -val[0], "test": list(tested), "validation": list(val),
        "curve": curve, "parameters": model.parameter_count(), "config": config.to_dict(),
        "tokens": steps * batch * T, "seconds": round(seconds, 2), "tokens_per_second": speed,
        "grad_norm": {"median": late[len(late) // 2] if late else None,
                      "largest": late[-1] if late else None},
        "device_name": torch.cuda.get_device_name() if on_card else "CPU",
    }  # fmt: skip


def in_bits(text: Text, result: dict[str, Any]) -> dict[str, Any]:
    """A training's result with its scores on the test books."""
    near, far = map(text.bits, result["test"])
    told = f"{near:.3f} {far:.3f}, {result['tokens_per_second']:,.0f} tokens/s"
    return result | {"scores": {NEAR: near, FAR: far}, "headline": told}


def columns(records: Sequence[Record], near: str = NEAR, far: str = FAR) -> list[Column]:
    """Tokens, seconds, and two metrics: those of the trained length and of STRETCH times it."""
    return [
        tables.model(), PARAMETERS, RATE, SEEDS, words("tokens", lambda r: f"{r.tokens:,}"),
        mean("seconds", lambda r: r.seconds if r.metric == near else None, digits=0),
        mean("tokens/s", detail("tokens_per_second"), digits=0),
        mean(near, metric(near)), mean(far, metric(far)),
    ]  # fmt: skip


def panel(records: Sequence[Record], title: str, axes: tuple[str, str], x: int, y: int) -> Panel:
    """What `trained` measured on the way: a column of it along tokens (0) or seconds (1)."""

    def along(r: Record) -> Along:
        rows = r.detail["curve"]
        return [row[x] for row in rows], [row[y] for row in rows]

    return Panel(title, *axes, lines(records, along))


@torch.no_grad()
def surprise(model: HopeLM, ids: Tensor, length: int) -> Tensor:
    """Nats [B, T] of every token of texts [B, T + 1] after the first, read in pieces of `length`
    with the state carried.
    """
    device = next(model.parameters()).device
    state, parts = None, []
    for a in range(0, ids.shape[1] - 1, length):
        part = ids[:, a : a + length + 1].long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, state = model(part[:, :-1], state)
        parts.append(F.cross_entropy(logits.mT.float(), part[:, 1:], reduction="none").cpu())
    return torch.cat(parts, 1)


def anew(model: HopeLM, ids: Tensor, length: int) -> Tensor:
    """Nats [B, T] as `surprise`, read in windows of `length` that start anew, of which half is read
    again, so that every token has at least half a window before it.
    """
    B, T, half = len(ids), ids.shape[1] - 1, length // 2
    if length >= T:
        return surprise(model, ids, length)
    windows = ids.unfold(1, length + 1, half)
    windows = torch.cat([windows, ids[:, None, -length - 1 :]], 1)
    nats = torch.cat([surprise(model, some, length) for some in windows.flatten(0, 1).split(16)])
    nats = nats.view(B, -1, length)
    known = torch.cat([nats[:, 0, :half], nats[:, :-1, half : 2 * half].flatten(1)], 1)
    rest = T - known.shape[1]
    return torch.cat([known, nats[:, -1, length - rest :]], 1)


def stream(model: HopeLM, ids: Tensor, length: int) -> dict[str, Any]:
    """Nats per token in each tenth of streams of 100,000 and 1,000,000, memory carried, and of the
    same text read anew every `length` tokens; peak bytes on the card at both lengths.
    """
    device = next(model.parameters()).device
    model.eval()
    out: dict[str, Any] = {}
    for total in (n for n in STREAMS if n < len(ids)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        windows = ids[: total + 1].unfold(0, length + 1, length).split(16)
        apart = [surprise(model, some, length).flatten() for some in windows]
        rows = (surprise(model, ids[None, : total + 1], 16 * length)[0], torch.cat(apart))
        tenths = [[round(float(t.mean()), 4) for t in row.chunk(10)] for row in rows]
        out[str(total)] = {"carried": tenths[0], "anew": tenths[1]}
        if device.type == "cuda":
            out[str(total)]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return out
