"""Ways to learn a text that may forget less, for the frontier: each method at one setting."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.experiments.cells import Tell
from nestlearn.hf.anchor import Anchor

BLOCK, WINDOW = 256, 512  # tokens: of a write, and read at once
EIGHT = (0.0007, 0.0015, 0.003, 0.008, 0.02, 0.05, 0.12, 0.3)
FOUR = (0.002, 0.008, 0.03, 0.12)


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
    "out": Method("SGD on the MLPs' last matrices", options={"learns": "out"}),
    "skip": Method("the same, by the last block's gradient",
                   options={"objective": "skip", "learns": "out"}),
    "rank": Method("SGD on low-rank deltas (2, 8)", how="rank", dial=(2, 8)),
    "gate": Method("SGD, surprising half / unsurprising half only", how="gate", dial=(1, -1)),
    "scaled": Method("SGD, scaled back at the end", how="scale", dial=(0.3, 0.6)),
    "replay": Method("SGD, replay of own samples", how="replay", dial=(0.125, 0.25)),
    "anchor": Method("SGD, anchored to own samples", how="anchor", dial=(1.0, 4.0)),
    "three-anchor": Method("3 levels, sequential, anchored", THREE, how="anchor", dial=(1.0, 4.0)),
    "three-replay": Method(
        "3 levels, sequential, replay", THREE, how="replay", dial=(0.125, 0.25)
    ),
    "meta": Method("SGD, step sizes meta-trained", how="meta", dial=(1.0, 4.0)),
    "three-meta": Method("3 levels, step sizes meta-trained", THREE, how="meta", dial=(1.0, 4.0)),
    "meta-starts": Method("SGD, step sizes and start values meta-trained", how="meta-starts",
                          dial=(1.0, 4.0)),
}  # fmt: skip
META_SCALES = (0.5, 1.0, 2.0, 4.0)  # instead of step sizes: the trained ones times these


def rates(method: Method) -> tuple[float, ...]:
    """The step sizes of each value of its dial: eight runs in all."""
    if not method.dial:
        return EIGHT
    return META_SCALES if method.how.startswith("meta") else FOUR


def base(data: Path) -> Any:
    """A fresh copy of the pretrained model."""
    from nestlearn.hf.llama2c import load_llama2c

    return load_llama2c(data / "models" / "stories260K.bin")


def stacked(data: Path, method: Method, lr: float, dial: float) -> Any:
    """The model stacked for that method and setting."""
    from nestlearn import DeltaLevel, stack_levels

    options = {"window": WINDOW, **method.options}
    levels = [
        DeltaLevel(chunk=chunk, lr=min(0.99, factor * lr), rule=method.rule, bound=None)
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
    from nestlearn.hf.lending import kernel

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


@dataclass
class Reader:
    """One method at one setting, reading one excerpt."""

    model: Any
    method: Method
    dial: float
    own: dict[str, Tensor]
    fisher: list[Tensor] = field(default_factory=list)

    def read(self, ids: Tensor, tell: Tell) -> Any:
        """The memory after the text [1, READ]."""
        memory, how, anchor, fresh = self.model.init_memory(1), self.method.how, None, BLOCK
        if how == "ewc":
            self.fisher = fisher(self.model, self.own["replayed"])
        if how == "anchor":
            anchor = Anchor(self.own["replayed"][:, : BLOCK // 2], self.dial)
        if how == "replay":
            fresh = round(BLOCK * (1 - self.dial))
        for i, part in enumerate(ids.split(fresh, 1)):
            part, mask = self.prepared(part, i, memory)
            _, memory = self.model.learn(part, memory, mask, anchor=anchor)
            if how == "ewc":
                memory = self.pulled(memory)
            if i % 20 == 0:
                tell(i * fresh / ids.shape[1], "")
        return self.scaled(memory) if how == "scale" else memory

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

    def scaled(self, memory: Any) -> Any:
        """Every delta times the dial."""
        levels = tuple(
            level._replace(fast=tuple(f._replace(left=self.dial * f.left) for f in level.fast))
            for level in memory.levels
        )
        return memory._replace(levels=levels)
