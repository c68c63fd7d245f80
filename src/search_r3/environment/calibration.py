"""Fair competition between fresh and stale rows. (ours)

A stale row's cosine with a query is what it was worth to older weights. The rows of the uniform sample, scored before
and after they were encoded again, show by how much such cosines are off. Only those near the top matter for a ranking,
so the shift is measured there; a line through all cosines would pull high stale ones towards the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_ROWS = 40
RANGES = 3  # of ages
TOP = 0.05  # share of the sampled rows that counts as the top of a rollout's ranking
LEAST_TOP = 4


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """fresh cosine = stale cosine + shift, by age."""

    edges: np.ndarray
    """(r - 1,) ages that separate the ranges."""
    shifts: np.ndarray
    """(r,) in cosine."""

    def __call__(self, scores: np.ndarray, ages: np.ndarray) -> np.ndarray:
        """Calibrated cosines, (Q, n); rows of age 0 keep theirs. ages: (n,)."""
        shift = np.where(ages == 0, 0.0, self.shifts[np.searchsorted(self.edges, ages)])
        return (scores + shift).astype(np.float32)


def fit_calibration(
    stale: np.ndarray, fresh: np.ndarray, ages: np.ndarray, rng: np.random.Generator
) -> Calibration | None:
    """Shifts from the sample's cosines, or None where held-out rows are no nearer to the truth for them.

    stale, fresh: (Q, n) cosines of this step's rollouts with n sampled rows before and after these were encoded again.
    ages: (n,). Half of the rows are held out.
    """
    count = stale.shape[1]
    if count < LEAST_ROWS:
        return None
    order = rng.permutation(count)
    train, test = order[: count // 2], order[count // 2 :]
    tried = _fit(stale[:, train], fresh[:, train], ages[train])
    rows = _top(stale[:, test], fresh[:, test])
    before = np.take_along_axis(fresh[:, test] - stale[:, test], rows, 1)
    after = np.take_along_axis(fresh[:, test] - tried(stale[:, test], ages[test]), rows, 1)
    return _fit(stale, fresh, ages) if (after**2).mean() < (before**2).mean() else None


def _fit(stale: np.ndarray, fresh: np.ndarray, ages: np.ndarray) -> Calibration:
    edges = np.unique(np.quantile(ages, np.arange(1, RANGES) / RANGES))
    group = np.searchsorted(edges, ages)
    everyone = _shift(stale, fresh)
    shifts = np.full(len(edges) + 1, everyone)
    for number in range(len(shifts)):
        rows = group == number
        if rows.sum() >= LEAST_ROWS // 2:
            shifts[number] = _shift(stale[:, rows], fresh[:, rows])
    return Calibration(edges, shifts)


def _shift(stale: np.ndarray, fresh: np.ndarray) -> float:
    return float(np.take_along_axis(fresh - stale, _top(stale, fresh), 1).mean())


def _top(stale: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """The rows near the top of each rollout's ranking before or after: chosen by either alone, the shift would lean."""
    k = min(stale.shape[1], max(LEAST_TOP, int(TOP * stale.shape[1])))
    return np.argpartition(-np.maximum(stale, fresh), k - 1, axis=1)[:, :k]
