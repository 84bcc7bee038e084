"""The level of a memory that studies: what a step costs it, and how it moves."""

from __future__ import annotations

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

from .answers import Example, Frame, Rows, apart, divergence


class Pupil:
    """One level's factors, moved by Adam, while the other levels stay as they are.

    held: what the model is held to, in every second step. text: the weight of the next tokens of
    `ids`. frame: the shape of every step, which is then captured as a CUDA graph: a step of a small
    model is thousands of kernels that take longer to launch than to run.
    """

    def __init__(
        self, model: StackedModel, before: StackMemory, level: int, lr: float, *,
        drift: float | None = None, held: Anchor | None = None, text: float = 0.0,
        ids: Tensor | None = None,
    ):  # fmt: skip
        self.model, self.before, self.level, self.lr = model, before, level, lr
        self.held, self.text, self.ids = held, text, ids
        self.frame: Frame | None = None
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
        texts = self.held.texts(step // 2) if self.held is not None and step % 2 == 0 else None
        if self.frame is not None:
            self._graphed(self.frame.fill(examples, turn), texts)
        else:
            loss = divergence(self.model, self.weights(), examples, turn)
            if self.text and self.ids is not None and self.ids.shape[1] > 1:
                loss = loss + self.text * self._next_tokens(self.ids, step)
            if texts is not None:
                loss = loss + self._pull(texts)
            self._note(loss)
        self.adam.param_groups[0]["lr"] = self.lr * share
        self.adam.step()

    def _note(self, loss: Tensor) -> Tensor:
        # not backward(): the base model's own parameters may ask for gradients, too
        for w, grad in zip(self.flat, torch.autograd.grad(loss, list(self.flat))):
            w.grad = grad
        return loss.detach()

    def _graphed(self, rows: Rows, texts: Tensor | None) -> None:
        """The gradients of both parts, each a graph of its own."""
        longest = self.frame.longest if self.frame else 0

        def answers(*given: Tensor) -> Tensor:
            with lend(self.weights()):
                return self._note(apart(self.model, Rows(*given), longest))

        def pull(given: Tensor) -> Tensor:
            return self._note(self._pull(given))

        self._replay("answers", answers, *rows)
        if texts is None:
            return
        grads = [w.grad for w in self.flat]
        self._replay("pull", pull, texts)
        for w, grad in zip(self.flat, torch._foreach_add([w.grad for w in self.flat], grads)):
            w.grad = grad

    def _replay(self, name: str, run, *inputs: Tensor) -> None:
        if name not in self.graphs:
            self.graphs[name] = Captured(self.flat, run, *inputs)
        self.graphs[name](*inputs)

    def _pull(self, texts: Tensor) -> Tensor:
        """Twice the anchor's: it stands in every second step."""
        assert self.held is not None
        return 2 * self.held.apart(self.model, self.weights(), texts, 1)[0]

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
