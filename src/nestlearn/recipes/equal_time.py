"""Equal tokens and equal time: losses of language models along both, on books.

Each family trains with the same number of learning rates on seed 0; the rate with the lowest loss
on validation books goes on to the other seeds, and test books give the figures. The Transformer has
a second row, with twice the steps: about the time that Hope takes. Seconds are those of training
steps alone on their card, without evaluation.
"""

from __future__ import annotations

import json
import lzma
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.recipes import suite
from nestlearn.recipes.cells import Cell, Tell, Work, run_cells
from nestlearn.recipes.language import with_parameters
from nestlearn.train import Corpus, TrainConfig, evaluate, train
from nestlearn.train.run import resolve_device

FAMILIES: dict[str, dict[str, Any]] = {
    "Hope": {},
    "Hope-Attention": {"mixer": "attention"},
    "DeltaNet with levels": {"mixer": "deltanet"},
    "Transformer": {"mixer": "attention", "channel": "mlp"},
    "Transformer, twice the steps": {"mixer": "attention", "channel": "mlp"},
    "Static projections with levels": {"adapt": ()},
    "Hope, streams of 8 windows": {},
    "Hope, static MLP": {"channel": "mlp"},
    "DeltaNet with levels, streams of 8 windows": {"mixer": "deltanet"},
}
MODELS = tuple(FAMILIES)[:7]
SIZES = {"6M": (256, 6, 4), "25M": (512, 8, 8)}
LRS = (3e-3, 6e-3, 1.2e-2)
STEPS, BATCH, LENGTH, STRETCH = 300, 64, 512, 4
BOOKS = ("train-0.txt.xz", "valid.txt.xz", "test.txt.xz")


@lru_cache(1)
def books(folder: Path) -> tuple[Corpus, Tensor]:
    """Bytes of the training and validation books, and of the test books."""
    parts = [bytearray(lzma.decompress((folder / name).read_bytes())) for name in BOOKS]
    ids = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
    train, val = len(parts[0]), len(parts[1])
    corpus = Corpus(ids[0], ids[1], 256, name="Gutenberg", train_bytes=train, val_bytes=val)
    return corpus, ids[2]


def _entry(
    size: str, data: Path, device: str, quick: bool, model: str, lr: float, seed: int
) -> Cell:
    """One training."""
    steps = (3 if quick else STEPS) * (2 if "twice" in model else 1)
    return {
        "benchmark": "equal-time", "task": size, "model": model, "lr": lr, "seed": seed,
        "steps": steps, "batch": 2 if quick else BATCH, "length": 128 if quick else LENGTH,
        "books": str(data), "device": device,
    }  # fmt: skip


def _windows(model: str) -> int:
    """How many windows a stream of text goes on for."""
    words = model.split()
    return int(words[words.index("of") + 1]) if "of" in words else 1


def config_of(model: str, size: str) -> HopeConfig:
    """The family's configuration, with the parameters of Hope of that size."""
    dim, layers, heads = SIZES[size]
    base = HopeConfig(dim=dim, layers=layers, heads=heads)
    with torch.device("meta"):
        target = HopeLM(base).parameter_count()
    config = replace(base, **FAMILIES[model])
    return config if config == base else with_parameters(config, target)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Train and measure one cell; "value" is minus the validation loss at the trained length."""
    corpus, test = books(Path(cell["books"]))
    steps, T = cell["steps"], cell["length"]
    on_card = cell["device"].startswith("cuda")
    settings = TrainConfig(
        steps=steps, batch=cell["batch"], length=T, lr=cell["lr"], warmup=max(1, steps // 6),
        eval_every=steps, seed=cell["seed"], device=cell["device"],
        dtype="bfloat16" if on_card else "float32", stream=_windows(cell["model"]),
    )  # fmt: skip
    torch.manual_seed(cell["seed"])
    config = config_of(cell["model"], cell["task"])
    model = HopeLM(config)
    windows = 2 if cell["batch"] < 8 else 16
    curve: list[list[float]] = []
    seconds = 0.0

    def losses(text: Tensor, count: int) -> tuple[float, float]:
        held = replace(corpus, val=text, val_bytes=text.numel())
        long = held.val_windows(count, STRETCH * T)
        pieces = torch.cat([long[:, i * T : (i + 1) * T + 1] for i in range(STRETCH)])
        near, _ = evaluate(model, pieces, cell["batch"], settings.dtype)
        far, _ = evaluate(model, long, max(1, cell["batch"] // STRETCH), settings.dtype)
        return near, far

    def on_step(record: dict[str, Any]) -> None:
        nonlocal seconds
        took = cell["batch"] * T / record["tokens_per_second"]
        if record["step"] > 3:  # before that a graph is made
            seconds += took
        if record["step"] % max(1, steps // 6) == 0:
            near, far = losses(corpus.val, windows)
            curve.append([record["step"] * cell["batch"] * T, seconds, near, far])
            model.train()
            tell(record["step"] / steps, f"{near:.3f} {far:.3f}")

    log = train(model, corpus, settings, None, progress=False, on_step=on_step)
    near, far = losses(corpus.val, 4 * windows)
    test_near, test_far = losses(test, 4 * windows)
    late = sorted(r["grad_norm"] for r in log[settings.warmup :])
    speeds = [r["tokens_per_second"] for r in log[3:]] or [0.0]
    result = {
        "value": -near, "val": [near, far], "test": [test_near, test_far], "curve": curve,
        "parameters": model.parameter_count(), "config": config.to_dict(),
        "tokens": steps * cell["batch"] * T, "seconds": round(seconds, 2),
        "tokens_per_second": statistics.median(speeds),
        "grad_norm": {"median": late[len(late) // 2] if late else None,
                      "largest": late[-1] if late else None},
        "device_name": torch.cuda.get_device_name() if on_card else "CPU",
        "headline": f"{test_near:.3f} {test_far:.3f}, {statistics.median(speeds):,.0f} tokens/s",
    }  # fmt: skip
    grows = config.mixer == "attention"
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


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    data: str | Path | None = None,
    only: Sequence[str] = (),
    models: Sequence[str] = (),
    seeds: int = 3,
    workers: int | None = None,
    device: str = "auto",
) -> str:
    """Train every family at every size and return the table, also in out/table.md.

    data: the folder of books (train-0.txt.xz, valid.txt.xz, test.txt.xz). only: sizes of SIZES.
    models: names of FAMILIES (default: MODELS). seeds: trainings with the best rate.
    """
    if data is None or not all((Path(data) / name).is_file() for name in BOOKS):
        raise ValueError(f"--data {data}: give a folder with {', '.join(BOOKS)}")
    device = str(resolve_device(device))
    names = suite.chosen(models or MODELS, tuple(FAMILIES), "model")
    sizes = suite.chosen(only or (("6M",) if quick else ()), tuple(SIZES), "size")
    records: list[dict[str, Any]] = []
    for size in sizes:
        make = partial(_entry, size, Path(data), device, quick)
        rates = LRS[1:2] if quick else LRS
        name = f"equal-time, {size}"
        records += tuned(make, work, names, rates, 1 if quick else seeds, out, workers, name)
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    figure(records, out / "equal_time.png")
    text = table(records)
    suite.write_table(out, text)
    return text


def tuned(
    make: Callable[[str, float, int], Cell], work: Work, models: Sequence[str],
    rates: Sequence[float], seeds: int, out: Path, workers: int | None, name: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every model with every rate on seed 0, and with the best by "value" on the other seeds.

    make: the cell of (model, rate, seed). One record for each training, "chosen" if at that rate.
    """
    folder = out / "cells"
    search = [make(model, lr, 0) for model in models for lr in rates]
    found = run_cells(search, work, folder, workers=workers, name=f"{name}: rates")
    best: dict[str, tuple[float, float]] = {}
    for cell, done in zip(search, found):
        rank = (-math.inf if done is None else done["result"]["value"], cell["lr"])
        best[cell["model"]] = max(best.get(cell["model"], rank), rank)
    more = [make(model, best[model][1], seed) for seed in range(1, seeds) for model in models]
    found += run_cells(more, work, folder, workers=workers, name=f"{name}: seeds")
    return [
        {**done["cell"], **done["result"], "commit": done["commit"], "chosen": chosen}
        for cell, done in zip(search + more, found)
        if done is not None
        for chosen in [cell["lr"] == best[cell["model"]][1]]
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Test losses at both lengths, mean ± half the range over seeds, with tokens and seconds."""
    heads = [
        "size", "model", "parameters", "rate", "seeds", "tokens", "seconds", "tokens/s",
        "nats at the trained length", "at four times it", "gradient norm",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    chosen = [r for r in records if r["chosen"]]
    for size, model in dict.fromkeys((r["task"], r["model"]) for r in chosen):
        rows = [r for r in chosen if (r["task"], r["model"]) == (size, model)]
        near, far = ([r["test"][i] for r in rows] for i in (0, 1))
        norms = [r["grad_norm"]["median"] or 0.0 for r in rows]
        cells = [
            size, model, f"{rows[0]['parameters']:,}", f"{rows[0]['lr']:g}", str(len(rows)),
            f"{rows[0]['tokens']:,}", f"{statistics.mean(r['seconds'] for r in rows):.0f}",
            f"{statistics.mean(r['tokens_per_second'] for r in rows):,.0f}",
            spread(near), spread(far), f"{max(norms):.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± half the range, if there are several."""
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.3f}"


def figure(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Validation loss against tokens and seconds, at both lengths; a row for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [r for r in records if r["chosen"] and r["curve"]]
    sizes = list(dict.fromkeys(r["task"] for r in chosen))
    if not sizes:
        return
    fig, axes = plt.subplots(len(sizes), 4, figsize=(17, 3.8 * len(sizes)), squeeze=False)
    names = list(FAMILIES)
    for row, size in zip(axes, sizes):
        for j, (ax, axis, length) in enumerate(zip(row, (0, 0, 1, 1), (2, 3, 2, 3))):
            for model in names:
                curves = [r["curve"] for r in chosen if (r["task"], r["model"]) == (size, model)]
                if not curves:
                    continue
                points = [[statistics.mean(c[i][k] for c in curves) for k in (axis, length)]
                          for i in range(len(curves[0]))]  # fmt: skip
                x, y = zip(*points)
                ax.plot(x, y, label=model, color=f"C{names.index(model)}", marker=".")
            ax.set_xlabel(("tokens", "seconds on one card")[axis])
            where = ("trained length", "four times it")[length - 2]
            ax.set_title(f"{size}, {where}")
            ax.set_ylabel("validation nats per byte" if j == 0 else "")
    axes[0][0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
