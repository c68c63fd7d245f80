"""Who embeds the documents: anything with `encode_documents`, on one process or on several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from search_r3.errors import DataError, SearchR3Error
from search_r3.records import Document


class Encoder(Protocol):
    """Anything that embeds documents with the current weights; `SearchR3` does."""

    def encode_documents(self, documents: Sequence[Document]) -> np.ndarray:
        """(n, D) unit rows."""


class ShardedEncoder:
    """Several processes with the same model share one encoding; every one of them gets all vectors.

    Every process must ask for the same documents in the same order, as environments do that see the same steps and
    refresh nothing besides; DataError where they do not.

    encoder: this process's own. rank, world: its number and how many there are. gather: collects one object of each
    process, in the order of their ranks, on all of them (`accelerate.utils.gather_object`).
    """

    def __init__(
        self,
        encoder: Encoder,
        rank: int,
        world: int,
        gather: Callable[[list[Any]], list[Any]],
    ):
        self.encoder, self.rank, self.world, self.gather = encoder, rank, world, gather

    def encode_documents(self, documents: Sequence[Document]) -> np.ndarray:
        """(n, D) unit rows. Where one process failed, raises on every one: DataError for what a user can mend."""
        mine: np.ndarray | Exception
        try:
            own = documents[self.rank :: self.world]
            mine = np.asarray(self.encoder.encode_documents(own), np.float32) if own else np.empty((0, 0), np.float32)
        except Exception as error:  # the others wait in gather: tell them instead of leaving
            kind = DataError if isinstance(error, SearchR3Error) else RuntimeError
            mine = kind(f"encoding failed on process {self.rank}: {error}")
        asked = hashlib.sha256(json.dumps([document.id for document in documents]).encode()).hexdigest()
        everyone, parts = zip(*self.gather([(asked, mine)]), strict=True)
        if failed := [part for part in parts if isinstance(part, Exception)]:
            raise failed[0]
        if len(set(everyone)) > 1:
            raise DataError("the processes want different documents encoded; give all environments the same steps")
        vectors = np.empty((len(documents), max(part.shape[1] for part in parts)), np.float32)
        for number, part in enumerate(parts):
            if len(part):
                vectors[number :: self.world] = part
        return vectors
