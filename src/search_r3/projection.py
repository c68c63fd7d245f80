"""Vectors in the plane: what a 2-D map of an index is drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """The two directions in which vectors differ most (PCA)."""

    mean: np.ndarray
    """(D,) float32."""
    axes: np.ndarray
    """(2, D) float32, unit rows; zeros where the vectors span less."""
    explained: float
    """Share of the vectors' variance within the plane, 0 to 1."""

    @classmethod
    def fit(cls, vectors: np.ndarray) -> Plane:
        """The plane of (N, D) vectors."""
        vectors = np.asarray(vectors, dtype=np.float32)
        mean = vectors.mean(axis=0) if len(vectors) else np.zeros(vectors.shape[1], np.float32)
        axes = np.zeros((2, vectors.shape[1]), np.float32)
        if len(vectors) < 2:
            return cls(mean, axes, 0.0)
        _, lengths, rows = np.linalg.svd(vectors - mean, full_matrices=False)
        # A direction and its opposite are equally good; the larger component is made positive, so that maps agree.
        signs = np.sign(rows[np.arange(len(rows[:2])), np.abs(rows[:2]).argmax(axis=1)])
        axes[: len(rows[:2])] = rows[:2] * signs[:, None]
        variance = float((lengths**2).sum())
        return cls(mean, axes, float((lengths[:2] ** 2).sum()) / variance if variance else 0.0)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, 2) places of (N, D) vectors."""
        return np.asarray((np.asarray(vectors, np.float32) - self.mean) @ self.axes.T, dtype=np.float32)
