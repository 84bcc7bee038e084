"""Closed-book questions: what a model knows of a page that is not before it any more.

    nestlearn reproduce closed-book --data FOLDER

FOLDER/model is a pretrained model that follows instructions, with its tokenizer, as transformers
saves it; on FOLDER/wikitext2/test.txt and FOLDER/lm_eval/lambada_openai.jsonl.gz, if there,
forgetting is measured beside the model's own samples. Pages are of invented facts
(`nestlearn.evals.closed_book`); two kinds of them were used for nothing else. A memory starts anew
for every page and goes through its file. Two rows need a library each: bm25s finds passages, peft
trains LoRA.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals import closed_book, grouped
from nestlearn.evals.closed_book import FORMS, HELD_OUT, KINDS, Document, Question
from nestlearn.evals.last_words import lambada, last_words
from nestlearn.experiments import pretrained
from nestlearn.experiments.experiment import Cell, Column, Experiment, Options, Record, Tell, chosen
from nestlearn.experiments.pretrained import BM25
from nestlearn.experiments.tables import detail, mean, model, words

ROWS = {
    "nothing read": "",
    "the page before the question": "context",
    "passages found by BM25 before it": "retrieval",
    "read once": "learn 1",
    "read four times": "learn 4",
    "LoRA, next tokens": "lora",
    "studied": "study 0",
    "read and studied": "study 1",
    "read and studied, one level": "study 1 one",
}
PAGES, QUICK_PAGES = 10, 1
SAID = 24  # tokens of an answer
FOUND, PASSAGE = 2, 200  # passages before a question, of about so many letters
LAST_WORDS = 200  # passages of LAMBADA
COSTS = (("own", "nats", 3), ("wikitext", "nats", 3), ("lambada", "points", 1))
LORA_RATE, LORA_STEPS = 1e-3, 170  # about a study's operations


def grid(asked: Options) -> list[Cell]:
    base = pretrained.part(asked)
    kinds = chosen(asked.only, KINDS, "kind")
    pages = asked.pick(QUICK_PAGES, PAGES)
    return [
        {
            "task": kind, "model": name, "page": n, **base, "kinds": kinds, "pages": pages,
            "setting": "kept apart" if kind in HELD_OUT else "developed on", "short": asked.quick,
        }
        for n, kind in zip(range(pages), cycle(kinds))
        for name in chosen(asked.models, ROWS, "way of reading")
    ]  # fmt: skip


@cache
def loaded(folder: Path, device: str, count: int = 2) -> tuple[Any, Any]:
    from nestlearn import DeltaLevel, stack_levels

    base, words = pretrained.opened(folder, device)
    levels = [DeltaLevel(chunk, lr=0.05, rule="gd") for chunk in (64, 512)[-count:]]
    return stack_levels(base, levels, rank=8, window=128, cache_dtype="bfloat16"), words


class _Elsewhere(NamedTuple):
    """What forgetting is measured on: ids [N, T] of texts, whose loss counts; passages, whose last
    word counts; and both of the base model.
    """

    texts: dict[str, Tensor]
    passages: list[tuple[list[int], list[int]]]
    before: dict[str, float]

    def measured(self, reader: Any) -> dict[str, float]:
        """Nats a token of each text, and the percentage of last words."""
        found = {name: _loss(reader, rows) for name, rows in self.texts.items()}
        if self.passages:
            found["lambada"] = 100 * last_words(reader, self.passages)
        return found


@cache
def _elsewhere(folder: Path, device: str) -> _Elsewhere:
    from nestlearn.hf.anchor import Anchor
    from nestlearn.hf.lending import lend

    stacked, tokenizer = loaded(folder, device)
    length = min(128, stacked.window - 1)
    texts = {"own": Anchor.sampled(stacked, 16, length, seed=9).samples}
    if (file := folder / "wikitext2" / "test.txt").is_file():
        ids = tokenizer.encode(file.read_text(encoding="utf-8")[:10_000])
        rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        texts["wikitext"] = rows.to(stacked.lr[0].device)
    file = folder / "lm_eval" / "lambada_openai.jsonl.gz"
    found = _Elsewhere(texts, lambada(file, tokenizer, LAST_WORDS) if file.is_file() else [], {})
    with lend({}):
        return found._replace(before=found.measured(stacked.base))


def pages(cell: Cell) -> list[Document]:
    """Every page of the run; the cell's own is number `page`."""
    every = zip(cycle(cell["kinds"]), count(10_000 * (cell["seed"] + 1)))
    return [closed_book.document(kind, seed) for kind, seed in islice(every, cell["pages"])]


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One page, read in one way, and every question about it."""
    from nestlearn.learn.questions import FROM_TEXT

    folder, how = Path(cell["folder"]), ROWS[cell["model"]]
    stacked, words_of = loaded(folder, cell["device"], 1 if how.endswith("one") else 2)
    page = pages(cell)[cell["page"]]
    reader, size = stacked.base, 0.0
    weights: Any = {}
    began = time.perf_counter()
    with _counted(stacked.base) as operations:
        if how == "lora":
            reader, size = _lora(words_of, page.text, cell, tell)
        elif how.startswith(("learn", "study")):
            weights, size = _read(stacked, words_of, page.text, how, cell, tell)
    seconds = time.perf_counter() - began
    finds: Callable[[str], str] = _retrieval(cell) if how == "retrieval" else lambda _: page.text
    asked = [q.text for q in page.questions]
    if how in ("context", "retrieval"):
        asked = [FROM_TEXT.format(text=finds(text), question=text) for text in asked]
    answers = said(reader, words_of, asked, weights)
    shares = right(page.questions, answers)
    changed = bool(weights) or reader is not stacked.base
    return {
        "scores": {"direct": shares["direct"]}, "value": shares["direct"], "shares": shares,
        "cost": cost(cell, reader, weights, changed), "megabytes": size / 1e6,
        "seconds": round(seconds, 1), "operations": operations[0],
        "answers": [[q.text, q.answer, a] for q, a in zip(page.questions, answers)],
        "headline": ", ".join(f"{form} {share:.2f}" for form, share in shares.items()),
    }  # fmt: skip


def cost(cell: Cell, reader: Any, weights: Any, changed: bool = True) -> dict[str, float]:
    """What a model that computes with these weights is worse by, elsewhere, than the base model."""
    from nestlearn.hf.lending import lend

    elsewhere = _elsewhere(Path(cell["folder"]), cell["device"])
    if not changed:
        return dict.fromkeys(elsewhere.before, 0.0)
    with lend(weights):
        now = elsewhere.measured(reader)
    return {name: value - elsewhere.before[name] for name, value in now.items()}


def said(reader: Any, words_of: Any, asked: list[str], weights: Any) -> list[str]:
    """The likeliest answers of a model that computes with these weights."""
    from nestlearn.hf.lending import lend
    from nestlearn.learn.questions import decode, prompt

    with lend(weights):
        prompts = [prompt(words_of, text) for text in asked]
        return decode(reader, words_of, prompts, SAID, "", lambda *_: None)


def right(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The share of right answers to the questions of each form."""
    found = grouped(zip(questions, answers), lambda pair: pair[0].form)
    return {
        form: sum(closed_book.right(*pair) for pair in found[form]) / len(found[form])
        for form in FORMS if form in found
    }  # fmt: skip


def _read(
    stacked: Any, words_of: Any, text: str, how: str, cell: Cell, tell: Tell
) -> tuple[Any, float]:
    """The weights and bytes of a memory that has read the page, from its file."""
    from nestlearn import Session
    from nestlearn.learn import StudyConfig

    with tempfile.TemporaryDirectory() as place:
        session = Session(stacked, Path(place) / "memory", words_of)
        for _ in range(int(how.split()[1])):
            session.learn(text)
        if how.startswith("study"):
            settings = StudyConfig(seed=cell["seed"])
            if cell["short"]:
                settings = replace(settings, questions=4, words=1, epochs=1)
            session.study(text, settings, tell=lambda what, done, of: tell(done / of, what))
        session.save()
        session = Session(stacked, Path(place) / "memory", words_of)  # what is on disk
    return stacked.weights(session.memory), sum(session.bytes.values())


def _lora(words_of: Any, text: str, cell: Cell, tell: Tell) -> tuple[Any, float]:
    """The model with adapters that learned the page's next tokens, and their bytes."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(cell["seed"])
    plain, _ = pretrained.opened(Path(cell["folder"]), cell["device"])
    asked = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    reader: Any = get_peft_model(plain, asked)
    mine = [p for p in reader.parameters() if p.requires_grad]
    adam = torch.optim.Adam(mine, LORA_RATE)
    ids = torch.tensor([words_of.encode(text)], device=cell["device"])
    steps = 2 if cell["short"] else LORA_STEPS
    for step in range(steps):
        tell(step / steps, "training")
        adam.zero_grad()
        F.cross_entropy(reader(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        adam.step()
    return reader.eval(), sum(p.numel() * p.element_size() for p in mine)


def _retrieval(cell: Cell) -> Callable[[str], str]:
    """What finds the passages of all pages that are most like a question."""
    from nestlearn.learn.questions import passages

    parts = [part for page in pages(cell) for part in passages(page.text, PASSAGE)]
    index = BM25(parts, "en")
    return lambda question: "\n".join(parts[i] for i in sorted(index.like(question, FOUND)))


@torch.no_grad()
def _loss(reader: Any, rows: Tensor) -> float:
    """Nats a token of ids [N, T]."""
    logits = reader(input_ids=rows).logits[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@contextmanager
def _counted(base: Any) -> Iterator[list[float]]:
    """Operations inside the block of models like this one: 2 for each parameter and token, three
    times as many where gradients are taken.
    """
    words = base.get_input_embeddings().num_embeddings
    each, total = 2 * sum(p.numel() for p in base.parameters()), [0.0]

    def note(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == words:
            total[0] += each * given[0].numel() * (3 if torch.is_grad_enabled() else 1)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield total
    finally:
        hook.remove()


def columns(records: Sequence[Record]) -> list[Column]:
    return [
        model("memory"), words("kinds", lambda r: r.setting),
        *(mean(form, _share(form), digits=2) for form in FORMS),
        *costs(records), mean("MB", detail("megabytes"), digits=1),
        mean("TFLOP", lambda r: r.detail["operations"] / 1e12, digits=1),
        mean("seconds", lambda r: r.seconds, digits=0),
    ]  # fmt: skip


def costs(records: Sequence[Record]) -> list[Column]:
    """Of each text on which forgetting was measured."""
    return [
        mean(f"{name}, {unit}", detail("cost", name), digits=digits)
        for name, unit, digits in COSTS
        if any(name in r.detail.get("cost", ()) for r in records)
    ]


def _share(form: str) -> Any:
    return lambda r: r.detail["shares"].get(form)


EXPERIMENT = Experiment(
    name="closed-book", shows="questions about a page of invented facts, with the page away",
    price=("~1 hour", "–"),
    takes=("only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    seeds=1,
    columns=columns, by=lambda r: (r.setting, r.model),
    sources=(*pretrained.SOURCES, "learn", "evals/closed_book.py"),
)  # fmt: skip
