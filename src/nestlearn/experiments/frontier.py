"""Learning against forgetting: what a stacked model gains on a text, and what that costs it.

The pretrained stories model (260,000 parameters) reads a novel, or a dictionary, once. Measured
afterwards, with the memory held still: the loss on the text's later part, which it has not read,
and the loss on its own kind of text, samples of the base model. A step size alone moves along a
line from "nothing learned" to "all forgotten"; a method is better only if its line lies below. So
every method gets eight settings (step sizes, or step sizes times a dial of its own) on each of
three excerpts, and its line is the best of them at each cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestlearn.disk import atomic_write
from nestlearn.evals import grouped
from nestlearn.evals.files import rows_of, text_of
from nestlearn.experiments.cells import run_cells
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.methods import BLOCK, EIGHT, METHODS, Reader, base, rates, stacked
from nestlearn.experiments.tables import spread
from nestlearn.train.plots import new_figure, write_figure

Point = tuple[float, float]  # loss on the own kind, on the later part
TEXTS = ("novel", "dictionary")
NOVELS = ("pride_and_prejudice", "dracula", "great_expectations")  # one for each seed
OTHER = "middlemarch"  # for meta-training
READ, LATER = 24_576, 4_096  # tokens
COSTS = (0.05, 0.15, 0.4)  # nats on the model's own kind of text
MARKS = "os^vDP*X<>hd|"  # 13 of them and 20 colours: no pair comes twice


@cache
def text(data: Path, kind: str, seed: int) -> Tensor:
    """The tokens [1, READ + LATER] of an excerpt; kind may be a novel's name."""
    from nestlearn.hf.llama2c import Llama2cTokenizer

    tokenizer = Llama2cTokenizer(data / "models" / "tok512.bin")
    if kind == "dictionary":
        entries = rows_of(data / "novel_languages" / "teop_wordlist.jsonl.gz")
        whole = "\n".join(f"{e['word']} ({e['pos']}): {e['en']}" for e in entries)
    else:
        name = NOVELS[seed % len(NOVELS)] if kind == "novel" else kind
        whole = text_of(data / "books" / f"{name}.txt.gz")
    size = READ + LATER
    start = torch.Generator().manual_seed(seed)
    at = int(torch.randint(0, max(1, len(whole) - 5 * size), (), generator=start))
    ids = tokenizer.encode(whole[at : at + 5 * size])[1 : size + 1]
    if len(ids) < size:
        raise ValueError(f"{kind}: the excerpt has {len(ids)} tokens, {size} are wanted")
    return torch.tensor([ids])


def own_texts(data: Path, out: Path) -> dict[str, Tensor]:
    """Samples of the base model [n, BLOCK]: to measure on, to replay, to keep in meta-training."""
    path = out / "own.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        model = base(data)
        drawn = model.generate(
            torch.ones(144, 1, dtype=torch.long), do_sample=True, max_new_tokens=BLOCK - 1,
            min_new_tokens=BLOCK - 1, top_k=0, pad_token_id=0,
        )  # fmt: skip
        parts = dict(zip(("measured", "replayed", "kept"), drawn.split(48)))
        atomic_write(path, lambda p: save_file({k: v.contiguous() for k, v in parts.items()}, p))
    return load_file(path)


@torch.no_grad()
def measure(model: Any, memory: Any, later: Tensor, own: Tensor) -> tuple[float, float]:
    """Loss in nats on the text's later part, and on the own kind, the memory held still."""
    loss = float(model.losses(later, memory)[:, 1:].mean())
    with model.using(memory):
        logits = model.base(own).logits[:, :-1]
    return loss, float(F.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten()))


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One reading: later loss; "own", "before": both without a memory, "seconds" to read."""
    data, out = Path(cell["folder"]), Path(cell["out"])
    method, own = METHODS[cell["model"]], own_texts(data, out)
    if cell["task"] == "meta-training":
        return meta_train(cell, tell, data, out)
    ids = text(data, cell["task"], cell["seed"])
    read, later = ids[:, :READ], ids[:, READ:]
    meta = method.how.startswith("meta")
    model = stacked(data, method, 0.05 if meta else cell["lr"], cell["dial"])
    if meta:
        load_meta(model, meta_path(out, cell["model"], cell["dial"]), cell["lr"])
    before = measure(model, None, later, own["measured"])
    began = time.perf_counter()
    memory = Reader(model, method, cell["dial"], own).read(read, tell)
    seconds = time.perf_counter() - began
    after = measure(model, memory, later, own["measured"])
    return {
        "scores": {"later loss": after[0]}, "value": -after[0], "own": after[1],
        "before": list(before), "seconds": round(seconds, 2),
        "headline": f"later {before[0]:.3f} → {after[0]:.3f}, own {before[1]:.3f} → {after[1]:.3f}",
    }  # fmt: skip


# ---------------------------------------------------------------------------------- meta-training


def meta_path(out: Path, name: str, keep: float) -> Path:
    """Where trained step sizes and start values stand."""
    return out / "meta" / f"{name}-{keep:g}.safetensors"


def meta_train(cell: Cell, tell: Tell, data: Path, out: Path) -> dict[str, Any]:
    """Step sizes (and start values) trained on another novel, by the loss while learning plus
    dial times that on own samples.
    """
    from nestlearn.hf.meta import MetaConfig, train_stack

    method = METHODS[cell["model"]]
    model = stacked(data, method, 0.05, 0.0)
    config = MetaConfig(
        steps=cell["steps"], batch=2, length=2048, reach=2048, lr=0.1, keep=cell["dial"],
        start_lr=1e-4 if method.how == "meta-starts" else None,
    )  # fmt: skip
    kept = own_texts(data, out)["kept"].flatten()
    history = train_stack(
        model, text(data, OTHER, 0)[0], config, keep=kept,
        say=lambda step, *loss: tell(step / config.steps, f"{loss[0]:.3f}, own {loss[1]:.3f}"),
    )  # fmt: skip
    tensors = {f"lr.{i}": lr.detach().clone() for i, lr in enumerate(model.lr)}
    tensors |= {f"starts.{i}": w.detach().clone() for i, w in enumerate(model.starts)}
    path = meta_path(out, cell["model"], cell["dial"])
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lambda p: save_file(tensors, p))
    rates = {name: [round(float(v), 5) for v in t] for name, t in tensors.items() if "lr" in name}
    first, last = history[0], history[-1]
    line = f"{first[0]:.3f}, {first[1]:.3f} → {last[0]:.3f}, {last[1]:.3f}"
    return {"history": [list(h) for h in history], "rates": rates, "headline": line}


def load_meta(model: Any, path: Path, scale: float) -> None:
    """Trained step sizes times `scale`, and start values."""
    from nestlearn.hf.meta import add_starts

    tensors = load_file(path)
    with torch.no_grad():
        for i, lr in enumerate(model.lr):
            lr.copy_(scale * tensors[f"lr.{i}"])
        if "starts.0" in tensors:
            add_starts(model)
            for i, w in enumerate(model.starts):
                w.copy_(tensors[f"starts.{i}"])


# ---------------------------------------------------------------------------------- the frontier


def front(points: Sequence[Point]) -> list[Point]:
    """Of points (own, later) those that no other beats in both, by rising cost."""
    best: list[Point] = []
    for own, later in sorted(points):
        if not best or later < best[-1][1]:
            best.append((own, later))
    return best


def at_cost(points: Sequence[Point], own: float) -> float:
    """The line through the front at that loss on the own kind; beyond its end, the end."""
    costs, losses = zip(*front(points))
    return float(np.interp(own, costs, losses))


def line_of(rows: Sequence[Record], every: Sequence[Record], seed: int) -> list[Point]:
    """A method's points on one excerpt, and that of the untouched model."""
    later, own = untouched(every, seed)
    return [(own, later), *((r.detail["own"], r.value) for r in rows if r.seed == seed)]


def untouched(records: Sequence[Record], seed: int) -> tuple[float, float]:
    """(later, own) of the base model; of a method without start values of its own."""
    plain = [r for r in records if r.seed == seed and r.model != "meta-starts"]
    later, own = (plain or [r for r in records if r.seed == seed])[0].detail["before"]
    return later, own


def later_at(cost: float, name: str, every: Sequence[Record]) -> list[float]:
    """A method's later loss at that cost, on each excerpt. every: all records of its text."""
    own = [r for r in every if r.model == name]
    return [
        at_cost(line_of(own, every, seed), untouched(every, seed)[1] + cost)
        for seed in sorted({r.seed for r in own})
    ]


def grid(asked: Options) -> list[Cell]:
    if asked.data is None or not (Path(asked.data) / "models" / "stories260K.bin").is_file():
        raise ValueError(f"data={asked.data}: give the folder that holds models/stories260K.bin")
    texts = chosen(asked.only, TEXTS, "text")[: 1 if asked.quick or not asked.only else None]
    base = {"read": READ, "quick": asked.quick, **_places(asked)}
    return [
        {"task": kind, "model": name, "dial": dial, **base}
        for kind in texts
        for name in _names(asked)
        for dial in asked.pick((), METHODS[name].dial) or (0.0,)
    ]


def _names(asked: Options) -> tuple[str, ...]:
    return chosen(asked.models or asked.pick(("sgd", "three"), ()), METHODS, "method")


def _places(asked: Options) -> dict[str, str]:
    assert asked.data is not None
    return {"folder": asked.data, "out": str(asked.out.resolve())}


def prepare(asked: Options) -> None:
    """The base model's own samples, and what meta-training makes."""
    assert asked.data is not None
    own_texts(Path(asked.data), asked.out)
    steps = asked.pick(2, 40)
    cells = [
        {"task": "meta-training", "model": name, "dial": keep, "steps": steps, **_places(asked)}
        for name in _names(asked) if METHODS[name].how.startswith("meta")
        for keep in METHODS[name].dial
        if not meta_path(asked.out, name, keep).is_file()
    ]  # fmt: skip
    name = "frontier: meta-training"
    run_cells(cells, work, asked.out / "cells", workers=asked.workers, name=name)


def columns(records: Sequence[Record]) -> list[Column]:
    def at(cost: float) -> Column:
        def text(rows: Sequence[Record]) -> str:
            every = [r for r in records if r.task == rows[0].task]
            return spread(later_at(cost, rows[0].model, every))

        return Column(f"at +{cost:g}", text)

    return [
        Column("method", lambda rows: METHODS[rows[0].model].title),
        *map(at, COSTS),
        Column("seconds to read", lambda rows: f"{statistics.median(r.seconds for r in rows):.0f}"),
    ]


def _task(record: Record) -> str:
    return record.task


def best_first(records: Sequence[Record]) -> list[Record]:
    """The methods by their loss at the second cost."""
    place = {
        (task, name): (task, statistics.mean(later_at(COSTS[1], name, every)), METHODS[name].title)
        for task, every in grouped(records, _task).items()
        for name in {r.model for r in every}
    }
    return sorted(records, key=lambda r: place[r.task, r.model])


def notes(records: Sequence[Record]) -> str:
    """Where all lines begin."""
    lines = []
    for task, every in grouped(records, _task).items():
        starts = [untouched(every, seed) for seed in sorted({r.seed for r in every})]
        before, own = spread([s[0] for s in starts]), statistics.mean(s[1] for s in starts)
        lines.append(f"Base model, {task}: {before} at {own:.3f} on its own kind of text.")
    return "\n".join(lines)


def figure(records: Sequence[Record], path: Path) -> None:
    """Each method's front, mean over excerpts of each setting; a file for each text."""
    from matplotlib import colormaps

    colours = colormaps["tab20"]
    for task, every in grouped(records, _task).items():
        picture, (axes,) = new_figure(
            "Loss on its own kind of text (nats)", "Loss on later text (nats)"
        )
        picture.set_size_inches(9.6, 5.6)
        there = grouped(every, lambda r: r.model)
        for i, name in enumerate(name for name in METHODS if name in there):
            settings = grouped(there[name], lambda r: (r.config["lr"], r.config["dial"]))
            means = [
                (statistics.mean(own), statistics.mean(later))
                for some in settings.values()
                for own, later in [zip(*((r.detail["own"], r.value) for r in some))]
            ]
            first = i == 0  # what all others are measured by
            axes.plot(
                *zip(*front(means)), lw=2.4 if first else 1.1, ms=4, label=METHODS[name].title,
                color="black" if first else colours(i % 20), marker=MARKS[i % len(MARKS)],
            )  # fmt: skip
        own = untouched(every, every[0].seed)[1]
        axes.set_xlim(own - 0.02, own + 0.8)
        picture.legend(loc="outside right upper", frameon=False, fontsize=8)
        write_figure(picture, path.with_stem(f"{path.stem}-{task}"))


EXPERIMENT = Experiment(
    name="frontier", shows="a pretrained model learns a novel: gain against forgetting",
    price=("~2 hours", "–"),
    takes=("data", "only", "models", "seeds", "workers"), device="cpu",
    grid=grid, work=work, prepare=prepare,
    rates=lambda cell: EIGHT if cell["quick"] else rates(METHODS[cell["model"]]),
    quick_rates=(4, 6), chooses="",
    columns=columns, by=lambda r: (r.task, r.model), order=best_first, notes=notes, figure=figure,
    sources=("hf", "experiments/methods.py"),
)  # fmt: skip
