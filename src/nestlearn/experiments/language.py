"""Byte-level language modelling on text that every machine with Python has: its standard library.

Every model trains with the same parameters, tokens and schedule, and is measured on validation text
at the training length and at four times it. Nothing is chosen by that text: learning rates were, on
one seed, and are fixed. A training that was killed goes on from its checkpoint. `nestlearn
quickstart` is this experiment on one's own text.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch

from nestlearn.disk import atomic_write
from nestlearn.experiments.cells import PLACES
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.models import parameter_count, with_parameters
from nestlearn.experiments.tables import PARAMETERS, detail, mean, model
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.options import Attention, DeltaNet, SwiGLU
from nestlearn.train import Corpus, TrainConfig, evaluate, load_text, stdlib_text, train
from nestlearn.train.folder import read_log
from nestlearn.train.plots import comparison

LEARNING_RATE = 8e-3  # best of 2, 4, 6, 8, 12, 16e-3 for the Transformer, of 4, 8, 12e-3 for Hope
STRETCH = 4  # the second measurement: sequences so many times longer than the trained ones
STEPS, QUICK_STEPS = 200, 30
QUICK_MODELS = ("Hope", "Transformer")


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
    transformer = replace(config, mixer=Attention(), channel=SwiGLU())
    return [Entry("Hope", config, matched=False), Entry("Transformer", transformer)]


def all_models(vocab_size: int, size: str = "tiny") -> list[Entry]:
    """The quickstart's two, and what tells where the difference comes from."""
    hope, transformer = quick_models(vocab_size, size)
    c = hope.config
    plain = replace(transformer.config, mixer=Attention(conv=0))
    return [
        hope, transformer,
        Entry("Transformer, no convolution", plain, lr=4e-3),  # best of 2, 4, 6, 8e-3
        Entry("Hope, static MLP", replace(c, channel=SwiGLU())),
        Entry("Hope-Attention", replace(c, mixer=Attention())),
        Entry("DeltaNet + CMS", replace(c, mixer=DeltaNet())),
        Entry("DeltaNet", replace(c, mixer=DeltaNet(), channel=SwiGLU())),
    ]  # fmt: skip


def matched(entries: Sequence[Entry]) -> list[Entry]:
    """Every entry with as many parameters as the first, by the width of its channel mixer."""
    target = parameter_count(entries[0].config)
    return [
        replace(e, config=with_parameters(e.config, target)) if e.matched else e for e in entries
    ]


def settings(steps: int | None = None, *, quick: bool = False) -> TrainConfig:
    """How the models train; `quick`: fewer and smaller steps, half a minute in all."""
    batch, length, windows = (4, 128, 4) if quick else (8, 256, 16)
    steps = (QUICK_STEPS if quick else STEPS) if steps is None else steps
    return TrainConfig(
        steps=steps, batch=batch, length=length, warmup=min(50, max(steps, 0) // 5),
        eval_every=max(1, steps // (5 if quick else 8)), eval_windows=windows,
        checkpoint_every=max(1, steps // 4),
    )  # fmt: skip


@lru_cache(1)
def corpus_of(paths: tuple[str, ...]) -> Corpus:
    """The text of those files and folders; none: the standard library of this Python."""
    if paths:
        return load_text(list(paths))
    return replace(load_text(stdlib_text()), name="the standard library of Python")


def cells(
    entries: Sequence[Entry], paths: tuple[str, ...], config: TrainConfig, out: Path, prompt: str
) -> list[Cell]:
    """A cell for each entry, matched. ValueError where `out` holds runs of another text, or the
    text is too short for the longer measurement.
    """
    corpus = corpus_of(paths)
    corpus.val_windows(1, STRETCH * config.length)  # a short text fails before any training
    sha256 = corpus.describe()["sha256"]
    for path in out.glob("*/config.json"):
        text = json.loads(path.read_text(encoding="utf-8")).get("corpus", {})
        if text.get("sha256") != sha256:
            raise ValueError(
                f"{path.parent} was trained on other text ({text.get('name')}): give another "
                "--out, or delete it"
            )
    own = {k: v for k, v in asdict(config).items() if k not in ("lr", "seed", "device")}
    return [
        {
            "task": corpus.name, "model": e.name, "config": e.config.to_dict(), "train": own,
            "sha256": sha256, "prompt": prompt, "peak": e.lr, "folder": paths,
            "out": str(out.resolve()),
        }
        for e in matched(entries)
    ]  # fmt: skip


def grid(asked: Options) -> list[Cell]:
    paths = (asked.data,) if asked.data else ()
    entries = all_models(corpus_of(paths).vocab_size)
    names = asked.models or asked.pick(QUICK_MODELS, ())
    names = chosen(names, [e.name for e in entries], "model")
    some = [entries[0], *(e for e in entries[1:] if e.name in names)]  # whom all others match
    found = cells(some, paths, settings(asked.steps, quick=asked.quick), asked.out, "def ")
    return [cell for cell in found if cell["model"] in names]


def folder_name(cell: Cell) -> str:
    """The name of a training's folder, from its model and seed."""
    slug = "".join(c if c.isalnum() else "-" for c in cell["model"].lower()).replace("--", "-")
    return f"{slug}-seed{cell['seed']}"


def check_folder(cell: Cell) -> None:
    """ValueError where the training's folder is of another cell."""
    path = Path(cell["out"], folder_name(cell), "cell.json")
    if path.is_file() and json.loads(path.read_text("utf-8")) != json.loads(_identity(cell)):
        raise ValueError(
            f"{path.parent} holds other settings, or is of another version of nestlearn: give "
            "another --out, or delete it"
        )


def _identity(cell: Cell) -> str:
    said = {k: v for k, v in cell.items() if k not in (*PLACES, "rates")}
    return json.dumps(said, indent=1) + "\n"


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One model, one seed: trained in a folder of its own, measured, sampled."""
    corpus, folder = corpus_of(tuple(cell["folder"])), Path(cell["out"], folder_name(cell))
    check_folder(cell)
    own = {**cell["train"], "betas": tuple(cell["train"]["betas"])}
    config = TrainConfig(**own, lr=cell["lr"], seed=cell["seed"], device=cell["device"])
    torch.manual_seed(config.seed)
    model = HopeLM(HopeConfig.from_dict(cell["config"]))
    folder.mkdir(parents=True, exist_ok=True)
    said = partial(Path.write_text, data=_identity(cell), encoding="utf-8")
    atomic_write(folder / "cell.json", said)
    train(
        model, corpus, config, folder, resume=(folder / "config.json").is_file(),
        progress=parent_process() is None,
        on_step=lambda r: tell(r["step"] / config.steps, f"loss {r['loss']:.3f}"),
    )  # fmt: skip
    log = read_log(folder / "log.jsonl")
    losses, curve = measure(model, corpus, config)
    tokens = config.batch * config.length
    loss = losses[config.length]
    return {
        "value": -loss, "scores": {"validation loss (nats per token)": loss}, "value_at": losses,
        "bits_per_byte": {n: corpus.bits_per_byte(x) for n, x in losses.items()},
        "loss_by_position": curve.tolist(), "parameters": model.parameter_count(),
        "steps": config.steps, "tokens": config.steps * tokens,
        "seconds": sum(tokens / r["tokens_per_second"] for r in log),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in log),
        "log": [[r["step"], r["loss"], r.get("val_loss")] for r in log],
        "sample": _sample(model, corpus, cell["prompt"]), "headline": f"validation loss {loss:.4f}",
    }  # fmt: skip


def eval_tokens(config: TrainConfig) -> int:
    """How many tokens of validation text are read at each length."""
    trained = config.steps * config.batch * config.length
    return max(STRETCH * config.length, min(65_536, trained // 12))


def measure(
    model: HopeLM, corpus: Corpus, config: TrainConfig
) -> tuple[dict[int, float], torch.Tensor]:
    """The mean loss at the trained length and at STRETCH times it, and the latter by position [T].

    Both read the same text: the long windows, and the same windows in STRETCH pieces.
    """
    T = config.length
    long = corpus.val_windows(eval_tokens(config) // (STRETCH * T), STRETCH * T)
    pieces = torch.cat([long[:, i * T : (i + 1) * T + 1] for i in range(STRETCH)])
    short_loss, _ = evaluate(model, pieces, config.batch, config.dtype)
    long_loss, by_position = evaluate(model, long, config.batch, config.dtype)
    return {T: short_loss, STRETCH * T: long_loss}, by_position


def _sample(model: HopeLM, corpus: Corpus, prompt: str) -> str:
    assert corpus.tokenizer is not None
    device = next(model.parameters()).device
    ids = torch.tensor([corpus.tokenizer.encode(prompt)], device=device)
    draw = torch.Generator(device).manual_seed(0)
    longer = model.eval().generate(ids, 200, temperature=0.8, top_k=40, generator=draw)
    return corpus.tokenizer.decode(longer[0].tolist())


def columns(records: Sequence[Record]) -> list[Column]:
    lengths = list(records[0].detail["value_at"])
    return [
        model(), PARAMETERS,
        *(mean(f"bits per byte at {n}", detail("bits_per_byte", n)) for n in lengths),
        mean("tokens/s", detail("tokens_per_second"), digits=0),
    ]  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    runs = [{"model": r.model, "seed": r.seed, **r.detail} for r in records]
    comparison(runs, path.with_name("comparison.png"))


EXPERIMENT = Experiment(
    name="language",
    shows="Hope, a Transformer and what lies between, on bytes of Python's standard library",
    price=("~5 hours", "–"),
    takes=("seeds", "steps", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: (cell["peak"],), quick_rates=(0, 1), seeds=1,
    columns=columns, figure=figure,
)  # fmt: skip
