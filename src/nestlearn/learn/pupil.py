"""The level of a memory that studies: what a step costs it, and how it moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.captured import Captured
from nestlearn.hf.anchor import Anchor
from nestlearn.hf.lending import Factors, Weights, lend
from nestlearn.hf.plan import StackMemory
from nestlearn.hf.stack import StackedModel
from nestlearn.hf.writes import Fast, limit
from nestlearn.layers.streaming import wide

from .answers import Example, Frame, apart, divergence, predicted


class Pupil:
    """One level's factors, moved by Adam, while the other levels stay as they are.

    held: what the model is held to, in every second step. text: the weight of the next tokens of
    `ids`. frames: shapes; what has one is captured as a CUDA graph, for a step of a small model is
    thousands of kernels that take longer to launch than to run.
    """

    def __init__(
        self, model: StackedModel, before: StackMemory, level: int, lr: float, *,
        drift: float | None = None, held: Anchor | None = None, text: float = 0.0,
        ids: Tensor | None = None,
    ):  # fmt: skip
        self.model, self.before, self.level, self.lr = model, before, level, lr
        self.held, self.text, self.ids = held, text, ids
        self.frames: dict[str, Frame] = {}
        self.graphs: dict[str, Captured] = {}
        self.others = model.fasts(before)
        start = _copies(self.others.pop(level, ()) or model.start(level, 1))
        self.flat = nn.ParameterList(w for pair in start for w in pair if w is not None)
        numbers = iter(self.flat)
        self.fast: Fast = tuple(
            Factors(*(next(numbers) for w in p if w is not None)) for p in start
        )
        self.adam = torch.optim.Adam(self.flat, lr)
        self.bound = model.pace(level, drift).bound
        self.low = model.config.rank is not None
        with torch.no_grad():  # what does not learn is added to the base once
            self.rest = model.effective(self.others, dense=True) if self.low else {}

    def weights(self) -> Weights:
        """Of all levels, as they are now."""
        if not self.low:
            return self.model.effective({**self.others, self.level: self.fast})
        own = self.model.effective({self.level: self.fast})
        return self.rest | {
            layer: self.rest[layer]._replace(added=lent.added) if layer in self.rest else lent
            for layer, lent in own.items()
        }

    def memory(self) -> StackMemory:
        """A copy of the memory as it is now, within its bounds."""
        fast = tuple(limit(pair, high) for pair, high in zip(_copies(self.fast), self.bound))
        i, levels = self.level, self.before.levels
        level = levels[i]._replace(fast=fast, velocity=(), writes=levels[i].writes + 1)
        return self.before._replace(levels=(*levels[:i], level, *levels[i + 1 :]))

    def learn(self, examples: list[Example], step: int, turn: int, share: float) -> None:
        """A step of so much of the rate, from questions that are asked in the way of this turn."""
        parts = [self.gradients("answers", examples, turn)]
        if self.text and self.ids is not None and self.ids.shape[1] > 1:
            parts.append(self._gradients(self.text * self._next_tokens(self.ids, step)))
        if self.held is not None and step % 2 == 0:
            parts.append(self._pull(self.held, self.held.texts(step // 2).to(self.flat[0].device)))
        self.move(parts, share)

    def gradients(self, name: str, examples: list[Example], turn: int = 0) -> list[Tensor]:
        """Of the divergence of these examples; in the frame of that name, if there is one."""
        if name not in self.frames:
            return self._gradients(divergence(self.model, self.weights(), examples, turn))
        frame = self.frames[name]

        def run(
            ids: Tensor, mask: Tensor, where: Tensor, counts: Tensor, thought: Tensor
        ) -> Tensor:
            with lend(self.weights()):
                now = predicted(self.model, ids, mask, where, frame.longest)
            return apart(now, counts, thought)

        return self._replay(name, run, *frame.fill(examples, turn))

    def fits(self, name: str, frame: Frame) -> None:
        """Capture what has that name, in a frame that this one and earlier ones fit into."""
        old = self.frames.get(name, frame)
        frame = Frame(*map(max, old, frame))
        if self.frames.get(name) != frame:
            self.frames[name] = frame
            self.graphs.pop(name, None)

    def move(self, parts: list[list[Tensor]], share: float) -> None:
        """A step of Adam along the sum of gradients, at so much of the rate."""
        for w, *some in zip(self.flat, *parts):
            w.grad = sum(some[1:], some[0])
        self.adam.param_groups[0]["lr"] = self.lr * share
        self.adam.step()

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        # not backward(): the base model's own parameters may ask for gradients, too
        return list(torch.autograd.grad(loss, list(self.flat)))

    def _replay(self, name: str, loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        def run(*given: Tensor) -> Tensor:
            value = loss(*given)
            for w, grad in zip(self.flat, self._gradients(value)):
                w.grad = grad
            return value.detach()

        if name not in self.graphs:
            self.graphs[name] = Captured(self.flat, run, *inputs)
        self.graphs[name](*inputs)
        return [w.grad for w in self.flat if w.grad is not None]

    def _pull(self, held: Anchor, texts: Tensor) -> list[Tensor]:
        """Of twice the anchor's divergence: it stands in every second step."""

        def loss(given: Tensor) -> Tensor:
            return 2 * held.apart(self.model, self.weights(), given, 1)[0]

        return self._replay("held", loss, texts) if self.frames else self._gradients(loss(texts))

    def _next_tokens(self, ids: Tensor, step: int) -> Tensor:
        part = ids[:, window(ids, self.model.window, step)]
        with lend(self.weights()):
            logits = self.model.base(input_ids=part, use_cache=False).logits
        return F.cross_entropy(wide(logits[0, :-1]), part[0, 1:])


def window(ids: Tensor, size: int, step: int) -> slice:
    """The window of a long text that is read in a step, the windows in turn."""
    count = -(-ids.shape[1] // size)
    at = min(step % count * size, max(ids.shape[1] - size, 0))
    return slice(at, at + size)


def _copies(fast: Fast) -> Fast:
    """The same numbers, apart from any graph."""
    return tuple(
        Factors(left.detach().clone(), None if right is None else right.detach().clone())
        for left, right in fast
    )
