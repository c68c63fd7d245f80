"""BM25 over passages (bm25s), the lexical half of hybrid search and the baseline of every table.

Lucene's idf, k1 0.9, b 0.4, English stemming and stop words: the setting of the BEIR and Anserini baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import StoreError

LEXICAL_WEIGHT = 0.2  # what the best lexical match is worth, in cosine


class LexicalIndex:
    """BM25 scores over numbered texts. `retriever` is None when no text has a word that is worth indexing."""

    def __init__(self, retriever: Any | None, rows: np.ndarray):
        self._retriever, self._rows = retriever, rows

    @classmethod
    def build(cls, texts: Sequence[str], rows: Sequence[int]) -> LexicalIndex:
        """Index texts under these row numbers."""
        import bm25s

        tokens = _tokenise(list(texts))
        retriever = None
        if any(tokens.vocab):
            retriever = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
            retriever.index(tokens, show_progress=False)
        return cls(retriever, np.asarray(rows, dtype=np.int64))

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        np.save(folder / "rows.npy", self._rows)
        if self._retriever is not None:
            self._retriever.save(str(folder / "bm25s"))

    @classmethod
    def load(cls, folder: Path) -> LexicalIndex:
        """Load what `save` wrote. Raises StoreError if it is damaged."""
        import bm25s

        try:
            rows = np.load(folder / "rows.npy")
            inner = folder / "bm25s"
            return cls(bm25s.BM25.load(str(inner)) if inner.exists() else None, rows)
        except Exception as error:
            raise StoreError(f"{folder}: cannot be loaded ({error}); delete it, and it will be rebuilt") from error

    def search(self, queries: Sequence[str], k: int, alive: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Index.search`, for texts; rows that share no word with the query are not returned (-inf, -1).

        alive: bool by row number; rows that are false are not returned.
        """
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        wanted = min(k, len(self._rows))
        if not wanted or self._retriever is None:
            return scores, rows
        mask = None if alive is None else alive[self._rows].astype(np.float32)
        found, values = self._retriever.retrieve(
            _tokenise(list(queries)), k=wanted, show_progress=False, weight_mask=mask
        )
        positive = values > 0
        scores[:, :wanted] = np.where(positive, values, -np.inf)
        rows[:, :wanted] = np.where(positive, self._rows[found], -1)
        return scores, rows


def _tokenise(texts: list[str]) -> Any:
    import bm25s
    import Stemmer

    return bm25s.tokenize(texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)


def fuse_scores(
    dense: Mapping[str, float], lexical: Mapping[str, float], weight: float = LEXICAL_WEIGHT
) -> dict[str, float]:
    """Cosine + weight * BM25 / the best BM25, for every document of either ranking.

    Scores keep what ranks lose: by how much a document leads (Bruch et al., 2022, arXiv 2210.11934). A document that
    the dense ranking lacks gets that ranking's lowest score, one that the lexical ranking lacks gets 0. How the weight
    was chosen stands in docs/evaluation.md.

    >>> fuse_scores({"a": 0.5, "b": 0.25}, {"b": 8.0, "c": 4.0})
    {'a': 0.5, 'b': 0.45, 'c': 0.35}
    """
    lowest, best = min(dense.values(), default=0.0), max(lexical.values(), default=1.0)
    return {name: dense.get(name, lowest) + weight * lexical.get(name, 0.0) / best for name in {**dense, **lexical}}
