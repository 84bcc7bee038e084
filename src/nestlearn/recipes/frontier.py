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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestlearn.disk import atomic_write
from nestlearn.layers import Level
from nestlearn.recipes.cells import Cell, Tell, commit, run_cells
from nestlearn.recipes.frontier_table import COSTS, draw, table
from nestlearn.recipes.suite import chosen
from nestlearn.recipes.tuned import write

TEXTS = ("novel", "dictionary")
NOVELS = ("pride_and_prejudice", "dracula", "great_expectations")  # one for each seed
OTHER = "middlemarch"  # for meta-training
READ, LATER, WINDOW, BLOCK = 24_576, 4_096, 512, 256  # tokens
EIGHT = (0.0007, 0.0015, 0.003, 0.008, 0.02, 0.05, 0.12, 0.3)
FOUR = (0.002, 0.008, 0.03, 0.12)

Hook = Callable[["Reader", Any], Any]


@dataclass(frozen=True)
class Method:
    """levels: (chunk, factor on the step size) of each. dial: two values of what `how` says, with
    four step sizes each; without, eight step sizes. options: of `stack_levels`.
    """

    title: str
    levels: tuple[tuple[int, float], ...] = ((BLOCK, 1.0),)
    rule: str = "gd"
    options: dict[str, Any] = field(default_factory=dict)
    how: str = ""
    dial: tuple[float, ...] = ()


TWO, THREE = ((256, 1.0), (1024, 1.0)), ((64, 0.5), (256, 1.0), (1024, 1.0))
METHODS = {
    "sgd": Method("SGD"),
    "pull": Method("SGD, pulled to the base weights", how="half_life", dial=(4096, 16_384)),
    "ewc": Method("EWC", how="ewc", dial=(0.03, 0.3)),
    "depth2": Method("2 levels over the depth", TWO, options={"spread": "depth"}),
    "depth3": Method("3 levels over the depth", THREE, options={"spread": "depth"}),
    "two": Method("2 levels in each block, sequential", TWO),
    "three": Method("3 levels, sequential", THREE),
    "nested": Method("3 levels, nested", THREE, options={"variant": "nested"}),
    "independent": Method("3 levels, independent", THREE, options={"variant": "independent"}),
    "dgd": Method("3 levels, sequential, DGD", THREE, "dgd"),
    "momentum": Method("3 levels, sequential, momentum", THREE, "momentum"),
    "fading": Method(
        "3 levels, independent, the fast ones fade", THREE, options={"variant": "independent"},
        how="fading", dial=(256, 1024),
    ),
    "last": Method("SGD on one block (first, last)", how="layer", dial=(0, -1)),
    "rank": Method("SGD on low-rank deltas (2, 8)", how="rank", dial=(2, 8)),
    "gate": Method("SGD, surprising half / unsurprising half only", how="gate", dial=(1, -1)),
    "scaled": Method("SGD, scaled back at the end", how="scale", dial=(0.3, 0.6)),
    "replay": Method("SGD, replay of own samples", how="replay", dial=(0.125, 0.25)),
    "distill": Method(
        "SGD, distilled from the base model on own samples", how="distill", dial=(1.0, 4.0)
    ),
    "three-replay": Method(
        "3 levels, sequential, replay", THREE, how="replay", dial=(0.125, 0.25)
    ),
    "meta": Method("SGD, step sizes meta-trained", how="meta", dial=(1.0, 4.0)),
    "three-meta": Method("3 levels, step sizes meta-trained", THREE, how="meta", dial=(1.0, 4.0)),
    "meta-starts": Method("SGD, step sizes and start values meta-trained", how="meta-starts",
                          dial=(1.0, 4.0)),
}  # fmt: skip
META_SCALES = (0.5, 1.0, 2.0, 4.0)  # instead of step sizes: the trained ones times these


# ----------------------------------------------------------------------------- model and texts


def base(data: Path) -> Any:
    """A fresh copy of the pretrained model."""
    from nestlearn.recipes.llama2c import load_llama2c

    return load_llama2c(data / "models" / "stories260K.bin")


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


# ------------------------------------------------------------------------------------ a reading


@dataclass
class Reader:
    """One method at one setting, reading one excerpt."""

    model: Any
    method: Method
    lr: float
    dial: float
    own: dict[str, Tensor]
    fisher: list[Tensor] = field(default_factory=list)

    def read(self, ids: Tensor, tell: Tell) -> Any:
        """The memory after the text [1, READ]."""
        memory = self.model.init_memory(1)
        if self.method.how == "ewc":
            self.fisher = fisher(self.model, self.own["replayed"])
        fresh = round(BLOCK * (1 - self.dial)) if self.method.how == "replay" else BLOCK
        for i, part in enumerate(ids.split(fresh, 1)):
            part, mask = self.prepared(part, i, memory)
            _, memory = self.model.learn(part, memory, mask)
            if self.method.how == "ewc":
                memory = self.pulled(memory)
            if self.method.how == "distill":
                memory = self.distilled(memory, i)
            if i % 20 == 0:
                tell(i * fresh / ids.shape[1], "")
        return self.scaled(memory, self.dial) if self.method.how == "scale" else memory

    def prepared(self, part: Tensor, i: int, memory: Any) -> tuple[Tensor, Tensor | None]:
        """The block's tokens, and which to learn from."""
        if self.method.how == "replay":
            stories = self.own["replayed"]
            rest = BLOCK - part.shape[1]
            return torch.cat([part, stories[i % len(stories)][None, :rest]], 1), None
        if self.method.how == "gate":
            loss = self.dial * self.model.losses(part, memory).nan_to_num(0.0)
            return part, loss >= loss.median()
        return part, None

    def pulled(self, memory: Any) -> Any:
        """EWC: Δ ← Δ / (1 + λ F), F of mean 1: the penalty's step, implicit."""
        level = memory.levels[0]
        if not level.fast:
            return memory
        fast = tuple(
            f._replace(left=f.left / (1 + self.dial * w)) for f, w in zip(level.fast, self.fisher)
        )
        return memory._replace(levels=(level._replace(fast=fast),))

    def distilled(self, memory: Any, i: int) -> Any:
        """A step along KL(base ‖ now) on 4 × 128 tokens of own samples, times the dial."""
        level, stories = memory.levels[0], self.own["replayed"]
        if not level.fast:
            return memory
        some = stories[(4 * i + torch.arange(4)) % len(stories), : BLOCK // 2]
        weights = self.model.effective({0: level.fast})
        leaves = [weights[layer].base.requires_grad_() for layer in self.model.layers]
        with torch.no_grad():
            target = self.model.base(some).logits.log_softmax(-1)
        with torch.enable_grad(), self.model.using(weights):
            now = self.model.base(some).logits.log_softmax(-1)
            loss = F.kl_div(now, target, log_target=True, reduction="sum") / some.numel()
            grads = torch.autograd.grad(loss, leaves)
        step = self.dial * self.lr
        fast = tuple(f._replace(left=f.left - step * g) for f, g in zip(level.fast, grads))
        return memory._replace(levels=(level._replace(fast=fast),))

    def scaled(self, memory: Any, share: float) -> Any:
        """Every delta times `share`."""
        levels = tuple(
            level._replace(fast=tuple(f._replace(left=share * f.left) for f in level.fast))
            for level in memory.levels
        )
        return memory._replace(levels=levels)


def stacked(data: Path, method: Method, lr: float, dial: float) -> Any:
    """The model stacked for that method and setting."""
    from nestlearn.hf.stack import stack_levels

    options = {"window": WINDOW, **method.options}
    levels = [
        Level(chunk=chunk, lr=min(0.99, factor * lr), rule=method.rule, bound=None)
        for chunk, factor in method.levels
    ]
    match method.how:
        case "half_life":
            levels = [replace(level, half_life=int(dial)) for level in levels]
        case "fading":
            levels = [replace(level, half_life=int(dial)) for level in levels[:-1]] + levels[-1:]
        case "layer":
            options["layers"] = [int(dial) % 5]
        case "rank":
            options["rank"] = int(dial)
    return stack_levels(base(data), levels, **options)


def fisher(model: Any, stories: Tensor) -> list[Tensor]:
    """The diagonal Fisher information of every layer's weights on own samples, of mean 1."""
    from nestlearn.hf.families import kernel

    weights = [kernel(layer) for layer in model.layers]
    sums = [torch.zeros_like(w) for w in weights]
    for story in stories.split(1):
        with torch.enable_grad():
            logits = model.base(story).logits[0, :-1]
            loss = F.cross_entropy(logits, story[0, 1:], reduction="sum")
            grads = torch.autograd.grad(loss, weights)
        for total, g in zip(sums, grads):
            total += g.square()
    mean = torch.cat([s.flatten() for s in sums]).mean()
    return [s / mean for s in sums]


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
    only: of TEXTS. models: of METHODS. quick: two methods, two settings, one seed.
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


def settings(method: Method, quick: bool = False) -> list[tuple[float, float]]:
    """(step size, dial) of each of the eight runs."""
    if quick:
        return [(lr, 0.0) for lr in EIGHT[4:6]]
    if not method.dial:
        return [(lr, 0.0) for lr in EIGHT]
    scales = META_SCALES if method.how.startswith("meta") else FOUR
    return [(lr, dial) for dial in method.dial for lr in scales]
