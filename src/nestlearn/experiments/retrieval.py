"""Texts that are like another one, by BM25: the row without a memory."""

from __future__ import annotations

import os
from collections.abc import Sequence


class BM25:
    """An index of texts. stopwords: a language whose commonest words do not count, or None."""

    def __init__(self, texts: Sequence[str], stopwords: str | None = None):
        # bm25s calls JAX where it is installed, which would take three quarters of the card.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import bm25s

        self._library, self._stopwords, self._count = bm25s, stopwords, len(texts)
        self._index = bm25s.BM25()
        self._index.index(self._words(texts), show_progress=False)

    def _words(self, texts: Sequence[str]) -> object:
        return self._library.tokenize(
            list(texts), stopwords=self._stopwords, show_progress=False
        )  # fmt: skip

    def like(self, text: str, most: int) -> list[int]:
        """The places of the texts most like this one, the best first."""
        places, _ = self._index.retrieve(
            self._words([text]), k=min(most, self._count), show_progress=False,
            backend_selection="numpy",
        )  # fmt: skip
        return [int(place) for place in places[0]]
