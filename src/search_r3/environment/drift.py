"""How the space moved: a map from stored to current vectors, learnt from the rows that were encoded again. (ours)

The map is a translation plus a low-rank linear part, so that applying it to a whole corpus costs less than searching
it; it starts from the identity, and the strength of the pull towards it is chosen on held-out pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in units of the mean variance of a component
LEAST_PAIRS = 20
FOLDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """v -> unit(v + shift + (v @ down) @ up)."""

    shift: np.ndarray
    """(D,) float32."""
    down: np.ndarray
    """(D, r) float32."""
    up: np.ndarray
    """(r, D) float32."""
    before: float = 0.0
    """Mean cosine of stored with current vectors on the pairs it was learnt from."""
    after: float = 0.0
    """The same, each pair corrected by a map learnt without it."""

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Corrected unit rows, (n, D) float32."""
        vectors = np.asarray(vectors, np.float32)
        return _unit(vectors + self.shift + (vectors @ self.down) @ self.up)


def fit_drift(
    old: np.ndarray, new: np.ndarray, rng: np.random.Generator, rank: int = 64
) -> tuple[Drift, np.ndarray] | None:
    """The map that helps held-out pairs most, or None where none helps beyond chance (two standard errors).

    old, new: (n, D) unit rows, the same documents as stored and as the model sees them now. Besides the map, which all
    pairs teach, returns `old` corrected by maps learnt without the row, (n, D): they show how far off the map is on
    rows that it has not seen. Source: cross-fitting, arXiv 1608.00060.
    """
    if len(old) < LEAST_PAIRS:
        return None
    folds = []
    for part in np.array_split(rng.permutation(len(old)), FOLDS):
        rest = np.setdiff1d(np.arange(len(old)), part)
        folds.append((part, old[rest], new[rest], _decompose(old[rest])))
    near: dict[float | None, float] = {}
    for strength in (None, *STRENGTHS):  # chosen at full rank, which needs one decomposition a fold for all of them
        near[strength] = 0.0
        for part, rest, moved, spectrum in folds:
            shift, linear = _ridge(rest, moved, spectrum, strength)
            near[strength] += float(_cosine(_unit(old[part] + shift + old[part] @ linear), new[part]).sum())
    best = max(near, key=near.__getitem__)
    corrected = np.empty_like(old)
    for part, rest, moved, spectrum in folds:
        corrected[part] = Drift(*_cut(*_ridge(rest, moved, spectrum, best), rest, rank))(old[part])
    before = _cosine(old, new)
    gain = _cosine(corrected, new) - before
    if gain.mean() <= 2 * gain.std(ddof=1) / np.sqrt(len(old)):
        return None
    final = _cut(*_ridge(old, new, _decompose(old), best), old, rank)
    return Drift(*final, float(before.mean()), float((before + gain).mean())), corrected


def _decompose(old: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.linalg.svd(old - old.mean(axis=0), full_matrices=False))


def _ridge(
    old: np.ndarray, new: np.ndarray, spectrum: tuple[np.ndarray, ...], strength: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of the moves on the stored vectors: shift (D,), linear (D, D). strength None: the mean move."""
    width, moves = old.shape[1], new - old
    if strength is None:
        return moves.mean(axis=0), np.zeros((width, width), np.float32)
    left, values, right = spectrum  # centred old = left * values @ right
    penalty = strength * (values**2).sum() / width
    target = left.T @ (moves - moves.mean(axis=0))  # (m, D)
    linear = right.T @ ((values / (values**2 + penalty))[:, None] * target)
    return moves.mean(axis=0) - old.mean(axis=0) @ linear, linear


def _cut(
    shift: np.ndarray, linear: np.ndarray, old: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The linear part cut to the directions in which it moves the rows of `old` most: shift, down (D, r), up (r, D)."""
    mean = old.mean(axis=0)
    _, directions = np.linalg.eigh((moved := (old - mean) @ linear).T @ moved)
    up = directions[:, ::-1][:, :rank].T  # (r, D)
    down = linear @ up.T
    kept = shift + mean @ linear - mean @ down @ up  # the mean move is kept whole
    return kept.astype(np.float32), down.astype(np.float32), up.astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    found: np.ndarray = (one * other).sum(axis=1)
    return found
