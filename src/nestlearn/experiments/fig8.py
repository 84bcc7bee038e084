"""Figure 8: two new languages, each alone and one after the other, translated into English.

    nestlearn reproduce fig8 --data FOLDER

FOLDER/model is a pretrained model with its tokenizer; FOLDER/novel_languages/ holds a list of words
and pairs of sentences for each language (dictionaries of Dictionaria: Teop, Kalamang). The paper's
own data, MTOB, are kept from the open web on purpose, so no figure here is one of MTOB. chrF by
sacrebleu. Every row has one dial, of three values, chosen on validation sentences of seed 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nestlearn.evals.classes import Group, Text
from nestlearn.evals.files import rows_of
from nestlearn.evals.tasks import stream
from nestlearn.experiments import pretrained
from nestlearn.experiments.experiment import Cell, Experiment, Options, Tell, cells
from nestlearn.experiments.learners import Learner, Reader
from nestlearn.experiments.pretrained import BM25
from nestlearn.experiments.tables import detail, mean, metric, model, words

LANGUAGES = {"Teop": "teop", "Kalamang": "kalamang"}
ORDERS = {"alone": (("Teop",), ("Kalamang",)), "one after the other": (("Teop", "Kalamang"),)}
RATES = (5e-4, 2e-3, 8e-3)
ROWS: dict[str, tuple[str, tuple[float, ...]]] = {  # how, and the values of its dial
    "in context": ("context", (2, 4, 8)),  # pairs like the sentence, and its words in the list
    "low-rank deltas (LoRA)": ("adam", RATES),
    "the same, EWC": ("ewc", RATES),
    "the same, replay": ("replay", RATES),
    "levels": ("levels", (0.02, 0.1, 0.5)),
    "levels, studied": ("study", RATES),
}
LONGEST, TRAIN, LISTED, VALIDATION, TEST, KEPT = 12, 1500, 1000, 50, 100, 100


class Language(NamedTuple):
    """A list of words with what they mean, and pairs of sentences."""

    listed: list[tuple[str, str]]
    group: Group


def language(folder: Path, name: str, seed: int, short: bool = False) -> Language:
    """One language, its sentences of at most LONGEST words, split by the seed."""

    def lines(what: str) -> list[dict[str, str]]:
        return rows_of(folder / "novel_languages" / f"{LANGUAGES[name]}_{what}.jsonl.gz")

    found = {row["src"].strip(): row["en"].strip() for row in lines("pairs")}
    pairs = [Text(a, b) for a, b in found.items() if b and 2 < len(a.split()) <= LONGEST]
    rng = stream(seed, "languages", name)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    meant = [(row["word"], row["en"].split(";")[0][:60]) for row in lines("wordlist") if row["en"]]
    listed = [meant[i] for i in rng.permutation(len(meant))]
    test, validation, train, most = (2, 1, 6, 4) if short else (TEST, VALIDATION, TRAIN, LISTED)
    held, rest = pairs[: test + validation], pairs[test + validation :]
    learned = [*rest[:train], *(Text(a, b) for a, b in listed[:most])]
    return Language(meant, Group((name,), tuple(learned), tuple(held[test:]), tuple(held[:test])))


class InContext(Reader):
    """Nothing is learned: the sentence's words in the list, and pairs like it, stand before it."""

    ask, longest, rows = "{text}\nEnglish:", 40, 128

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.of: list[Language] = []

    def take(self, told: Language) -> None:
        self.of.append(told)
        self.bytes += float(sum(len(f"{t.text}{t.label}".encode()) for t in told.group.train))

    def said(self, texts: Sequence[str]) -> list[str]:
        meant = {a.lower(): b for told in self.of for a, b in told.listed}
        pairs = [t for told in self.of for t in told.group.train if " " in t.text]
        index = BM25([t.text for t in pairs])
        prompts = []
        for text in texts:
            known = [(w, meant[w.lower()]) for w in text.strip(".!?").split() if w.lower() in meant]
            before = "".join(f"{a}: {b}\n" for a, b in known)
            before += "".join(
                f"{self.ask.format(text=pairs[i].text)} {pairs[i].label}\n\n"
                for i in index.like(text, int(self.dial))
            )
            prompts.append(self.encode(before + self.ask.format(text=text)))
        return self.decoded(prompts)


class Translator(Learner):
    """What learns to translate."""

    ask, longest = "{text}\nEnglish:", 40

    def take(self, told: Language) -> None:
        self.learn(told.group)

    def keep(self, group: Group) -> list[Text]:
        return list(group.train[:KEPT])


def grid(asked: Options) -> list[Cell]:
    """A cell for each order and row."""
    own = {**pretrained.part(asked), "short": asked.quick}
    return cells(asked, list(ORDERS), ROWS, ("order", "row"), **own)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """The languages learned in one way, each run of an order by a model of its own; chrF."""
    how, folder = ROWS[cell["model"]][0], Path(cell["folder"])
    kind = InContext if how == "context" else Translator
    scores: dict[str, float] = {}
    validation, size = [], 0.0
    for run in ORDERS[cell["task"]]:
        reader = kind(folder, cell["device"], how, cell["lr"], cell["seed"])
        read = []
        for name in run:
            tell(len(scores) / 2, f"learning {name}")
            read.append(language(folder, name, cell["seed"], cell["short"]))
            reader.take(read[-1])
        for name, told in zip(run, read):
            scores[name] = _chrf(reader, told.group.test)
            validation.append(_chrf(reader, told.group.validation))
        size = max(size, reader.bytes)
    return {
        "value": statistics.fmean(validation), "scores": scores, "megabytes": size / 1e6,
        "headline": ", ".join(f"{name} {value:.1f}" for name, value in scores.items()),
    }  # fmt: skip


def _chrf(reader: Any, texts: Sequence[Text]) -> float:
    import sacrebleu

    said = reader.said([t.text for t in texts])
    return sacrebleu.corpus_chrf(said, [[t.label for t in texts]]).score


COLUMNS = [
    words("order", lambda r: r.task), model("row"),
    *(mean(f"{name}, chrF", metric(name), digits=1) for name in LANGUAGES),
    mean("MB", detail("megabytes"), digits=2), mean("seconds", lambda r: r.seconds, digits=0),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="fig8", shows="two new languages, alone and one after the other, translated",
    price=("~1 day", "~1 hour"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=lambda cell: ROWS[cell["model"]][1],
    columns=COLUMNS, by=lambda r: (r.task, r.model),
    sources=(*pretrained.SOURCES, "learn", "evals/classes.py", "experiments/learners.py"),
)  # fmt: skip
