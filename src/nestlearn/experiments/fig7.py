"""Figure 7: questions about long texts: what do levels add to a window, how many, how slow?

    nestlearn reproduce fig7 --data FOLDER

FOLDER/model is a pretrained model with its tokenizer; beside it stand ruler_words/ and books/ (for
MK-NIAH, RULER's multi-key needles, hidden in novels), qasper_subset/ (papers and questions) and
lm_eval/pubmed_qa_labeled.jsonl.gz (questions about one of four abstracts, answered by yes, no or
maybe). A text of up to LENGTH tokens is read by a stack in its window of WINDOW, and the question
is asked with what is in the window still there. The step size is chosen on validation questions.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nestlearn.evals import needles
from nestlearn.evals.files import rows_of, text_of
from nestlearn.evals.tasks import stream
from nestlearn.experiments import pretrained
from nestlearn.experiments.experiment import Cell, Experiment, Options, Tell
from nestlearn.experiments.learners import padded
from nestlearn.experiments.tables import at, mean, model

LENGTH, WINDOW, SAID = 4096, 1024, 24
RATES = (0.02, 0.1, 0.3)
ROWS: dict[str, tuple[int, tuple[int, ...]]] = {  # window, chunks of the levels
    "the text in context": (LENGTH + 512, ()),
    "its last 1,024 tokens": (WINDOW, ()),
    **{
        f"{len(chunks)} level{'s' * (len(chunks) > 1)}: {', '.join(map(str, chunks))}": (
            WINDOW, chunks,
        )
        for chunks in (
            (512,), (64, 128), (64, 256), (64, 512), (64, 2048), (64, 256, 1024),
            (32, 128, 512, 2048),
        )
    },
}  # fmt: skip
ASKED, QUICK_ASKED, VALIDATED = 100, 2, 20
TOGETHER = 20  # texts that are read side by side, a memory each


class Asked(NamedTuple):
    """A text, a question about it, and what a right answer contains."""

    text: str
    question: str
    answer: str


def _needles(folder: Path, count: Callable[[str], int], length: int, seed: int) -> list[Asked]:
    words = needles.Words.read(folder / "ruler_words")
    books = sorted((folder / "books").glob("*.txt.gz"))
    told = text_of(books[seed % len(books)]).split()[2000:][:length]  # a word, a token or more
    found = needles.sample("MK-NIAH-1", length, words, count, seed, " ".join(told))
    return [Asked(f"{found.before}\n{found.context}", found.question, found.answers[0])]


def _papers(folder: Path, count: Callable[[str], int], length: int, seed: int) -> list[Asked]:
    rows = rows_of(folder / "qasper_subset" / "qasper_79papers.jsonl.gz")
    row = rows[seed % len(rows)]
    return [
        Asked(row["text"], f"Question: {qa['question']}\nAnswer:", qa["answer"])
        for qa in row["qas"]
        if 0 < len(qa["answer"]) < 60
    ]


def _abstracts(folder: Path, count: Callable[[str], int], length: int, seed: int) -> list[Asked]:
    rows = rows_of(folder / "lm_eval" / "pubmed_qa_labeled.jsonl.gz")
    some = [rows[(4 * seed + i) % len(rows)] for i in range(4)]
    texts, questions = zip(*(row["context"].split("\nQuestion: ") for row in some))
    which = seed % 4
    question = f"Question: {questions[which]}"
    return [Asked("\n\n".join(texts), question, some[which]["continuation"])]


# What makes the questions about a text of a number, and how many texts there are.
SETS = {"MK-NIAH": (_needles, 10_000), "QASPER": (_papers, 79), "PubMedQA": (_abstracts, 250)}


def questions(
    folder: Path, name: str, count: Callable[[str], int], length: int, seed: int, most: int,
    *, validation: bool = False,
) -> list[Asked]:  # fmt: skip
    """So many questions of a set, or all there are, drawn by the seed; those of every fifth text
    are for validation, and no others.
    """
    make, texts = SETS[name]
    found: list[Asked] = []
    for number in stream(seed, "fig7", name).permutation(texts).tolist():
        if (number % 5 == 0) == validation:
            found += make(folder, count, length, number)
        if len(found) >= most:
            break
    return found[:most]


def right(answer: str, said: str) -> bool:
    """Whether the answer is in what was said as whole words; yes, no or maybe: as its first one."""
    told = re.findall(r"\w+", said.lower())
    wanted = re.findall(r"\w+", answer.lower())
    if wanted in (["yes"], ["no"], ["maybe"]):
        return told[:1] == wanted
    return any(told[i : i + len(wanted)] == wanted for i in range(len(told)))


def grid(asked: Options) -> list[Cell]:
    count, length = asked.pick((QUICK_ASKED, 400), (ASKED, LENGTH))
    return pretrained.cells(asked, SETS, "set", ROWS, count=count, length=length)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    from nestlearn import DeltaLevel, stack_levels

    folder, (window, chunks) = Path(cell["folder"]), ROWS[cell["model"]]
    base, tokenizer = pretrained.opened(folder, cell["device"])
    window = min(window, base.config.max_position_embeddings - SAID, cell["length"])
    stacked = stack_levels(
        base,
        [DeltaLevel(chunk, lr=cell["lr"], rule="gd") for chunk in chunks or (512,)],
        rank=8, window=min(window, WINDOW), cache_dtype="bfloat16",
    )  # fmt: skip

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def share(most: int, validation: bool) -> float:
        asked = questions(
            folder, cell["task"], lambda t: len(encode(t)), cell["length"], cell["seed"], most,
            validation=validation,
        )  # fmt: skip
        read = [(encode(one.text)[: cell["length"]], encode(f"\n{one.question}")) for one in asked]
        said: list[str] = []
        for a in range(0, len(asked), TOGETHER):
            tell(a / len(asked), "validation" if validation else "test")
            some = read[a : a + TOGETHER]
            memory = stacked.init_memory(len(some))
            if chunks:
                ids, mask = padded([text for text, _ in some])
                memory = stacked.learn(ids.to(cell["device"]), memory, mask.to(cell["device"]))[1]
            prompts = [(text + question)[-window:][::-1] for text, question in some]
            ids, mask = (x.flip(1) for x in padded(prompts))  # padding stands in front
            made = stacked.generate(
                ids.to(cell["device"]), memory, max_new_tokens=SAID, do_sample=False,
                attention_mask=mask.to(cell["device"]), pad_token_id=0,
            )  # fmt: skip
            new = made[:, ids.shape[1] :].tolist()
            said += tokenizer.batch_decode(new, skip_special_tokens=True)
        return 100 * statistics.fmean(right(one.answer, text) for one, text in zip(asked, said))

    return {
        "value": share(min(VALIDATED, cell["count"]), True),
        "scores": {"accuracy": share(cell["count"], False)},
        "headline": cell["model"],
    }  # fmt: skip


COLUMNS = [model("memory"), *(mean(name, at(name), digits=1) for name in SETS)]
EXPERIMENT = Experiment(
    name="fig7", shows="questions about long texts, by number and period of levels",
    price=("~5 days", "~3 hours"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=RATES,
    columns=COLUMNS,
    sources=(*pretrained.SOURCES, "evals/needles.py", "experiments/learners.py"),
)  # fmt: skip
