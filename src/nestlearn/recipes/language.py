"""Byte-level language modelling on text that every machine with Python has: its standard library.

`compare` trains each model once for every seed, with the same parameters, tokens and schedule,
measures it at the training length and at four times it, and writes a table, a figure and samples.
A cell that is done is never trained again; one that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nestlearn.disk import atomic_write
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.train import Corpus, TrainConfig, evaluate, train
from nestlearn.train.checkpoint import read_log, versions
from nestlearn.train.plots import comparison

LEARNING_RATE = 8e-3  # best of 2, 4, 6, 8, 12, 16e-3 for the Transformer, of 4, 8, 12e-3 for Hope
STRETCH = 4  # the second measurement: sequences so many times longer than the trained ones

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the comparison; `matched` gives it, by its MLP, the first one's parameters."""

    name: str
    config: HopeConfig
    lr: float = LEARNING_RATE
    matched: bool = True


def quick_models(vocab_size: int, size: str = "tiny") -> list[Entry]:
    """Hope beside a Transformer: the quickstart."""
    config = HopeConfig.size(size, vocab_size=vocab_size)
    transformer = replace(config, mixer="attention", channel="mlp")
    return [Entry("Hope", config, matched=False), Entry("Transformer", transformer)]


def all_models(vocab_size: int, size: str = "tiny") -> list[Entry]:
    """The quickstart's two, and what tells where the difference comes from."""
    hope, transformer = quick_models(vocab_size, size)
    c = hope.config
    plain = replace(transformer.config, conv=0)
    return [
        hope,
        transformer,
        Entry("Transformer, no convolution", plain, lr=4e-3),  # best of 2, 4, 6, 8e-3
        Entry("Hope, static MLP", replace(c, channel="mlp")),
        Entry("Hope-Attention", replace(c, mixer="attention")),
        Entry("DeltaNet + CMS", replace(c, mixer="deltanet")),
        Entry("DeltaNet", replace(c, mixer="deltanet", channel="mlp")),
    ]


def compare(
    entries: list[Entry],
    corpus: Corpus,
    settings: TrainConfig,
    out: Path,
    *,
    seeds: int = 1,
    prompt: str = "def ",
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and measure every entry for every seed; the records, also in out/results.json."""
    entries = _matched(entries)
    records: list[Record] = []
    for seed in range(seeds):
        for entry in entries:
            say(f"{entry.name}, seed {seed}: {_parameters(entry.config):,} parameters")
            records.append(_cell(entry, corpus, replace(settings, seed=seed), out, prompt))
    text = json.dumps(records, indent=1)
    atomic_write(out / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    atomic_write(
        out / "table.md", lambda path: path.write_text(table(records) + "\n", encoding="utf-8")
    )
    comparison(records, out / "comparison.png")
    return records


def _cell(entry: Entry, corpus: Corpus, settings: TrainConfig, out: Path, prompt: str) -> Record:
    """One model, one seed: trained, measured, sampled; read from disk if that was done before."""
    slug = "".join(c if c.isalnum() else "-" for c in entry.name.lower()).replace("--", "-")
    folder = out / f"{slug}-seed{settings.seed}"
    settings = replace(settings, lr=entry.lr)
    identity = {"config": json.loads(json.dumps(entry.config.to_dict())), "train": repr(settings)}
    done = folder / "cell.json"
    if done.is_file():
        record = json.loads(done.read_text(encoding="utf-8"))
        if {k: record[k] for k in identity} == identity:
            return record
        raise ValueError(f"{folder} holds other settings: give another --out, or delete it")
    torch.manual_seed(settings.seed)
    model = HopeLM(entry.config)
    train(model, corpus, settings, folder, resume=(folder / "config.json").is_file())
    log = read_log(folder / "log.jsonl")
    losses, curve = measure(model, corpus, settings)
    record = {
        "benchmark": "language",
        "task": corpus.name,
        "model": entry.name,
        "seed": settings.seed,
        "metric": "validation loss (nats per token)",
        "value": losses[settings.length],
        "value_at": losses,
        "bits_per_byte": {n: corpus.bits_per_byte(x) for n, x in losses.items()},
        "loss_by_position": curve.tolist(),
        "parameters": model.parameter_count(),
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.length,
        "seconds": sum(settings.batch * settings.length / r["tokens_per_second"] for r in log),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in log),
        "log": [[r["step"], r["loss"], r.get("val_loss")] for r in log],
        "sample": _sample(model, corpus, prompt),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        **identity,
    }
    record = json.loads(json.dumps(record))  # the same types as when read back
    atomic_write(done, lambda path: path.write_text(json.dumps(record), encoding="utf-8"))
    return record


def eval_tokens(settings: TrainConfig) -> int:
    """How many tokens of validation text are read at each length."""
    trained = settings.steps * settings.batch * settings.length
    return max(STRETCH * settings.length, min(65_536, trained // 12))


def measure(
    model: HopeLM, corpus: Corpus, settings: TrainConfig
) -> tuple[dict[int, float], torch.Tensor]:
    """The mean loss at the trained length and at STRETCH times it, and the latter by position [T].

    Both read the same text: the long windows, and the same windows in STRETCH pieces.
    """
    T = settings.length
    long = corpus.val_windows(eval_tokens(settings) // (STRETCH * T), STRETCH * T)
    pieces = torch.cat([long[:, i * T : (i + 1) * T + 1] for i in range(STRETCH)])
    short_loss, _ = evaluate(model, pieces, settings.batch, settings.dtype)
    long_loss, by_position = evaluate(model, long, settings.batch, settings.dtype)
    return {T: short_loss, STRETCH * T: long_loss}, by_position


def _sample(model: HopeLM, corpus: Corpus, prompt: str, tokens: int = 200) -> str:
    assert corpus.tokenizer is not None
    device = next(model.parameters()).device
    ids = torch.tensor([corpus.tokenizer.encode(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(0)
    longer = model.eval().generate(
        ids, max_new_tokens=tokens, temperature=0.8, top_k=40, generator=generator
    )
    return corpus.tokenizer.decode(longer[0].tolist())


def _parameters(config: HopeConfig) -> int:
    with torch.device("meta"):
        return HopeLM(config).parameter_count()


def _matched(entries: list[Entry]) -> list[Entry]:
    """Every entry with as many parameters as the first, by the width of its channel mixer."""
    target = _parameters(entries[0].config)
    return [
        replace(e, config=with_parameters(e.config, target)) if e.matched else e for e in entries
    ]


def with_parameters(config: HopeConfig, target: int) -> HopeConfig:
    """The configuration with the channel mixer's width that brings it nearest to `target`."""

    def at(width: int) -> HopeConfig:
        if config.channel == "mlp":
            return replace(config, mlp_hidden=width)
        levels = tuple(replace(level, hidden=width) for level in config.levels)
        return replace(config, levels=levels)

    one, two = (_parameters(at(width)) for width in (16, 32))
    width = 16 + round(16 * (target - one) / (two - one) / 8) * 8
    if width < 8:
        raise ValueError(
            f"{target:,} parameters are too few for mixer={config.mixer!r} at dim={config.dim}: "
            "the rest of the model alone has more"
        )
    return at(width)


def table(records: list[Record]) -> str:
    """The comparison as a Markdown table: mean over seeds, ± half the range of several."""
    lengths = list(records[0]["value_at"])
    head = ["model", "parameters", *(f"bits per byte at {n}" for n in lengths), "tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(r["model"] for r in records):
        rows = [r for r in records if r["model"] == name]
        cells = [name, f"{rows[0]['parameters']:,}"]
        cells += [_spread([r["bits_per_byte"][n] for r in rows]) for n in lengths]
        cells.append(f"{statistics.mean(r['tokens_per_second'] for r in rows):,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.3f}"


__all__ = ["Entry", "all_models", "compare", "quick_models", "table", "with_parameters"]
