"""What an index must do. Everything that searches vectors fits behind this."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Index(Protocol):
    """Maximum-inner-product search over numbered rows."""

    def __len__(self) -> int:
        """Rows that can be found."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, best first.

        queries: (Q, D) float32. Returns scores (Q, k) float32 and row numbers (Q, k) int64; where fewer than k rows
        exist, the rest is -inf and -1.
        """
