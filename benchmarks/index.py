"""Our exact and graph search against faiss-cpu: 100,000 vectors of 576 components, one query at a time and in batches.

The vectors imitate text embeddings: topics in a space of low intrinsic dimension plus noise, unit length; queries are
disturbed documents. Graphs are compared at equal recall: faiss searches with the smallest width that finds at least
what ours finds. Memory is what each index adds to the process.

    python benchmarks/index.py --json
"""

import gc
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import psutil

from common import arguments, finish, paired
from search_r3.index.exact import ExactIndex
from search_r3.index.graph import CONNECTIVITY, EXPANSION_ADD, GraphIndex

K = 10


def make(count: int, width: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) documents and (Q, D) queries, float32 with unit rows."""
    random = np.random.default_rng(seed)
    intrinsic, topics = 48, 500
    centres = random.standard_normal((topics, intrinsic))
    inner = centres[random.integers(topics, size=count)] + 0.6 * random.standard_normal((count, intrinsic))
    documents = (inner @ random.standard_normal((intrinsic, width))).astype(np.float32)
    documents += 0.5 * random.standard_normal((count, width), dtype=np.float32)
    chosen = documents[random.integers(count, size=queries)]
    asked = chosen + 2.0 * random.standard_normal(chosen.shape, dtype=np.float32)
    return unit(documents), unit(asked)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return psutil.Process().memory_info().rss


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true K rows that were found."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def one_by_one(search: object, queries: np.ndarray) -> None:
    """Search each query alone, as a person does."""
    for query in queries:
        search(query[None], K)  # type: ignore[operator]


def compare_exact(documents: np.ndarray, queries: np.ndarray, repeats: int) -> tuple[np.ndarray, dict[str, float]]:
    """The true K rows of each query, and figures; ours reads a memory map, as the store does."""
    single = queries[:40]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.bin"
        documents.tofile(path)
        ours = ExactIndex(np.memmap(path, np.float32, "r", shape=documents.shape))
        half = ExactIndex(documents.astype(np.float16))
        flat = faiss.IndexFlatIP(documents.shape[1])
        flat.add(documents)
        truth = flat.search(queries, K)[1]
        exact = paired(lambda: one_by_one(ours.search, single), lambda: one_by_one(flat.search, single), repeats)
        batch = paired(lambda: ours.search(queries, K), lambda: flat.search(queries, K), repeats)
        halves = paired(lambda: half.search(queries, K), lambda: flat.search(queries, K), repeats)
        return truth, {
            "exact_x": exact["ratio"],
            "exact_batch_x": batch["ratio"],
            "exact_batch_half_x": halves["ratio"],
            "exact_ms": 1000 * exact["ours_s"] / len(single),
            "exact_recall10": recall(ours.search(queries, K)[1], truth),
        }


def main() -> None:
    args = arguments(
        __doc__, count=(100_000, "vectors"), width=(576, "components"), queries=(200, "queries"),
        repeats=(3, "counted runs"),
    )  # fmt: skip
    faiss.omp_set_num_threads(args.threads)
    documents, queries = make(args.count, args.width, args.queries)
    truth, exact = compare_exact(documents, queries, args.repeats)

    before, started = resident(), time.perf_counter()
    graph = GraphIndex.build(documents[:-1])
    graph_build, graph_bytes = time.perf_counter() - started, resident() - before
    started = time.perf_counter()
    graph.extend(documents)
    graph_extend = time.perf_counter() - started
    before, started = resident(), time.perf_counter()
    hnsw = faiss.IndexHNSWFlat(args.width, CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = EXPANSION_ADD
    hnsw.add(documents)
    hnsw_build, hnsw_bytes = time.perf_counter() - started, resident() - before
    found = recall(graph.search(queries, K)[1], truth)
    theirs = 0.0
    for width in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024):
        hnsw.hnsw.efSearch = width
        theirs = recall(hnsw.search(queries, K)[1], truth)
        if theirs >= found:
            break
    near = paired(lambda: one_by_one(graph.search, queries), lambda: one_by_one(hnsw.search, queries), 5 * args.repeats)
    finish(
        {
            **exact,
            "graph_x": near["ratio"],
            "graph_recall10": found,
            "faiss_recall10": theirs,
            "faiss_ef_search": hnsw.hnsw.efSearch,
            "graph_ms": 1000 * near["ours_s"] / len(queries),
            "graph_build_s": graph_build,
            "graph_extend_s": graph_extend,
            "faiss_build_s": hnsw_build,
            "graph_build_x": hnsw_build / graph_build,
            "graph_mib": graph_bytes / 2**20,
            "faiss_mib": hnsw_bytes / 2**20,
            "vectors": args.count,
            "width": args.width,
            "threads": args.threads,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
