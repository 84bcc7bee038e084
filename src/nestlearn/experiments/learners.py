"""Pretrained models that take in groups of texts with an answer each, one group after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nestlearn.evals.classes import Group, Text
from nestlearn.experiments.pretrained import opened

RANK, BATCH, EPOCHS, EWC, KEPT = 8, 32, 2, 1e4, 5
WIDE = 256  # texts that are read side by side


class Reader:
    """A pretrained model that reads texts and answers, and what a row makes of it.

    ask: what stands before an answer. longest: tokens of one. rows: that are answered side by side.
    bytes: what is carried from group to group.
    """

    ask, longest, rows, epochs = "{text}\nClass:", 10, WIDE, EPOCHS
    bytes = 0.0

    def __init__(self, folder: Path, device: str, how: str, dial: float, seed: int):
        self.how, self.dial, self.draw = how, dial, random.Random(seed)
        self.base, self.words = self.opened(folder, device)
        self.labels: list[str] = []

    def opened(self, folder: Path, device: str) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return opened(folder, device)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def learn(self, group: Group) -> None:
        """Take in the classes of a group and their texts."""
        raise NotImplementedError

    def said(self, texts: Sequence[str]) -> list[str]:
        """The class of each text."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Its ids, without those that begin a text."""
        return self.words.encode(text, add_special_tokens=False)

    def decoded(self, prompts: Sequence[list[int]]) -> list[str]:
        """The first line that follows each prompt."""
        from nestlearn.learn.questions import decode

        said = decode(
            self.base, self.words, prompts, self.longest, "", lambda *_: None, rows=self.rows
        )
        return [text.split("\n")[0].strip() for text in said]

    @torch.no_grad()
    def hidden(self, texts: Sequence[str]) -> Tensor:
        """The mean of the last hidden states of each text [N, D]."""
        found = []
        for a in range(0, len(texts), WIDE):
            ids, mask = padded([self.encode(text) for text in texts[a : a + WIDE]])
            ids, mask = ids.to(self.base.device), mask.to(self.base.device)
            out = self.base(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            h = out.hidden_states[-1] * mask[..., None]
            found.append(h.sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(found)

    def batches(self, texts: Sequence[Any]) -> list[list[Any]]:
        """The texts, in another order each of EPOCHS times."""
        return [
            order[a : a + BATCH]
            for order in (self.draw.sample(texts, len(texts)) for _ in range(self.epochs))
            for a in range(0, len(order), BATCH)
        ]


def padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows as ids and mask [N, T]; padded behind."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, batch_first=True), pad_sequence(mask, batch_first=True)


class Learner(Reader):
    """Low-rank deltas on the MLPs that learn to name the class: by Adam, by levels, or both.

    levels: a stream of texts with their class, of which the class is learned. study: the levels,
    and then Adam on the slowest, held to what the memory said before of KEPT texts of each earlier
    class, and to that class; unread: the same, where the levels do not read. ewc: squared gradients
    of earlier groups weigh how far each number may move.
    """

    def __init__(self, *given: Any):
        from nestlearn import DeltaLevel, stack_levels

        super().__init__(*given)
        rate = self.dial if self.how in ("levels", "depth") else 0.1
        levels = [DeltaLevel(chunk, lr=rate, rule="gd") for chunk in (256, 1024)]
        spread = "depth" if self.how == "depth" else "block"
        self.studies = self.how in ("study", "unread")
        self.stacked = stack_levels(
            self.base, levels, rank=RANK, window=256, spread=spread, cache_dtype="bfloat16"
        )
        self.memory = self.stacked.init_memory(1)
        self.kept: list[Text] = []
        self.pupil: Any = None
        self.importance: list[tuple[Tensor, Tensor]] = []  # of each number, and where it stood

    def learn(self, group: Group) -> None:
        self.labels += group.labels
        if self.how in ("levels", "depth", "study"):
            self._read(group)
        if self.how not in ("levels", "depth"):
            self._train(group)
        self.kept += self.keep(group)
        memory = sum(
            w.numel() * w.element_size()
            for level in self.memory.levels for fast in level.fast for w in fast if w is not None
        )  # fmt: skip
        beside = sum(2 * w.numel() * 4 for w, _ in self.importance)
        texts = sum(len(f"{t.text}{t.label}".encode()) for t in self.kept)
        self.bytes = float(memory + beside + texts * (self.how == "replay" or self.studies))

    def keep(self, group: Group) -> list[Text]:
        """What stays of a group's texts, for replay and for study."""
        by = {label: [t for t in group.train if t.label == label] for label in group.labels}
        return [t for texts in by.values() for t in texts[:KEPT]]

    def _pair(self, text: Text) -> tuple[list[int], list[int]]:
        return self.encode(self.ask.format(text=text.text)), self.encode(f" {text.label}\n")

    def _read(self, group: Group) -> None:
        ids: list[int] = []
        mask: list[bool] = []
        for text in self.draw.sample(group.train, len(group.train)):
            asked, label = self._pair(text)
            ids += asked + label
            mask += [False] * len(asked) + [True] * len(label)
        device = self.base.device
        self.memory = self.stacked.learn(
            torch.tensor([ids], device=device), self.memory, torch.tensor([mask], device=device)
        )[1]

    def _train(self, group: Group) -> None:
        from nestlearn.learn.answers import Frame, firm, think

        held = [self._example(text) for text in self.kept * self.studies]
        held = firm(think(self.stacked, self.stacked.weights(self.memory), held))
        texts = list(group.train) + self.kept * (self.how == "replay")
        train = [self._example(text) for text in texts]
        pupil = self._pupil()
        batches = self.batches(train)
        # every text that is held as often as a new one, as in replay
        size = min(len(held), -(-self.epochs * len(held) // len(batches)))
        if self.base.device.type == "cuda":
            for name, examples, rows in (("new", train, BATCH), ("held", held, size)):
                if examples:
                    pupil.fits(name, Frame.of(examples, min(rows, len(examples))))
        squares = [torch.zeros_like(w) for w in pupil.flat]
        with torch.enable_grad():
            for n, some in enumerate(batches):
                parts = [pupil.gradients("new", some)]
                if self.how == "ewc":
                    for square, grad in zip(squares, parts[0]):
                        square += grad.square() / len(batches)
                    past = zip(self.importance, pupil.flat)
                    if self.importance:
                        parts.append([2 * EWC * i * (w.detach() - at) for (i, at), w in past])
                if held:
                    again = [held[(n * size + i) % len(held)] for i in range(size)]
                    parts.append(pupil.gradients("held", again))
                pupil.move(parts, 1 - n / len(batches))
        if self.how == "ewc":
            old = [i for i, _ in self.importance] or [torch.zeros_like(s) for s in squares]
            self.importance = [
                (a + b, w.detach().clone()) for a, b, w in zip(old, squares, pupil.flat)
            ]
        self.memory = pupil.memory()

    def _pupil(self) -> Any:
        """What trains the slowest level; its rate starts anew, and its graphs stay where the other
        levels do.
        """
        from nestlearn.learn.consolidation import level_of
        from nestlearn.learn.pupil import Pupil

        if self.studies or self.pupil is None:
            level = level_of(self.stacked, None)
            self.pupil = Pupil(self.stacked, self.memory, level, self.dial)
        self.pupil.adam = torch.optim.Adam(self.pupil.flat, self.dial)
        return self.pupil

    def _example(self, text: Text) -> Any:
        """That the class is the only right answer."""
        from nestlearn.learn.answers import Example

        asked, label = self._pair(text)
        return Example([asked], label, torch.tensor(label, device=self.base.device))

    def said(self, texts: Sequence[str]) -> list[str]:
        from nestlearn.hf.lending import lend

        with lend(self.stacked.weights(self.memory)):
            return self.decoded([self.encode(self.ask.format(text=text)) for text in texts])
