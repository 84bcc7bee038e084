"""Learning against forgetting: what a stacked model gains on a text, and what that costs it.

    nestlearn reproduce frontier --data ../shared/data

The pretrained stories model (260,000 parameters) reads a novel, or a dictionary, once. Measured
afterwards, with the memory held still: the loss on the text's later part, which it has not read,
and the loss on its own kind of text, samples of the base model. A step size alone moves along a
line from "nothing learned" to "all forgotten"; a method is better only if its line lies below. So
every method gets eight settings (step sizes, or step sizes times a dial of its own) on each of
three excerpts, and its line is the best of them at each cost.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestlearn.disk import atomic_write
from nestlearn.recipes.cells import Cell, Tell, commit, run_cells
from nestlearn.recipes.frontier_table import COSTS, draw, table
from nestlearn.recipes.readers import BLOCK, METHODS, Reader, base, settings, stacked
from nestlearn.recipes.suite import chosen
from nestlearn.recipes.tuned import write

TEXTS = ("novel", "dictionary")
NOVELS = ("pride_and_prejudice", "dracula", "great_expectations")  # one for each seed
OTHER = "middlemarch"  # for meta-training
READ, LATER = 24_576, 4_096  # tokens


@cache
def text(data: Path, kind: str, seed: int) -> Tensor:
    """The tokens [1, READ + LATER] of an excerpt; kind may be a novel's name."""
    from nestlearn.recipes.llama2c import Llama2cTokenizer

    tokenizer = Llama2cTokenizer(data / "models" / "tok512.bin")
    if kind == "dictionary":
        raw = unpacked(data / "novel_languages" / "teop_wordlist.jsonl.gz")
        entries = [json.loads(line) for line in raw.splitlines()]
        whole = "\n".join(f"{e['word']} ({e['pos']}): {e['en']}" for e in entries)
    else:
        name = NOVELS[seed % len(NOVELS)] if kind == "novel" else kind
        whole = unpacked(data / "books" / f"{name}.txt.gz")
    size = READ + LATER
    start = torch.Generator().manual_seed(seed)
    at = int(torch.randint(0, max(1, len(whole) - 5 * size), (), generator=start))
    ids = tokenizer.encode(whole[at : at + 5 * size])[1 : size + 1]
    if len(ids) < size:
        raise ValueError(f"{kind}: the excerpt has {len(ids)} tokens, {size} are wanted")
    return torch.tensor([ids])


def unpacked(path: Path) -> str:
    """The text of a gzip file."""
    return gzip.decompress(path.read_bytes()).decode()


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


def work(cell: Cell, tell: Tell, *, data: Path, out: Path) -> dict[str, Any]:
    """One cell: {"later", "own", "before": the same without a memory, "seconds" to read}."""
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
    memory = Reader(model, method, cell["lr"], cell["dial"], own).read(read, tell)
    seconds = time.perf_counter() - began
    after = measure(model, memory, later, own["measured"])
    return {
        "later": after[0], "own": after[1], "before": list(before), "seconds": round(seconds, 2),
        "headline": f"later {before[0]:.3f} → {after[0]:.3f}, own {before[1]:.3f} → {after[1]:.3f}",
        "value": -after[0],
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


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    data: str | None = None,
    only: Sequence[str] = (),
    models: Sequence[str] = (),
    seeds: int = 3,
    workers: int | None = None,
) -> str:
    """Read with every method at every setting; the table, also in out/table.md, with a figure.

    data: the folder with models/stories260K.bin, models/tok512.bin, books/ and novel_languages/.
    only: of TEXTS (default: the novel). models: of METHODS. quick: two methods, two settings, one
    seed.
    """
    if data is None or not (Path(data) / "models" / "stories260K.bin").is_file():
        raise ValueError(f"data={data}: give the folder that holds models/stories260K.bin")
    out.mkdir(parents=True, exist_ok=True)
    own_texts(Path(data), out)
    texts = chosen(only, TEXTS, "text")[: 1 if quick or not only else None]
    names = chosen(models or (("sgd", "three") if quick else ()), tuple(METHODS), "method")
    seeds = 1 if quick else seeds
    run = partial(work, data=Path(data), out=out)
    training: list[Cell] = [
        {"task": "meta-training", "model": name, "dial": keep, "steps": 2 if quick else 40}
        for name in names if METHODS[name].how.startswith("meta") for keep in METHODS[name].dial
    ]  # fmt: skip
    trained = [c for c in training if not meta_path(out, c["model"], c["dial"]).is_file()]
    run_cells(trained, run, out / "cells", workers=workers, name="frontier: meta-training")
    cells: list[Cell] = [
        {"task": kind, "model": name, "lr": lr, "dial": dial, "seed": seed}
        for kind in texts for name in names for lr, dial in settings(METHODS[name], quick)
        for seed in range(seeds)
    ]  # fmt: skip
    done = run_cells(cells, run, out / "cells", workers=workers, name="frontier")
    records = [{**c, **d["result"]} for c, d in zip(cells, done) if d is not None]
    results = {"costs": COSTS, "read": READ, "later": LATER, "quick": quick, "commit": commit()}
    titles = {name: method.title for name, method in METHODS.items()}
    parts = []
    for kind in texts:
        some = [r for r in records if r["task"] == kind]
        parts.append(f"**{kind}**\n\n{table(some, titles)}")
        draw(some, titles, out / f"frontier-{kind}.png")
    return write(out, {**results, "records": records}, "\n\n".join(parts))
