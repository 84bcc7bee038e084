"""What a model thinks of answers with a text before the question, and how far it is from it now."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from nestlearn.hf.cache import CACHE
from nestlearn.hf.door import evaluating
from nestlearn.hf.lending import Weights, lend
from nestlearn.hf.stack import StackedModel
from nestlearn.layers.streaming import wide

from .questions import BRIEF, FROM_TEXT, ROWS, Question, Tell, beside, prompt

FIRM = 0.9  # of what is to be thought of an answer: that it is right


class Example(NamedTuple):
    """The ways to ask a question as ids, the answer's ids, and what is to be thought of each of
    these: log-probabilities [N, V] in half precision, as the model thought with the text before it;
    or tokens [N], int64, the only right ones.
    """

    asked: list[list[int]]
    answer: list[int]
    thought: Tensor

    def way(self, turn: int) -> list[int]:
        """How it is asked in a turn."""
        return self.asked[turn % len(self.asked)]


class Rows(NamedTuple):
    """Questions with their answers, side by side. ids, mask [B, T]. Of the N tokens of all answers:
    the place where each is predicted among the last logits [B · (longest + 1)], what it counts: 1
    in all, each answer alike; and what is to be thought of it, [N, V] or [N].
    """

    ids: Tensor
    mask: Tensor
    where: Tensor
    counts: Tensor
    thought: Tensor


class Frame(NamedTuple):
    """A shape that fits all rows of a study: B of T tokens, answers of `longest` tokens."""

    size: int
    length: int
    longest: int

    @classmethod
    def of(cls, examples: list[Example], size: int) -> Frame:
        """That of `size` of these examples, in any way of asking them."""
        lengths = [max(map(len, e.asked)) + len(e.answer) for e in examples]
        return cls(size, max(lengths), max(len(e.answer) for e in examples))

    def fill(self, examples: list[Example], turn: int) -> Rows:
        """Rows of this shape; what is too much counts for nothing."""
        like = examples[0].thought
        texts = [e.way(turn) + e.answer for e in examples]
        texts += texts[:1] * (self.size - len(texts))
        gaps = [self.length - len(text) for text in texts]
        ids = [[0] * gap + text for gap, text in zip(gaps, texts)]
        mask = [[0] * gap + [1] * (self.length - gap) for gap in gaps]
        given = (*_places(examples, self.longest), torch.cat([e.thought for e in examples]))
        new = [x.new_zeros(self.size * self.longest, *x.shape[1:]) for x in given]
        for mine, x in zip(new, given):
            mine[: len(x)] = x
        return Rows(*(torch.tensor(x, device=like.device) for x in (ids, mask)), *new)


@torch.no_grad()
def thoughts(
    model: StackedModel, tokenizer: Any, questions: list[Question], tell: Tell,
    weights: Weights | None = None,
) -> list[Example]:  # fmt: skip
    """What the model thinks of each answer's tokens with the passage, if any, before the question;
    weights: those of a memory (None: of the base model).
    """
    end = _end(model.base)
    lengths = [(q.passage, len(q.text) + len(q.answer)) for q in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)  # one passage, one length
    shown = [
        Example(
            [prompt(tokenizer, _told(questions[i]))],
            tokenizer.encode(questions[i].answer, add_special_tokens=False) + end,
            model.lr[0],
        )
        for i in order
    ]
    found = {}
    for i, example in zip(order, think(model, weights or {}, shown, tell)):
        ways = [prompt(tokenizer, words) for words in _untold(questions[i], i)]
        found[i] = example._replace(asked=ways)
    return [found[i] for i in range(len(questions))]


@torch.no_grad()
def think(
    model: StackedModel, weights: Weights, examples: list[Example], tell: Tell = lambda *_: None
) -> list[Example]:
    """The examples with what the model thinks of the answers under these weights."""
    found = []
    with evaluating(model.base):
        for a in range(0, len(examples), ROWS):
            tell("thinking", a, len(examples))
            some = examples[a : a + ROWS]
            sizes = [len(e.answer) for e in some]
            now = _predicted(model, weights, some, 0).half().split(sizes)
            found += [e._replace(thought=thought.clone()) for e, thought in zip(some, now)]
    return found


def firm(examples: list[Example], share: float = FIRM) -> list[Example]:
    """The examples with this share of what is thought given to the answer's own tokens.

    A distribution that is learned as it is spreads over what the model would say as well; one that
    is learned again and again as it was thought last drifts away from the answer.
    """
    if not share:
        return examples
    found = []
    for e in examples:
        thought = e.thought.float() + math.log(1 - share)
        answer = torch.tensor(e.answer, device=thought.device)[:, None]
        own = thought.gather(1, answer).logaddexp(thought.new_tensor(math.log(share)))
        found.append(e._replace(thought=thought.scatter(1, answer, own).half()))
    return found


def divergence(
    model: StackedModel, weights: Weights, examples: list[Example], turn: int = 0
) -> Tensor:
    """KL(thought ‖ now) in nats a token, the mean over the answers; of tokens that are the only
    right ones −log p. Asked in another way each turn.
    """
    now = _predicted(model, weights, examples, turn)
    _, counts = _places(examples, 0)
    return apart(now, counts, torch.cat([e.thought for e in examples]))


def _predicted(model: StackedModel, weights: Weights, examples: list[Example], turn: int) -> Tensor:
    """The log-probabilities of all tokens of the answers [N, V], what all begin with read once."""
    with lend(weights):
        asked = [e.way(turn) for e in examples]
        ids, mask, cache = beside(asked, model.base, [e.answer for e in examples])
        longest = max(len(e.answer) for e in examples)
        return predicted(model, ids, mask, _places(examples, longest)[0], longest, cache)


def predicted(
    model: StackedModel, ids: Tensor, mask: Tensor, where: Tensor, longest: int,
    cache: DynamicCache | None = None,
) -> Tensor:  # fmt: skip
    """Log-probabilities [N, V] at the places `where` of rows, under the weights that are lent."""
    read = 0 if cache is None else cache.get_seq_length()
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, read:]
    given = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
    logits = model.base(
        input_ids=ids[:, read:], attention_mask=mask, position_ids=places,
        logits_to_keep=longest + 1, **given,
    ).logits  # fmt: skip
    return wide(logits.flatten(0, 1)[where]).log_softmax(-1)


def apart(now: Tensor, counts: Tensor, thought: Tensor) -> Tensor:
    """How far what is thought now [N, V] is from what is to be thought, in nats."""
    if thought.dtype == torch.long:
        each = F.nll_loss(now, thought, reduction="none")
    else:
        each = F.kl_div(now, thought.to(now), log_target=True, reduction="none").sum(-1)
    return (each * counts).sum()


@torch.no_grad()
def mean(model: StackedModel, weights: Weights, examples: list[Example]) -> float:
    """The divergence of any number of them, each asked in its first way."""
    parts = [examples[a : a + ROWS] for a in range(0, len(examples), ROWS)]
    return sum(float(divergence(model, weights, part)) * len(part) for part in parts) / len(
        examples
    )


def _places(examples: list[Example], longest: int) -> tuple[Tensor, Tensor]:
    """where and counts of `Rows`; the answers end the rows."""
    where: list[int] = []
    counts: list[float] = []
    for row, e in enumerate(examples):
        first = (row + 1) * (longest + 1) - 1 - len(e.answer)
        where += range(first, first + len(e.answer))
        counts += [1 / len(e.answer) / len(examples)] * len(e.answer)
    device = examples[0].thought.device
    return torch.tensor(where, device=device), torch.tensor(counts, device=device)


def _told(question: Question) -> str:
    if not question.passage:
        return question.text
    return FROM_TEXT.format(text=question.passage, question=question.text)


def _untold(question: Question, i: int) -> list[str]:
    """The ways to ask it, now with, now without being told to be brief."""
    brief = BRIEF * bool(question.passage)
    return [w + brief * ((i + n) % 2) for n, w in enumerate((question.text, *question.ways))]


def _end(base: Any) -> list[int]:
    """What ends a reply: the first of the model's end marks, if it has any."""
    ends = base.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return [] if first is None else [first]
