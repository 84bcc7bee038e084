"""Figure 7: questions about long texts: what do levels add to a window, how many, how slow?

    nestlearn reproduce fig7 --data FOLDER

FOLDER/model is a pretrained model with its tokenizer; beside it stand ruler_words/ and books/ (for
MK-NIAH, RULER's multi-key needles, hidden in novels: right is what says the number), qasper_subset/
(papers and questions: F1 of the words, as there) and lm_eval/pubmed_qa_labeled.jsonl.gz (questions
about one of four abstracts: the likeliest of yes, no and maybe). A text of up to LENGTH tokens is
read by a stack in its window of WINDOW, and the question is asked with what is in the window still
there. The step size is chosen on validation questions.
"""

from __future__ import annotations

import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from nestlearn.evals import needles
from nestlearn.evals.files import rows_of, text_of
from nestlearn.evals.tasks import stream
from nestlearn.experiments import pretrained
from nestlearn.experiments.experiment import Cell, Experiment, Options, Tell, cells
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
LONG = 150  # letters of a paper's answer
TOGETHER = 10  # texts that are read side by side, a memory each


class Asked(NamedTuple):
    """A text, a question about it, and its answer; choices: all that may be said, if few may."""

    text: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


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
        if 0 < len(qa["answer"]) < LONG
    ]


CHOICES = ("yes", "no", "maybe")


def _abstracts(folder: Path, count: Callable[[str], int], length: int, seed: int) -> list[Asked]:
    rows = rows_of(folder / "lm_eval" / "pubmed_qa_labeled.jsonl.gz")
    some = [rows[(4 * seed + i) % len(rows)] for i in range(4)]
    texts, questions = zip(*(row["context"].split("\nQuestion: ") for row in some))
    which = seed % 4
    question = f"Question: {questions[which].split(chr(10))[0]}\nAnswer:"
    return [Asked("\n\n".join(texts), question, some[which]["continuation"], CHOICES)]


def contained(answer: str, said: str) -> float:
    """1.0 if the answer is in what was said, as whole words."""
    told, wanted = words(said), words(answer)
    places = range(len(told) - len(wanted) + 1)
    return float(any(told[i : i + len(wanted)] == wanted for i in places))


def overlap(answer: str, said: str) -> float:
    """F1 of the words of what was said, up to the end of its line (Dasigi et al. 2021)."""
    told, wanted = words(said.strip().split("\n")[0]), words(answer)
    same = (Counter(told) & Counter(wanted)).total()
    return 2 * same / max(1, len(told) + len(wanted))


def words(text: str) -> list[str]:
    """In small letters, without punctuation and articles, as SQuAD's own script has them."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ("a", "an", "the")]


# What makes the questions about a text of a number, how many texts there are, and what counts.
SETS = {
    "MK-NIAH": (_needles, 10_000, contained), "QASPER": (_papers, 79, overlap),
    "PubMedQA": (_abstracts, 250, contained),
}  # fmt: skip


def questions(
    folder: Path, name: str, count: Callable[[str], int], length: int, seed: int, most: int,
    *, validation: bool = False,
) -> list[Asked]:  # fmt: skip
    """So many questions of a set, or all there are, drawn by the seed; those of every fifth text
    are for validation, and no others.
    """
    make, texts, _ = SETS[name]
    found: list[Asked] = []
    for number in stream(seed, "fig7", name).permutation(texts).tolist():
        if (number % 5 == 0) == validation:
            found += make(folder, count, length, number)
        if len(found) >= most:
            break
    return found[:most]


def grid(asked: Options) -> list[Cell]:
    count, length = asked.pick((QUICK_ASKED, 400), (ASKED, LENGTH))
    own = {**pretrained.part(asked), "count": count, "length": length}
    return cells(asked, list(SETS), ROWS, ("set", "row"), **own)


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    from nestlearn import DeltaLevel, stack_levels

    folder, (window, chunks) = Path(cell["folder"]), ROWS[cell["model"]]
    base, tokenizer = pretrained.opened(folder, cell["device"])
    window = min(window, base.config.max_position_embeddings - SAID, cell["length"])
    levels = [DeltaLevel(chunk, lr=cell["lr"], rule="gd") for chunk in chunks or (512,)]
    stacked = stack_levels(base, levels, rank=8, window=min(window, WINDOW), cache_dtype="bfloat16")

    def share(most: int, validation: bool) -> float:
        asked = questions(
            folder, cell["task"], lambda t: len(_ids(tokenizer, t)), cell["length"], cell["seed"],
            most, validation=validation,
        )  # fmt: skip
        said: list[str] = []
        for a in range(0, len(asked), TOGETHER):
            tell(a / len(asked), "validation" if validation else "test")
            some = asked[a : a + TOGETHER]
            said += answers(stacked, tokenizer, some, cell["length"], window, learn=bool(chunks))
        counts = SETS[cell["task"]][2]
        return 100 * statistics.fmean(counts(one.answer, text) for one, text in zip(asked, said))

    return {
        "value": share(min(VALIDATED, cell["count"]), True),
        "scores": {"accuracy": share(cell["count"], False)},
        "headline": cell["model"],
    }  # fmt: skip


def answers(
    stacked: Any, tokenizer: Any, asked: Sequence[Asked], length: int, window: int, *, learn: bool
) -> list[str]:
    """What is said to each question: up to SAID tokens, or the likeliest choice. Of a text the
    first `length` tokens are read, and learned; the last `window`, with the question, are seen.
    """
    texts = [_ids(tokenizer, one.text)[:length] for one in asked]
    memory, device = stacked.init_memory(len(asked)), stacked.base.device
    if learn:
        ids, mask = padded(texts)
        memory = stacked.learn(ids.to(device), memory, mask.to(device))[1]
    choices = [_ids(tokenizer, f" {choice}") for choice in asked[0].choices]
    same = takewhile(lambda at: len(set(at)) == 1, zip(*choices))
    begun = [at[0] for at in same]  # as all of them begin; then one token tells them apart
    firsts = [choice[len(begun)] for choice in choices]
    prompts = [
        (text + _ids(tokenizer, f"\n{one.question}") + begun)[-window:][::-1]
        for text, one in zip(texts, asked)
    ]
    ids, mask = (x.flip(1) for x in padded(prompts))  # padding stands in front
    only = {"prefix_allowed_tokens_fn": lambda *_: firsts} if firsts else {}
    made = stacked.generate(
        ids.to(device), memory, max_new_tokens=1 if firsts else SAID, do_sample=False,
        attention_mask=mask.to(device), pad_token_id=0, **only,
    )  # fmt: skip
    new = made[:, ids.shape[1] :].tolist()
    if firsts:
        return [asked[0].choices[firsts.index(row[0])] for row in new]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


COLUMNS = [model("memory"), *(mean(name, at(name), digits=1) for name in SETS)]
EXPERIMENT = Experiment(
    name="fig7", shows="questions about long texts, by number and period of levels",
    price=("~5 days", "~40 minutes"),
    takes=("seeds", "only", "models", "data", "workers", "device"),
    grid=grid, work=work,
    rates=RATES,
    columns=COLUMNS,
    sources=(*pretrained.SOURCES, "evals/needles.py", "experiments/learners.py"),
)  # fmt: skip
