"""BM25 over passages (bm25s), the lexical half of hybrid search and the baseline of every table.

Lucene's idf, k1 0.9, b 0.4, English stemming and stop words: the setting of the BEIR and Anserini baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import StoreError

QUERY_CHARACTERS = 8000  # of a query that are read: time grows with its words, and the model reads fewer still
LEXICAL_WEIGHT, MOST_WORDS = 0.2, 25  # of `LexicalIndex.worth`; how they were chosen stands in docs/evaluation.md


class LexicalIndex:
    """BM25 scores over numbered texts. `retriever` is None when no text has a word that is worth indexing."""

    def __init__(self, retriever: Any | None, rows: np.ndarray):
        self._retriever, self._rows = retriever, rows

    @classmethod
    def build(cls, texts: Sequence[str], rows: Sequence[int]) -> LexicalIndex:
        """Index texts under these row numbers."""
        import bm25s

        tokens = _tokenise(list(texts))
        if not any(tokens.vocab):
            return cls(None, np.empty(0, np.int64))
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
            return cls(bm25s.BM25.load(str(folder / "bm25s")) if len(rows) else None, rows)
        except Exception as error:
            raise StoreError(f"{folder}: cannot be loaded ({error})") from error

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Index.search`, for texts; rows that share no word with the query are not returned (-inf, -1)."""
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        wanted = min(k, len(self._rows))
        if not wanted or self._retriever is None:
            return scores, rows
        tokens = _tokenise([query[:QUERY_CHARACTERS] for query in queries])
        found, values = self._retriever.retrieve(tokens, k=wanted, show_progress=False)
        positive = values > 0
        scores[:, :wanted] = np.where(positive, values, -np.inf)
        rows[:, :wanted] = np.where(positive, self._rows[found], -1)
        return scores, rows

    def coverage(self, query: str, rows: int) -> np.ndarray:
        """(rows,) float32: how much of a query each row holds, its BM25 over the sum of the query's idf, in [0, 1).

        rows: how many row numbers there are. A word that no row has counts as the rarest: a query of which little is
        known is not answered by its common words. Unlike a rank or a share of the best score (Bruch et al., 2022, arXiv
        2210.11934), it can be added to a cosine whatever else was found.

        Examples:
            >>> index = LexicalIndex.build(["pack many files", "list files"], [0, 1])
            >>> [round(float(share), 2) for share in index.coverage("pack files", 2)]
            [0.51, 0.11]
        """
        return self._coverage(_words(query), rows)

    def worth(self, query: str, rows: int) -> np.ndarray:
        """(rows,) float32: what hybrid search adds to a cosine, 0.2 * sqrt(n) * `coverage` for a query of n words.

        A share of n words is a mean of n, of which chance takes less the larger n is, by its square root. n counts up
        to 25: longer texts say the same again. (ours)
        """
        words = _words(query)
        return np.float32(LEXICAL_WEIGHT * min(len(words), MOST_WORDS) ** 0.5) * self._coverage(words, rows)

    def _coverage(self, words: list[str], rows: int) -> np.ndarray:
        found = np.zeros(rows, dtype=np.float32)
        if self._retriever is None or not words:
            return found
        ids = self._retriever.get_tokens_ids(words)
        if ids:
            texts = self._retriever.scores["num_docs"]
            having = np.diff(self._retriever.scores["indptr"])[ids]
            having = np.append(having, np.zeros(len(words) - len(ids)))
            ceiling = np.log1p((texts - having + 0.5) / (having + 0.5)).sum()  # Lucene's idf, term frequency at most 1
            found[self._rows] = self._retriever.get_scores_from_ids(ids) / ceiling
        return found


def _words(query: str) -> list[str]:
    return [word for word in _tokenise([query[:QUERY_CHARACTERS]], return_ids=False)[0] if word]


def _tokenise(texts: list[str], return_ids: bool = True) -> Any:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=return_ids, show_progress=False)
