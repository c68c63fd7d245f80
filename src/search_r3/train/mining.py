"""Hard negatives: documents that a search ranks high for a query and that are not relevant to it.

Positive-aware filtering after Moreira et al., 2024 (arXiv 2407.15831): a candidate that scores nearly as well as the
positive, or better, is likely an unlabelled positive and is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.evaluate.baselines import Search, bm25
from search_r3.evaluate.collection import load_collection
from search_r3.index.exact import ExactIndex
from search_r3.model.search_r3 import SearchR3
from search_r3.progress import Meter
from search_r3.records import Document

BLOCK = 256  # queries searched at once


@dataclass(frozen=True, slots=True)
class Mining:
    """How negatives are chosen."""

    count: int = 4
    """Most negatives of a query."""
    depth: int = 100
    """Candidates looked at."""
    skip: int = 0
    """Best candidates passed over, however they score."""
    max_score_ratio: float = 0.95
    """Candidates above this share of the best positive's score are passed over; 0 or less keeps all."""


def mine(
    folder: Path,
    split: str,
    how: Mining,
    searcher: Callable[[Sequence[Document]], Search] = bm25,
    progress: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """A record `{"query_id", "negatives", "rank"}` for each judged query; rank is the best positive's, or null.

    searcher: makes a search over the corpus. The score of a positive beyond `depth` is not known; its query's
    candidates are all kept. Raises DataError for a broken data set.
    """
    collection = load_collection(folder, split)
    names = [document.id for document in collection.documents]
    search = searcher(collection.documents)
    with Meter("mine", len(collection.queries), "queries", progress) as meter:
        for start in range(0, len(collection.queries), BLOCK):
            block = collection.queries[start : start + BLOCK]
            scores, rows = search([query.text for query in block], min(how.depth, len(names)))
            for query, line, found in zip(block, scores, rows, strict=True):
                judged = collection.judgements[query.id]
                relevant = {name for name, score in judged.items() if score > 0}
                places = [place for place, row in enumerate(found) if row >= 0 and names[row] in relevant]
                limit = np.inf
                if places and how.max_score_ratio > 0:
                    limit = how.max_score_ratio * line[places[0]]
                negatives = [
                    names[row]
                    for place, row in enumerate(found)
                    if row >= 0 and names[row] not in relevant and place >= how.skip and line[place] <= limit
                ][: how.count]
                yield {"query_id": query.id, "negatives": negatives, "rank": places[0] + 1 if places else None}
            meter.advance(len(block), 0)


def model_search(model: SearchR3) -> Callable[[Sequence[Document]], Search]:
    """Direct search with a model of ours."""

    def searcher(documents: Sequence[Document]) -> Search:
        index = ExactIndex(model.encode_documents(documents, progress=None))
        return lambda queries, k: index.search(model.encode_queries(queries), k)

    return searcher
