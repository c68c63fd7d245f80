"""Exact search: every row is scored, block by block, so memory stays flat and a memory-mapped file is enough."""

from __future__ import annotations

import numpy as np

try:
    import numkong
except ImportError:  # a part of the 'graph' extra
    numkong = None  # type: ignore[assignment]

BLOCK_BYTES = 64 << 20  # of float32 rows scored at once
MANY = 256  # queries whose cosines with such a block are held at once
FEW = 8  # queries that are scored faster on 16-bit rows as they are than on rows widened first
ENLARGED = 2048  # what is left of a float32 beside its float16, in units of that one's last place


class ExactIndex:
    """Blocked top-k over rows that may live in a file.

    vectors: (N, D) float32 or float16, an array or memory map; scores have the precision of float32 at least.
    alive: (N,) bool; rows that are false are never returned. None: all rows.
    """

    def __init__(self, vectors: np.ndarray, alive: np.ndarray | None = None):
        self.vectors = vectors
        self.alive = None if alive is None or alive.all() else alive

    def __len__(self) -> int:
        return len(self.vectors) if self.alive is None else int(self.alive.sum())

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`. queries: unit rows. Equal scores are ordered by row number."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)  # (Q, D)
        if len(queries) > MANY:
            parts = [self.search(queries[start : start + MANY], k) for start in range(0, len(queries), MANY)]
            return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        count, width = self.vectors.shape
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        halves = numkong and self.vectors.dtype == np.float16 and self.vectors.flags.c_contiguous
        score = _score_halves if halves and 0 < len(queries) <= FEW else _score
        step = max(k, BLOCK_BYTES // (4 * width), 1)
        for start in range(0, count, step):
            block = self.vectors[start : start + step]  # (S, D)
            found = score(queries, block)  # (Q, S)
            if self.alive is not None:
                found[:, ~self.alive[start : start + step]] = -np.inf
            numbers = np.arange(start, start + len(block))
            for query in range(len(queries)):
                best, where = largest(found[query], numbers, k)
                if start:
                    best, where = largest(np.append(scores[query], best), np.append(rows[query], where), k)
                scores[query, : len(best)], rows[query, : len(where)] = best, where
        rows[np.isneginf(scores)] = -1
        return scores, rows


def _score(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    return queries @ np.asarray(block, dtype=np.float32).T


def _score_halves(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Without widening the rows: each query is the sum of two of 16 bits, the second of them enlarged."""
    high = queries.astype(np.float16)
    low = ((queries - high) * ENLARGED).astype(np.float16)
    found = np.asarray(numkong.cdist(np.concatenate([high, low]), block, "dot"))  # (2 Q, S)
    return (found[: len(queries)] + found[len(queries) :] / ENLARGED).astype(np.float32)


def largest(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest, in order; of equal ones the first."""
    if len(scores) > k:
        least = np.partition(scores, -k)[-k]
        kept = np.concatenate([np.flatnonzero(scores > least), np.flatnonzero(scores == least)])[:k]
        scores, rows = scores[kept], rows[kept]
    order = np.lexsort((rows, -scores))
    return scores[order], rows[order]
