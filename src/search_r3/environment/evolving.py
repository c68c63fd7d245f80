"""The stored vectors of a corpus and the model step at which each was computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from search_r3.index.exact import BLOCK_BYTES, largest

NEVER = -1
SCORE_BYTES = 256 << 20  # of cosines held at once


class EvolvingIndex:
    """Rows that are overwritten in place.

    vectors: (N, D) float32 or float16, in memory or, given a folder, in a file there (scratch: `state_dict` of the
        environment is what lasts).
    encoded: (N,) int64, the model step at which the model computed the row; -1: never, or a write was cut short.
    """

    def __init__(self, count: int, dimension: int, dtype: str = "float32", folder: Path | None = None):
        if folder is None:
            self.vectors = np.zeros((count, dimension), dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.vectors = np.lib.format.open_memmap(
                folder / "vectors.npy", mode="w+", dtype=np.dtype(dtype), shape=(count, dimension)
            )
        self.encoded = np.full(count, NEVER, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.vectors)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 copies."""
        found: np.ndarray = self.vectors[rows].astype(np.float32)
        return found

    def write(self, rows: np.ndarray, vectors: np.ndarray, step: int) -> None:
        """Overwrite rows with what the model of `step` computed. Cut short, the rows count as never encoded."""
        self.encoded[rows] = NEVER
        self.vectors[rows] = vectors
        self.encoded[rows] = step

    def blocks(self) -> Iterator[slice]:
        """Consecutive rows, so many that their float32 copies stay small."""
        size = max(1, BLOCK_BYTES // (4 * self.vectors.shape[1]))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def scores(self, queries: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Cosines with every row, or with `rows`, (Q, N) float32."""
        queries = np.ascontiguousarray(queries, np.float32)
        if rows is not None:
            some: np.ndarray = queries @ self.read(rows).T
            return some
        found = np.empty((len(queries), len(self)), np.float32)
        for block in self.blocks():
            found[:, block] = queries @ np.asarray(self.vectors[block], np.float32).T
        return found

    def best(self, groups: Sequence[np.ndarray], depth: int) -> Iterator[np.ndarray]:
        """For each group of queries (G, D), the (depth,) rows nearest to any of them, nearest first."""
        for scores in self._group_scores(groups):
            yield best_columns(scores.max(axis=0), depth)

    def pools(
        self, groups: Sequence[np.ndarray], depth: int, relevant: Sequence[np.ndarray], rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each group, the rows to rank (n,), ascending, the relevant ones among them; how many rows of the corpus
        each stands for (n,); and their cosines with the group's queries (G, n). Here: all rows, one each.
        """
        rows, weights = np.arange(len(self)), np.ones(len(self))
        for scores in self._group_scores(groups):
            yield rows, weights, scores

    def _group_scores(self, groups: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Cosines of each group with every row, (G, N); several groups are scored at once, as memory allows."""
        limit, start = max(1, SCORE_BYTES // (4 * len(self))), 0
        while start < len(groups):
            end, queries = start + 1, len(groups[start])
            while end < len(groups) and queries + len(groups[end]) <= limit:
                queries += len(groups[end])
                end += 1
            scores = self.scores(np.concatenate(groups[start:end]))
            yield from np.split(scores, np.cumsum([len(group) for group in groups[start : end - 1]]))
            start = end

    def maintain(self, rng: np.random.Generator) -> None:
        """Called after every step's writes; there is nothing to maintain here."""


def best_columns(scores: np.ndarray, depth: int) -> np.ndarray:
    """Numbers of the `depth` highest scores (n,), highest first; equal ones by number."""
    return largest(scores, np.arange(len(scores)), depth)[1]
