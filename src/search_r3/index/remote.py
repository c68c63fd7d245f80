"""Search in Qdrant, for corpora that outgrow one machine.

The store stays the truth: its rows are copied to a collection, a point a row, and what changed since is copied before a
search. The collection can be dropped at any time; it is filled again. Processes that search the same store share its
collection and fill it one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from search_r3.errors import DataError, StoreError, first_line
from search_r3.extras import need
from search_r3.files import write_json
from search_r3.index.filters import BOUNDS
from search_r3.index.store import Store

BATCH = 256  # rows in one request
Quantisation = Literal["int8", "binary"]


def connect(url: str) -> Any:
    """A client. url: of a server, a folder for the client's local mode, or ":memory:"."""
    need("qdrant", "a Qdrant index")
    from qdrant_client import QdrantClient

    if re.fullmatch(r"[\w.-]+:\d+", url):
        raise StoreError(f"{url}: write http://{url}, or https://")
    try:
        if url == ":memory:" or "://" not in url:
            return QdrantClient(url) if url == ":memory:" else QdrantClient(path=url)
        client = QdrantClient(url=url, check_compatibility=False)
        client.get_collections()
        return client
    except Exception as error:
        raise StoreError(f"{url}: no Qdrant answers there ({first_line(error)})") from error


def follower(url: str, quantise: Quantisation | None = None) -> Callable[[Store], RemoteIndex]:
    """What `Retriever` takes as its kind: one client, and for each store a collection of its own."""
    client = connect(url)

    def follow(store: Store) -> RemoteIndex:
        place = f"{platform.node()}:{store.folder.resolve()}"
        name = re.sub(r"[^A-Za-z0-9_-]", "-", store.folder.resolve().name)
        return RemoteIndex(client, f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}", store, quantise)

    return follow


class RemoteIndex:
    """`Index` over a Qdrant collection that follows a store.

    quantise: the server searches over smaller copies and ranks the best with the whole vectors; int8 takes a quarter
    of the memory, binary a thirty-second.
    """

    def __init__(self, client: Any, collection: str, store: Store, quantise: Quantisation | None = None):
        self.client, self.collection, self.store, self.quantise = client, collection, store, quantise
        self._state = store.folder / f"qdrant-{collection}.json"
        self._errors(self._follow)

    def __len__(self) -> int:
        return int(self._errors(self.client.count, self.collection).count)

    def search(
        self, queries: np.ndarray, k: int, where: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`. where: as of `Store.matching`, but bounds are numbers, and of numbers.

        The metadata is that of when a row was copied: of a document whose metadata alone has changed, the old.
        """
        from qdrant_client import models

        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        chosen = None
        if where:
            chosen = models.Filter(
                must=[
                    models.FieldCondition(key=f"metadata.{_key(name)}", **_match(value))
                    for name, value in where.items()
                ]
            )
        rescored = models.SearchParams(quantization=models.QuantizationSearchParams(rescore=True, oversampling=3.0))
        requests = [
            models.QueryRequest(
                query=query.tolist(), limit=k, filter=chosen, params=rescored if self.quantise else None
            )
            for query in np.asarray(queries, np.float32)
        ]
        for number in range(0, len(requests), BATCH):
            answers = self._errors(self._query, requests[number : number + BATCH])
            for line, answer in enumerate(answers, number):
                # Another process may have copied what it committed since this store was last read.
                known = [p for p in answer.points if p.id < self.store.rows and self.store.alive[p.id]]
                for place, point in enumerate(known):
                    scores[line, place], rows[line, place] = point.score, point.id
        return scores, rows

    def drop(self) -> None:
        """Remove the collection."""
        self._errors(self.client.delete_collection, self.collection)
        self._state.unlink(missing_ok=True)

    def _query(self, requests: list[Any]) -> Any:
        try:
            return self.client.query_batch_points(self.collection, requests)
        except Exception:
            if self.client.collection_exists(self.collection):
                raise
            self._follow()  # somebody has dropped it
            return self.client.query_batch_points(self.collection, requests)

    def _follow(self) -> None:
        """Copy what the store has and the collection has not, and remove what the store has no more."""
        with self._state.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._copy()

    def _copy(self) -> None:
        store, done = self.store, self._copied()
        if done > store.rows:  # another process has read the store later, and copied what this one has not seen yet
            return
        rows = np.flatnonzero(store.alive)
        for part in _batches(rows[rows >= done]):
            self._upsert(part)
        if self.client.count(self.collection).count != store.passages:
            for part in _batches(np.flatnonzero(~store.alive[:done])):
                from qdrant_client import models

                self.client.delete(self.collection, models.PointIdsList(points=part.tolist()), wait=True)
        if self.client.count(self.collection).count != store.passages:  # a copy was cut short: begin again
            self.drop()
            self._copied()
            for part in _batches(rows):
                self._upsert(part)
        self._note(store.rows)

    def _copied(self) -> int:
        """Rows that the collection has seen; a new one is made where there is none of this store's."""
        from qdrant_client import models

        if self.client.collection_exists(self.collection):
            if not self._state.exists():
                raise StoreError(
                    f"Qdrant collection {self.collection}: exists, and {self.store.folder} did not make it; remove it "
                    "from Qdrant, or choose another name"
                )
            state = json.loads(self._state.read_text(encoding="utf-8"))
            rows = int(state["rows"])
            expected = self._name(rows)
            if rows > self.store.rows:
                with Store.open(self.store.folder, verify=False) as latest:
                    expected["checksum"] = latest.checksum(rows)
            if state == expected:
                return rows
            self.client.delete_collection(self.collection)
        self._note(0)
        quantisation: Any = None
        if self.quantise == "int8":
            quantisation = models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            )
        elif self.quantise == "binary":
            quantisation = models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
        self.client.create_collection(
            self.collection,
            vectors_config=models.VectorParams(size=self.store.manifest.dimension, distance=models.Distance.DOT),
            quantization_config=quantisation,
        )
        return 0

    def _note(self, rows: int) -> None:
        write_json(self._state, self._name(rows))

    def _name(self, rows: int) -> dict[str, Any]:
        """How many rows are copied, and what makes their numbers mean what they mean."""
        return {
            "rows": rows,
            "checksum": self.store.checksum(rows),
            "fingerprint": self.store.manifest.fingerprint,
            "vectors": self.store.vectors_name,
            "quantise": self.quantise,
        }

    def _upsert(self, rows: np.ndarray) -> None:
        from qdrant_client import models

        passages = self.store.get(rows.tolist())
        payloads = [{"id": p.document.id, "metadata": dict(p.document.metadata)} for p in passages]
        vectors = np.asarray(self.store.vectors[rows], dtype=np.float32).tolist()
        points = models.Batch(ids=rows.tolist(), vectors=vectors, payloads=payloads)
        self.client.upsert(self.collection, points, wait=True)

    def _errors(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except (StoreError, OSError):
            raise
        except Exception as error:  # a client's errors are of a dozen unrelated types
            raise StoreError(f"Qdrant collection {self.collection}: {first_line(error)}") from error


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _match(value: Any) -> Any:
    from qdrant_client import models

    if isinstance(value, Mapping):
        if not BOUNDS.keys() >= value.keys() or not all(isinstance(bound, int | float) for bound in value.values()):
            raise DataError(f"where: {dict(value)}: Qdrant's bounds are numbers, some of {', '.join(BOUNDS)}")
        return {"range": models.Range(**value)}
    if isinstance(value, float):
        return {"range": models.Range(gte=value, lte=value)}
    return {"match": models.MatchAny(any=value) if isinstance(value, list) else models.MatchValue(value=value)}


def _key(name: str) -> str:
    """Qdrant reads dots as levels; quotes keep a name whole."""
    return f'"{name}"' if not name.isidentifier() else name
