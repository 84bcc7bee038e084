"""LAMBADA: a word counts where all its tokens are the likeliest."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from nestlearn.evals.last_words import lambada, last_words


class Letters:
    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]


class Next(torch.nn.Module):
    """After a letter it says the next of the alphabet."""

    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 200))


def written(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_every_token_of_the_word_counts(tmp_path):
    after = chr(ord(" ") - 1)  # what a space follows
    pairs = [("ab" + after, "!"), ("a longer one" + after, '!"'), ("a" + after, "!!"), ("b", "!")]
    rows = [{"context": a, "continuation": b} for a, b in pairs]
    passages = lambada(written(tmp_path / "some.jsonl.gz", rows), Letters())
    assert passages[0] == ([1, 97, 98, 31], [32, 33])
    for size in (1, 3, 32):
        assert last_words(Next(), passages, size) == 0.5
    assert lambada(tmp_path / "some.jsonl.gz", Letters(), 2) == passages[:2]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="context and continuation"):
        lambada(written(tmp_path / "some.jsonl.gz", [{"text": "a"}]), Letters())
