"""How much words should count in hybrid search: nDCG@10 by weight, beside reciprocal rank fusion, on BEIR folders.

    python benchmarks/fusion.py data/covid-faq data/perlfaq --limit 100 --json

The weight in the product was chosen by the mean of these; use folders that are not your test sets.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from search_r3 import SearchR3
from search_r3.evaluate.collection import load_collection
from search_r3.evaluate.metrics import score_queries
from search_r3.index.lexical import LexicalIndex, fuse_scores

DEPTH = 100  # documents of each ranking
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 100.0)  # the vectors alone ... almost BM25 alone


def by_ranks(dense: dict[str, float], words: dict[str, float], constant: int = 60) -> dict[str, float]:
    """Reciprocal rank fusion (Cormack et al., 2009) of two rankings given by their scores."""
    fused: dict[str, float] = {}
    for scores in (dense, words):
        for rank, name in enumerate(sorted(scores, key=lambda n: -scores[n]), 1):
            fused[name] = fused.get(name, 0.0) + 1 / (constant + rank)
    return fused


def measure(model: SearchR3, folder: Path, limit: int, tokens: int) -> dict[str, float]:
    """nDCG@10 of every way to fuse, on one collection."""
    collection = load_collection(folder, limit=limit)
    names = [document.id for document in collection.documents]
    texts = [query.text for query in collection.queries]
    cosines = model.encode_queries(texts) @ model.encode_documents(collection.documents, max_tokens=tokens).T
    words = LexicalIndex.build([document.content for document in collection.documents], range(len(names)))
    pairs = []
    for cosine, scores, rows in zip(cosines, *words.search(texts, DEPTH), strict=True):
        dense = {names[row]: float(cosine[row]) for row in np.argsort(-cosine)[:DEPTH]}
        pairs.append((dense, {names[row]: float(s) for row, s in zip(rows, scores, strict=True) if row >= 0}))
    ways = {"ranks": by_ranks} | {f"weight_{w:g}": partial(fuse_scores, weight=w) for w in WEIGHTS}
    found = {}
    for name, way in ways.items():
        run = {query.id: way(*pair) for query, pair in zip(collection.queries, pairs, strict=True)}
        found[name] = float(np.mean(list(score_queries(collection.judgements, run)["nDCG@10"].values())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--limit", type=int, default=100, help="first queries of each folder (100)")
    parser.add_argument("--tokens", type=int, default=128, help="documents are cut here (128)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = SearchR3.from_pretrained(args.checkpoint)
    result = {folder.name: measure(model, folder, args.limit, args.tokens) for folder in args.folders}
    result["mean"] = {
        name: float(np.mean([row[name] for row in result.values()])) for name in next(iter(result.values()))
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
