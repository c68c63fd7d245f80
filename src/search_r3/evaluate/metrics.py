"""Scores per query by ir-measures, and the paired randomisation test.

nDCG@10 uses the gain itself (not 2^gain - 1) and log2(1 + rank), as trec_eval does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from search_r3.evaluate.collection import Collection

METRICS = ("nDCG@10", "R@100", "RR@10")
"""ir-measures' names; RR@10 averaged over queries is MRR@10."""

DEPTH = 100  # documents of a ranking
RESAMPLES = 9999

Ranking = Mapping[str, float]
"""Document ids with their scores; of equals, the first is taken for the better one."""


def score_queries(
    judgements: Mapping[str, Mapping[str, int]], run: Mapping[str, Ranking]
) -> dict[str, dict[str, float]]:
    """Metric -> query id -> value in [0, 1]; a judged query without results counts 0."""
    import ir_measures

    measures = [ir_measures.parse_measure(name) for name in METRICS]
    values = {name: dict.fromkeys(judgements, 0.0) for name in METRICS}
    # Places instead of scores: of equal scores one measure would take the higher id first, another the lower.
    places = {query: {name: -place for place, name in enumerate(_ranked(found))} for query, found in run.items()}
    for value in ir_measures.iter_calc(measures, judgements, places):
        values[str(value.measure)][value.query_id] = float(value.value)
    return values


def score_matrix(collection: Collection, scores: np.ndarray) -> list[float]:
    """nDCG@10 of each query. scores: (queries, documents); of equal ones the first document is the better."""
    run = {}
    for query, line in zip(collection.queries, scores, strict=True):
        best = np.argsort(-line, kind="stable")[:DEPTH]
        run[query.id] = {collection.documents[row].id: float(line[row]) for row in best}
    found = score_queries(collection.judgements, run)["nDCG@10"]
    return [found[query.id] for query in collection.queries]


def _ranked(found: Ranking) -> list[str]:
    return sorted(found, key=lambda name: found[name], reverse=True)  # stable


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the paired randomisation test: signs of the per-query differences are flipped at random.

    Fisher's test as recommended for retrieval by Smucker et al. (2007).
    Returns 1.0 for fewer than two queries or when all differences are zero.
    """
    from scipy.stats import permutation_test

    differences = np.asarray(first) - np.asarray(second)
    if len(differences) < 2 or not differences.any():
        return 1.0
    # Differences against zero: "samples" permutes within pairs, which flips signs.
    result = permutation_test(
        (differences, np.zeros_like(differences)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,  # or memory grows with resamples x queries
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
