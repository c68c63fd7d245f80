"""Search as the index grows to a million vectors: time of a query, recall, memory, time to build. Synthetic vectors.

Exact search reads a memory map in 32 and in 16 bits, as the store keeps them; the graph is compared with it. Medians
of single queries in milliseconds, after a warm-up. `gib` is what the process grew by; for exact search, pages of the
map, which the system may drop.

    python benchmarks/scale.py --json        # about 7 minutes and 12 GiB; --most 100000: one minute
"""

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, finish
from index import K, make, recall, resident
from search_r3.index.exact import ExactIndex
from search_r3.index.graph import GraphIndex


def singles(index: Any, queries: np.ndarray) -> tuple[float, np.ndarray]:
    """Median milliseconds of one query, and the rows found by all."""
    index.search(queries[:1], K)
    times, rows = [], []
    for query in queries:
        started = time.perf_counter()
        rows.append(index.search(query[None], K)[1][0])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times), np.array(rows)


def measure(count: int, width: int, asked: int) -> dict[str, Any]:
    """All figures at one size."""
    documents, queries = make(count, width, asked)
    row: dict[str, Any] = {"documents": count}
    with tempfile.TemporaryDirectory() as folder:
        truth = None
        for name, dtype in (("exact", np.float32), ("half", np.float16)):
            path = Path(folder) / name
            documents.astype(dtype, copy=False).tofile(path)
            index = None  # or its map would count as there before
            before = resident()
            index = ExactIndex(np.memmap(path, dtype, "r", shape=documents.shape))
            row[f"{name}_p50_ms"], found = singles(index, queries)
            started = time.perf_counter()
            index.search(queries, K)
            row[f"{name}_batch_ms"] = 1000 * (time.perf_counter() - started) / len(queries)
            row[f"{name}_gib"] = (resident() - before) / 2**30
            row[f"{name}_disk_gib"] = path.stat().st_size / 2**30
            truth = found if truth is None else truth
            row[f"{name}_recall10"] = recall(found, truth)
        del index
        # The graph keeps the vectors where they are and adds its own copy in 16 bits.
        mapped = np.memmap(Path(folder) / "exact", np.float32, "r", shape=documents.shape)
        del documents
        gc.collect()
        before, started = resident(), time.perf_counter()
        near = GraphIndex.build(mapped)
        row["graph_build_s"], row["graph_gib"] = time.perf_counter() - started, (resident() - before) / 2**30
        row["graph_p50_ms"], found = singles(near, queries)
        row["graph_recall10"] = recall(found, truth)
    return row


def main() -> None:
    args = arguments(
        __doc__, most=(1_000_000, "largest number of vectors"), width=(576, "components"), queries=(100, "queries"),
    )  # fmt: skip
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= args.most]
    rows = [measure(size, args.width, args.queries) for size in sizes]
    finish({"sizes": rows, "width": args.width, "threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
