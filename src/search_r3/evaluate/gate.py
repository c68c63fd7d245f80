"""When to reason: what is gained, and what it costs, if only the queries that need it most are reasoned over. (ours)"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from search_r3.records import Hit
from search_r3.retriever import margin

STEPS = 10
_WORD = re.compile(r"\w{3,}")


def signals(query: str, hits: Sequence[Hit]) -> dict[str, float]:
    """What can be told of a query from its direct search, before any reasoning; low values call for it.

    margin: of the best hit over the second, in cosine, at most 2. words: different words of three letters or more.
    overlap: share of these that the best hit holds.
    """
    words = _words(query)
    best = _words(f"{hits[0].title} {hits[0].text}") if hits else set()
    return {
        "margin": min(margin([hit.score for hit in hits]), 2.0),
        "words": float(len(words)),
        "overlap": len(words & best) / max(len(words), 1),
    }


def _words(text: str) -> set[str]:
    return {match.group().lower() for match in _WORD.finditer(text)}


def curve(
    signal: np.ndarray, direct: np.ndarray, reason: np.ndarray, direct_tokens: np.ndarray, reason_tokens: np.ndarray
) -> list[dict[str, float]]:
    """Quality against cost, reasoning over the share of queries whose signal is lowest, from none to all. Where not all
    of the same signal belong to it, each does in part: what drawing among them would give on average.

    All (Q,), a value a query: the signal, the scores of both ways, their tokens. A query that is reasoned over has been
    searched directly before: it pays for both. Returns points of `share`, `threshold`, `score`, `tokens` (means a
    query), and `random`: the score to expect if as many queries were drawn blindly.
    """
    ranked = np.sort(signal)
    points = []
    for step in range(STEPS + 1):
        count = round(len(ranked) * step / STEPS)
        chosen = np.zeros(len(ranked))
        if count:
            tied = signal == ranked[count - 1]
            chosen[signal < ranked[count - 1]] = 1
            chosen[tied] = (count - chosen.sum()) / tied.sum()
        share = count / len(ranked)
        points.append(
            {
                "share": share,
                # No limit on the last point, so that it is JSON: a gate of 2 lets every cosine through.
                "threshold": min(float(ranked[count]), 2.0) if count < len(ranked) else 2.0,
                "score": float((direct + chosen * (reason - direct)).mean()),
                "random": float(direct.mean() + share * (reason.mean() - direct.mean())),
                "tokens": float((direct_tokens + chosen * reason_tokens).mean()),
            }
        )
    return points


def best(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The point of the highest score; of equals, the cheapest."""
    return max(points, key=lambda point: (round(point["score"], 6), -point["tokens"]))
