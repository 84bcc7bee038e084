"""Equal tokens and equal time: losses of language models along both, on books.

Test books give the figures, validation books choose the learning rates. The Transformer has a
second row, with twice the steps: about the time that Hope takes. Seconds are those of training
steps alone on their card, without evaluation.
"""

from __future__ import annotations

import lzma
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals import Record
from nestlearn.experiments.cells import Cell, Tell
from nestlearn.experiments.experiment import Experiment, Options, chosen
from nestlearn.experiments.figures import Panel, curves
from nestlearn.experiments.models import parameter_count, with_parameters
from nestlearn.experiments.provenance import fingerprint
from nestlearn.experiments.tables import (
    PARAMETERS,
    RATE,
    SEEDS,
    Column,
    detail,
    mean,
    metric,
    model,
    words,
)
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Attention, DeltaNet, SwiGLU, Titans
from nestlearn.train import Corpus, TrainConfig, evaluate, train

FAMILIES: dict[str, dict[str, Any]] = {
    "Hope": {},
    "Hope-Attention": {"mixer": Attention()},
    "DeltaNet with levels": {"mixer": DeltaNet()},
    "Transformer": {"mixer": Attention(), "channel": SwiGLU()},
    "Transformer, twice the steps": {"mixer": Attention(), "channel": SwiGLU()},
    "Static projections with levels": {"mixer": Titans(adapt=())},
    "Hope, streams of 8 windows": {},
    "Hope, static MLP": {"channel": SwiGLU()},
    "DeltaNet with levels, streams of 8 windows": {"mixer": DeltaNet()},
}
MODELS = tuple(FAMILIES)[:7]
SIZES = {"6M": (256, 6, 4), "25M": (512, 8, 8)}
STEPS, BATCH, LENGTH, STRETCH = 300, 64, 512, 4
BOOKS = ("train-0.txt.xz", "valid.txt.xz", "test.txt.xz")
NEAR, FAR = "nats at the trained length", "at four times it"


@lru_cache(1)
def books(folder: Path) -> tuple[Corpus, Tensor]:
    """Bytes of the training and validation books, and of the test books."""
    parts = [bytearray(lzma.decompress((folder / name).read_bytes())) for name in BOOKS]
    ids = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
    train, val = len(parts[0]), len(parts[1])
    corpus = Corpus(ids[0], ids[1], 256, name="Gutenberg", train_bytes=train, val_bytes=val)
    return corpus, ids[2]


def text_of(data: str | None) -> dict[str, str]:
    """A cell's part: the folder of books, and a hash of them; ValueError if they are not there."""
    if data is None or not all((Path(data) / name).is_file() for name in BOOKS):
        raise ValueError(f"--data {data}: give a folder with {', '.join(BOOKS)}")
    return {"folder": data, "books": fingerprint(Path(data) / name for name in BOOKS)}


def grid(asked: Options) -> list[Cell]:
    """Every family at every size."""
    text = text_of(asked.data)
    names = chosen(asked.models or MODELS, tuple(FAMILIES), "model")
    return [
        {
            "task": size, "model": name,
            "steps": asked.pick(3, STEPS) * (2 if "twice" in name else 1),
            "batch": asked.pick(2, BATCH), "length": asked.pick(128, LENGTH), **text,
        }
        for size in chosen(asked.only or asked.pick(("6M",), ()), tuple(SIZES), "size")
        for name in names
    ]  # fmt: skip


def _windows(model: str) -> int:
    """How many windows a stream of text goes on for."""
    words = model.split()
    return int(words[words.index("of") + 1]) if "of" in words else 1


def config_of(model: str, size: str) -> HopeConfig:
    """The family's configuration, with the parameters of Hope of that size."""
    dim, layers, heads = SIZES[size]
    base = HopeConfig(dim=dim, layers=layers, heads=heads)
    config = replace(base, **FAMILIES[model])
    return config if config == base else with_parameters(config, parameter_count(base))


def losses(
    model: HopeLM, text: Tensor, length: int, count: int, batch: int, dtype: str
) -> tuple[float, float]:
    """Nats per token in `count` windows of STRETCH lengths, read in pieces of one and whole."""
    held = Corpus(text, text, 256)
    long = held.val_windows(count, STRETCH * length)
    pieces = torch.cat([long[:, i * length : (i + 1) * length + 1] for i in range(STRETCH)])
    near, _ = evaluate(model, pieces, batch, dtype)
    far, _ = evaluate(model, long, max(1, batch // STRETCH), dtype)
    return near, far


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and measure one cell; "value" is minus the validation loss at the trained length."""
    corpus, test = books(Path(cell["folder"]))
    steps, T, batch = cell["steps"], cell["length"], cell["batch"]
    on_card = cell["device"].startswith("cuda")
    settings = TrainConfig(
        steps=steps, batch=batch, length=T, lr=cell["lr"], warmup=max(1, steps // 6),
        eval_every=steps, seed=cell["seed"], device=cell["device"],
        dtype="bfloat16" if on_card else "float32", stream=_windows(cell["model"]),
    )  # fmt: skip
    torch.manual_seed(cell["seed"])
    config = config_of(cell["model"], cell["task"])
    model = HopeLM(config)
    windows = 2 if batch < 8 else 16
    curve: list[list[float]] = []
    seconds = 0.0

    def on_step(record: dict[str, Any]) -> None:
        nonlocal seconds
        took = batch * T / record["tokens_per_second"]
        if record["step"] > 3:  # before that a graph is made
            seconds += took
        if record["step"] % max(1, steps // 6) == 0:
            near, far = losses(model, corpus.val, T, windows, batch, settings.dtype)
            curve.append([record["step"] * batch * T, seconds, near, far])
            model.train()
            tell(record["step"] / steps, f"{near:.3f} {far:.3f}")

    log = train(model, corpus, settings, None, progress=False, on_step=on_step)
    val, tested = (
        losses(model, text, T, 4 * windows, batch, settings.dtype) for text in (corpus.val, test)
    )
    late = sorted(r["grad_norm"] for r in log[settings.warmup :])
    speed = statistics.median([r["tokens_per_second"] for r in log[3:]] or [0.0])
    result = {
        "value": -val[0], "scores": dict(zip((NEAR, FAR), tested)), "validation": list(val),
        "curve": curve, "parameters": model.parameter_count(), "config": config.to_dict(),
        "tokens": steps * batch * T, "seconds": round(seconds, 2), "tokens_per_second": speed,
        "grad_norm": {"median": late[len(late) // 2] if late else None,
                      "largest": late[-1] if late else None},
        "device_name": torch.cuda.get_device_name() if on_card else "CPU",
        "headline": f"{tested[0]:.3f} {tested[1]:.3f}, {speed:,.0f} tokens/s",
    }  # fmt: skip
    grows = isinstance(config.mixer, Attention)
    if not grows and cell["seed"] == 1 and steps >= STEPS:  # of seeds 1 one rate is trained
        result["stream"] = stream(model, test, T, settings.dtype)
    return result


@torch.no_grad()
def stream(model: HopeLM, ids: Tensor, length: int, dtype: str) -> dict[str, Any]:
    """Nats per byte in each tenth of streams of 100,000 and 1,000,000 bytes, memory carried, and
    of the same text read anew every `length` bytes; peak bytes on the card at both lengths.
    """
    device = next(model.parameters()).device
    model.eval()
    out: dict[str, Any] = {}
    for total in (100_000, 1_000_000):
        if len(ids) <= total:
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        x = ids[: total + 1].long().to(device)
        state, one, anew = None, [], []
        for a in range(0, total, 16 * length):
            part = x[a : min(a + 16 * length, total) + 1]
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits, state = model(part[None, :-1], state)
            one.append(F.cross_entropy(logits[0].float(), part[1:], reduction="none").cpu())
            whole = (len(part) - 1) // length * length
            if whole:
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                    logits, _ = model(part[:whole].view(-1, length))
                y = part[1 : whole + 1]
                anew.append(
                    F.cross_entropy(logits.flatten(0, 1).float(), y, reduction="none").cpu()
                )
        tenths = [
            [round(float(t.mean()), 4) for t in torch.cat(rows).chunk(10)] for rows in (one, anew)
        ]
        out[str(total)] = {"carried": tenths[0], "anew": tenths[1]}
        if device.type == "cuda":
            out[str(total)]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return out


def columns(records: Sequence[Record]) -> list[Column]:
    """Test losses at both lengths, with tokens and seconds."""
    return [
        words("size", lambda r: r.task), model(), PARAMETERS, RATE, SEEDS,
        words("tokens", lambda r: f"{r.tokens:,}"),
        mean("seconds", lambda r: r.seconds if r.metric == NEAR else None, digits=0),
        mean("tokens/s", detail("tokens_per_second"), digits=0),
        mean(NEAR, metric(NEAR)), mean(FAR, metric(FAR)),
        mean("gradient norm", detail("grad_norm", "median"), digits=2),
    ]  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    """Validation loss against tokens and seconds, at both lengths; a file for each size."""
    for size in dict.fromkeys(r.task for r in records):
        panels = []
        for axis, x in enumerate(("Tokens", "Seconds on one card")):
            for column, where in ((2, "trained length"), (3, "four times it")):
                lines = {}
                for name in FAMILIES:
                    own = [
                        r.detail["curve"]
                        for r in records
                        if (r.task, r.model) == (size, name) and r.detail.get("curve")
                    ]
                    if own:
                        at = [
                            statistics.mean(p)
                            for p in zip(*([row[axis] for row in c] for c in own))
                        ]
                        lines[name] = (at, [[row[column] for row in c] for c in own])
                panels.append(
                    Panel(f"{size}, {where}", x, "Validation loss (nats per byte)", lines)
                )
        curves(panels, path.with_stem(f"{path.stem}-{size}"), marker=True)


EXPERIMENT = Experiment(
    name="equal-time",
    shows="losses on books along tokens and along seconds",
    price=("–", "~2 hours"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid,
    work=work,
    rates=(3e-3, 6e-3, 1.2e-2),
    columns=columns,
    by=lambda r: (r.task, r.model),
    figure=figure,
)
