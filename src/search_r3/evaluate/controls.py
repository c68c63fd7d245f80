"""Texts of equal length that explain a gain away: if one of them does as well as reasoning, length did it.

Every control gives each query exactly as many tokens as its own reasoning had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

ControlName = Literal["control-repeat", "control-fixed", "control-other"]
CONTROLS: tuple[ControlName, ...] = ("control-repeat", "control-fixed", "control-other")

FIXED_TEXT = (
    "This is a question that someone has asked. To answer it well, one should think about what is meant, look at the "
    "words that are used, and find texts that speak about the same thing in the same or in other words. "
)


def control_thoughts(
    name: ControlName,
    queries: Sequence[Sequence[int]],
    thoughts: Sequence[Sequence[int]],
    fixed: Sequence[int],
    samples: int = 1,
) -> list[list[int]]:
    """Tokens that stand in for each query's reasoning.

    queries, thoughts: tokens of N queries, and of their N x samples reasonings, a query's side by side; fixed: tokens
    of `FIXED_TEXT`. Returns as many as there are reasonings.
    control-repeat repeats the query; control-fixed repeats a generic text; control-other takes the reasoning of the
    next query that has one, repeated or cut to length.
    """
    result = []
    for number, thought in enumerate(thoughts):
        if name == "control-repeat":
            source = queries[number // samples]
        elif name == "control-fixed":
            source = fixed
        else:
            steps = range(samples, len(thoughts), samples)
            others = (thoughts[(number + step) % len(thoughts)] for step in steps)
            source = next((other for other in others if other), fixed)
        result.append(_to_length(source, len(thought)))
    return result


def _to_length(tokens: Sequence[int], length: int) -> list[int]:
    if not length:
        return []
    times = -(-length // len(tokens))
    return (list(tokens) * times)[:length]
