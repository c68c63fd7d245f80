"""Fair competition between fresh and stale rows. (ours)

A stale row's cosine with a query is what it was worth to older weights. The rows of the uniform sample, scored before
and after they were encoded again, show what such cosines are worth now: one line for each range of ages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_ROWS = 40
RANGES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """fresh cosine = offset + slope * stale cosine, by age."""

    edges: np.ndarray
    """(r - 1,) ages that separate the ranges."""
    offsets: np.ndarray
    """(r,)."""
    slopes: np.ndarray
    """(r,)."""

    def __call__(self, scores: np.ndarray, ages: np.ndarray) -> np.ndarray:
        """Calibrated cosines, (Q, n); rows of age 0 keep theirs. ages: (n,)."""
        group = np.searchsorted(self.edges, ages, side="left")
        moved = self.offsets[group] + self.slopes[group] * scores
        return np.where(ages == 0, scores, moved).astype(np.float32)


def fit_calibration(
    stale: np.ndarray, fresh: np.ndarray, ages: np.ndarray, rng: np.random.Generator
) -> Calibration | None:
    """Lines through the sample's cosines, or None where held-out rows are no nearer to the truth for them.

    stale, fresh: (Q, n) cosines of this step's rollouts with n sampled rows before and after these were encoded again.
    ages: (n,). Half of the rows are held out; the gain must exceed two standard errors.
    """
    count = stale.shape[1]
    if count < LEAST_ROWS:
        return None
    order = rng.permutation(count)
    train, test = order[: count // 2], order[count // 2 :]
    tried = _fit(stale[:, train], fresh[:, train], ages[train])
    gain = ((stale - fresh)[:, test] ** 2 - (tried(stale[:, test], ages[test]) - fresh[:, test]) ** 2).mean(axis=0)
    if gain.mean() <= 2 * gain.std(ddof=1) / np.sqrt(len(test)):
        return None
    return _fit(stale, fresh, ages)


def _fit(stale: np.ndarray, fresh: np.ndarray, ages: np.ndarray) -> Calibration:
    edges = np.unique(np.quantile(ages, np.arange(1, RANGES) / RANGES))
    group = np.searchsorted(edges, ages, side="left")
    offsets, slopes = np.zeros(len(edges) + 1), np.ones(len(edges) + 1)
    everyone = _line(stale, fresh)
    for number in range(len(slopes)):
        rows = group == number
        slopes[number], offsets[number] = (
            _line(stale[:, rows], fresh[:, rows]) if rows.sum() >= LEAST_ROWS // 4 else everyone
        )
    return Calibration(edges, offsets, slopes)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-12))
    return slope, float(y.mean() - slope * x.mean())
