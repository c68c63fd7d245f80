"""Model + index: add documents, search them, keep them on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np

from search_r3.errors import DataError, StoreError, refuse_string
from search_r3.files import given_path, new_folder, vacant
from search_r3.index.base import Index
from search_r3.index.exact import ExactIndex
from search_r3.index.graph import GraphIndex
from search_r3.index.lexical import LexicalIndex
from search_r3.index.store import MANIFEST, Passage, Store, StoreManifest, content_hash
from search_r3.model.checkpoint import lasting_name
from search_r3.model.reasoning import TextCallback, mean_vectors
from search_r3.model.search_r3 import SearchR3
from search_r3.passages import Splitting, split
from search_r3.progress import Meter
from search_r3.projection import Plane
from search_r3.records import Document, Hit, Reasoned

IndexKind = Literal["exact", "graph"] | Callable[[Store], Index]
"""Or what makes an index of a store's present content, such as `remote.RemoteIndex`."""
Encode = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""From turns of the embed act (`Engine.tails`) to (N, D) float32 vectors."""
FUSION_DEPTH = 100  # documents by vector, and half of the passages by words, that hybrid search scores
MOST_DEPTHS = 64  # passages looked at by words for each document that is wanted


@dataclass(slots=True)
class Added:
    """What `Retriever.add` did, in documents."""

    added: int = 0
    """New ids."""
    updated: int = 0
    """Known ids with other content."""
    unchanged: int = 0
    """Known ids with the same content: not encoded again."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Documents between reading and storing."""

    documents: list[Document]
    """New and changed ones."""
    ranges: list[tuple[int, int, int]]
    """Their passages: number in `documents`, first character, one past the last."""
    tails: list[list[int]]
    """The passages as turns of the embed act."""
    report: Added
    """What becomes of all that were given."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The answer to one query."""

    query: str
    """As asked."""
    hits: list[Hit]
    """Best first."""
    thoughts: list[Reasoned] = field(default_factory=list)
    """What the model thought: nothing for direct search, otherwise one text for each sample."""

    @property
    def reasoned(self) -> Reasoned | None:
        """The first of `thoughts`."""
        return self.thoughts[0] if self.thoughts else None


class Retriever:
    """Search over a folder of vectors and documents with the model that made them.

    Examples:
        >>> retriever = Retriever.open_or_create("my-index", SearchR3.from_pretrained())
        >>> retriever.add([Document("1", "tar packs files into one archive")])
        Added(added=1, updated=0, unchanged=0)
        >>> retriever.search("many files into one", k=3, reason=True).hits[0].id
        '1'

    Several threads may share one; what they look up in the folder takes turns.
    """

    def __init__(self, model: SearchR3, store: Store, kind: IndexKind = "exact"):
        if store.manifest.fingerprint != model.fingerprint or store.manifest.dimension != model.dimension:
            raise StoreError(
                f"{store.folder}: written by checkpoint {store.manifest.checkpoint} "
                f"({store.manifest.fingerprint[:12]}, {store.manifest.dimension} dimensions), but the model is "
                f"{model.source} ({model.fingerprint[:12]}, {model.dimension}), another even if of its name; search "
                "with the one that wrote it, or index again into a new folder"
            )
        self.model, self.store, self.kind = model, store, kind
        self._index: tuple[int, Index] | None = None
        self._graphed: tuple[Path, GraphIndex] | None = None
        self._lexical: tuple[int, LexicalIndex] | None = None
        self._plane: tuple[tuple[int, int], tuple[Plane, list[Passage], np.ndarray]] | None = None

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: SearchR3,
        *,
        splitting: Splitting | None = None,
        max_tokens: int | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        kind: IndexKind = "exact",
    ) -> Retriever:
        """A new, empty index. max_tokens: cut passages at this length; default: the checkpoint's.

        Raises StoreError if the folder holds something, DataError for passages longer than what is read of them.
        """
        splitting = splitting or Splitting()
        max_tokens = max_tokens or model.manifest.max_tokens.document
        if splitting.tokens > max_tokens:
            raise DataError(
                f"passages of {splitting.tokens} tokens, of which {max_tokens} are read: the rest of each could not be "
                f"found; take at most {max_tokens} (--passage-tokens)"
            )
        manifest = StoreManifest(
            checkpoint=lasting_name(model.source),
            fingerprint=model.fingerprint,
            dimension=model.dimension,
            dtype=dtype,
            passage_tokens=splitting.tokens,
            passage_overlap=splitting.overlap,
            max_tokens=max_tokens,
        )
        return cls(model, Store.create(Path(folder), manifest), kind)

    @classmethod
    def open(cls, folder: str | Path, model: SearchR3 | None = None, kind: IndexKind = "exact") -> Retriever:
        """An existing index. model: default, the checkpoint that the index names.

        Raises StoreError if there is none, it is damaged, or another checkpoint wrote it.
        """
        store = Store.open(Path(folder))
        try:
            stored = store.manifest
            return cls(model or SearchR3.from_pretrained(stored.checkpoint, dims=stored.dimension), store, kind)
        except BaseException:
            store.close()
            raise

    @classmethod
    def open_or_create(
        cls,
        folder: str | Path,
        model: SearchR3,
        *,
        splitting: Splitting | None = None,
        max_tokens: int | None = None,
        dtype: Literal["float32", "float16"] | None = None,
        kind: IndexKind = "exact",
    ) -> Retriever:
        """`open` if the folder holds an index, else `create`. Settings given must equal those of an existing index."""
        folder = given_path(Path(folder) / MANIFEST).parent
        if vacant(folder):
            return cls.create(
                folder, model, splitting=splitting, max_tokens=max_tokens, dtype=dtype or "float32", kind=kind
            )
        if not (folder / MANIFEST).exists():
            raise StoreError(f"{folder}: exists and is not an index; choose another folder")
        retriever = cls.open(folder, model, kind)
        stored = retriever.store.manifest
        given = {"passage length": splitting, "max tokens": max_tokens, "dtype": dtype}
        kept = {"passage length": stored.splitting, "max tokens": stored.max_tokens, "dtype": stored.dtype}
        for name, value in given.items():
            if value is not None and value != kept[name]:
                retriever.close()
                raise StoreError(f"{folder}: was made with {name} {kept[name]}, not {value}; index into a new folder")
        return retriever

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the index folder."""
        self.store.close()

    def add(
        self,
        documents: Iterable[Document],
        *,
        batch: int | None = None,
        encode: Encode | None = None,
        progress: bool | None = False,
    ) -> Added:
        """Encode and store documents; known ids are replaced, unchanged documents are skipped.

        Reads and commits `batch` documents at a time: memory does not grow with the text, and whatever ends this call
        (an error in the data, Ctrl-C, a kill) keeps all batches before it. Default: 32 on a CPU, where they take some
        seconds, 1024 elsewhere. encode: embeds in place of our own engine, such as `distributed.RayEncoder`. Raises
        DataError for an empty document.
        """
        batch = batch or (32 if self.model.engine.device.type == "cpu" else 1024)
        report = Added()
        stream = iter(documents)
        with self.store.writing(), Meter("index", None, "documents", progress) as meter:
            while True:
                chunk, failure = _take(stream, batch)
                plan = self.plan(chunk)
                if plan.documents:
                    self.commit(plan, (encode or self._encode)(plan.tails))
                tokens = sum(map(len, plan.tails))
                report.added += plan.report.added
                report.updated += plan.report.updated
                report.unchanged += plan.report.unchanged
                meter.advance(len(chunk), tokens)
                if failure is not None:
                    raise failure
                if not chunk:
                    break
        return report

    def plan(self, documents: Sequence[Document]) -> Plan:
        """What is to be encoded of these documents; of several with one id the last counts. Updates metadata.

        Raises DataError for an empty document, or one that is no text.
        """
        for document in documents:
            if not isinstance(document, Document):
                raise DataError(f"{type(document).__name__} where a Document is needed: Document(id, text)")
            for part in (document.id, document.title, document.text):
                if not isinstance(part, str):
                    raise DataError(f"document {document.id!r}: {part!r} is no text; id, title and text must be")
                try:
                    part.encode()
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"document {document.id!r}: {error.reason} ({error.object[error.start]!r})"
                    ) from None
        latest = list({document.id: document for document in documents}.values())
        known = self.store.hashes([document.id for document in latest])
        new = [document for document in latest if known.get(document.id) != content_hash(document)]
        fresh = {document.id for document in new}
        self.store.touch([document for document in latest if document.id not in fresh])
        updated = sum(document.id in known for document in new)
        ranges: list[tuple[int, int, int]] = []
        texts: list[str] = []
        for number, document in enumerate(new):
            if not document.content.strip():
                raise DataError(f"document {document.id!r} is empty; remove it or fill it")
            for start, end in split(document, self.model.engine.plain_tokenizer, self._splitting(document.title)):
                ranges.append((number, start, end))
                texts.append(Passage(document, start, end).content)
        tails = self.model.engine.tails(texts, "embed", self.store.manifest.max_tokens)
        return Plan(new, ranges, tails, Added(len(new) - updated, updated, len(latest) - len(new)))

    def _splitting(self, title: str) -> Splitting:
        """The index's, with room for the title that stands before every passage."""
        kept, most = self.store.manifest.splitting, self.store.manifest.max_tokens
        if not title or len(title.encode()) + kept.tokens < most:  # a token is at least one byte
            return kept
        return kept.beside(len(self.model.engine.plain_ids([title])[0]) + 1, most)

    def commit(self, plan: Plan, vectors: np.ndarray) -> None:
        """Store what was planned, in one step. vectors: (len(plan.tails), D) float32. Dead rows do not pile up."""
        self.store.put(plan.documents, plan.ranges, vectors)
        self.store.tidy()

    def _encode(self, tails: Sequence[Sequence[int]]) -> np.ndarray:
        return self.model.engine.encode(tails, "embed")

    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents; unknown ids are ignored. Returns how many were removed. Dead rows do not pile up.

        Raises TypeError for one id in place of several.
        """
        refuse_string(ids)
        with self.store.writing():
            removed = self.store.delete(ids)
            self.store.tidy()
        return removed

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Those of these documents that are stored, in the order asked. Raises TypeError for one id."""
        refuse_string(ids)
        with self.store.reading():
            return self.store.documents(ids)

    def __len__(self) -> int:
        """Number of documents."""
        with self.store.reading():
            return len(self.store)

    def __bool__(self) -> bool:
        return True  # an empty index is one

    def index(self) -> Index:
        """The search structure over the store's present content; a graph is built when it is first needed."""
        if self._index is None or self._index[0] != self.store.generation:
            store = self.store
            index: Index
            if self.kind == "exact":
                index = ExactIndex(store.vectors, store.alive)
            else:
                index = self._graph() if self.kind == "graph" else self.kind(store)
            self._index = (store.generation, index)
        return self._index[1]

    def _graph(self) -> GraphIndex:
        """The graph of the vectors' file; rows are only ever appended to that."""
        store = self.store
        path = store.derived("graph", store.vectors_name)
        if self._graphed and self._graphed[0] == path:
            graph = self._graphed[1]
            graph.extend(store.vectors, store.alive)
        else:
            try:
                graph = GraphIndex.load(path, store.vectors, store.alive)
            except StoreError:  # none, damaged, or removed by another process just now
                graph = GraphIndex.build(store.vectors, store.alive)
        self._graphed = path, graph
        if graph.saved < 0.9 * store.rows:
            with suppress(OSError):  # a copy for the next start: search goes on without it
                temporary = path.with_name(f".{path.name}.{uuid4().hex}")  # not a process's number: containers share it
                graph.save(temporary)
                temporary.replace(path)
        return graph

    def lexical(self) -> LexicalIndex:
        """BM25 over the same passages; built when it is first needed."""
        if self._lexical is None or self._lexical[0] != self.store.generation:
            made_by = "-".join(version(name) for name in ("bm25s", "PyStemmer"))  # who stem the queries, too
            path = self.store.derived("bm25", f"{self.store.generation}-{made_by}")
            try:
                lexical = LexicalIndex.load(path)
            except StoreError:  # as for the graph
                texts = {row: passage.content for row, passage in self.store.scan()}
                lexical = LexicalIndex.build(list(texts.values()), list(texts))
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError), new_folder(path) as temporary:
                    lexical.save(temporary)
            self._lexical = (self.store.generation, lexical)
        return self._lexical[1]

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        reason: bool = False,
        samples: int = 1,
        fuse: float | None = None,
        gate: float | None = None,
        hybrid: bool = False,
        where: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        on_text: TextCallback | None = None,
    ) -> Found:
        """Search for one query; see `search_many`. on_text(0, piece) is called as reasoning appears, of
        several the first."""
        return self.search_many(
            [query],
            k,
            reason=reason,
            samples=samples,
            fuse=fuse,
            gate=gate,
            hybrid=hybrid,
            where=where,
            max_new_tokens=max_new_tokens,
            on_text=on_text,
        )[0]

    def search_many(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        reason: bool = False,
        samples: int = 1,
        fuse: float | None = None,
        gate: float | None = None,
        hybrid: bool = False,
        where: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        on_text: TextCallback | None = None,
    ) -> list[Found]:
        """The k best documents of each query.

        reason: think before embedding. samples: think that often, and search with the mean of the vectors. fuse: weight
        in [0, 1] of the reasoned vector in a sum with the direct one. gate: reason only over queries whose best direct
        hit leads the second by less than this, in cosine; `search-r3 eval` shows what a gate saves. Several samples,
        fuse and gate imply `reason`. hybrid: add BM25 (`LexicalIndex.worth`). where: only documents whose metadata has
        these values, e.g. `{"lang": ["en", "de"], "year": {"gte": 1979}}` (`Store.matching`). Raises DataError for an
        empty query.
        """
        if k < 1:
            raise DataError(f"k={k}: must be at least 1")
        if fuse is not None and not 0 <= fuse <= 1:
            raise DataError(f"fuse={fuse}: must be between 0 and 1")
        if gate is not None and not 0 <= gate <= 2:
            raise DataError(f"gate={gate}: must be between 0 and 2, the largest difference of two cosines")
        if samples < 1:
            raise DataError(f"samples={samples}: must be at least 1")
        thoughts: list[list[Reasoned]] = [[] for _ in queries]
        think = reason or samples > 1 or fuse is not None or gate is not None
        wanted = list(range(len(queries))) if think else []
        if not think or fuse is not None or gate is not None:
            vectors = self.model.encode_queries(queries)
        else:
            vectors = np.empty((len(queries), self.model.dimension), np.float32)
        if gate is not None:
            leads = self.search_vectors(vectors, 2, where=where)
            wanted = [n for n in wanted if margin([hit.score for hit in leads[n]]) < gate]

        def show(row: int, piece: str) -> None:
            assert on_text is not None
            if row % samples == 0:
                on_text(wanted[row // samples], piece)

        reasoned = self.model.reason(
            [queries[n] for n in wanted],
            samples=samples,
            max_new_tokens=max_new_tokens,
            on_text=show if on_text else None,
        )
        for place, number in enumerate(wanted):
            thoughts[number] = reasoned[place * samples : (place + 1) * samples]
            mixed = mean_vectors(np.stack([thought.vector for thought in thoughts[number]]), samples)
            vectors[number] = (mixed if fuse is None else fuse_vectors(vectors[number, None], mixed, fuse))[0]
        hits = self.search_vectors(vectors, k, queries if hybrid else None, where)
        return [Found(q, h, t) for q, h, t in zip(queries, hits, thoughts, strict=True)]

    def search_vectors(
        self,
        vectors: np.ndarray,
        k: int,
        texts: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[list[Hit]]:
        """The k best documents of each query vector, (Q, D). texts: the queries' words, for hybrid search.

        where: see `search_many`; a filtered search is exact, whatever the index.
        """
        with self.store.reading():
            depth = max(k, FUSION_DEPTH) if texts is not None else k
            allowed = self.store.matching(where) if where else None
            scores, rows = self._rank(vectors, depth, allowed)
            hits = []
            for query, vector in enumerate(vectors):
                if texts is None:
                    ranking = rows[query], scores[query]
                else:
                    ranking = self._with_words(vector, rows[query], texts[query], 2 * depth, allowed)
                best = self._documents(*ranking, k).values()
                hits.append([_hit(rank, score, passage) for rank, (score, passage) in enumerate(best, 1)])
            return hits

    def plane(self, limit: int = 1000) -> tuple[Plane, list[Passage], np.ndarray]:
        """The plane in which the stored vectors differ most, passages evenly chosen, and their places, (N, 2)."""
        store = self.store
        with store.reading():
            if self._plane is None or self._plane[0] != (store.generation, limit):
                rows = np.flatnonzero(store.alive)
                if len(rows) > limit:
                    rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
                vectors = np.asarray(store.vectors[rows], dtype=np.float32)
                plane = Plane.fit(vectors)
                self._plane = (store.generation, limit), (plane, store.get(rows.tolist()), plane(vectors))
        return self._plane[1]

    def _rank(self, vectors: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Enough rows for k documents each: passages of one document must not crowd out the others."""
        index = self.index() if allowed is None else ExactIndex(self.store.vectors, allowed)
        documents = min(k, len(self.store))
        depth = k if self.store.passages == len(self.store) else 4 * k
        while True:
            scores, rows = index.search(vectors, depth)
            if depth >= len(index) or depth >= self.store.passages or self.store.passages == len(self.store):
                return scores, rows
            if all(self.store.count(found[found >= 0]) >= documents for found in rows):
                return scores, rows
            depth *= 4

    def _with_words(
        self, vector: np.ndarray, rows: np.ndarray, text: str, depth: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows by cosine and words in common, best first, and their scores: those given, and the best by words.

        Of these enough for `depth` documents, in reason. Both parts are computed for every row, whichever ranking it
        comes from.
        """
        worth = self.lexical().worth(text, self.store.rows)
        if allowed is not None:
            worth *= allowed
        best = np.flatnonzero(worth > 0)
        taken, documents, split = depth, min(depth, len(self.store)), self.store.passages > len(self.store)
        while taken < len(best):
            first = best[np.argpartition(-worth[best], taken)[:taken]]
            if not split or taken >= MOST_DEPTHS * depth or self.store.count(first) >= documents:
                best = first
                break
            taken *= 4
        candidates = np.union1d(rows[rows >= 0], best)
        cosines = np.asarray(self.store.vectors[candidates], dtype=np.float32) @ vector
        scores = cosines + worth[candidates]
        order = np.argsort(-scores, kind="stable")
        return candidates[order], scores[order]

    def _documents(self, rows: np.ndarray, scores: np.ndarray, k: int) -> dict[str, tuple[float, Passage]]:
        """Up to k documents by id, best first, each with its best passage; reads no more than it must."""
        best: dict[str, tuple[float, Passage]] = {}
        left = np.flatnonzero(rows >= 0)
        while len(best) < k and len(left):
            now, left = left[:k], left[k:]
            for score, passage in zip(scores[now].tolist(), self.store.get(rows[now].tolist()), strict=True):
                best.setdefault(passage.document.id, (score, passage))
        return dict(islice(best.items(), k))


def margin(scores: Sequence[float]) -> float:
    """How far the best hit of a search leads the second, in cosine: little where the vector is undecided.

    Examples:
        >>> margin([0.75, 0.5, 0.25]), margin([0.5])
        (0.25, inf)
    """
    return float(scores[0] - scores[1]) if len(scores) > 1 else float("inf")


def fuse_vectors(direct: np.ndarray, reasoned: np.ndarray, weight: float) -> np.ndarray:
    """Unit sums (1 - weight) * direct + weight * reasoned of (Q, D) unit vectors."""
    mixed = (1 - weight) * direct + weight * reasoned
    return np.asarray(mixed / np.linalg.norm(mixed, axis=1, keepdims=True), dtype=np.float32)


def _take(stream: Iterable[Document], number: int) -> tuple[list[Document], DataError | None]:
    """Up to `number` documents, and the error that cut them short: what was read before a bad record is still used."""
    chunk: list[Document] = []
    try:
        for document in islice(stream, number):
            chunk.append(document)
    except DataError as error:
        return chunk, error
    return chunk, None


def _hit(rank: int, score: float, passage: Passage) -> Hit:
    document = passage.document
    return Hit(rank, document.id, score, document.title, passage.text, passage.start, passage.end, document.metadata)
