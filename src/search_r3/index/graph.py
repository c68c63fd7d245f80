"""Approximate search over a hierarchical navigable small-world graph (usearch), for corpora too large to scan.

The graph walks over bfloat16 copies and proposes; the proposals are ranked with the vectors themselves, so scores are
those of exact search and rounding costs no recall.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import StoreError
from search_r3.extras import need
from search_r3.index.exact import ExactIndex

CONNECTIVITY = 16  # neighbours a node; 32 found no more at 576 dimensions and took a third longer to build
EXPANSION_ADD = 128
EXPANSION_SEARCH = 48  # nodes kept in view; raised to the number of rows asked for
BLOCK_BYTES = 64 << 20  # of proposed rows ranked at once


class GraphIndex:
    """A graph over the numbered rows of `vectors`; those that it lacks at the end are added.

    vectors: (N, D) float32 or float16, an array or memory map.
    alive: (N,) bool; other rows are skipped by searching deeper. None: all rows.
    """

    def __init__(self, graph: Any, vectors: np.ndarray, alive: np.ndarray | None = None):
        self.graph = graph
        self.saved = len(graph)
        """How many rows its copy on disk holds."""
        self.extend(vectors, alive)

    @classmethod
    def build(cls, vectors: np.ndarray, alive: np.ndarray | None = None) -> GraphIndex:
        """Build from scratch, on all cores."""
        return cls(_new(vectors.shape[1]), vectors, alive)

    @classmethod
    def load(cls, path: Path, vectors: np.ndarray, alive: np.ndarray | None = None) -> GraphIndex:
        """Load the saved graph of these vectors, or of the first of them. Raises StoreError if it is damaged."""
        graph = _new(vectors.shape[1])
        try:
            graph.load(str(path))
            if graph.ndim != vectors.shape[1] or len(graph) > len(vectors):
                raise ValueError(f"it holds {len(graph)} rows of {graph.ndim}, the store {vectors.shape}")
            for first in range(0, len(graph), 4096):
                rows = np.arange(first, min(first + 4096, len(graph)))
                if not np.allclose(graph.get(rows, dtype="f32"), vectors[rows], atol=0.02):
                    raise ValueError(f"rows {first} to {rows[-1]} are other vectors than in the store")
        except Exception as error:
            raise StoreError(f"{path}: cannot be loaded ({error})") from error
        return cls(graph, vectors, alive)

    def extend(self, vectors: np.ndarray, alive: np.ndarray | None = None) -> None:
        """Take over what has been appended to the vectors, and which rows are alive now."""
        first = len(self.graph)
        if first < len(vectors):
            self.graph.add(np.arange(first, len(vectors)), np.asarray(vectors[first:], dtype=np.float32))
        self.vectors, self.alive = vectors, None if alive is None or alive.all() else alive

    def save(self, path: Path) -> None:
        """Write the graph; the caller renames it into place. Raises OSError."""
        try:
            self.graph.save(str(path))
        except RuntimeError as error:  # usearch's only kind
            path.unlink(missing_ok=True)
            raise OSError(str(error)) from error
        self.saved = len(self.graph)

    def __len__(self) -> int:
        return len(self.graph) if self.alive is None else int(self.alive.sum())

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`; approximate: a row may be missed, but a score is never wrong."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)  # (Q, D)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        wanted = min(k, len(self))
        step = max(1, BLOCK_BYTES // (8 * max(wanted, 1) * queries.shape[1]))
        for start in range(0, len(queries), step) if wanted else ():
            block = queries[start : start + step]
            keys, usable = self._propose(block, wanted)  # (S, depth)
            if usable.sum(axis=1).min() < wanted:  # to some rows no edge leads
                part = slice(start, start + step)
                scores[part, :wanted], rows[part, :wanted] = ExactIndex(self.vectors, self.alive).search(block, wanted)
                continue
            found = (self.vectors[keys].astype(np.float32, copy=False) @ block[:, :, None])[:, :, 0]  # (S, depth)
            found[~usable] = -np.inf
            best = (-found).argsort(axis=1, kind="stable")[:, :wanted]
            line = np.arange(len(block))[:, None]
            scores[start : start + step, :wanted] = found[line, best]
            rows[start : start + step, :wanted] = keys[line, best]
        rows[np.isneginf(scores)] = -1
        return scores, rows

    def _propose(self, queries: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers (Q, depth) and which may be returned: at least `wanted` a query where there are."""
        from usearch.index import BatchMatches

        depth = min(len(self.graph), wanted + wanted // 2 + 1)
        while True:
            self.graph.expansion_search = max(EXPANSION_SEARCH, depth)
            matches = self.graph.search(queries, depth)
            keys = matches.keys.astype(np.int64).reshape(len(queries), -1)
            usable = np.ones(keys.shape, dtype=bool)
            if isinstance(matches, BatchMatches):  # fewer than depth were found: the rest of the line is undefined
                usable = np.arange(keys.shape[1]) < matches.counts[:, None]
                keys = np.where(usable, keys, 0)
            if self.alive is not None:
                usable &= self.alive[keys]
            if depth == len(self.graph) or usable.sum(axis=1).min() >= wanted:
                return keys, usable
            depth = min(len(self.graph), 4 * depth)


def _new(dimension: int) -> Any:
    need("graph", "a graph index")
    from usearch.index import Index

    return Index(ndim=dimension, metric="ip", dtype="bf16", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD)
