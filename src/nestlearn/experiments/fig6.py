"""Figure 6: classes arrive in groups, one after the other; which are still known after the last?

    nestlearn reproduce fig6 --data FOLDER

FOLDER/model is a pretrained model with its tokenizer, as transformers saves it; beside it stand
clinc150/, banking77/ and dbpedia14/ (see `nestlearn.evals.classes`). A text is followed by "Class:"
and the model names the class, among all that were seen; classifiers choose by its hidden states.
Rows of a small Hope are of the one that the package brings (`nestlearn.experiments.small_hope`).
Every row has one dial, of three values, chosen on validation texts of seed 0. A row's bytes are
what it carries from group to group. What trains by Adam reads every text of a group twice, a small
Hope twenty times; levels read it once.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals import classes, grouped
from nestlearn.evals.classes import Group, Text
from nestlearn.experiments import pretrained
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.learners import BATCH, EPOCHS, Learner, Reader
from nestlearn.experiments.provenance import fingerprint
from nestlearn.experiments.small_hope import Carried, OfBytes, Trained
from nestlearn.experiments.tables import detail, mean, model, words
from nestlearn.names import SHIPPED, model_folder

DELTAS = (5e-4, 2e-3, 8e-3)  # Adam's rates
WEIGHTS = (3e-4, 1e-3, 3e-3)  # the same, of all weights of a small model


def grid(asked: Options) -> list[Cell]:
    """A cell for each set and row."""
    sizes = asked.pick({"train": 4, "validation": 1, "test": 2, "most": 2}, {})
    base = pretrained.part(asked)
    found = cells(asked, list(classes.SETS), ROWS, ("set", "row"), **base, sizes=sizes)
    for cell in found:
        if issubclass(ROWS[cell["model"]][0], OfBytes):
            cell["weights"] = fingerprint(model_folder(SHIPPED).glob("*.safetensors"))
    return found


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One order of the classes, learned in one way; accuracy on every group after every group."""
    torch.manual_seed(cell["seed"])
    every = classes.groups(Path(cell["folder"]), cell["task"], cell["seed"], **cell["sizes"])
    kind, how, _ = ROWS[cell["model"]]
    learner = kind(Path(cell["folder"]), cell["device"], how, cell["lr"], cell["seed"])
    if how == "joint":
        together = (sum((getattr(g, f.name) for g in every), ()) for f in fields(Group))
        learner.learn(Group(*together))
    matrix = []
    for n, group in enumerate(every):
        tell(n / len(every), f"group {n + 1}")
        if how != "joint":
            learner.learn(group)
        seen = [told.test for told in every[: n + 1]]
        right = iter(_right(learner, [text for texts in seen for text in texts]))
        matrix.append([sum(islice(right, len(texts))) / len(texts) for texts in seen])
    held = [text for group in every for text in group.validation]
    validation = 100 * sum(_right(learner, held)) / len(held)
    last, accuracy = matrix[-1], 100 * statistics.fmean(matrix[-1])
    earlier = range(len(matrix) - 1)
    moved = [last[k] - matrix[k][k] for k in earlier] or [0.0]
    lost = [max(row[k] for row in matrix[k:]) - last[k] for k in earlier] or [0.0]
    return {
        "value": validation, "scores": {"accuracy": accuracy}, "matrix": matrix,
        "transfer": 100 * statistics.fmean(moved), "forgetting": 100 * statistics.fmean(lost),
        "megabytes": learner.bytes / 1e6, "headline": f"{accuracy:.1f} % at {cell['lr']:g}",
    }  # fmt: skip


def _right(learner: Any, asked: Sequence[Text]) -> list[bool]:
    return [text.label == said for text, said in zip(asked, learner.said([t.text for t in asked]))]


class Context(Reader):
    """Nothing is learned: examples of the classes, drawn evenly, stand before the question."""

    rows = 32  # each has keys and values of all examples

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.seen: list[Text] = []

    def learn(self, group: Group) -> None:
        self.seen += group.train
        self.bytes = float(sum(len(f"{t.text}{t.label}".encode()) for t in self.seen))

    def said(self, texts: Sequence[str]) -> list[str]:
        by = grouped(self.seen, lambda text: text.label)
        shown: list[Text] = []
        while len(shown) < self.dial:
            rows = list(by.values())
            self.draw.shuffle(rows)
            shown += [self.draw.choice(row) for row in rows]
        before = "".join(
            f"{self.ask.format(text=t.text)} {t.label}\n\n" for t in shown[: int(self.dial)]
        )
        return self.decoded([self.encode(before + self.ask.format(text=text)) for text in texts])


class Cosine(Reader):
    """The class whose mean hidden state is nearest, by angle."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.means: list[Tensor] = []

    def learn(self, group: Group) -> None:
        for label in group.labels:
            self.labels.append(label)
            texts = [t.text for t in group.train if t.label == label]
            self.means.append(self.hidden(texts).mean(0))
        self.bytes = 4.0 * sum(m.numel() for m in self.means)

    def said(self, texts: Sequence[str]) -> list[str]:
        means = torch.stack(self.means)
        centre = self.dial * means.mean(0)
        near = F.normalize(self.hidden(texts) - centre, dim=-1) @ F.normalize(means - centre).T
        return [self.labels[i] for i in near.argmax(-1).tolist()]


class Probe(Reader):
    """A linear layer on the hidden states, trained on each group in turn."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.weight = torch.zeros(0, self.base.config.hidden_size, device=self.base.device)

    def learn(self, group: Group) -> None:
        self.labels += group.labels
        fresh = self.weight.new_zeros(len(group.labels), self.weight.shape[1])
        self.weight = torch.cat([self.weight.detach(), fresh]).requires_grad_()
        x = F.normalize(self.hidden([t.text for t in group.train]), dim=-1) * 10
        y = torch.tensor([self.labels.index(t.label) for t in group.train], device=x.device)
        adam = torch.optim.Adam([self.weight], self.dial)
        for _ in range(EPOCHS):
            for some in torch.randperm(len(x)).split(BATCH):
                adam.zero_grad()
                F.cross_entropy(x[some] @ self.weight.T, y[some]).backward()
                adam.step()
        self.bytes = 4.0 * self.weight.numel()

    @torch.no_grad()
    def said(self, texts: Sequence[str]) -> list[str]:
        x = F.normalize(self.hidden(texts), dim=-1)
        return [self.labels[i] for i in (x @ self.weight.T).argmax(-1).tolist()]


class HopeCosine(Cosine, OfBytes):
    """The same of a small Hope's hidden states."""


ROWS: dict[str, tuple[type[Reader], str, tuple[float, ...]]] = {  # how, and values of its dial
    "in context": (Context, "", (16, 32, 64)),  # examples before the question
    "cosine classifier, frozen": (Cosine, "", (0.0, 0.5, 1.0)),  # share of the mean taken away
    "linear probe, in sequence": (Probe, "", (1e-3, 1e-2, 1e-1)),
    "low-rank deltas, in sequence (LoRA)": (Learner, "adam", DELTAS),
    "the same, EWC": (Learner, "ewc", DELTAS),
    "the same, replay of 5 a class": (Learner, "replay", DELTAS),
    "levels": (Learner, "levels", (0.02, 0.1, 0.5)),
    "levels over the depth": (Learner, "depth", (0.02, 0.1, 0.5)),
    "levels, studied": (Learner, "study", DELTAS),
    "studied, not read": (Learner, "unread", DELTAS),
    "low-rank deltas, all at once": (Learner, "joint", DELTAS),
    "small Hope, state carried": (Carried, "", (1, 2, 4)),  # times that a group is read
    "small Hope, cosine classifier, frozen": (HopeCosine, "", (0.0, 0.5, 1.0)),
    "small Hope, trained in sequence": (Trained, "adam", WEIGHTS),
    "small Hope, EWC": (Trained, "ewc", WEIGHTS),
    "small Hope, replay of 5 a class": (Trained, "replay", WEIGHTS),
    "small Hope, trained all at once": (Trained, "joint", WEIGHTS),
}


def figure(records: Sequence[Record], path: Path) -> None:
    """Accuracy over all groups seen so far, along the groups."""

    def along(r: Record) -> Along:
        seen = [100 * statistics.fmean(row) for row in r.detail["matrix"]]
        return range(1, len(seen) + 1), seen

    panels = [
        Panel(name, "groups seen", "accuracy (%)", lines(own, along))
        for name, own in grouped(records, lambda r: r.task).items()
    ]
    curves(panels, path, ylim=(0, 100))


COLUMNS = [
    words("set", lambda r: r.task), model("row"),
    mean("accuracy", lambda r: r.value, digits=1),
    mean("backward transfer", detail("transfer"), digits=1),
    mean("forgetting", detail("forgetting"), digits=1),
    mean("MB", detail("megabytes"), digits=2), mean("seconds", lambda r: r.seconds, digits=0),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="fig6", shows="classes that arrive in groups: CLINC150, Banking77, DBpedia",
    price=("~3 days", "~2 hours"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: ROWS[cell["model"]][2], seeds=5,
    columns=COLUMNS, by=lambda r: (r.task, r.model), figure=figure,
    sources=(
        *pretrained.SOURCES, "learn", "evals/classes.py", "experiments/learners.py",
        "experiments/small_hope.py", "experiments/asked.py",
    ),
)  # fmt: skip
