"""How words should count in hybrid search: nDCG@10 by way and weight, beside reciprocal rank fusion, on BEIR folders.

    python benchmarks/fusion.py data/covid-faq data/perlfaq --limit 100 --json

The weight in the product was chosen by the mean of these; use folders that are not your test sets. `--minilm` asks
whether it suits all-MiniLM-L6-v2, too, for the baseline `minilm-hybrid`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from search_r3 import SearchR3
from search_r3.evaluate.baselines import minilm_vectors
from search_r3.evaluate.collection import load_collection
from search_r3.evaluate.metrics import score_queries
from search_r3.index.lexical import LexicalIndex

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
DEPTH = 100  # documents of a ranking


def by_ranks(cosines: np.ndarray, words: np.ndarray, constant: int = 60) -> np.ndarray:
    """Reciprocal rank fusion (Cormack et al., 2009) of the best of two rankings given by their scores, (N,)."""
    fused = np.zeros(len(cosines))
    for scores in (cosines, words):
        order = np.argsort(-scores, kind="stable")[:DEPTH]
        order = order[scores[order] > 0]
        fused[order] += 1 / (constant + np.arange(1, len(order) + 1))
    return fused


def shared(cosines: np.ndarray, words: np.ndarray, weight: float) -> np.ndarray:
    """Cosine + weight * the share of the query's best BM25 score."""
    return cosines + weight * words / max(words.max(), 1e-9)


def covered(cosines: np.ndarray, words: np.ndarray, weight: float) -> np.ndarray:
    """Cosine + weight * coverage, as `Retriever` does."""
    return cosines + weight * words


def measure(model: SearchR3 | None, folder: Path, limit: int, tokens: int) -> dict[str, float]:
    """nDCG@10 of every way to fuse, on one collection; model: None for all-MiniLM-L6-v2."""
    collection = load_collection(folder, limit=limit)
    names = [document.id for document in collection.documents]
    texts = [query.text for query in collection.queries]
    if model is None:
        encode, vectors = minilm_vectors(collection.documents)
        cosines = encode(texts) @ vectors.T
    else:
        cosines = model.encode_queries(texts) @ model.encode_documents(collection.documents, max_tokens=tokens).T
    index = LexicalIndex.build([document.content for document in collection.documents], range(len(names)))
    words = [index.coverage(text, len(names)) for text in texts]
    ways = {"vectors": lambda c, w: c, "bm25": lambda c, w: w, "ranks": by_ranks}
    for weight in WEIGHTS:
        ways[f"share_{weight:g}"] = partial(shared, weight=weight)
        ways[f"coverage_{weight:g}"] = partial(covered, weight=weight)
    found = {}
    for name, way in ways.items():
        run = {}
        for query, *pair in zip(collection.queries, cosines, words, strict=True):
            scores = way(*pair)
            best = np.argsort(-scores, kind="stable")[:DEPTH]
            run[query.id] = {names[row]: float(scores[row]) for row in best}
        found[name] = float(np.mean(list(score_queries(collection.judgements, run)["nDCG@10"].values())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--minilm", action="store_true", help="all-MiniLM-L6-v2 as it is, instead of a checkpoint")
    parser.add_argument("--limit", type=int, default=100, help="first queries of each folder (100)")
    parser.add_argument("--tokens", type=int, default=128, help="documents are cut here (128)")
    parser.add_argument("--precision", default="auto", help="of the model (auto)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = None if args.minilm else SearchR3.from_pretrained(args.checkpoint, dtype=args.precision)
    result = {folder.name: measure(model, folder, args.limit, args.tokens) for folder in args.folders}
    result["mean"] = {
        name: float(np.mean([row[name] for row in result.values()])) for name in next(iter(result.values()))
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
