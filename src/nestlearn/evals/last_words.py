"""LAMBADA: passages of novels whose last word a reader of the whole passage knows.

Paperno et al. 2016, in the form of OpenAI's test set: lines of JSON with `context` and
`continuation`. A word is right if each of its tokens is the likeliest one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import rows_of

Passage = tuple[list[int], list[int]]  # ids of the passage, and of its last word


def lambada(file: Path, tokenizer: Any, count: int | None = None) -> list[Passage]:
    """The first `count` passages (None: all) of a gzipped file; ValueError where it has others."""
    try:
        texts = [(row["context"], row["continuation"]) for row in rows_of(file)[:count]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no lines of context and continuation") from error
    return [
        (tokenizer.encode(context), tokenizer.encode(f" {word}", add_special_tokens=False))
        for context, word in texts
    ]


@torch.no_grad()
def last_words(model: Any, passages: list[Passage], rows: int = 32) -> float:
    """The share of passages whose last word the model says. model: ids [B, T] -> .logits."""
    device, right = next(model.parameters()).device, 0
    order = sorted(passages, key=lambda passage: len(passage[0]))  # padding costs
    for a in range(0, len(order), rows):
        some = order[a : a + rows]
        longest = max(len(context) + len(word) for context, word in some)
        # padded behind: a causal model does not see it
        ids = [c + w + [0] * (longest - len(c) - len(w)) for c, w in some]
        said: Tensor = model(input_ids=torch.tensor(ids, device=device)).logits.argmax(-1)
        for row, (context, word) in zip(said.tolist(), some):
            begin = len(context) - 1
            right += row[begin : begin + len(word)] == word
    return right / len(passages)
