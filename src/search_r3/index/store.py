"""The folder on disk that holds an index: vectors in one flat file, everything else in SQLite.

    manifest.json   format, checkpoint, dimension, dtype, splitting
    records.sqlite  documents, their content hashes, passages (one per vector row), blocks (a checksum per append)
    vectors-N.bin   row-major float32 or float16; row r starts at r * dimension * itemsize
    graph-* derived from a vectors' file, bm25-* from all; deleted at any time, rebuilt when needed

Crash safety: a batch's vectors are appended and synced first, then its records are committed in one transaction. Bytes
beyond the last committed row belong to a batch that was in flight and are overwritten. So a store killed at any instant
opens again and has lost at most that batch. One process may write; any number may read meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search_r3.errors import DataError, StoreError
from search_r3.files import given_path, new_folder, write_text
from search_r3.index.filters import condition
from search_r3.passages import Splitting
from search_r3.records import Document

MANIFEST = "manifest.json"
FORMAT = 1

_SCHEMA = """
CREATE TABLE documents (id TEXT PRIMARY KEY, hash BLOB NOT NULL, title TEXT NOT NULL, metadata TEXT NOT NULL,
                        text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE passages (row INTEGER PRIMARY KEY, document TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL);
CREATE INDEX passages_by_document ON passages (document);
CREATE TABLE blocks (first INTEGER PRIMARY KEY, rows INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE state (file TEXT NOT NULL, rows INTEGER NOT NULL, generation INTEGER NOT NULL);
"""
_PASSAGES = "SELECT row, document, start, stop FROM passages"

_ADVICE = {  # by a part of SQLite's message
    "closed database": "open it again",
    "full": "free some space and run again",
    "locked": "another program holds it; end that and run again",
    "readonly": "give this user the right to write there: readers take locks, too",
    "unable to open": "give this user the right to write there: readers take locks, too",
}
_DAMAGED = "restore it, or index again into a new folder"


class StoreManifest(BaseModel):
    """What an index was made with; fixed at creation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    """Version of the folder's layout."""
    checkpoint: str
    """Source of the model, for people and for reopening."""
    fingerprint: str
    """The model's embedding space (`Manifest.fingerprint`)."""
    dimension: int = Field(ge=1)
    """Width of a vector."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision; scores are float32 either way."""
    passage_tokens: int = Field(ge=0)
    """See `Splitting`."""
    passage_overlap: int = Field(ge=0)
    """See `Splitting`."""
    max_tokens: int = Field(ge=1)
    """Tokens beyond this in a passage (title included) were cut."""

    @property
    def splitting(self) -> Splitting:
        """How documents were split."""
        return Splitting(self.passage_tokens, self.passage_overlap)


@dataclass(frozen=True, slots=True)
class Passage:
    """A row of an index: a character range of a document."""

    document: Document
    """The whole document."""
    start: int
    """First character of the body."""
    end: int
    """One past the last."""

    @property
    def text(self) -> str:
        """The passage without the title."""
        return self.document.text[self.start : self.end]

    @property
    def content(self) -> str:
        """What is embedded: the title and the passage."""
        return Document(self.document.id, self.text, self.document.title).content


def content_hash(document: Document) -> bytes:
    """Hash of what the vectors depend on. A document whose hash is stored is not encoded again."""
    return hashlib.sha256(json.dumps([document.title, document.text]).encode()).digest()


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays are numbers and lists; dates and the like are stored as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _metadata(document: Document) -> str:
    try:
        return json.dumps(dict(document.metadata), ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError as error:
        raise StoreError(f"document {document.id!r}: metadata cannot be stored ({error}); mend or remove it") from error


class Store:
    """An open index folder. Use `create` or `open`; close it, or use it as a context manager.

    vectors: (rows, D) memory map, read only; alive: (rows,) bool, false for replaced and deleted rows.
    """

    def __init__(self, folder: Path, manifest: StoreManifest, verify: bool):
        self.folder, self.manifest = folder, manifest
        self._dtype = np.dtype(manifest.dtype)
        self._stride = manifest.dimension * self._dtype.itemsize
        self._lock: IO[str] | None = None
        self._writing, self._access = threading.RLock(), threading.RLock()  # of threads: one writes; one at the records
        self._counted = (-1, 0)  # generation, documents
        with self._errors():
            self._db = sqlite3.connect(folder / "records.sqlite", isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA busy_timeout = 10000")
            self._opened = _identity(folder)
        self.generation = -1
        with self.reading(verify):
            pass

    @classmethod
    def create(cls, folder: Path, manifest: StoreManifest) -> Store:
        """Make an empty store. Raises StoreError if the folder holds something already or cannot be written."""
        folder = given_path(folder)
        try:
            with new_folder(folder) as temporary:
                write_text(temporary / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
                (temporary / "vectors-0.bin").touch()
                db = sqlite3.connect(temporary / "records.sqlite")
                db.executescript(
                    f"PRAGMA journal_mode = WAL; {_SCHEMA} INSERT INTO state VALUES ('vectors-0.bin', 0, 0);"
                )
                db.close()
        except FileExistsError as error:
            raise StoreError(f"{folder}: exists and is not an index; choose another folder or remove it") from error
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{folder}: cannot be created ({error})") from error
        return cls(folder, manifest, verify=False)

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Store:
        """Open a store. verify: check every block's checksum, so that a damaged file is found before it misleads.

        Raises StoreError for a folder that is no index, is damaged, or was written by a newer version.
        """
        path = given_path(folder / MANIFEST)
        folder = path.parent
        if not path.is_file():
            raise StoreError(f"{folder}: no index here (no {MANIFEST}); make one with: search-r3 index CORPUS {folder}")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
                raise StoreError(f"{path}: format {raw['format']} is newer than this search-r3 reads; upgrade it")
            manifest = StoreManifest.model_validate(raw)
            if manifest.passage_tokens and manifest.passage_overlap >= manifest.passage_tokens:
                raise StoreError(f"{path}: field passage_overlap: must be less than passage_tokens; index again")
        except ValidationError as error:
            first = error.errors()[0]
            raise StoreError(
                f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}; index again"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{path}: not a readable manifest ({error}); index again") from error
        if not (folder / "records.sqlite").is_file():
            raise StoreError(f"{folder}/records.sqlite: missing; index again into a new folder")
        return cls(folder, manifest, verify)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release files and the write lock."""
        self._db.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def refresh(self, verify: bool = False) -> None:
        """See what has been committed since the last look, by this process or another."""
        with self._errors():
            state = self._db.execute("SELECT file, rows, generation FROM state").fetchone()
            if state is None or (verify and self._lost_records()):
                raise StoreError(f"{self.folder}/records.sqlite: records are missing; index again into a new folder")
            file, self.rows, generation = state
            self.generation = -1  # what fails half-way is done again before anything is read
            self._path = self.folder / file
            size = self._path.stat().st_size if self._path.exists() else -1
            if size < self.rows * self._stride:
                raise StoreError(
                    f"{self._path}: holds {max(size, 0)} bytes, but {self.rows} rows need {self.rows * self._stride}; "
                    "the file was truncated: restore it, or index again into a new folder"
                )
            self._map()
            if verify:
                self._verify()
            self.alive = np.zeros(self.rows, dtype=bool)
            alive = self._db.execute("SELECT row FROM passages WHERE row < ?", (self.rows,))
            self.alive[np.fromiter((row for (row,) in alive), dtype=np.int64)] = True
            self.generation = generation

    def _lost_records(self) -> int:
        """Documents without a passage and passages without a document: every document has at least one."""
        query = (
            "SELECT (SELECT count(*) FROM documents WHERE id NOT IN (SELECT document FROM passages))"
            " + (SELECT count(*) FROM passages WHERE document NOT IN (SELECT id FROM documents))"
        )
        return int(self._db.execute(query).fetchone()[0])

    def _map(self) -> None:
        shape = (self.rows, self.manifest.dimension)
        self.vectors: np.ndarray = (
            np.memmap(self._path, self._dtype, "r", shape=shape) if self.rows else np.empty(shape, self._dtype)
        )

    def _verify(self) -> None:
        for first, rows, crc in self._db.execute("SELECT first, rows, crc FROM blocks WHERE first < ?", (self.rows,)):
            if zlib.crc32(np.ascontiguousarray(self.vectors[first : first + rows]).data) != crc:
                raise StoreError(
                    f"{self._path}: rows {first} to {first + rows - 1} do not match their checksum; the file is "
                    "damaged: restore it, or index again into a new folder"
                )

    @contextmanager
    def reading(self, verify: bool = False) -> Iterator[None]:
        """See one state of the index, the latest, whatever other processes commit meanwhile."""
        with self._access, self._errors():
            self._begin(verify)
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    def _begin(self, verify: bool) -> None:
        """Begin a transaction on the latest state. Looks again where another process numbered rows anew just then."""
        self._check_place()
        while True:
            self._db.execute("BEGIN")
            seen = None
            try:
                seen = self._committed()
                if seen != self.generation:
                    self.refresh(verify)
                return
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("COMMIT")
                if seen is None or self._committed() == seen:
                    raise

    def _check_place(self) -> None:
        """Raise StoreError where another index stands in this one's place: their files must not mix."""
        if _identity(self.folder) != self._opened:
            raise StoreError(f"{self.folder}: was replaced or removed after it was opened; open it again")

    def moved(self) -> bool:
        """Whether another process has committed since the last look: rows may mean something else now."""
        with self._errors():
            return self._committed() != self.generation

    def _committed(self) -> int | None:
        """The generation on disk; None where its record is missing."""
        found = self._db.execute("SELECT generation FROM state").fetchone()
        return found and int(found[0])

    def __len__(self) -> int:
        """Number of documents."""
        if self._counted[0] != self.generation:  # counting reads the whole table
            with self._errors():
                count = int(self._db.execute("SELECT count(*) FROM documents").fetchone()[0])
            self._counted = (self.generation, count)
        return self._counted[1]

    @property
    def vectors_name(self) -> str:
        """The vectors' file, which changes when rows are numbered anew."""
        return str(self._path.name)

    @property
    def passages(self) -> int:
        """Number of passages that can be found."""
        return int(self.alive.sum())

    def hashes(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Content hashes of those of `ids` that are stored."""
        return dict(self._among("SELECT id, hash FROM documents WHERE id", ids))

    def ids(self) -> Iterator[str]:
        """Ids of all documents, in order of id."""
        with self._errors():
            for (name,) in self._db.execute("SELECT id FROM documents ORDER BY id"):
                yield name

    def documents(self, ids: Sequence[str]) -> list[Document]:
        """Those of these documents that are stored, in the order asked."""
        records = self._among("SELECT id, text, title, metadata FROM documents WHERE id", ids)
        found = {record[0]: _document(*record) for record in records}
        return [found[name] for name in ids if name in found]

    def get(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of these rows, in the order asked."""
        records = list(self._among(f"{_PASSAGES} WHERE row", np.asarray(rows).tolist()))
        documents = {d.id: d for d in self.documents(list({name for _, name, _, _ in records}))}
        found = {row: Passage(documents[name], start, stop) for row, name, start, stop in records if name in documents}
        return [found[row] for row in rows if row in found]

    def count(self, rows: Sequence[int] | np.ndarray) -> int:
        """How many documents these rows belong to."""
        found = self._among("SELECT document FROM passages WHERE row", np.asarray(rows).tolist())
        return len({name for (name,) in found})

    def _among(self, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Records of a query whose last column is one of these; many are asked for in parts."""
        with self._errors():
            for start in range(0, len(values), 500):
                part = values[start : start + 500]
                yield from self._db.execute(f"{query} IN ({','.join('?' * len(part))})", part)

    def scan(self) -> Iterator[tuple[int, Passage]]:
        """All passages with their rows, in order of row, streamed."""
        document: Document | None = None
        with self._errors():
            for row, name, start, stop in self._db.execute(f"{_PASSAGES} ORDER BY row"):
                if document is None or document.id != name:  # passages of a document lie together; it may be long
                    document = next(iter(self.documents([name])), None)
                if document is not None:  # else it was removed just now
                    yield row, Passage(document, start, stop)

    def matching(self, where: Mapping[str, Any]) -> np.ndarray:
        """(rows,) bool: passages whose document's metadata is as wanted, in every field.

        A value is wanted as it is, a list means any of its values, and bounds such as `{"gte": 1979, "lt": 1990}` all
        hold (gt, gte, lt, lte): numbers bound numbers, also those written as text, and text bounds text (ISO dates). A
        field that is a list has each of its elements. Raises DataError for what no metadata field can be.
        """
        found = self.alive.copy()
        for key, wanted in where.items():
            test, values = condition(key, wanted)
            with self._errors():
                rows = self._db.execute(
                    "SELECT row FROM passages WHERE document IN ("
                    "SELECT documents.id FROM documents, json_each(metadata) AS field "
                    f"WHERE field.key = ?1 AND ({test.format('field')} OR EXISTS (SELECT 1 FROM json_each("
                    f"CASE field.type WHEN 'array' THEN field.value END) AS item WHERE {test.format('item')})))",
                    [key, *values],
                ).fetchall()
            these = np.zeros_like(found)
            these[[row for (row,) in rows if row < self.rows]] = True
            found &= these
        return found

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's write lock. Raises StoreError if another process writes; other threads wait."""
        self._check_place()
        with self._writing:
            if self._lock is not None:
                yield
                return
            with self._errors():
                lock = (self.folder / "lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                why = f"cannot be locked ({error.strerror}); put the index on a disk that has file locks"
                if isinstance(error, BlockingIOError):
                    why = "another process is writing to this index; wait until it ends"
                raise StoreError(f"{self.folder}: {why}") from error
            self._lock = lock
            try:
                with self._access:
                    if self.moved():
                        self.refresh()
                yield
            finally:
                self._lock = None
                lock.close()

    def put(self, documents: Sequence[Document], ranges: Sequence[tuple[int, int, int]], vectors: np.ndarray) -> None:
        """Add or replace documents in one step.

        ranges: one (number of the document in `documents`, start, end) per row of `vectors`, which is (rows, D).
        All is stored or nothing. Raises StoreError when the disk is full or the vectors are unusable.
        """
        if vectors.shape != (len(ranges), self.manifest.dimension):
            raise StoreError(f"vectors of shape {vectors.shape} do not fit {len(ranges)} x {self.manifest.dimension}")
        if not np.isfinite(vectors).all():
            bad = documents[ranges[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])][0]].id
            raise StoreError(f"the vector of document {bad!r} is not finite; try dtype float32, and check the model")
        with self.writing(), self._access, self._errors():
            block = np.ascontiguousarray(vectors, dtype=self._dtype)
            self._append(block)
            first = self.rows
            with self._transaction():
                _, dead = self._forget([document.id for document in documents])
                self._db.executemany(
                    "INSERT INTO documents (id, hash, title, metadata, text) VALUES (?, ?, ?, ?, ?)",
                    [(d.id, content_hash(d), d.title, _metadata(d), d.text) for d in documents],
                )
                self._db.executemany(
                    "INSERT INTO passages VALUES (?, ?, ?, ?)",
                    [(first + n, documents[number].id, start, end) for n, (number, start, end) in enumerate(ranges)],
                )
                if len(block):
                    self._db.execute("INSERT INTO blocks VALUES (?, ?, ?)", (first, len(block), zlib.crc32(block.data)))
                generation = _next()
                self._db.execute("UPDATE state SET rows = ?, generation = ?", (first + len(block), generation))
            self.rows, self.generation = first + len(block), -1  # as in `refresh`
            self.alive = np.append(self.alive, np.ones(len(block), dtype=bool))
            self.alive[dead] = False
            self._map()
            self.generation = generation

    def touch(self, documents: Sequence[Document]) -> None:
        """Store the metadata of documents whose content is stored already."""
        if not documents:
            return
        values = [(_metadata(d), d.id) for d in documents]
        with self.writing(), self._access, self._errors(), self._transaction():
            self._db.executemany("UPDATE documents SET metadata = ?1 WHERE id = ?2 AND metadata <> ?1", values)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove documents in one step; ids that are not stored are ignored. Returns how many were removed."""
        with self.writing(), self._access, self._errors():
            with self._transaction():
                removed, dead = self._forget(ids)
                generation = _next() if dead else self.generation  # nothing removed: what was derived is still good
                self._db.execute("UPDATE state SET generation = ?", (generation,))
            self.generation = generation
            self.alive[dead] = False
            return removed

    def tidy(self) -> None:
        """`compact` where most of many rows are dead."""
        if self.rows > 1000 and self.passages < self.rows / 2:
            with suppress(StoreError):  # no room for it: what was written stays, and the next write tries again
                self.compact()

    def compact(self) -> None:
        """Rewrite the vectors without dead rows."""
        with self.writing(), self._access, self._errors():
            rows = np.flatnonzero(self.alive)
            generation = _next()
            new = self.folder / f"vectors-{generation}.bin"
            blocks = []
            try:
                with new.open("wb") as file:
                    for start in range(0, len(rows), 4096):
                        block = np.ascontiguousarray(self.vectors[rows[start : start + 4096]])
                        file.write(block.data)
                        blocks.append((start, len(block), zlib.crc32(block.data)))
                    file.flush()
                    os.fsync(file.fileno())
                with self._transaction():
                    # Rows only move down, in rising order, so no update meets a row that is still in use.
                    self._db.executemany(
                        "UPDATE passages SET row = ? WHERE row = ?", ((n, int(row)) for n, row in enumerate(rows))
                    )
                    self._db.execute("DELETE FROM blocks")
                    self._db.executemany("INSERT INTO blocks VALUES (?, ?, ?)", blocks)
                    self._db.execute(
                        "UPDATE state SET file = ?, rows = ?, generation = ?", (new.name, len(rows), generation)
                    )
            except BaseException:
                if self._committed() != generation:
                    new.unlink(missing_ok=True)
                raise
            self.refresh()
            for old in self.folder.glob("vectors-*.bin"):  # the last one, and what a killed compaction left
                if old != self._path:
                    old.unlink(missing_ok=True)

    def checksum(self, rows: int) -> str:
        """Of the first rows' vectors, up to the end of a commit: tells them from others under the same numbers."""
        with self._errors():
            blocks = self._db.execute("SELECT first, rows, crc FROM blocks WHERE first < ? ORDER BY first", (rows,))
            return hashlib.sha256(repr(blocks.fetchall()).encode()).hexdigest()

    def derived(self, kind: str, of: str | None = None) -> Path:
        """Where something computed from the content is kept, e.g. `bm25-12`; all others of the kind are removed.

        of: what it was computed from; default, the present generation.
        """
        path = self.folder / f"{kind}-{of or self.generation}"
        if not path.exists():
            begun = [old for old in self.folder.glob(f".{kind}-*") if _age(old) > 3600]  # and killed while writing
            for old in (*self.folder.glob(f"{kind}-*"), *begun):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        return path

    def _append(self, block: np.ndarray) -> None:
        with self._path.open("r+b") as file:
            file.seek(self.rows * self._stride)
            file.write(block.data)
            file.flush()
            os.fsync(file.fileno())

    def _forget(self, ids: Sequence[str]) -> tuple[int, list[int]]:
        """Drop documents and their passages; returns how many documents there were, and the rows that are dead now."""
        removed, dead = 0, []
        for name in ids:
            gone = self._db.execute("DELETE FROM passages WHERE document = ? RETURNING row", (name,)).fetchall()
            dead += [row for (row,) in gone]
            removed += self._db.execute("DELETE FROM documents WHERE id = ?", (name,)).rowcount
        return removed, dead

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite ends it by itself where the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what disks and SQLite raise into one line that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            advice = next((advice for sign, advice in _ADVICE.items() if sign in text), _DAMAGED)
            raise StoreError(
                f"{self.folder}/records.sqlite: {text}; what was stored before is kept; {advice}"
            ) from error
        except UnicodeEncodeError as error:
            raise DataError(f"{error.object!r}: {error.reason}") from error
        except OSError as error:
            raise StoreError(
                f"{error.filename or self.folder}: {error.strerror or error}; what was stored before is kept; "
                "mend this and run again"
            ) from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of the file of records, whatever its name; None where there is none."""
    with suppress(OSError):
        status = (folder / "records.sqlite").stat()
        return status.st_dev, status.st_ino
    return None


def _age(path: Path) -> float:
    """Seconds since it was written; 0 where it has just gone."""
    with suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _next() -> int:
    """A number for the next state that none had, not even one that a restored backup has undone."""
    return secrets.randbits(48)


def _document(name: str, text: str, title: str, metadata: str) -> Document:
    try:
        return Document(name, text, title, json.loads(metadata))
    except ValueError as error:
        raise StoreError(f"records.sqlite: the record of document {name!r} is damaged; index again") from error
