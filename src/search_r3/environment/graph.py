"""A graph whose vectors move under it: rows are overwritten in place and its edges stay.

usearch keeps the vectors of a saved index in one block, in the order in which they were added. A second mapping of that
block lets rows be overwritten at the speed of memory while the index goes on searching. Edges that no longer fit cost
recall; rows of the corpus are looked up now and then, and where too few find themselves the graph is built anew.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.environment.evolving import EvolvingIndex, best_columns
from search_r3.errors import StoreError
from search_r3.extras import need

CONNECTIVITY = 16
EXPANSION_ADD = 96
HEADER_BYTES = 8  # rows and bytes a row, before usearch's block of vectors
PROBES = 64
LEAST_FOUND = 0.95
SAMPLE = 1024  # rows that stand for all that are not proposed


class EvolvingGraph(EvolvingIndex):
    """An `EvolvingIndex` that proposes without scoring every row. Needs the extra `graph`.

    folder: where the graph's file lies; a temporary folder by default.
    """

    def __init__(self, count: int, dimension: int, dtype: str = "float32", folder: Path | None = None):
        super().__init__(count, dimension, dtype, None)
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="search-r3-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._graph: Any = None
        self.builds = 0

    def build(self) -> None:
        """Build the edges for the vectors as they are now."""
        need("graph", "index: graph")
        from usearch.index import Index

        kind = "f16" if self.vectors.dtype == np.float16 else "f32"
        graph = Index(
            ndim=self.vectors.shape[1],
            metric="ip",
            dtype=kind,
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
        )
        rows = np.arange(len(self), dtype=np.uint64)
        graph.add(rows, np.ascontiguousarray(self.vectors), threads=1)  # one thread: rows are stored in their order
        path = self.folder / f"graph-{self.builds}.usearch"
        graph.save(str(path))
        stored = np.memmap(path, self.vectors.dtype, "r+", HEADER_BYTES, self.vectors.shape)
        if not np.array_equal(stored[:: max(1, len(self) // 100)], self.vectors[:: max(1, len(self) // 100)]):
            raise StoreError("this usearch stores vectors in another layout; use index: exact")
        self._graph, self.vectors = Index.restore(str(path), view=True), stored
        self.builds += 1
        for older in self.folder.glob("graph-*.usearch"):
            if older != path:
                older.unlink()

    def best(self, groups: Sequence[np.ndarray], depth: int) -> Iterator[np.ndarray]:
        """See `EvolvingIndex.best`; a row may be missed."""
        for queries in groups:
            rows = np.unique(self._search(queries, min(depth, len(self))))
            yield rows[best_columns(self.scores(queries, rows).max(axis=0), depth)]

    def pools(
        self, groups: Sequence[np.ndarray], depth: int, relevant: Sequence[np.ndarray], rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """See `EvolvingIndex.pools`: what is proposed or relevant stands for itself, a uniform sample for the rest."""
        for queries, wanted in zip(groups, relevant, strict=True):
            near = np.union1d(self._search(queries, min(depth, len(self))), wanted)
            drawn = np.setdiff1d(rng.integers(0, len(self), min(SAMPLE, 4 * len(self))), near)
            rows = np.concatenate([near, drawn])
            weights = np.ones(len(rows))
            weights[len(near) :] = (len(self) - len(near)) / max(len(drawn), 1)
            order = np.argsort(rows)
            yield rows[order], weights[order], self.scores(queries, rows[order])

    def maintain(self, rng: np.random.Generator) -> None:
        """Look rows of the corpus up, and build the graph anew where too few find themselves."""
        if self._graph is None:
            self.build()
        rows = rng.choice(len(self), min(PROBES, len(self)), replace=False)
        queries = self.read(rows)
        found = self._search(queries, min(10, len(self)))
        best = (self.read(found.ravel()).reshape(*found.shape, -1) @ queries[:, :, None])[:, :, 0].max(axis=1)
        own = (queries * queries).sum(axis=1)
        if (best >= own - 1e-3).mean() < LEAST_FOUND:  # a copy of the same text counts as the row itself
            self.build()

    def _search(self, queries: np.ndarray, depth: int) -> np.ndarray:
        """Row numbers that the graph proposes for each query, (Q, depth)."""
        if self._graph is None:
            self.build()
        self._graph.expansion_search = max(64, depth)
        keys = self._graph.search(np.ascontiguousarray(queries, np.float32), depth).keys
        rows: np.ndarray = np.minimum(np.asarray(keys, np.uint64), len(self) - 1).astype(np.int64)
        return rows.reshape(len(queries), -1)
