"""How far the stored index is from the truth, estimated without encoding the corpus; and what to do about it.

The documents near the top of each audited query are all encoded again, the rest of the corpus is sampled, and every
sampled document stands for as many as were left out (a stratified Horvitz-Thompson estimate of each true rank). By how
much the sample errs on the stored vectors, whose ranks are known, is taken off again (a control variate): an index that
is fresh has no error, whatever the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search_r3.environment.evolving import EvolvingIndex, best_columns
from search_r3.environment.outcome import Outcome, groups_of, make_outcome
from search_r3.records import Document

RESAMPLES = 2000
Reward = Callable[[Outcome], float | None]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    """The estimate."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Stored against fresh, on the last step's rollouts. Intervals are of 95%."""

    model_step: int
    """Of the weights that the audit encoded with."""
    cosine: Interval
    """Of stored with fresh vectors, over the corpus."""
    reward_error: Interval
    """|reward given - reward on a fresh index|, over the audited queries."""
    spearman: float
    """Mean rank correlation of given and fresh rewards inside groups; nan where no group has a spread."""
    recall_10: float
    """Share of the fresh top 10 that is in the stored top 10."""
    recall_100: float
    """The same of the top 100."""
    documents: int
    """Looked at; those that the step had not encoded were encoded for this audit."""


def interval(values: np.ndarray, rng: np.random.Generator, level: float = 0.95) -> Interval:
    """Mean of independent values with a studentised bootstrap interval, which allows for skew.

    values: (n,). Fewer than two values give an unbounded interval.
    """
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, -np.inf, np.inf)
    error = values.std(ddof=1) / np.sqrt(len(values))
    drawn = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
    spread = drawn.std(axis=1, ddof=1) / np.sqrt(len(values))
    usable = spread > 0
    if error == 0 or usable.sum() < RESAMPLES / 2:
        return Interval(mean, float(drawn.mean(axis=1).min()), float(drawn.mean(axis=1).max()))
    pivots = (drawn.mean(axis=1)[usable] - mean) / spread[usable]
    low, high = np.quantile(pivots, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(mean - high * error), float(mean - low * error))


@dataclass(slots=True)
class Controller:
    """Holds the reward error under a bound by raising or lowering the token budget."""

    bound: float
    """Largest reward error to tolerate."""
    least: float
    """Smallest budget, tokens a step."""
    most: float
    """Largest budget, tokens a step."""

    def adjust(self, budget: float, error: Interval) -> tuple[float, bool]:
        """The next budget, and whether the bound can be held: false where the largest budget does not suffice."""
        if error.mean > self.bound:
            return min(self.most, 1.5 * budget), budget < self.most
        if error.high < self.bound / 2:
            return max(self.least, budget / 1.25), True
        return budget, True


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What an audit looks at."""

    index: EvolvingIndex
    """The stored rows."""
    documents: Sequence[Document]
    """(N,) of the rows."""
    relevant: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Rows and grades of each query's relevant documents."""
    encode: Callable[[np.ndarray], np.ndarray]
    """Rows -> their current vectors."""
    calibrate: Callable[[np.ndarray], np.ndarray]
    """Cosines with all rows (B, N) -> as the step ranked by them."""
    model_step: int
    """Of the current weights."""
    k: int
    """Documents in an outcome's ranking."""


def examine(
    subject: Subject,
    query_ids: list[str],
    vectors: np.ndarray,
    given: list[Outcome],
    reward: Reward,
    rng: np.random.Generator,
    sample: int,
    depth: int,
    queries: int,
) -> Audit:
    """The audit of one step's rollouts; see `RetrievalEnvironment.audit`."""
    index = subject.index
    groups = groups_of(query_ids)
    names = [str(name) for name in rng.permutation(list(groups))[:queries]]
    members = [member for name in names for member in groups[name]]
    stored = subject.calibrate(index.scores(vectors[members]))  # (B, N)
    near = np.zeros(len(index), bool)
    for name, lines in zip(names, np.split(stored, np.cumsum([len(groups[name]) for name in names])[:-1]), strict=True):
        near[subject.relevant[name][0]] = True
        near[best_columns(lines.max(axis=0), max(depth, subject.k))] = True
    for line in stored:
        near[best_columns(line, subject.k)] = True
    rest = np.flatnonzero(~near)
    drawn = rng.permutation(rest)[:sample]
    rows = np.sort(np.concatenate([np.flatnonzero(near), drawn]))
    weights = np.where(near[rows], 1.0, len(rest) / max(len(drawn), 1))
    fresh = subject.encode(rows)
    cosines = (index.read(rows) * fresh).sum(axis=1)
    scores = vectors[members] @ fresh.T  # (B, n)
    rewards: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    recalls: dict[int, list[float]] = {10: [], 100: []}
    everything, one = np.arange(len(index)), np.ones(len(index))
    for member, was, now in zip(members, stored, scores, strict=True):
        name = query_ids[member]

        def earned(rows: np.ndarray, line: np.ndarray, weights: np.ndarray, name: str = name) -> float | None:
            k = min(subject.k, len(rows))
            return reward(make_outcome(name, subject.documents, subject.relevant[name], rows, line, weights, k))

        told, all_stored = reward(given[member]), earned(everything, was, one)
        sampled, true = earned(rows, was[rows], weights), earned(rows, now, weights)
        if told is not None and all_stored is not None and sampled is not None and true is not None:
            rewards[name].append((told, true + all_stored - sampled))
        for k, found in recalls.items():
            if k <= min(len(was), max(depth, subject.k)):
                top = was[rows] >= np.partition(was, -k)[-k]
                sampled_recall = weighted_recall(top, was[rows], weights, k)  # 1, were all rows looked at
                found.append(1 + weighted_recall(top, now, weights, k) - sampled_recall)
    near = near[rows]
    return summarise(subject.model_step, rewards, recalls, cosines[near], cosines[~near], len(rest), rng)


def weighted_recall(stored: np.ndarray, fresh: np.ndarray, weights: np.ndarray, k: int) -> float:
    """Share of the fresh top k that the stored top k holds.

    stored: (n,) whether each examined document is in the stored top k. fresh: (n,) its fresh score.
    """
    order = np.argsort(-fresh, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    taken = np.clip(k - before, 0, weights[order])
    return float((taken * stored[order]).sum() / taken.sum())


def summarise(
    model_step: int,
    rewards: dict[str, list[tuple[float, float]]],
    recalls: dict[int, list[float]],
    near: np.ndarray,
    drawn: np.ndarray,
    rest: int,
    rng: np.random.Generator,
) -> Audit:
    """Put an audit together.

    rewards: (given, fresh) of each audited query's rollouts. recalls: by depth, one a rollout. near, drawn: cosines of
    the rows that stand for themselves, and of those that stand for the `rest` of the corpus.
    """
    errors = np.array([np.mean([abs(a - b) for a, b in pairs]) for pairs in rewards.values() if pairs])
    others = interval(drawn, rng) if len(drawn) else Interval(1.0, 1.0, 1.0)
    share = rest / (len(near) + rest)
    known = float(near.mean()) * (1 - share)
    return Audit(
        model_step,
        Interval(*(known + share * value for value in (others.mean, others.low, others.high))),
        interval(errors, rng) if len(errors) else Interval(float("nan"), -np.inf, np.inf),
        spearman_within([(np.array([a for a, _ in p]), np.array([b for _, b in p])) for p in rewards.values() if p]),
        recall_10=float(np.mean(recalls[10] or [np.nan])),
        recall_100=float(np.mean(recalls[100] or [np.nan])),
        documents=len(near) + len(drawn),
    )


def spearman_within(groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean Spearman correlation over groups whose both sides have a spread."""
    from scipy.stats import spearmanr

    found = [spearmanr(a, b).statistic for a, b in groups if np.ptp(a) > 0 and np.ptp(b) > 0]
    return float(np.mean(found)) if found else float("nan")
