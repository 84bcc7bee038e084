"""A small Hope that takes in groups of texts with an answer each: by its state, or by training.

It is `nestlearn/tiny`, which the package brings: bytes, trained on books, without an instruction
anywhere. What is trained here are all of its weights, on the bytes of the answers. A question has
newlines before it, up to whole chunks, so that no answer depends on what is asked beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn import state as tree
from nestlearn.captured import Captured
from nestlearn.evals import grouped
from nestlearn.evals.classes import Group, Text
from nestlearn.experiments.asked import ROWS, WHOLE, answers, autocast
from nestlearn.experiments.learners import BATCH, EWC, KEPT, Reader, padded
from nestlearn.models.hope import HopeLM
from nestlearn.names import SHIPPED


class OfBytes(Reader):
    """A `Reader` whose model is the small Hope and whose tokens are bytes."""

    longest, rows = 64, 512

    def opened(self, folder: Path, device: str) -> tuple[Any, Any]:
        return HopeLM.from_pretrained(SHIPPED).float().to(device).eval(), None

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def asked(self, text: str) -> bytes:
        """A question, of whole chunks."""
        told = self.ask.format(text=text).encode()
        return told.rjust(-(-len(told) // WHOLE) * WHOLE, b"\n")

    def said(self, texts: Sequence[str]) -> list[str]:
        prompts = [self.asked(text) for text in texts]
        found = [""] * len(texts)
        for same in grouped(range(len(prompts)), lambda i: len(prompts[i])).values():
            for a in range(0, len(same), self.rows):
                some = [prompts[i] for i in same[a : a + self.rows]]
                told = answers(self.base, self.before(len(some)), some, self.longest, ord("\n"))
                for i, text in zip(same[a:], told):
                    found[i] = text.split("\n")[0].strip()
        return found

    def before(self, rows: int) -> Any:
        """The state in which a question is read; None: it is the first that is read."""
        return None

    @torch.no_grad()
    def hidden(self, texts: Sequence[str]) -> Tensor:
        found = []
        for a in range(0, len(texts), ROWS):
            ids, mask = _whole([self.encode(text) for text in texts[a : a + ROWS]])
            with autocast(self.device):
                h = self.base(ids.to(self.device), output="hidden")[0].float()
            keep = mask.to(h)[..., None]
            found.append((h * keep).sum(1) / keep.sum(1))
        return torch.cat(found)


class Carried(OfBytes):
    """A stream of texts with their class is read, as often as the dial says; every question is
    asked of the state that it left.
    """

    state: Any = None

    @torch.no_grad()
    def learn(self, group: Group) -> None:
        for _ in range(int(self.dial)):
            texts = self.draw.sample(group.train, len(group.train))
            told = "".join(f"{self.ask.format(text=t.text)} {t.label}\n\n" for t in texts)
            for part in torch.tensor([self.encode(told)], device=self.device).split(4096, 1):
                with autocast(self.device):
                    _, self.state = self.base(part, self.state, output="hidden")
        self.bytes = float(tree.nbytes(self.state))

    def before(self, rows: int) -> Any:
        if self.state is None:
            return None
        return tree.tree_map(lambda x: x.expand(rows, *x.shape[1:]).contiguous(), self.state)


class Trained(OfBytes):
    """All weights are trained by Adam on each group in turn, by itself, with replay of KEPT texts
    of each earlier class, or held where earlier groups need them (EWC). A model this small reads
    every text twenty times: after two the largest rate is the best.
    """

    epochs = 20

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.kept: list[Text] = []
        self.weights = [w for w in self.base.parameters() if w.requires_grad]
        self.graphs: dict[tuple[int, ...], Captured] = {}
        self.importance: list[tuple[Tensor, Tensor]] = []  # of each number, and where it stood

    def learn(self, group: Group) -> None:
        texts = list(group.train) + self.kept * (self.how == "replay")
        adam = torch.optim.Adam(self.weights, self.dial)
        batches = self.batches(texts)
        squares = [torch.zeros_like(w) for w in self.weights]
        for n, some in enumerate(batches):
            self._gradients(*self._laid(some, BATCH if self.device.type == "cuda" else len(some)))
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            if self.how == "ewc":
                for square, w, (weight, at) in zip(squares, self.weights, self._importance()):
                    if w.grad is not None:
                        square += w.grad.square() / len(batches)
                        w.grad += 2 * EWC * weight * (w.detach() - at)
            for part in adam.param_groups:
                part["lr"] = self.dial * (1 - n / len(batches))
            adam.step()
        if self.how == "ewc":
            self.importance = [
                (old + new, w.detach().clone())
                for (old, _), new, w in zip(self._importance(), squares, self.weights)
            ]
        for label in group.labels:
            self.kept += [t for t in group.train if t.label == label][:KEPT]
        told = sum(len(f"{t.text}{t.label}".encode()) for t in self.kept) * (self.how == "replay")
        beside = sum(8 * w.numel() for w, _ in self.importance)
        self.bytes = float(sum(4 * w.numel() for w in self.weights) + beside + told)

    def _importance(self) -> list[tuple[Tensor, Tensor]]:
        return self.importance or [(torch.zeros_like(w), w.detach()) for w in self.weights]

    def _laid(self, some: Sequence[Text], size: int) -> tuple[Tensor, Tensor]:
        """ids and mask of the answers, filled up to `size` rows: a graph has one shape."""
        asked = [list(self.asked(t.text)) for t in some]
        rows = [a + self.encode(f" {t.label}\n") for a, t in zip(asked, some)]
        rows += rows[:1] * (size - len(rows))
        ids, mask = _whole(rows, one_more=True)
        for row, a in zip(mask, asked):
            row[: len(a)] = 0
        mask[len(some) :] = 0
        return ids.to(self.device), mask.to(self.device)

    def _gradients(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return self._run(ids, mask)
        if ids.shape not in self.graphs:
            self.graphs[ids.shape] = Captured(self.base, self._run, ids, mask)
        return self.graphs[ids.shape](ids, mask)

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Nats a byte of the answers, with fresh gradients in `.grad`."""
        self.base.zero_grad()
        with torch.enable_grad():
            with autocast(self.device):
                logits, _ = self.base(ids[:, :-1])
            nats = F.cross_entropy(logits.mT.float(), ids[:, 1:], reduction="none")
            loss = (nats * mask[:, 1:]).sum() / mask[:, 1:].sum()
            loss.backward()
        return loss.detach()


def _whole(rows: Sequence[list[int]], one_more: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as ids and mask [N, T], padded behind to whole chunks (and one byte more)."""
    ids, mask = padded(rows)
    fill = -(ids.shape[1] - one_more) % WHOLE
    return F.pad(ids, (0, fill)), F.pad(mask, (0, fill))
