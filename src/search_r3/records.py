"""The nouns of the project: small frozen records that travel between modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus."""

    id: str
    """Unique within its corpus."""
    text: str
    """The body; never empty."""
    title: str = ""
    """May be empty; embedded before the body."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Any JSON values; returned with hits, not embedded."""

    @property
    def content(self) -> str:
        """What is embedded and matched lexically: title, newline, body."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Query:
    """One question of a test collection."""

    id: str
    """Unique within its collection."""
    text: str
    """As a user would type it; never empty."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result."""

    rank: int
    """1 is best."""
    id: str
    """The document's id."""
    score: float
    """Cosine in [-1, 1]; in hybrid search with up to 1 for the words in common."""
    title: str
    """The document's title."""
    text: str
    """The passage that matched best; the whole body when the document is one passage."""
    start: int
    """Character offset of the passage in the body."""
    end: int
    """Character offset one past the passage's end."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The document's metadata."""


class Status(StrEnum):
    """How a reasoning came to its embedding token."""

    FINISHED = "finished"
    """The model emitted the embedding token itself."""
    FORCED = "forced"
    """The model ended its turn or ran out of tokens; the embedding token was appended for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Reasoned:
    """One reasoning and the embedding that followed it."""

    text: str
    """The reasoning without control tokens."""
    vector: np.ndarray
    """(D,) float32, unit length."""
    token_ids: tuple[int, ...]
    """Every token the model chose, in order, including the control token that ended it, if one did."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each of `token_ids` in the distribution sampled from, no token ruled out."""
    status: Status
    """Whether the embedding token was the model's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One rollout: what the policy made of a query, before anything ranked it."""

    query_id: str
    """The query's id in the environment."""
    query: str
    """Its text."""
    reasoned: Reasoned
    """The reasoning and its vector."""
    limit: int
    """Most tokens the reasoning could have had."""
