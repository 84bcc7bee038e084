"""Study: a memory takes over what a text says, and not only its words.

Reading teaches a model the text's next tokens; asked what the text says, it does not know. So it
asks itself questions about the text and answers them with the text before it, and is asked about
the words of each sentence, which that sentence answers. Then one level learns to think of every
answer without the text what the model thinks of it with the text (a divergence). It is held to
what the model says by itself, and to what it answered to questions of earlier studies. This is the
consolidation that the paper asks for: the slow level learns from what the fast context has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.hf.anchor import Anchor
from nestlearn.hf.cache import CACHE
from nestlearn.hf.door import evaluating
from nestlearn.hf.lending import Factors, Weights, lend
from nestlearn.hf.plan import StackMemory
from nestlearn.hf.stack import StackedModel
from nestlearn.hf.writes import Fast, limit
from nestlearn.layers.streaming import wide

from .questions import BRIEF, FROM_TEXT, ROWS, Question, Tell, beside, prompt

WARMUP = 4  # steps
EARLIER = 64  # questions of earlier studies, at most


@dataclass(frozen=True)
class StudyConfig:
    """How a text is studied.

    questions: that the model asks itself, at most. words: of each sentence, about which it is asked
    (0: none). epochs: rounds of them; it ends sooner when the questions kept apart, the share
    `held_out`, have not become better for two. batch: questions of one step. lr: Adam's, which
    falls to nothing. text: the weight of the text's own next tokens. anchor: that of the divergence
    from the base model on its own samples (0: none). rehearse: questions of earlier studies in each
    step beside the batch. level: the one that learns (None: the slowest).
    """

    questions: int = 24
    words: int = 3
    epochs: int = 6
    batch: int = 8
    lr: float = 4e-3
    text: float = 0.0
    anchor: float = 1.0
    rehearse: int = 4
    held_out: float = 0.125
    level: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("questions", 0), ("words", 0), ("epochs", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give {least} or more")
        if not self.questions + self.words:
            raise ValueError("questions=0, words=0: nothing would be asked, give one of them")
        if not self.lr > 0 or min(self.text, self.anchor, self.rehearse) < 0:
            raise ValueError("lr is above 0; text, anchor and rehearse are 0 or more")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: give a share in [0, 1)")


class Example(NamedTuple):
    """The ways to ask a question without the text as ids, the answer's ids, and what the model
    thought of each of these with the text before it: log-probabilities [N, V], in half precision.
    """

    asked: list[list[int]]
    answer: list[int]
    thought: Tensor


class Epoch(NamedTuple):
    """number: rounds made. memory: after the best of them so far. apart: the divergence, in nats a
    token, of the questions kept apart, before anything was studied and now; of all questions where
    none is kept apart. ended: whether it was the last.
    """

    number: int
    memory: StackMemory
    apart: tuple[float, float]
    ended: bool


def level_of(model: StackedModel, asked: int | None) -> int:
    """The level that studies: the slowest that is written."""
    order = model.config.faster_first()
    if asked is not None:
        model.check_level(asked)
        return asked
    if not order:
        raise ValueError("no level has a chunk, so none is ever written: stack the model with one")
    return order[-1]


def consolidate(
    model: StackedModel, tokenizer: object, memory: StackMemory, questions: list[Question],
    ids: Tensor, config: StudyConfig, tell: Tell, each: Callable[[Epoch], bool], *,
    done: int = 0, drift: float | None = None, anchor: Anchor | None = None,
    earlier: Sequence[Question] = (),
) -> None:  # fmt: skip
    """Let a level of one stream's memory learn the answers, and the text's tokens ids [1, T].

    each: called after every round, with the memory as it is then; whether to go on. done: rounds
    made before. earlier: questions of earlier studies, to be answered as they are now.

    Raises ValueError for a memory of several streams, and without questions.
    """
    if len(memory.context) != 1:
        raise ValueError(f"a memory of {len(memory.context)} streams: select() one to study with")
    if not questions:
        raise ValueError(
            "the model found no question that the text answers: give a longer text, more "
            "questions, or a model that follows instructions"
        )
    mine, apart = _parted(thoughts(model, tokenizer, questions, tell), config.held_out)
    held = anchor or _anchor(model, config)
    drawn = random.Random(config.seed).sample(earlier, min(len(earlier), EARLIER))
    pupil = _Pupil(model, memory, config, drift)
    known = thoughts(model, tokenizer, drawn if config.rehearse else [], tell, pupil.weights())
    least = min(config.rehearse, len(known))
    per_round = -(-len(mine) // config.batch)
    steps, step = per_round * config.epochs, per_round * done
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model.base):
        first = best = _mean(model, pupil.weights(), apart)
        kept, since = memory, 0
        for number in range(done + 1, config.epochs + 1):
            for some in _batches(mine, config.batch, config.seed + number):
                tell("studying", step, steps)
                old = [known[(step * least + n) % len(known)] for n in range(least)]
                loss = _loss(model, pupil.weights(), some + old, ids, held, config, step, number)
                pupil.move(loss, min(1, (step + 1) / WARMUP) * (1 - step / steps))
                step += 1
            value = _mean(model, pupil.weights(), apart)
            since = 0 if value < best else since + 1
            if value < best:
                best, kept = value, pupil.memory()
            ended = number == config.epochs or since == 2
            if not each(Epoch(number, kept, (first, best), ended)) or ended:
                break


class _Pupil:
    """The level of a memory that learns: its factors, moved by Adam."""

    def __init__(
        self, model: StackedModel, before: StackMemory, config: StudyConfig, drift: float | None
    ):
        self.model, self.before = model, before
        self.level, self.lr = level_of(model, config.level), config.lr
        self.others = model.fasts(before)
        self.fast = _copies(self.others.get(self.level) or model.start(self.level, 1))
        self.flat = [w.requires_grad_() for pair in self.fast for w in pair if w is not None]
        self.adam = torch.optim.Adam(self.flat, config.lr)
        self.bound = model.pace(self.level, drift).bound

    def weights(self) -> Weights:
        """Of all levels, as they are now."""
        return self.model.effective({**self.others, self.level: self.fast})

    def move(self, loss: Tensor, share: float) -> None:
        """A step of so much of the rate."""
        self.adam.param_groups[0]["lr"] = self.lr * share
        # not backward(): the base model's own parameters may ask for gradients, too
        for w, grad in zip(self.flat, torch.autograd.grad(loss, self.flat)):
            w.grad = grad
        self.adam.step()

    def memory(self) -> StackMemory:
        """A copy of the memory as it is now, within its bounds."""
        fast = tuple(limit(pair, high) for pair, high in zip(_copies(self.fast), self.bound))
        i, levels = self.level, self.before.levels
        level = levels[i]._replace(fast=fast, velocity=(), writes=levels[i].writes + 1)
        return self.before._replace(levels=(*levels[:i], level, *levels[i + 1 :]))


def _parted(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Those to learn from, and a share apart to measure by; the same where too few are there."""
    every = round(1 / share) if share else 0
    mine = [e for n, e in enumerate(examples) if not every or n % every]
    apart = examples[::every] if every else mine
    return mine or examples, apart


def _loss(
    model: StackedModel, weights: Weights, examples: list[Example], ids: Tensor,
    held: Anchor | None, config: StudyConfig, step: int, number: int,
) -> Tensor:  # fmt: skip
    """The divergence of a step's answers, the text's own tokens, and what the model is held to."""
    loss = divergence(model, weights, examples, config.seed + number)
    if config.text and ids.shape[1] > 1:
        part = ids[:, _window(ids, model.window, step)]
        loss = loss + config.text * _next_tokens(model, weights, part)
    if held is not None and step % 2 == 0:  # as good as half of it in each step
        loss = loss + 2 * held.divergence(model, weights, step // 2, 1)[0]
    return loss


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
    end = _end(tokenizer, base)
    lengths = [(q.passage, len(q.text) + len(q.answer)) for q in questions]
    order = sorted(range(len(questions)), key=lengths.__getitem__)  # one passage, one length
    with evaluating(base), lend(weights or {}):
        for a in range(0, len(order), ROWS):
            tell("thinking", a, len(order))
            some = order[a : a + ROWS]
            answers = [_encode(tokenizer, questions[i].answer) + end for i in some]
            longest = max(map(len, answers))
            asked = [prompt(tokenizer, _told(questions[i])) for i in some]
            ids, mask, cache = beside(asked, base, answers)
            read = cache.get_seq_length()
            out = base(
                input_ids=ids[:, read:], attention_mask=mask, position_ids=_places(mask)[:, read:],
                **{CACHE: cache}, use_cache=True, logits_to_keep=longest + 1,
            )  # fmt: skip
            for row, (i, answer) in enumerate(zip(some, answers)):
                logits = wide(out.logits[row, -len(answer) - 1 : -1])
                found[i] = Example(
                    [prompt(tokenizer, words) for words in _untold(questions[i], i)],
                    answer, logits.log_softmax(-1).half(),
                )  # fmt: skip
    return [found[i] for i in range(len(questions))]


def _told(question: Question) -> str:
    if not question.passage:
        return question.text
    return FROM_TEXT.format(text=question.passage, question=question.text)


def _untold(question: Question, i: int) -> list[str]:
    """The ways to ask it, now with, now without being told to be brief."""
    brief = BRIEF * bool(question.passage)
    return [w + brief * ((i + n) % 2) for n, w in enumerate((question.text, *question.ways))]


def divergence(
    model: StackedModel, weights: Weights, examples: list[Example], turn: int = 0
) -> Tensor:
    """KL(with the text ‖ without it) in nats a token, the mean over the answers; asked in another
    way each turn.
    """
    longest = max(len(e.answer) for e in examples)
    with lend(weights):
        ids, mask, cache = beside(
            [_asked(e, turn) for e in examples], model.base, [e.answer for e in examples]
        )
        read = cache.get_seq_length()
        out = model.base(
            input_ids=ids[:, read:], attention_mask=mask, position_ids=_places(mask)[:, read:],
            **{CACHE: cache}, use_cache=True, logits_to_keep=longest + 1,
        )  # fmt: skip
    total = wide(out.logits.new_zeros(()))
    for row, example in enumerate(examples):
        now = wide(out.logits[row, -len(example.answer) - 1 : -1]).log_softmax(-1)
        apart = F.kl_div(now, example.thought.to(now), log_target=True, reduction="none")
        total = total + apart.sum(-1).mean()
    return total / len(examples)


@torch.no_grad()
def _mean(model: StackedModel, weights: Weights, examples: list[Example]) -> float:
    parts = [examples[a : a + ROWS] for a in range(0, len(examples), ROWS)]
    return sum(float(divergence(model, weights, part)) * len(part) for part in parts) / len(
        examples
    )


def _next_tokens(model: StackedModel, weights: Weights, ids: Tensor) -> Tensor:
    with lend(weights):
        logits = model.base(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(wide(logits[0, :-1]), ids[0, 1:])


def _batches(examples: list[Example], size: int, seed: int) -> list[list[Example]]:
    """In another order for each seed, those of about one length together: padding costs."""
    rng = random.Random(seed)
    length = {id(e): len(_asked(e, seed)) + len(e.answer) + rng.uniform(0, 8) for e in examples}
    order = sorted(examples, key=lambda e: length[id(e)])
    batches = [order[a : a + size] for a in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def _asked(example: Example, turn: int) -> list[int]:
    return example.asked[turn % len(example.asked)]


def _copies(fast: Fast) -> Fast:
    """The same numbers, apart from any graph."""
    return tuple(
        Factors(left.detach().clone(), None if right is None else right.detach().clone())
        for left, right in fast
    )


def _window(ids: Tensor, size: int, step: int) -> slice:
    """The window of a long text that is read in a step, the windows in turn."""
    count = -(-ids.shape[1] // size)
    at = min(step % count * size, max(ids.shape[1] - size, 0))
    return slice(at, at + size)


def _anchor(model: StackedModel, config: StudyConfig) -> Anchor | None:
    if not config.anchor:
        return None
    return Anchor.sampled(model, 16, 48, strength=config.anchor, rows=1, seed=config.seed)


def _places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _encode(tokenizer: object, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]


def _end(tokenizer: object, base: object) -> list[int]:
    """What ends a reply: the first of the model's end marks, if it has any."""
    ends = base.generation_config.eos_token_id  # type: ignore[attr-defined]
    first = ends[0] if isinstance(ends, list) else ends
    return [] if first is None else [first]
