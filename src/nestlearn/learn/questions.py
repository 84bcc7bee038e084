"""What a model asks itself about a text, and what it answers with the text before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from nestlearn.hf.cache import CACHE

from . import conversation

# Of a whole passage, and of one of its sentences; {s}.
ABOUT_ALL = (
    "Ask one short question about a fact in the text above. Write only the question.",
    "Write one question about a person in the text above. Write only the question.",
    "Write one question about a place or a thing in the text above. Write only the question.",
    "Write one question about a number, a colour or a name in the text above. Write only the "
    "question.",
)
ABOUT_ONE = (
    'Write one short question that is answered by the sentence "{s}" Write only the question.',
    'Turn the sentence "{s}" into a question. Write only the question.',
)
# Of a word and of what its passage is about; the sentence with the word is the answer.
BY_NAME = (
    "What do you know about the {word} of {name}?",
    "{name}: {word}?",
    "Tell me about {word} and {name}.",
    "What can you say about {name} and {word}?",
    "What about the {word} in {name}?",
)
COMMON = 400  # first pieces of a vocabulary, among which its commonest words stand
BRIEF = " Answer in a few words."
FROM_TEXT = (
    "Text: {text}\n\nQuestion: {question}\nAnswer the question from the text, in a few words."
)
ASKED, ANSWERED = 32, 24  # tokens of a question and of an answer, at most
SAMPLED = {"top_p": 0.95, "temperature": 1.0, "top_k": 100}
ROWS = 32  # prompts that are read side by side
PASSAGE = 1200  # letters of a passage, about: all of it stands before every question

Tell = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


class Question(NamedTuple):
    """A question about a passage, and its answer: what the model says with the passage before it,
    or a sentence of the passage. ways: to ask the same in other words.
    """

    text: str
    answer: str
    passage: str
    ways: tuple[str, ...] = ()


def passages(text: str, size: int = PASSAGE) -> list[str]:
    """The text in runs of whole sentences of about `size` letters."""
    found: list[str] = []
    for sentence in sentences(text):
        if found and len(found[-1]) + len(sentence) < size:
            found[-1] += " " + sentence
        else:
            found.append(sentence)
    return found


def sentences(text: str) -> list[str]:
    """The sentences of a text, and what stands between its line breaks."""
    parts = re.split(r"(?<=[.!?])\s+|\s*\n\s*", text)
    return [part.strip() for part in parts if part.strip()]


def ask(base: Any, tokenizer: Any, text: str, count: int, seed: int, tell: Tell) -> list[Question]:
    """So many questions, the passages in turn, or fewer: none twice, and none whose answer shares
    no word with its passage but those of the question, which is then not an answer from it.

    base: the model that asks and answers, such as the stacked one's base.
    """
    parts = passages(text)
    wanted = []
    for i in range(count):
        passage = parts[i % len(parts)]
        turn, own = divmod(i // len(parts), 2)
        if own:  # every sentence in turn, and about it in every form
            lines = sentences(passage)
            form = ABOUT_ONE[turn // len(lines) % len(ABOUT_ONE)]
            asking = form.format(s=lines[turn % len(lines)])
        else:
            asking = ABOUT_ALL[turn % len(ABOUT_ALL)]
        wanted.append((passage, f"{passage}\n\n{asking}"))
    prompts = [prompt(tokenizer, words) for _, words in wanted]
    said = decode(base, tokenizer, prompts, ASKED, "asking", tell, seed=seed)
    asked: dict[str, str] = {}
    for (passage, _), words in zip(wanted, said):
        if question := question_in(words):
            asked.setdefault(question, passage)
    prompts = [
        prompt(tokenizer, FROM_TEXT.format(text=passage, question=question))
        for question, passage in asked.items()
    ]
    answers = decode(base, tokenizer, prompts, ANSWERED, "answering", tell)
    found = [Question(q, a.strip(), p) for (q, p), a in zip(asked.items(), answers)]
    return [question for question in found if _from_passage(question)]


def by_name(tokenizer: Any, text: str, count: int) -> list[Question]:
    """Questions that the sentences themselves answer: for each sentence, one about each of its
    `count` rarest words, by the name of what its passage is about.

    A small model asks about few of the facts; these ask about all, and cost no decoding.
    """
    found: list[Question] = []
    for passage in passages(text):
        name = topic(tokenizer, passage)
        for sentence in sentences(passage):
            for word in _rarest(tokenizer, sentence, name, count):
                ways = [form.format(word=word, name=name) for form in BY_NAME]
                first = len(found) % len(ways)
                asked, *others = ways[first:] + ways[:first]
                found.append(Question(asked, sentence, passage, tuple(others)))
    return found


def topic(tokenizer: Any, passage: str) -> str:
    """The name that a passage says most often, of equals the first: a word of several pieces with a
    capital. A passage without a name has its first word.
    """
    words = re.findall(r"\w[\w'-]*", passage)
    names = [w for w in words if w[0].isupper() and len(_pieces(tokenizer, w.lower())) > 1]
    return max(names or words[:1], key=names.count, default="")


def _rarest(tokenizer: Any, sentence: str, name: str, count: int) -> list[str]:
    """Words by the place of their piece in the vocabulary; those of several pieces are rarer."""
    words = dict.fromkeys(w for w in re.findall(r"\w[\w'-]*", sentence) if len(w) > 2)
    rank = {}
    for word in words:
        first, *more = _pieces(tokenizer, word.lower()) or [0]
        if word != name and (more or first > COMMON):
            rank[word] = (bool(more), 0 if more else first)
    return sorted(rank, key=lambda word: rank[word], reverse=True)[:count]


def _pieces(tokenizer: Any, word: str) -> list[int]:
    return tokenizer.encode(f" {word}", add_special_tokens=False)


def question_in(said: str) -> str | None:
    """The first question of what was said, without what introduces it; None without one."""
    found = re.match(r"[^?？؟\n]*[?？؟]", said.strip())
    if found is None:
        return None
    question = re.split(r"[\"“:]\s*|^\W*\d+[.)]\s*", found[0])[-1].strip(" *'-")
    return question if 8 < len(question) < 200 else None


def _from_passage(question: Question) -> bool:
    new = _words(question.answer) - _words(question.text)
    return bool(new & _words(question.passage))


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 1}


def prompt(tokenizer: Any, words: str) -> list[int]:
    """The ids that ask for a reply to these words alone."""
    return conversation.prompt(tokenizer, [{"role": "user", "content": words}])


@torch.no_grad()
def decode(
    base: Any, tokenizer: Any, prompts: Sequence[list[int]], tokens: int, what: str, tell: Tell,
    *, seed: int | None = None, rows: int = ROWS,
) -> list[str]:  # fmt: skip
    """What follows each prompt, `rows` at once: the likeliest tokens, or with a seed samples.

    Prompts that begin alike, as with one passage, have that beginning read once.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])  # those alike side by side
    said = [""] * len(prompts)
    device = base.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed or 0)
        for a in range(0, len(order), rows):
            tell(what, a, len(order))
            some = order[a : a + rows]
            ids, mask, cache = beside([prompts[i] for i in some], base)
            begin = ids.shape[1]
            made = base.generate(
                ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=tokens,
                do_sample=seed is not None, pad_token_id=_pad(base),
                **(SAMPLED if seed is not None else {}),
            )  # fmt: skip
            for i, row in zip(some, made[:, begin:].tolist()):
                said[i] = tokenizer.decode(row, skip_special_tokens=True)
    return said


def beside(
    prompts: Sequence[list[int]], base: Any, answers: Sequence[list[int]] = ()
) -> tuple[Tensor, Tensor, DynamicCache]:
    """Prompts, each with its answer, as rows: ids [B, T], which of them are no padding, and the
    cache of what all prompts begin with, but for their last token; the padding stands behind that.
    """
    same, shortest = 0, min(map(len, prompts)) - 1
    while same < shortest and len({row[same] for row in prompts}) == 1:
        same += 1
    prompts = [p + a for p, a in zip(prompts, answers)] if answers else prompts
    longest = max(map(len, prompts))
    cache = DynamicCache()
    if same:
        first = torch.tensor([prompts[0][:same]], device=base.device)
        base(input_ids=first, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    gaps = [longest - len(row) for row in prompts]
    ids = [row[:same] + [_pad(base)] * gap + row[same:] for row, gap in zip(prompts, gaps)]
    mask = [[1] * same + [0] * gap + [1] * (longest - same - gap) for gap in gaps]
    return torch.tensor(ids, device=base.device), torch.tensor(mask, device=base.device), cache


def _pad(base: Any) -> int:
    ends = base.generation_config.pad_token_id or base.config.get_text_config().eos_token_id
    return (ends[0] if isinstance(ends, list) else ends) or 0
