"""What a language model knows: seven sets of questions, counted by lm-evaluation-harness.

FOLDER/lm_eval has them as they are shipped: lines of JSON as in llm-foundry, and HellaSwag as text,
six lines a question. A question is some pairs of a text and what may follow it; a model says how
likely each is. The harness's tasks are made here, of rows in memory: nothing is fetched, and no
code of a data set runs. Counting needs the harness: pip install "nestlearn[harness]".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from .files import evenly, rows_of, text_of

Pair = tuple[str, str]
Score = Callable[[Sequence[Pair]], Sequence[tuple[float, bool]]]


class Quiz(NamedTuple):
    """file: in FOLDER/lm_eval. options: of a question, one of them right; 0: a word is to be said.
    by_bytes: options are compared by log p a byte, too.
    """

    file: str
    options: int
    by_bytes: bool = False

    @property
    def chance(self) -> float:
        """Percent right of who knows nothing."""
        return 100 / self.options if self.options else 0.0


QUIZZES = {
    "LAMBADA": Quiz("lambada_openai.jsonl.gz", 0),
    "HellaSwag": Quiz("hellaswag_val_full.txt.bz2", 4, True),
    "PIQA": Quiz("piqa.jsonl.gz", 2, True),
    "ARC easy": Quiz("arc_easy.jsonl.gz", 4, True),
    "ARC challenge": Quiz("arc_challenge.jsonl.gz", 4, True),
    "WinoGrande": Quiz("winogrande.jsonl.gz", 2),
    "BoolQ": Quiz("boolq.jsonl.gz", 2),
}


class Question(NamedTuple):
    """Several endings of one text, or one ending of several texts; right: the place of the right
    one. An ending follows after a space.
    """

    texts: tuple[str, ...]
    endings: tuple[str, ...]
    right: int = 0

    @property
    def pairs(self) -> list[Pair]:
        """What a model is asked about."""
        return [(text, f" {ending}") for text in self.texts for ending in self.endings]


def files(folder: Path) -> list[Path]:
    """The files of all sets; ValueError where one is missing."""
    found = [folder / "lm_eval" / quiz.file for quiz in QUIZZES.values()]
    for file in found:
        if not file.is_file():
            raise ValueError(f"--data {folder}: give a folder with lm_eval/{file.name}")
    return found


def questions(folder: Path, name: str, most: int) -> list[Question]:
    """At most so many questions of a set, from even places; ValueError for a file of other rows."""
    quiz = QUIZZES[name]
    file = folder / "lm_eval" / quiz.file
    try:
        if file.suffix == ".bz2":
            lines = text_of(file).rstrip("\n").split("\n")
            found = [
                Question((lines[i],), tuple(lines[i + 2 : i + 6]), int(lines[i + 1]))
                for i in range(0, len(lines), 6)
            ]
        else:
            found = [_question(row) for row in rows_of(file)]
        if not all(len(one.pairs) == max(1, quiz.options) > one.right for one in found):
            raise ValueError(f"a question has not {quiz.options} options")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no rows of {name} as they are shipped") from error
    return evenly(found, most)


def _question(row: Mapping[str, Any]) -> Question:
    if "choices" in row:
        text = f"{row['query'].rstrip()}\nAnswer:"
        return Question((text,), tuple(row["choices"]), row["gold"])
    if "context_options" in row:
        return Question(tuple(row["context_options"]), (row["continuation"],), row["gold"])
    return Question((row["context"],), (row["continuation"],))


def version() -> str:
    """That of the harness; "" where it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return ""


def accuracy(score: Score, asked: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, float]]:
    """Percent right in each set, as the harness counts it: "acc", by choice "acc_bytes", and the
    standard errors, "acc_stderr" ... ValueError where the harness is not installed.

    score(pairs): log p of each second text after its first one, and whether a greedy reader says
    it. A set has two questions or more.
    """
    try:
        import lm_eval
        from lm_eval.api.model import LM
    except ImportError as error:
        told = 'lm-evaluation-harness counts the answers: pip install "nestlearn[harness]"'
        raise ValueError(told) from error

    class Scored(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return list(score([request.args for request in requests]))

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError("no set asks for the likelihood of a whole text")

        def generate_until(self, requests: Any) -> Any:
            raise NotImplementedError("no set asks for a text")

    with redirect_stderr(StringIO()):  # a bar for each set, and advice on the command line
        tasks = {name: _task(name, some) for name, some in asked.items()}
        found = lm_eval.evaluate(Scored(), tasks, log_samples=False)["results"]
    return {
        name: {
            key.removesuffix(",none"): 100 * value
            for key, value in found[name].items() if key.startswith("acc")
        }
        for name in asked
    }  # fmt: skip


def _task(name: str, asked: Sequence[Question]) -> Any:
    """The harness's task of a set."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    quiz, several = QUIZZES[name], len(asked[0].texts) > 1
    rows = [
        {
            "texts": one.texts, "text": one.texts[0], "endings": one.endings,
            "ending": one.endings[0], "said": one.pairs[0][1], "right": one.right,
        }
        for one in asked
    ]  # fmt: skip
    if several:
        parts = {"doc_to_text": "right", "doc_to_choice": "texts", "doc_to_target": "ending"}
    elif quiz.options:
        parts = {"doc_to_text": "text", "doc_to_choice": "endings", "doc_to_target": "right"}
    else:
        parts = {"doc_to_text": "text", "doc_to_target": "said"}
    metrics = ["acc", "acc_bytes"] if quiz.by_bytes else ["acc"]
    return ConfigurableTask(
        config={
            "task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test", "num_fewshot": 0, **parts,
            "output_type": "multiple_choice" if quiz.options else "loglikelihood",
            "metric_list": [{"metric": metric} for metric in metrics],
        }
    )  # fmt: skip
