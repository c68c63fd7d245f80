"""What one step of the retrieval environment costs as the corpus grows, at a fixed token budget. Synthetic drift.

Vectors of low intrinsic dimension turn a little at every step, as a model in training turns them. `encoded` must not
grow with the corpus; `step_s` is the environment's own time (encoding excluded), beside the time of one exact search
for the 100 best of the same rollouts (`search_s`). Then the same with a graph.

    python benchmarks/environment_scale.py --json
    python benchmarks/environment_scale.py --sizes 1000,10000,100000,1000000 --indexes exact --json
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import finish
from search_r3.environment import EnvironmentConfig, RetrievalEnvironment
from search_r3.index.exact import ExactIndex
from search_r3.records import Document

WIDTH, INNER, QUERIES, GROUP, TOKENS = 384, 48, 16, 8, 64


class Turning:
    """An encoder whose space turns with every tick; documents are numbered."""

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        self.inner = rng.normal(size=(count, INNER)).astype(np.float32)
        self.basis = rng.normal(size=(INNER, WIDTH)).astype(np.float32)
        self.turn = (0.05 * rng.normal(size=(INNER, WIDTH))).astype(np.float32)
        self.tick, self.encoded = 0, 0

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        moved = self.inner[rows] @ (self.basis + self.tick * self.turn)
        return moved / np.linalg.norm(moved, axis=1, keepdims=True)

    def encode_documents(self, documents: Sequence[Document]) -> np.ndarray:
        self.encoded += len(documents)
        return self.vectors(np.array([int(document.id) for document in documents]))


def measure(count: int, budget: int, steps: int, index: str) -> dict[str, Any]:
    """Medians over the steps at one size."""
    rng = np.random.default_rng(1)
    encoder = Turning(count)
    documents = [Document(str(n), "text") for n in range(count)]
    names = rng.choice(count, 10 * QUERIES, replace=False)
    environment = RetrievalEnvironment(
        documents,
        {str(name): {str(name): 1} for name in names},
        encoder,
        EnvironmentConfig.model_validate({"budget": budget, "index": index}),
        lengths=[TOKENS] * count,
    )
    environment.reset()
    if index == "graph":  # built at its first use
        started = time.perf_counter()
        next(environment.ready().best([encoder.vectors(names[:1])], 10))
        print(f"{count:,}: graph built in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    first, times, searches, errors = encoder.encoded, [], [], []
    for _ in range(steps):
        encoder.tick += 1
        asked = np.repeat(rng.choice(names, QUERIES, replace=False), GROUP)
        vectors = encoder.vectors(asked) + 5 * rng.normal(size=(len(asked), WIDTH)) / np.sqrt(WIDTH)
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        started = time.perf_counter()
        outcomes = environment.step([str(name) for name in asked], vectors)
        times.append(time.perf_counter() - started)
        stored = np.asarray(environment.ready().vectors)
        started = time.perf_counter()
        ExactIndex(stored).search(vectors, 100)
        searches.append(time.perf_counter() - started)
        rows = encoder.vectors(np.arange(count))
        scores = vectors @ rows.T
        own = scores[np.arange(len(asked)), asked]
        ranks = 1 + (scores > own[:, None]).sum(axis=1)
        errors += [
            abs(1 / np.log2(1 + o.relevant[0].rank) - 1 / np.log2(1 + r)) for o, r in zip(outcomes, ranks, strict=True)
        ]
    return {
        "documents": count,
        "index": index,
        "encoded": (encoder.encoded - first) / steps,
        "step_s": float(np.median(times)),
        "search_s": float(np.median(searches)),
        "step_over_search": float(np.median(times) / np.median(searches)),
        "dcg_error": float(np.mean(errors)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--sizes", default="1000,10000,100000", help="documents, with commas")
    parser.add_argument("--budget", type=int, default=64 * 1000, help="tokens a step (64 a document)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--indexes", default="exact,graph", help="exact, graph, or both")
    args = parser.parse_args()
    lines = []
    for index in args.indexes.split(","):
        for size in map(int, args.sizes.split(",")):
            lines.append(measure(size, args.budget, args.steps, index))
            print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in lines[-1].items()),
                file=sys.stderr,
            )
    last = [line for line in lines if line["documents"] == lines[-1]["documents"]]
    report = {
        "encoded_growth": last[0]["encoded"] / lines[0]["encoded"],
        "step_over_search": last[0]["step_over_search"],
        "sizes": lines,
    }
    if len(last) == 2:
        report["graph_step_x"] = last[0]["step_s"] / last[1]["step_s"]
    finish(report, args.json)


if __name__ == "__main__":
    main()
