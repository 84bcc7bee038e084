"""Pretrained models that take in groups of texts with an answer each, one group after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals.classes import Group, Text

RANK, BATCH, EPOCHS, EWC, KEPT = 8, 32, 2, 1e4, 5
WIDE = 256  # texts that are read side by side


class Reader:
    """A pretrained model that reads texts and answers, and what a row makes of it.

    ask: what stands before an answer. longest: tokens of one. rows: that are answered side by side.
    bytes: what is carried from group to group.
    """

    ask, longest, rows = "{text}\nClass:", 10, WIDE
    bytes = 0.0

    def __init__(self, folder: Path, device: str, how: str, dial: float, seed: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.how, self.dial, self.draw = how, dial, random.Random(seed)
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.base, self.words = model.to(device).eval(), AutoTokenizer.from_pretrained(
            folder / "model"
        )  # fmt: skip
        self.labels: list[str] = []

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
            ids, mask, _ = padded([(self.encode(text), []) for text in texts[a : a + WIDE]])
            ids, mask = ids.to(self.base.device), mask.to(self.base.device)
            out = self.base(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            h = out.hidden_states[-1] * mask[..., None]
            found.append(h.sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(found)


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with answers as ids, mask and targets [N, T]; padded behind, targets -100 there."""
    longest = max(len(a) + len(b) for a, b in pairs)
    gaps = [longest - len(a) - len(b) for a, b in pairs]
    ids = torch.tensor([a + b + [0] * gap for (a, b), gap in zip(pairs, gaps)])
    mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
    targets = torch.tensor([[-100] * len(a) + b + [-100] * gap for (a, b), gap in zip(pairs, gaps)])
    return ids, mask, targets


class Learner(Reader):
    """Low-rank deltas on the MLPs that learn to name the class: by Adam, by levels, or both.

    levels: a stream of texts with their class, of which the class is learned. study: the levels,
    and then Adam on the slowest, held to what the memory said before of KEPT texts of each earlier
    class. ewc: squared gradients of earlier groups weigh how far each number may move.
    """

    def __init__(self, *given: Any):
        from nestlearn import DeltaLevel, stack_levels

        super().__init__(*given)
        rate = self.dial if self.how in ("levels", "depth") else 0.1
        levels = [DeltaLevel(chunk, lr=rate, rule="gd") for chunk in (256, 1024)]
        spread = "depth" if self.how == "depth" else "block"
        self.stacked = stack_levels(
            self.base, levels, rank=RANK, window=256, spread=spread, cache_dtype="bfloat16"
        )
        self.memory = self.stacked.init_memory(1)
        self.kept: list[Text] = []
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
        self.bytes = float(memory + beside + texts * (self.how in ("replay", "study")))

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
        from nestlearn.learn.consolidation import level_of

        level = level_of(self.stacked, None)
        fasts = self.stacked.fasts(self.memory)
        start = fasts.get(level) or self.stacked.start(level, 1)
        leaves = tuple(
            type(f)(*(w.detach().clone().requires_grad_() for w in f if w is not None))
            for f in start
        )
        flat = [w for f in leaves for w in f if w is not None]
        held = self.kept if self.how == "study" else []
        before = self._logits(self.stacked.effective(fasts), held) if held else None
        train = list(group.train) + self.kept * (self.how == "replay")
        adam = torch.optim.Adam(flat, self.dial)
        squares = [torch.zeros_like(w) for w in flat]
        batches = [
            order[a : a + BATCH]
            for order in (self.draw.sample(train, len(train)) for _ in range(EPOCHS))
            for a in range(0, len(order), BATCH)
        ]
        with torch.enable_grad():
            for n, some in enumerate(batches):
                adam.param_groups[0]["lr"] = self.dial * (1 - n / len(batches))
                weights = self.stacked.effective({**fasts, level: leaves})
                loss = self._loss(weights, some)
                if self.how == "ewc":
                    plain = torch.autograd.grad(loss, flat, retain_graph=True)
                    for square, grad in zip(squares, plain):
                        square += grad.square() / len(batches)
                if before is not None:
                    loss = loss + self._apart(weights, held, before, n)
                for (importance, place), w in zip(self.importance, flat):
                    loss = loss + EWC * (importance * (w - place).square()).sum()
                for w, grad in zip(flat, torch.autograd.grad(loss, flat)):
                    w.grad = grad
                adam.step()
        if self.how == "ewc":
            old = [i for i, _ in self.importance] or [torch.zeros_like(s) for s in squares]
            self.importance = [(a + b, w.detach().clone()) for a, b, w in zip(old, squares, flat)]
        fast = tuple(type(f)(*(w.detach() for w in f if w is not None)) for f in leaves)
        state = self.memory.levels[level]._replace(fast=fast)
        levels = self.memory.levels
        self.memory = self.memory._replace(levels=(*levels[:level], state, *levels[level + 1 :]))

    def _loss(self, weights: Any, some: Sequence[Text]) -> Tensor:
        logits, targets = self._read_pairs(weights, some)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    def _read_pairs(self, weights: Any, some: Sequence[Text]) -> tuple[Tensor, Tensor]:
        from nestlearn.hf.lending import lend

        ids, mask, targets = (x.to(self.base.device) for x in padded([self._pair(t) for t in some]))
        with lend(weights):
            return self.base(input_ids=ids, attention_mask=mask).logits, targets

    @torch.no_grad()
    def _logits(self, weights: Any, held: Sequence[Text]) -> list[Tensor]:
        """What is thought of each token of the classes, by text."""
        found: list[Tensor] = []
        for a in range(0, len(held), BATCH):
            logits, targets = self._read_pairs(weights, held[a : a + BATCH])
            known = targets[:, 1:] != -100
            found += [row[k].log_softmax(-1).half() for row, k in zip(logits[:, :-1], known)]
        return found

    def _apart(
        self, weights: Any, held: Sequence[Text], before: Sequence[Tensor], step: int
    ) -> Tensor:
        some = [(step * BATCH // 2 + i) % len(held) for i in range(min(BATCH // 2, len(held)))]
        logits, targets = self._read_pairs(weights, [held[i] for i in some])
        known = targets[:, 1:] != -100
        parts = [
            F.kl_div(row[k].log_softmax(-1), before[i].to(row), log_target=True, reduction="none")
            .sum(-1)
            .mean()
            for i, row, k in zip(some, logits[:, :-1], known)
        ]
        return torch.stack(parts).mean()

    def said(self, texts: Sequence[str]) -> list[str]:
        from nestlearn.hf.lending import lend

        with lend(self.stacked.weights(self.memory)):
            return self.decoded([self.encode(self.ask.format(text=text)) for text in texts])
