"""Exact search: every row is scored, block by block, so memory stays flat and a memory-mapped file is enough."""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = 64 << 20  # of float32 rows scored at once


class ExactIndex:
    """Blocked top-k over rows that may live in a file.

    vectors: (N, D) float32 or float16, an array or memory map; scores are always computed in float32.
    alive: (N,) bool; rows that are false are never returned. None: all rows.
    """

    def __init__(self, vectors: np.ndarray, alive: np.ndarray | None = None):
        self.vectors = vectors
        self.alive = None if alive is None or alive.all() else alive

    def __len__(self) -> int:
        return len(self.vectors) if self.alive is None else int(self.alive.sum())

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`. Equal scores are ordered by row number."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)  # (Q, D)
        count, width = self.vectors.shape
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        step = max(k, BLOCK_BYTES // (4 * width), 1)
        for start in range(0, count, step):
            block = np.asarray(self.vectors[start : start + step], dtype=np.float32)  # (S, D)
            found = queries @ block.T  # (Q, S)
            if self.alive is not None:
                found[:, ~self.alive[start : start + step]] = -np.inf
            numbers = np.arange(start, start + len(block))
            for query in range(len(queries)):
                best, where = _top(found[query], numbers, k)
                if start:
                    best, where = _top(np.append(scores[query], best), np.append(rows[query], where), k)
                scores[query, : len(best)], rows[query, : len(where)] = best, where
        rows[np.isneginf(scores)] = -1
        return scores, rows


def _top(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest, in order."""
    if len(scores) > k:
        kept = np.argpartition(-scores, k - 1)[:k]
        scores, rows = scores[kept], rows[kept]
    order = np.lexsort((rows, -scores))
    return scores[order], rows[order]
