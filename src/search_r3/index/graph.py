"""Approximate search over a hierarchical navigable small-world graph (usearch), for corpora too large to scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import StoreError

CONNECTIVITY = 32  # neighbours a node; 16 loses recall at 576 dimensions
EXPANSION_ADD = 128
EXPANSION_SEARCH = 128


class GraphIndex:
    """A graph over (N, D) vectors; row numbers are its keys.

    alive: (N,) bool; other rows are skipped by searching a little deeper. None: all rows.
    """

    def __init__(self, graph: Any, alive: np.ndarray | None = None):
        self.graph = graph
        self.alive = None if alive is None or alive.all() else alive

    @classmethod
    def build(cls, vectors: np.ndarray, alive: np.ndarray | None = None, dtype: str = "f16") -> GraphIndex:
        """Build from scratch. dtype: how the graph stores vectors, `f32`, `f16` or `i8`."""
        index = cls(_new(vectors.shape[1], dtype), alive)
        index.extend(vectors)
        return index

    @classmethod
    def load(cls, path: Path, dimension: int, alive: np.ndarray | None = None, dtype: str = "f16") -> GraphIndex:
        """Load a saved graph. Raises StoreError if it is damaged."""
        graph = _new(dimension, dtype)
        try:
            graph.load(str(path))
        except Exception as error:
            raise StoreError(f"{path}: cannot be loaded ({error}); delete it, and it will be rebuilt") from error
        return cls(graph, alive)

    def extend(self, vectors: np.ndarray) -> None:
        """Add the rows that the graph does not have yet: those after its last."""
        first = len(self.graph)
        if first < len(vectors):
            new = np.asarray(vectors[first:], dtype=np.float32)
            self.graph.add(np.arange(first, len(vectors)), new)

    def save(self, path: Path) -> None:
        """Write the graph; the caller renames it into place."""
        self.graph.save(str(path))

    def __len__(self) -> int:
        return len(self.graph) if self.alive is None else int(self.alive.sum())

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`; approximate."""
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        wanted = min(k, len(self))
        if not wanted:
            return scores, rows
        depth = wanted if self.alive is None else min(len(self.graph), 2 * wanted + 16)
        while True:
            matches = self.graph.search(np.ascontiguousarray(queries, dtype=np.float32), depth)
            keys = np.atleast_2d(matches.keys).astype(np.int64)
            found = 1 - np.atleast_2d(matches.distances)
            usable = np.ones(keys.shape, bool) if self.alive is None else self.alive[keys]
            if depth >= len(self.graph) or usable.sum(axis=1).min() >= wanted:
                break
            depth = min(len(self.graph), 4 * depth)
        for query in range(len(queries)):
            good = usable[query]
            number = min(k, int(good.sum()))
            scores[query, :number] = found[query][good][:number]
            rows[query, :number] = keys[query][good][:number]
        return scores, rows


def _new(dimension: int, dtype: str) -> Any:
    try:
        from usearch.index import Index
    except ImportError:
        raise StoreError("a graph index needs the 'graph' extra: pip install 'search-r3[graph]'") from None
    return Index(
        ndim=dimension,
        metric="ip",
        dtype=dtype,
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )
