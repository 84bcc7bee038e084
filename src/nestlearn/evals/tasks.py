"""What every benchmark makes: examples with targets; how models enter, and how they are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # a target that neither the loss nor the metric sees; torch's default, too
METRICS = ("sequence", "token")
VALIDATION = 1_000_003  # on top of the seed of a generator: data to choose by


@dataclass(frozen=True)
class Examples:
    """inputs, targets: int64 [N, T]; targets are IGNORED where nothing is asked.

    ValueError unless the two have one shape and every example asks something.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.inputs.shape != self.targets.shape:
            raise ValueError(
                f"inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)}: give "
                "both as [N, T]"
            )
        if not (self.targets != IGNORED).any(1).all():
            raise ValueError("an example has no target: give each at least one position to answer")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> Tensor:
        """Tokens up to the last target [N]: what follows cannot count for a causal model."""
        T = self.targets.shape[1]
        return ((self.targets != IGNORED) * torch.arange(1, T + 1)).amax(1)

    def rows(self, index: Tensor) -> Examples:
        """Those examples, cut after their last target."""
        length = int(self.lengths[index].max())
        return Examples(self.inputs[index, :length], self.targets[index, :length])

    def batches(self, size: int) -> Iterator[Examples]:
        """All examples, shortest first, at most `size` at once."""
        for index in self.lengths.argsort(stable=True).split(size):
            yield self.rows(index)


@dataclass(frozen=True)
class Task:
    """One task of a benchmark: data, and how it is scored.

    vocab: input ids are below it. classes: targets are. tests: sets by name. metric: "sequence"
    (an example counts if every target is met) or "token" (the share of all targets met). causal:
    False where the model reads the whole input before it answers. validation: sets of the same
    names, of another seed of the generator, by which rates and checkpoints are chosen.
    """

    benchmark: str
    name: str
    vocab: int
    classes: int
    train: Examples
    tests: dict[str, Examples]
    metric: str
    causal: bool = True
    validation: dict[str, Examples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r}: use one of {METRICS}")
        held = {f"validation {name}": part for name, part in self.validation.items()}
        for name, part in {"train": self.train, **self.tests, **held}.items():
            asked = part.targets[part.targets != IGNORED]
            for what, ids, end in (("input", part.inputs, "vocab"), ("target", asked, "classes")):
                low, high = int(ids.min()), int(ids.max())
                if low < 0 or high >= getattr(self, end):
                    wrong = low if low < 0 else high
                    raise ValueError(f"{name}: {what} {wrong} is not in [0, {end})")


class Scorable(Protocol):
    """Anything with `logits(ids int64 [B, T]) -> [B, T, V]`, causal unless the task says so."""

    def logits(self, ids: Tensor) -> Tensor:
        """Scores of the classes at every position."""
        ...


class Logits(nn.Module):
    """A module that returns logits, (logits, state, ...) or an object with `.logits`, as Scorable.

    So a plain nn.Module, `nestlearn.HopeLM` and a Hugging Face causal LM enter alike.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def logits(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> [B, T, V]; ValueError if the module returns no such thing."""
        out: Any = self.module(ids)
        out = getattr(out, "logits", out)
        out = out[0] if isinstance(out, tuple) else out
        if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != ids.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.module).__name__} returned {got} for ids {tuple(ids.shape)}: return "
                "logits [B, T, V], alone, first of a tuple, or as .logits"
            )
        return out

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)


@torch.no_grad()
def predict(model: Scorable, ids: Tensor, classes: int) -> Tensor:
    """The likeliest of the first `classes` classes at each position: int64 [B, T]."""
    return model.logits(ids)[..., :classes].argmax(-1)


def accuracy(predictions: Tensor, targets: Tensor, metric: str) -> float:
    """Percent right, of sequences or of tokens: int64 [N, T] both, IGNORED targets left out."""
    right, of = _counts(predictions, targets, metric)
    return 100.0 * right / of


def _counts(predictions: Tensor, targets: Tensor, metric: str) -> tuple[int, int]:
    """How many are right, of how many."""
    asked = targets != IGNORED
    right = (predictions == targets) & asked
    if metric == "sequence":
        return int((right == asked).all(1).sum()), len(targets)
    if metric == "token":
        return int(right.sum()), int(asked.sum())
    raise ValueError(f"metric={metric!r}: use one of {METRICS}")


def score(
    model: Scorable, task: Task, *, sets: Mapping[str, Examples] | None = None, batch: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, float]:  # fmt: skip
    """Percent right on each of the sets (default: the task's tests).

    The caller puts the model into eval mode.
    """
    scores = {}
    for name, test in (task.tests if sets is None else sets).items():
        right = of = 0
        for part in test.batches(batch):
            said = predict(model, part.inputs.to(device), task.classes).cpu()
            hits, asked = _counts(said, part.targets, task.metric)
            right, of = right + hits, of + asked
        scores[name] = 100.0 * right / of
    return scores


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The generator of one part of the data: other parts drawn more or less do not disturb it."""
    keys = [b for name in names for b in str(name).encode() + b"/"]
    return np.random.default_rng([seed, *keys])


def examples(inputs: np.ndarray, targets: np.ndarray) -> Examples:
    return Examples(torch.from_numpy(inputs), torch.from_numpy(targets))


def padded(rows: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Examples:
    """Rows of several lengths, padded on the right by input 0 and IGNORED."""
    inputs, asked = ([torch.from_numpy(row).long() for row in some] for some in (rows, targets))
    return Examples(
        pad_sequence(inputs, batch_first=True),
        pad_sequence(asked, batch_first=True, padding_value=IGNORED),
    )
