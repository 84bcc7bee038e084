"""What a model thinks of answers with a text before the question, and how far it is from it now."""

from __future__ import annotations

from typing import NamedTuple

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


class Example(NamedTuple):
    """The ways to ask a question without the text as ids, the answer's ids, and what the model
    thought of each of these with the text before it: log-probabilities [N, V], in half precision.
    """

    asked: list[list[int]]
    answer: list[int]
    thought: Tensor

    def way(self, turn: int) -> list[int]:
        """How it is asked in a turn."""
        return self.asked[turn % len(self.asked)]


class Rows(NamedTuple):
    """Questions with their answers, side by side. ids, mask [B, T]. Of the N tokens of all answers:
    the place where each is predicted among the last logits [B · (longest + 1)], what was thought of
    it [N, V], and what it counts [N]: 1 in all, each answer alike.
    """

    ids: Tensor
    mask: Tensor
    where: Tensor
    thought: Tensor
    counts: Tensor


@torch.no_grad()
def thoughts(
    model: StackedModel, tokenizer: object, questions: list[Question], tell: Tell,
    weights: Weights | None = None,
) -> list[Example]:  # fmt: skip
    """What the model thinks of each answer's tokens with the passage, if any, before the question;
    weights: those of a memory (None: of the base model).
    """
    base = model.base
    found: dict[int, Example] = {}
    end = _end(base)
    lengths = [(q.passage, len(q.text) + len(q.answer)) for q in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)  # one passage, one length
    with evaluating(base), lend(weights or {}):
        for a in range(0, len(order), ROWS):
            tell("thinking", a, len(order))
            some = order[a : a + ROWS]
            answers = [_encode(tokenizer, questions[i].answer) + end for i in some]
            asked = [prompt(tokenizer, _told(questions[i])) for i in some]
            ids, mask, cache = beside(asked, base, answers)
            logits = _logits(model, ids, mask, cache, max(map(len, answers)))
            for row, (i, answer) in enumerate(zip(some, answers)):
                thought = wide(logits[row, -len(answer) - 1 : -1]).log_softmax(-1)
                ways = [prompt(tokenizer, words) for words in _untold(questions[i], i)]
                found[i] = Example(ways, answer, thought.half())
    return [found[i] for i in range(len(questions))]


def divergence(
    model: StackedModel, weights: Weights, examples: list[Example], turn: int = 0
) -> Tensor:
    """KL(with the text ‖ without it) in nats a token, the mean over the answers; asked in another
    way each turn.
    """
    with lend(weights):
        asked = [e.way(turn) for e in examples]
        ids, mask, cache = beside(asked, model.base, [e.answer for e in examples])
        longest = max(len(e.answer) for e in examples)
        return apart(model, Rows(ids, mask, *_answers(examples, longest)), longest, cache)


def apart(
    model: StackedModel, rows: Rows, longest: int, cache: DynamicCache | None = None
) -> Tensor:
    """The divergence of rows that are laid out, under the weights that are lent."""
    logits = _logits(model, rows.ids, rows.mask, cache, longest)
    now = wide(logits.flatten(0, 1)[rows.where]).log_softmax(-1)
    kl = F.kl_div(now, rows.thought.to(now), log_target=True, reduction="none").sum(-1)
    return (kl * rows.counts).sum()


@torch.no_grad()
def mean(model: StackedModel, weights: Weights, examples: list[Example]) -> float:
    """The divergence of any number of them, each asked in its first way."""
    parts = [examples[a : a + ROWS] for a in range(0, len(examples), ROWS)]
    return sum(float(divergence(model, weights, part)) * len(part) for part in parts) / len(
        examples
    )


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
        given = _answers(examples, self.longest)
        full = self.size * self.longest
        new = [x.new_zeros(full, *x.shape[1:]) for x in given]
        for mine, x in zip(new, given):
            mine[: len(x)] = x
        return Rows(*(torch.tensor(x, device=like.device) for x in (ids, mask)), *new)


def _answers(examples: list[Example], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """where, thought and counts of `Rows`; the answers end the rows."""
    where: list[int] = []
    counts: list[float] = []
    for row, e in enumerate(examples):
        first = (row + 1) * (longest + 1) - 1 - len(e.answer)
        where += range(first, first + len(e.answer))
        counts += [1 / len(e.answer) / len(examples)] * len(e.answer)
    thought = torch.cat([e.thought for e in examples])
    device = thought.device
    return torch.tensor(where, device=device), thought, torch.tensor(counts, device=device)


def _logits(
    model: StackedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None, longest: int
) -> Tensor:
    """The last ones [B, longest + 1, V]."""
    read = 0 if cache is None else cache.get_seq_length()
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, read:]
    given = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
    return model.base(
        input_ids=ids[:, read:], attention_mask=mask, position_ids=places,
        logits_to_keep=longest + 1, **given,
    ).logits  # fmt: skip


def _told(question: Question) -> str:
    if not question.passage:
        return question.text
    return FROM_TEXT.format(text=question.passage, question=question.text)


def _untold(question: Question, i: int) -> list[str]:
    """The ways to ask it, now with, now without being told to be brief."""
    brief = BRIEF * bool(question.passage)
    return [w + brief * ((i + n) % 2) for n, w in enumerate((question.text, *question.ways))]


def _encode(tokenizer: object, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]


def _end(base: object) -> list[int]:
    """What ends a reply: the first of the model's end marks, if it has any."""
    ends = base.generation_config.eos_token_id  # type: ignore[attr-defined]
    first = ends[0] if isinstance(ends, list) else ends
    return [] if first is None else [first]
