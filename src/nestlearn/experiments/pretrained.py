"""Pretrained models that experiments read with, and BM25, the row without a memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.experiments.experiment import Cell, Options
from nestlearn.experiments.provenance import fingerprint

SOURCES = ("hf", "experiments/pretrained.py")  # of whoever reads with one


def part(asked: Options) -> Cell:
    """A cell's part: the folder, and a hash of the weights in it; ValueError where there are none.

    FOLDER/model is a pretrained model with its tokenizer, as transformers saves it.
    """
    files = sorted((Path(asked.data or "") / "model").glob("*.safetensors"))
    if asked.data is None or not files:
        raise ValueError(f"--data {asked.data}: give a folder with a pretrained model in model/")
    return {"folder": asked.data, "weights": fingerprint(files)}


def opened(folder: Path, device: str) -> tuple[Any, Any]:
    """The model of a folder, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(folder / "model")


class BM25:
    """An index of texts. stopwords: a language whose commonest words do not count, or None."""

    def __init__(self, texts: Sequence[str], stopwords: str | None = None):
        # bm25s calls JAX where it is installed, which would take three quarters of the card.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import bm25s

        self._tokenize, self._stopwords, self._count = bm25s.tokenize, stopwords, len(texts)
        self._index = bm25s.BM25()
        self._index.index(self._words(texts), show_progress=False)

    def _words(self, texts: Sequence[str]) -> object:
        return self._tokenize(list(texts), stopwords=self._stopwords, show_progress=False)

    def like(self, text: str, most: int) -> list[int]:
        """The places of the texts most like this one, the best first."""
        places, _ = self._index.retrieve(
            self._words([text]), k=min(most, self._count), show_progress=False,
            backend_selection="numpy",
        )  # fmt: skip
        return places[0].tolist()
