"""What the environment says of one rollout: everything a retrieval reward needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from search_r3.environment.evolving import best_columns
from search_r3.records import Document


@dataclass(frozen=True, slots=True)
class Relevant:
    """Where one relevant document came out."""

    id: str
    """The document's id."""
    grade: int
    """Its judged relevance; above 0."""
    rank: int
    """1 + how many documents of the ranked corpus score higher, or the same and stand before it; never truncated."""
    similarity: float
    """Its cosine with the rollout's vector."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The ranking that one rollout's vector gave."""

    query_id: str
    """The query that the rollout answers."""
    ranking: tuple[str, ...]
    """Ids of the best documents, best first."""
    scores: np.ndarray
    """(k,) float32, their cosines."""
    relevant: tuple[Relevant, ...]
    """Every relevant document of the query, best rank first."""
    best_negative: float
    """Highest cosine of a document that is not relevant; -inf where there is none."""
    corpus: int
    """How many documents were ranked."""


def make_outcome(
    query_id: str,
    documents: Sequence[Document],
    relevant: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray,
    k: int,
) -> Outcome:
    """The outcome of one rollout among some rows of the corpus, each of which stands for `weights` documents.

    relevant: rows and grades of the query's relevant documents. rows: (n,) ascending, every relevant one among them.
    scores, weights: (n,), of these rows.
    """
    numbers, grades = relevant
    places = np.searchsorted(rows, numbers)
    found = [
        Relevant(
            documents[rows[at]].id,
            int(grade),
            round(weighted_rank(scores, weights, at)),
            float(scores[at]),
        )
        for at, grade in zip(places, grades, strict=True)
    ]
    top = best_columns(scores, k)
    others = scores.copy()
    others[places] = -np.inf
    return Outcome(
        query_id,
        tuple(documents[row].id for row in rows[top]),
        scores[top],
        tuple(sorted(found, key=lambda r: r.rank)),
        float(others.max()),
        round(float(weights.sum())),
    )


def weighted_rank(scores: np.ndarray, weights: np.ndarray, row: int | np.intp) -> float:
    """1 + how many documents stand before `row`: score higher, or the same at a lower place; scores, weights: (n,).

    A model that makes one vector of everything must not find everything first.
    """
    before = scores > scores[row]
    before[:row] |= scores[:row] == scores[row]
    return 1 + float(weights[before].sum())


def dcg(outcome: Outcome) -> float:
    """sum over relevant documents of grade * s / log2(1 + rank), s = (1 + cosine) / 2, divided by its largest value.

    In [0, 1]. The reward nearest to that of Search-R3 (arXiv 2510.07048).
    """
    # Places that rounding made one share no rank; a calibrated cosine can lie a little above 1.
    ranks = accumulate((r.rank for r in outcome.relevant), lambda last, rank: max(last + 1, rank))
    gained = sum(
        r.grade * (1 + min(r.similarity, 1.0)) / 2 / np.log2(1 + rank)
        for r, rank in zip(outcome.relevant, ranks, strict=True)
    )
    grades = sorted((r.grade for r in outcome.relevant), reverse=True)
    return float(gained / sum(grade / np.log2(2 + place) for place, grade in enumerate(grades)))


def groups_of(query_ids: Sequence[str]) -> dict[str, list[int]]:
    """Places of each query's rollouts in the batch."""
    groups: dict[str, list[int]] = {}
    for number, query in enumerate(query_ids):
        groups.setdefault(query, []).append(number)
    return groups
