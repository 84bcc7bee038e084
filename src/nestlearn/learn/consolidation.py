"""Study: a memory takes over what a text says, and not only its words.

Reading teaches a model the text's next tokens; asked what the text says, it does not know. So it
asks itself questions about the text and answers them with the text before it, and is asked about
the words of each sentence, which that sentence answers. Then one level learns to give every answer
without the text: mostly its very tokens, and for the rest what the model thinks of them with the
text. It is held to what the model says by itself, and to the answers of earlier studies. This is
the consolidation that the paper asks for: the slow level learns from what the fast context has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.hf.anchor import Anchor
from nestlearn.hf.door import evaluating
from nestlearn.hf.plan import StackMemory
from nestlearn.hf.stack import StackedModel

from .answers import FIRM, Example, Frame, firm, mean, thoughts
from .pupil import Pupil
from .questions import Question, Tell

WARMUP = 4  # steps
HELD = 16  # own samples of the base model that a study is held to, and as many that judge it


@dataclass(frozen=True)
class StudyConfig:
    """How a text is studied.

    questions: that the model asks itself, at most. words: of each sentence, about which it is asked
    (0: none). epochs: rounds of them; it ends sooner when the questions kept apart, the share
    `held_out`, have not become better for two. batch: questions of one step. lr: Adam's, which
    falls to nothing. firm: the share of what is to be thought of an answer that is the answer
    itself; the rest is what the model thinks of it with the text. text: the weight of the text's
    own next tokens. anchor: that of the divergence from the base model on its own samples (0:
    none); most: that divergence, in nats a token and on samples that nothing was held to, above
    which the study is undone (a guess): a memory can study so much that the model says nothing
    right any more. rehearse: questions of
    earlier studies in each step beside the batch. level: the one that learns (None: the slowest).
    cuda_graph: on CUDA, capture a step as a graph, unless the text's own tokens are learned, too.
    """

    questions: int = 24
    words: int = 3
    epochs: int = 6
    batch: int = 8
    lr: float = 4e-3
    firm: float = FIRM
    text: float = 0.0
    anchor: float = 2.0
    most: float = 0.5
    rehearse: int = 4
    held_out: float = 0.125
    level: int | None = None
    seed: int = 0
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        for name, least in (("questions", 0), ("words", 0), ("epochs", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give {least} or more")
        if not self.questions + self.words:
            raise ValueError("questions=0, words=0: nothing would be asked, give one of them")
        if not min(self.lr, self.most) > 0 or min(self.text, self.anchor, self.rehearse) < 0:
            raise ValueError("lr and most are above 0; text, anchor and rehearse are 0 or more")
        for name in ("firm", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share in [0, 1)")


class Epoch(NamedTuple):
    """number: rounds made. memory: after the best of them so far. apart: the divergence, in nats a
    token, of the questions kept apart, before anything was studied and now; of all questions where
    none is kept apart. ended: whether it was the last. strayed: then, the divergence of that memory
    from the base model, on some of its own samples, in nats a token (None: there is no anchor).
    """

    number: int
    memory: StackMemory
    apart: tuple[float, float]
    ended: bool
    strayed: float | None


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
    asked = firm(thoughts(model, tokenizer, questions, tell), config.firm)
    mine, apart = _parted(asked, config.held_out)
    held, judge = _anchors(model, config, anchor)
    per_round = -(-len(mine) // config.batch)
    steps, step = per_round * config.epochs, per_round * done
    again = min(len(earlier), steps * config.rehearse)  # each once, where there are so many
    drawn = random.Random(config.seed).sample(earlier, again)
    pupil = Pupil(
        model, memory, level_of(model, config.level), config.lr,
        drift=drift, held=held, text=config.text, ids=ids,
    )  # fmt: skip
    known = firm(thoughts(model, tokenizer, drawn, tell, pupil.weights()), config.firm)
    least = min(config.rehearse, len(known))
    if ids.is_cuda and config.cuda_graph and not config.text:
        pupil.fits("answers", Frame.of(mine + known, min(config.batch, len(mine)) + least))
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model.base):
        first = best = mean(model, pupil.weights(), apart)
        kept, since = memory, 0
        for number in range(done + 1, config.epochs + 1):
            turn = config.seed + number
            for some in _batches(mine, config.batch, turn):
                tell("studying", step, steps)
                old = [known[(step * least + n) % len(known)] for n in range(least)]
                share = min(1, (step + 1) / WARMUP) * (1 - step / steps)
                pupil.learn(some + old, step, turn, share)
                step += 1
            value = mean(model, pupil.weights(), apart)
            since = 0 if value < best else since + 1
            if value < best:
                best, kept = value, pupil.memory()
            ended = number == config.epochs or since == 2
            strayed = None
            if ended and judge is not None:  # in the middle, at large rates, it is further away
                strayed = _strayed(model, kept, judge)
            if not each(Epoch(number, kept, (first, best), ended, strayed)) or ended:
                break


def _anchors(
    model: StackedModel, config: StudyConfig, given: Anchor | None
) -> tuple[Anchor | None, Anchor | None]:
    """What a study is held to, and own samples apart from it, by which it is judged; none where it
    is held to nothing.
    """
    if given is None and not config.anchor:
        return None, None
    own = Anchor.sampled(
        model, HELD if given else 2 * HELD, 48, strength=config.anchor or 1, rows=1,
        seed=config.seed,
    )  # fmt: skip
    held = given or replace(own, samples=own.samples[:HELD])
    return held, replace(own, samples=own.samples[-HELD:])


@torch.no_grad()
def _strayed(model: StackedModel, memory: StackMemory, judge: Anchor) -> float:
    """KL(base ‖ now) in nats a token, on texts that nothing was held to: those that something was
    held to, each in a step or two of its own, end further away.
    """
    texts = judge.samples.to(model.lr[0].device)
    return float(judge.apart(model, model.weights(memory), texts, 1).mean()) / judge.strength


def _parted(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Those to learn from, and a share apart to measure by; the same where too few are there."""
    every = round(1 / share) if share else 0
    mine = [e for n, e in enumerate(examples) if not every or n % every]
    return mine or examples, examples[::every] if every else mine


def _batches(examples: list[Example], size: int, seed: int) -> list[list[Example]]:
    """In another order for each seed, those of about one length together: padding costs."""
    rng = random.Random(seed)
    length = {id(e): len(e.way(seed)) + len(e.answer) + rng.uniform(0, 8) for e in examples}
    order = sorted(examples, key=lambda e: length[id(e)])
    batches = [order[a : a + size] for a in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches
