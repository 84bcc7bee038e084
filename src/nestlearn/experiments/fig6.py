"""Figure 6: classes arrive in groups, one after the other; which are still known after the last?

    nestlearn reproduce fig6 --data FOLDER

FOLDER/model is a pretrained model with its tokenizer, as transformers saves it; beside it stand
clinc150/, banking77/ and dbpedia14/ (see `nestlearn.evals.classes`). A text is followed by "Class:"
and the model names the class, among all that were seen; classifiers choose by its hidden states.
Every row has one dial, of three values, chosen on validation texts of seed 0. A row's bytes are
what it carries from group to group. All that trains reads every text of a group twice.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals import Record, classes
from nestlearn.evals.classes import Group, Text
from nestlearn.experiments.cells import Cell, Tell
from nestlearn.experiments.closed_book import fingerprint_of
from nestlearn.experiments.experiment import Experiment, Options, chosen
from nestlearn.experiments.figures import Panel, curves
from nestlearn.experiments.tables import Column, detail, mean, model, words

DELTAS = (5e-4, 2e-3, 8e-3)  # Adam's rates
ROWS: dict[str, tuple[str, tuple[float, ...]]] = {  # how, and the values of its dial
    "in context": ("context", (16, 32, 64)),  # examples before the question
    "cosine classifier, frozen": ("cosine", (0.0, 0.5, 1.0)),  # share of the mean taken away
    "linear probe, in sequence": ("probe", (1e-3, 1e-2, 1e-1)),
    "low-rank deltas, in sequence (LoRA)": ("adam", DELTAS),
    "the same, EWC": ("ewc", DELTAS),
    "the same, replay of 5 a class": ("replay", DELTAS),
    "levels": ("levels", (0.02, 0.1, 0.5)),
    "levels over the depth": ("depth", (0.02, 0.1, 0.5)),
    "levels, studied": ("study", DELTAS),
    "low-rank deltas, all at once": ("joint", DELTAS),
}
RANK, BATCH, EPOCHS, EWC, KEPT = 8, 32, 2, 1e4, 5
LABEL, WIDE = 10, 256  # tokens of a class; texts that are read side by side


def grid(asked: Options) -> list[Cell]:
    """A cell for each set and row."""
    weights = fingerprint_of(asked)
    return [
        {
            "task": name, "model": row, "folder": asked.data, "weights": weights,
            "sizes": asked.pick({"train": 4, "validation": 1, "test": 2, "most": 2}, {}),
        }
        for name in chosen(asked.only, tuple(classes.SETS), "set")
        for row in chosen(asked.models, tuple(ROWS), "row")
    ]  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One order of the classes, learned in one way; accuracy on every group after every group."""
    torch.manual_seed(cell["seed"])
    every = classes.groups(Path(cell["folder"]), cell["task"], cell["seed"], **cell["sizes"])
    how = ROWS[cell["model"]][0]
    kind: type[Reader] = {"context": Context, "cosine": Cosine, "probe": Probe}.get(how, Learner)
    learner = kind(Path(cell["folder"]), cell["device"], how, cell["lr"], cell["seed"])
    if how == "joint":
        learner.learn(_together(every))
    matrix, validation = [], 0.0
    for n, group in enumerate(every):
        tell(n / len(every), f"group {n + 1}")
        if how != "joint":
            learner.learn(group)
        asked = [text for seen in every[: n + 1] for text in seen.test]
        right = _right(learner, asked)
        per = [len(seen.test) for seen in every[: n + 1]]
        starts = [sum(per[:i]) for i in range(len(per))]
        matrix.append([sum(right[a : a + size]) / size for a, size in zip(starts, per)])
    held = [text for group in every for text in group.validation]
    validation = 100 * sum(_right(learner, held)) / len(held)
    last, size = matrix[-1], len(matrix)
    earlier = range(size - 1)
    return {
        "value": validation,
        "scores": {"accuracy": 100 * statistics.fmean(last)},
        "matrix": matrix,
        "transfer": 100 * statistics.fmean([last[k] - matrix[k][k] for k in earlier] or [0.0]),
        "forgetting": 100 * statistics.fmean(
            [max(matrix[t][k] for t in range(k, size)) - last[k] for k in earlier] or [0.0]
        ),
        "megabytes": learner.bytes / 1e6,
        "headline": f"{100 * statistics.fmean(last):.1f} % at {cell['lr']:g}",
    }  # fmt: skip


def _together(every: Sequence[Group]) -> Group:
    parts = [sum((getattr(g, name) for g in every), ()) for name in Group.__dataclass_fields__]
    return Group(*parts)


def _right(learner: Any, asked: Sequence[Text]) -> list[bool]:
    return [text.label == said for text, said in zip(asked, learner.said([t.text for t in asked]))]


class Reader:
    """A pretrained model that reads texts, and what a row makes of it."""

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

        said = decode(self.base, self.words, prompts, LABEL, "", lambda *_: None, rows=WIDE)
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


def asked_of(text: str) -> str:
    """What stands before a class."""
    return f"{text}\nClass:"


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with answers as ids, mask and targets [N, T]; padded behind, targets -100 there."""
    longest = max(len(a) + len(b) for a, b in pairs)
    gaps = [longest - len(a) - len(b) for a, b in pairs]
    ids = torch.tensor([a + b + [0] * gap for (a, b), gap in zip(pairs, gaps)])
    mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
    targets = torch.tensor([[-100] * len(a) + b + [-100] * gap for (a, b), gap in zip(pairs, gaps)])
    return ids, mask, targets


class Context(Reader):
    """Nothing is learned: examples of the classes, drawn evenly, stand before the question."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.seen: list[Text] = []

    def learn(self, group: Group) -> None:
        self.seen += group.train
        self.bytes = float(sum(len(f"{t.text}{t.label}".encode()) for t in self.seen))

    def said(self, texts: Sequence[str]) -> list[str]:
        by: dict[str, list[Text]] = {}
        for text in self.seen:
            by.setdefault(text.label, []).append(text)
        shown: list[Text] = []
        while len(shown) < self.dial:
            rows = list(by.values())
            self.draw.shuffle(rows)
            shown += [self.draw.choice(row) for row in rows]
        before = "".join(f"{asked_of(t.text)} {t.label}\n\n" for t in shown[: int(self.dial)])
        return self.decoded([self.encode(before + asked_of(text)) for text in texts])


class Cosine(Reader):
    """The class whose mean hidden state is nearest, by angle."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.means: list[Tensor] = []

    def learn(self, group: Group) -> None:
        for label in group.labels:
            self.labels.append(label)
            self.means.append(
                self.hidden([t.text for t in group.train if t.label == label]).mean(0)
            )
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
        levels = [DeltaLevel(chunk, lr=rate, rule="gd") for chunk in (64, 512)]
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
        by = {label: [t for t in group.train if t.label == label] for label in group.labels}
        self.kept += [t for texts in by.values() for t in texts[:KEPT]]
        memory = sum(
            w.numel() * w.element_size()
            for level in self.memory.levels for fast in level.fast for w in fast if w is not None
        )  # fmt: skip
        beside = sum(2 * w.numel() * 4 for w, _ in self.importance)
        texts = sum(len(f"{t.text}{t.label}".encode()) for t in self.kept)
        self.bytes = float(memory + beside + texts * (self.how in ("replay", "study")))

    def _pair(self, text: Text) -> tuple[list[int], list[int]]:
        return self.encode(asked_of(text.text)), self.encode(f" {text.label}\n")

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
                grads = torch.autograd.grad(loss, flat, retain_graph=True)
                if before is not None:
                    loss = loss + self._apart(weights, held, before, n)
                for (importance, place), w in zip(self.importance, flat):
                    loss = loss + EWC * (importance * (w - place).square()).sum()
                for square, plain in zip(squares, grads):
                    square += plain.square() / len(batches)
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
            return self.decoded([self.encode(asked_of(text)) for text in texts])


def columns(records: Sequence[Record]) -> list[Column]:
    """Accuracy after the last group, what later groups did to earlier ones, and bytes."""
    return [
        words("set", lambda r: r.task),
        model("row"),
        mean("accuracy", lambda r: r.value, digits=1),
        mean("backward transfer", detail("transfer"), digits=1),
        mean("forgetting", detail("forgetting"), digits=1),
        mean("MB", detail("megabytes"), digits=2),
        mean("seconds", lambda r: r.seconds, digits=0),
    ]


def figure(records: Sequence[Record], path: Path) -> None:
    """Accuracy over all groups seen so far, along the groups."""
    panels = []
    for name in dict.fromkeys(r.task for r in records):
        lines: dict[str, tuple[Sequence[float], list[list[float]]]] = {}
        for r in records:
            if r.task == name:
                seen = [100 * statistics.fmean(row) for row in r.detail["matrix"]]
                lines.setdefault(r.model, (range(1, len(seen) + 1), []))[1].append(seen)
        panels.append(Panel(name, "groups seen", "accuracy (%)", lines))
    curves(panels, path, ylim=(0, 100))


EXPERIMENT = Experiment(
    name="fig6",
    shows="classes that arrive in groups: CLINC150, Banking77, DBpedia",
    price=("~3 days", "~2 hours"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid,
    work=work,
    rates=lambda cell: ROWS[cell["model"]][1],
    seeds=5,
    columns=columns,
    by=lambda r: (r.task, r.model),
    figure=figure,
    sources=("hf", "learn", "evals/classes.py"),
)
