"""What a rollout is worth: pure functions of an episode and the ranking that its vector gave.

A reward is a number, or None where it cannot be told; None is left out of the group's mean, never counted as 0.
`dcg` is in `environment.outcome`, where audits use it too.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from search_r3.environment import Outcome
from search_r3.environment import dcg as outcome_dcg
from search_r3.errors import TrainingError
from search_r3.records import Episode, Reasoned, Status
from search_r3.train.rl_config import Reward

RewardFunction = Callable[[Episode, Outcome], float | None]
NO_EPISODE = Episode("", "", Reasoned("", np.empty(0, np.float32), (), (), Status.FORCED), 0)  # rankings need none
MARGIN_WIDTH = 0.2  # of the cosine gap's range that the margin reward tells apart


def dcg(episode: Episode, outcome: Outcome) -> float | None:
    """See `environment.dcg`; in [0, 1]."""
    return outcome_dcg(outcome) if outcome.relevant else None


def log_rank(episode: Episode, outcome: Outcome) -> float | None:
    """1 - log(rank of the best relevant document) / log(corpus), in [0, 1]. Source: LREM, arXiv 2510.14321."""
    if not outcome.relevant:
        return None
    return float(1 - np.log(outcome.relevant[0].rank) / np.log(max(outcome.corpus, 2)))


def margin(episode: Episode, outcome: Outcome) -> float | None:
    """0.4 x the gap between the best relevant and the best irrelevant cosine + 0.6 x `log_rank`, in [0, 1].

    The gap is clipped to +-0.2 and mapped to [0, 1] (ours). It goes on telling rollouts apart where all of them rank
    the document first and `dcg` is saturated (after ELVA).
    """
    ranked = log_rank(episode, outcome)
    if ranked is None or not np.isfinite(outcome.best_negative):
        return ranked
    gap = max(r.similarity for r in outcome.relevant) - outcome.best_negative
    clipped = (float(np.clip(gap, -MARGIN_WIDTH, MARGIN_WIDTH)) + MARGIN_WIDTH) / (2 * MARGIN_WIDTH)
    return 0.4 * clipped + 0.6 * ranked


def format(episode: Episode) -> float:
    """1 where the policy itself ended with the embedding token after some reasoning, else 0."""
    return float(episode.reasoned.status is Status.FINISHED and bool(episode.reasoned.text))


def length(episode: Episode, least: int, most: int) -> float:
    """1 for `least` to `most` tokens; falls to 0 at none and at the limit. (ours)"""
    count = len(episode.reasoned.token_ids)
    if count < least:
        return count / least
    return 1.0 if count <= most else max(0.0, (episode.limit - count) / max(episode.limit - most, 1))


RANKED: dict[str, RewardFunction] = {"dcg": dcg, "log_rank": log_rank, "margin": margin}


@dataclass(frozen=True, slots=True)
class Scored:
    """The parts of one rollout's reward; None where it could not be told."""

    total: float | None
    """Weighted sum; None where the rank part is."""
    rank: float | None
    """How well the vector ranks the relevant documents."""
    format: float
    """Whether the embedding token was the policy's own."""
    length: float
    """Whether the length is as wanted."""


class Scorer:
    """The weighted reward of a recipe. Raises TrainingError for a function that does not exist."""

    def __init__(self, reward: Reward):
        self.reward, self.rank = reward, find(reward.rank)

    def __call__(self, episode: Episode, outcome: Outcome) -> Scored:
        """Score one rollout."""
        reward, ranked = self.reward, self.rank(episode, outcome)
        if ranked is not None and not np.isfinite(ranked):
            ranked = None
        parts = format(episode), length(episode, reward.least_tokens, reward.most_tokens)
        total = None
        if ranked is not None:
            total = reward.rank_weight * ranked + reward.format_weight * parts[0] + reward.length_weight * parts[1]
        return Scored(total, ranked, *parts)


def audited(name: str) -> Callable[[Outcome], float | None]:
    """What audits compare: the ranking reward of a recipe; `dcg` where it is a user's own, which needs an episode."""
    function = RANKED.get(name)
    return outcome_dcg if function is None else lambda outcome: function(NO_EPISODE, outcome)


def find(name: str) -> RewardFunction:
    """A reward by name, or a user's own as `package.module:function`."""
    if name in RANKED:
        return RANKED[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise TrainingError(f"reward.rank: {name} is none of {', '.join(RANKED)}; your own is package.module:function")
    if "" not in sys.path:
        sys.path.append("")  # the current folder, where `python -m` would look as well
    try:
        found: RewardFunction = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise TrainingError(f"reward.rank: {name} cannot be imported ({error})") from error
    if not callable(found):
        raise TrainingError(f"reward.rank: {name} is not a function")
    return found
