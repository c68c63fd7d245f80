"""What the environment says of one rollout: everything a retrieval reward needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Relevant:
    """Where one relevant document came out."""

    id: str
    """The document's id."""
    grade: int
    """Its judged relevance; above 0."""
    rank: int
    """1 + how many documents of the ranked corpus score higher; never truncated."""
    similarity: float
    """Its cosine with the rollout's vector."""
    fresh: bool
    """Whether its vector was computed in this very step."""


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
    fresh: float
    """Share of `ranking` whose vectors were computed in this very step."""


def dcg(outcome: Outcome) -> float:
    """sum over relevant documents of grade * s / log2(1 + rank), s = (1 + cosine) / 2, divided by its largest value.

    In [0, 1]. The reward nearest to that of Search-R3 (arXiv 2510.07048).
    """
    gained = sum(r.grade * (1 + r.similarity) / 2 / np.log2(1 + r.rank) for r in outcome.relevant)
    grades = sorted((r.grade for r in outcome.relevant), reverse=True)
    return float(gained / sum(grade / np.log2(2 + place) for place, grade in enumerate(grades)))
