"""Which rows to encode again: the policies, and cutting a wish list to a token budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Policy:
    """What a step encodes again before it ranks."""

    everything: bool = False
    """All rows: the oracle."""
    relevant_only: bool = False
    """Rank among the relevant documents of the batch alone, and encode only those."""
    sample: bool = False
    """A uniform sample of the corpus; with other parts it takes its share of the budget, alone all of it."""
    local: bool = False
    """The batch's relevant documents and their nearest neighbours."""
    proposed: bool = False
    """What the stored vectors propose for the batch, and its relevant documents."""
    drift: bool = False
    """Correct the other rows by what the sample shows."""


POLICIES = {
    "frozen": Policy(),
    "full": Policy(everything=True),
    "in_batch": Policy(relevant_only=True),
    "random": Policy(sample=True),
    "local": Policy(local=True),
    "read_repair": Policy(proposed=True),
    "read_repair+drift": Policy(sample=True, proposed=True, drift=True),
}


def within_budget(rows: np.ndarray, lengths: np.ndarray, budget: float) -> np.ndarray:
    """The first rows whose tokens together stay within the budget; one that is longer by itself is passed over.

    rows: (n,) row numbers, the most wanted first. lengths: (N,) tokens of each row of the corpus.
    """
    rows = rows[lengths[rows] <= budget]
    return rows[np.cumsum(lengths[rows]) <= budget]


def by_priority(wanted: np.ndarray, ages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows that are wanted and not of the current step, highest traffic x age first.

    wanted: (N,) float traffic of each row, 0 where nothing asks for it. ages: (N,) steps since it was encoded. Equal
    priorities go by length, short first.
    """
    rows = np.flatnonzero((wanted > 0) & (ages > 0))
    return rows[np.lexsort((lengths[rows], -(wanted[rows] * ages[rows])))]
