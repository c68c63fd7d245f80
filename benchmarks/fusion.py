"""How words should count in hybrid search: nDCG@10 by way and weight, beside reciprocal rank fusion, on BEIR folders.

    python benchmarks/fusion.py data/covid-faq data/perlfaq --limit 100 --json

What the product does was chosen by the mean of these; use folders that are not your test sets. FOLDER:SPLIT takes other
judgements than `test`. `--minilm` asks whether it suits all-MiniLM-L6-v2, too, for the baseline `minilm-hybrid`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from search_r3 import SearchR3
from search_r3.evaluate.baselines import minilm_vectors
from search_r3.evaluate.collection import Collection, load_collection
from search_r3.evaluate.metrics import paired_p_value, score_queries
from search_r3.index.lexical import LEXICAL_WEIGHT, LexicalIndex

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
ROOTS = (0.15, 0.2, 0.25, 0.3)  # weights where the square root of the number of words counts, too
DEPTH = 100  # documents of a ranking


def by_ranks(cosines: np.ndarray, words: np.ndarray, _: np.ndarray, constant: int = 60) -> np.ndarray:
    """Reciprocal rank fusion (Cormack et al., 2009) of the best of two rankings given by their scores, (N,)."""
    fused = np.zeros(len(cosines))
    for scores in (cosines, words):
        order = np.argsort(-scores, kind="stable")[:DEPTH]
        order = order[scores[order] > 0]
        fused[order] += 1 / (constant + np.arange(1, len(order) + 1))
    return fused


def shared(cosines: np.ndarray, words: np.ndarray, _: np.ndarray, weight: float) -> np.ndarray:
    """Cosine + weight * the share of the query's best BM25 score."""
    return cosines + weight * words / max(words.max(), 1e-9)


def covered(cosines: np.ndarray, words: np.ndarray, _: np.ndarray, weight: float) -> np.ndarray:
    """Cosine + weight * coverage."""
    return cosines + weight * words


def rooted(cosines: np.ndarray, _: np.ndarray, worth: np.ndarray, weight: float) -> np.ndarray:
    """Cosine + weight * sqrt(words of the query) * coverage, as `Retriever` does."""
    return cosines + weight / LEXICAL_WEIGHT * worth


def similarities(model: SearchR3 | None, minilm: bool, collection: Collection, tokens: int) -> np.ndarray:
    """(Q, N) cosines of the model, of all-MiniLM-L6-v2, or the mean of both."""
    texts = [query.text for query in collection.queries]
    found = []
    if model is not None:
        found.append(model.encode_queries(texts) @ model.encode_documents(collection.documents, max_tokens=tokens).T)
    if minilm:
        encode, vectors = minilm_vectors(collection.documents)
        found.append(encode(texts) @ vectors.T)
    return np.mean(found, axis=0)


def measure(collection: Collection, cosines: np.ndarray) -> dict[str, dict[str, float]]:
    """nDCG@10 of every way to fuse and every query. Documents with the query's own id are passed over (ArguAna)."""
    names = [document.id for document in collection.documents]
    rows = {name: row for row, name in enumerate(names)}
    index = LexicalIndex.build([document.content for document in collection.documents], range(len(names)))
    ways = {"vectors": lambda c, w, s: c, "bm25": lambda c, w, s: w, "ranks": by_ranks}
    for weight in WEIGHTS:
        ways[f"share_{weight:g}"] = partial(shared, weight=weight)
        ways[f"coverage_{weight:g}"] = partial(covered, weight=weight)
    ways |= {f"root_{weight:g}": partial(rooted, weight=weight) for weight in ROOTS}
    runs: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ways}
    for query, cosine in zip(collection.queries, cosines, strict=True):
        parts = cosine.copy(), index.coverage(query.text, len(names)), index.worth(query.text, len(names))
        if query.id in rows:
            for part, least in zip(parts, (-1, 0, 0), strict=True):
                part[rows[query.id]] = least
        for name, way in ways.items():
            scores = way(*parts)
            best = np.argsort(-scores, kind="stable")[:DEPTH]
            runs[name][query.id] = {names[row]: float(scores[row]) for row in best}
    return {name: score_queries(collection.judgements, run)["nDCG@10"] for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="BEIR folders, each perhaps with :SPLIT")
    parser.add_argument("--checkpoint", default="default")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--minilm", action="store_true", help="all-MiniLM-L6-v2 as it is, instead of a checkpoint")
    other.add_argument("--both", action="store_true", help="the mean of the cosines of both")
    parser.add_argument("--limit", type=int, default=100, help="first queries of each folder (100)")
    parser.add_argument("--tokens", type=int, default=128, help="documents are cut here (128)")
    parser.add_argument("--precision", default="auto", help="of the model (auto)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = None if args.minilm else SearchR3.from_pretrained(args.checkpoint, dtype=args.precision)
    result, with_root, without = {}, [], []
    for given in args.folders:
        path, _, split = given.partition(":")
        collection = load_collection(Path(path), split=split or "test", limit=args.limit)
        found = measure(collection, similarities(model, args.minilm or args.both, collection, args.tokens))
        result[collection.name] = {name: float(np.mean(list(scores.values()))) for name, scores in found.items()}
        without += found["coverage_0.5"].values()
        with_root += [found["root_0.2"][name] for name in found["coverage_0.5"]]
    result["mean"] = {
        name: float(np.mean([row[name] for row in result.values()])) for name in next(iter(result.values()))
    }
    gain = float(np.mean(with_root) - np.mean(without))
    result["root_0.2 against coverage_0.5"] = {"a query": gain, "p": paired_p_value(with_root, without)}
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
