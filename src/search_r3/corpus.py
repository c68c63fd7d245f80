"""Read corpora and test collections, one record at a time, with errors that name file, line and field.

Sources of documents: a BEIR folder, `.jsonl`, `.csv`, `.tsv`, `.parquet`, a folder of `.txt`/`.md` files, or a Hub
data set (`hf://owner/name`, optionally `hf://owner/name#split`). Gzip (`.jsonl.gz`, ...) is read as it is.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from search_r3.errors import DataError, EmptyTextError, first_line
from search_r3.extras import need
from search_r3.files import given_path
from search_r3.records import Document, Query

Located = tuple[str, Mapping[str, Any]]
"""Where a record stands (for error messages) and its fields."""

ID_FIELDS = ("_id", "id", "doc_id", "docid")
TEXT_FIELDS = ("text", "body", "content", "contents", "passage")
TITLE_FIELDS = ("title",)
TEXT_FILES = (".txt", ".md", ".markdown")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the columns that hold a document; None tries the usual ones."""

    id: str | None = None
    """Column of the identifier; default: the first of `_id`, `id`, `doc_id`, `docid`."""
    text: str | None = None
    """Column of the body; default: the first of `text`, `body`, `content`, `contents`, `passage`."""
    title: str | None = None
    """Column of the title; default: `title`, which may be missing. One that is named must be in the first record."""


def read_documents(
    source: str | Path, fields: Fields | None = None, on_bad: Callable[[DataError], None] | None = None
) -> Iterator[Document]:
    """Stream the documents of `source`.

    on_bad: called for a record that cannot be used, which is then skipped; None raises. Raises DataError for an
    unusable record (missing, duplicate or empty id, empty text, broken line) and for a source that does not exist.
    """
    fields = fields or Fields()
    seen: dict[bytes, str] = {}  # a digest and a place per document: memory does not grow with the text
    for number, (where, record) in enumerate(read_records(source, on_bad)):
        if fields.title and not number and fields.title not in record:  # later ones may do without
            _first(where, record, [fields.title], "title")
        try:
            document = _document(where, record, fields)
            digest = hashlib.blake2b(document.id.encode("utf-8", "surrogatepass"), digest_size=12).digest()
            if digest in seen:
                raise DataError(f"{where}: id {document.id!r} was used before, {seen[digest]}; ids must be unique")
            seen[digest] = "in " + where.rsplit("/", 1)[-1]
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        yield document


def read_queries(path: str | Path) -> dict[str, Query]:
    """Queries of a `.jsonl` file by id. Raises DataError for a record that cannot be used."""
    queries: dict[str, Query] = {}
    for where, record in _jsonl(Path(path), None):
        name = _name(where, record, None)
        text = _string(where, record, "text")
        if not text.strip():
            raise DataError(f"{where}: field 'text' of query {name!r} is empty; remove the query or fill it")
        if name in queries:
            raise DataError(f"{where}: query id {name!r} was used before; ids must be unique")
        queries[name] = Query(name, text)
    return queries


def read_judgements(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance by query id and document id from a BEIR `.tsv` (query-id, corpus-id, score; one header line)."""
    judgements: dict[str, dict[str, int]] = {}
    with _open(Path(path)) as file:
        for number, row in _tabbed(file, Path(path), None):
            if number == 1 and not re.fullmatch(r"-?\d+", row[-1]):  # the header
                continue
            if len(row) != 3:
                raise DataError(f"{path}:{number}: {len(row)} columns; need query-id, corpus-id and score")
            if not re.fullmatch(r"-?\d{1,6}", row[2]):
                raise DataError(f"{path}:{number}: score {row[2]!r} is not a whole number of at most six digits")
            judged = judgements.setdefault(row[0], {})
            if judged.setdefault(row[1], int(row[2])) != int(row[2]):
                raise DataError(f"{path}:{number}: query {row[0]!r} and document {row[1]!r} had another score before")
    return judgements


def read_records(source: str | Path, on_bad: Callable[[DataError], None] | None = None) -> Iterator[Located]:
    """(place, record) pairs of a `.jsonl`, `.csv`, `.tsv` or `.parquet` file, a folder, or `hf://owner/name#split`."""
    if str(source).startswith("hf://"):
        return _hub(str(source))
    path = given_path(source)
    if not path.exists():
        raise DataError(f"{source}: no such file or folder")
    if path.is_dir():
        if (path / "corpus.jsonl").exists():
            return _jsonl(path / "corpus.jsonl", on_bad)
        return _folder(path, on_bad)
    packed = path.suffix == ".gz"
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return _jsonl(path, on_bad)
    if kind in (".csv", ".tsv"):
        return _table(path, "," if kind == ".csv" else "\t", on_bad)
    if kind == ".parquet" and not packed:
        return _parquet(path)
    if kind in TEXT_FILES and not packed:
        return _files(path.parent, [path], on_bad)
    raise DataError(
        f"{source}: unknown kind of source; use .jsonl, .csv or .tsv (or one of these as .gz), .parquet, .txt, .md, a "
        "folder or hf://owner/name"
    )


def _document(where: str, record: Mapping[str, Any], fields: Fields) -> Document:
    name = _name(where, record, fields.id)
    text_field = fields.text or _first(where, record, TEXT_FIELDS, "text")
    title_field = fields.title or next((f for f in TITLE_FIELDS if f in record), None)
    text = _string(where, record, text_field)
    title = _string(where, record, title_field) if title_field and record.get(title_field) is not None else ""
    if not text.strip():
        if not title.strip():
            raise EmptyTextError(f"{where}: field {text_field!r} of document {name!r} is empty; remove it or fill it")
        title, text = "", title  # a document that is only a title is a short document
    used = {text_field, title_field, fields.id or next((f for f in ID_FIELDS if f in record), None)}
    metadata = {key: value for key, value in record.items() if key not in used}
    nested = metadata.pop("metadata", None)  # BEIR's own habit
    if isinstance(nested, Mapping):
        metadata |= nested
    elif nested is not None:
        metadata["metadata"] = nested
    try:
        _encodable(where, "metadata", json.dumps(metadata, ensure_ascii=False, default=str, allow_nan=False))
    except ValueError as error:
        raise DataError(f"{where}: a field's number is not finite ({error}); change or remove it") from None
    return Document(name, text, title.strip(), metadata)


def _name(where: str, record: Mapping[str, Any], field: str | None) -> str:
    field = field or _first(where, record, ID_FIELDS, "id")
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value) == "":
        raise DataError(f"{where}: field {field!r} must be a non-empty string or whole number, got {value!r}")
    return _encodable(where, field, str(value))


def _first(where: str, record: Mapping[str, Any], names: Iterable[str], role: str) -> str:
    for name in names:
        if name in record:
            return name
    raise DataError(
        f"{where}: no field for the {role} (looked for {', '.join(names)}; "
        f"found {', '.join(map(str, record)) or 'none'}); name it with --{role}-field"
    )


def _string(where: str, record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {field!r} must be text, got {type(value).__name__ if value is not None else 'nothing'}"
        )
    return _encodable(where, field, value)


def _encodable(where: str, field: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: field {field!r} holds half of a surrogate pair, which is not text") from None
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _open(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError, zlib.error) as error:  # a truncated gzip, a vanished disk
        raise DataError(f"{path}: cannot be read to its end ({error})") from error


def _decoded(line: bytes, number: int, path: Path) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; convert the file (iconv -t UTF-8)"
        ) from None


def _jsonl(path: Path, on_bad: Callable[[DataError], None] | None) -> Iterator[Located]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_decoded(line, number, path), parse_constant=_no_constant)
                if not isinstance(record, dict):
                    raise DataError(f"{where}: a {type(record).__name__}; every line must be one JSON object")
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                bad = DataError(f"{where}: broken JSON ({reason})")
            except DataError as error:
                bad = error
            else:
                yield where, record
                continue
            if on_bad is None:
                raise bad
            on_bad(bad)


def _table(path: Path, delimiter: str, on_bad: Callable[[DataError], None] | None) -> Iterator[Located]:
    with _open(path) as file:
        rows = _tabbed(file, path, on_bad) if delimiter == "\t" else _quoted(file, path)
        _, header = next(rows, (0, []))
        if not header:
            raise DataError(f"{path}: empty; the first line must name the columns")
        if twice := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{path}:1: two columns are named {min(twice)!r}; rename one")
        for number, row in rows:
            if len(row) == len(header):
                yield f"{path}:{number}", dict(zip(header, row, strict=True))
                continue
            bad = DataError(f"{path}:{number}: {len(row)} columns, but the header names {len(header)}")
            if on_bad is None:
                raise bad
            on_bad(bad)


def _tabbed(file: IO[bytes], path: Path, on_bad: Callable[[DataError], None] | None) -> Iterator[tuple[int, list[str]]]:
    """A row a line: in tab-separated files a quote is an ordinary character, as everywhere in retrieval data."""
    for number, line in enumerate(_lines(file, path), 1):
        try:
            row = _decoded(line, number, path).rstrip("\r\n")
        except DataError as error:
            if on_bad is None or number == 1:
                raise
            on_bad(error)
            continue
        if row:
            yield number, row.split("\t")


def _quoted(file: IO[bytes], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a comma-separated file; after one that is broken nobody knows where the next begins."""
    csv.field_size_limit(sys.maxsize)
    lines = (_decoded(line, number, path) for number, line in enumerate(_lines(file, path), 1))
    reader = csv.reader(lines, strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a valid table ({error})") from error


def _folder(path: Path, on_bad: Callable[[DataError], None] | None) -> Iterator[Located]:
    def unreadable(error: OSError) -> None:
        bad = DataError(f"{error.filename}: this folder cannot be read ({error.strerror}); allow it, or move it away")
        if on_bad is None:
            raise bad from error
        on_bad(bad)

    found = []
    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if file.suffix.lower() in TEXT_FILES)
    if not files:
        raise DataError(f"{path}: no corpus.jsonl and no .txt, .md or .markdown file in this folder")
    if others := Counter(file.suffix.lower() or "no suffix" for file in found if file.suffix.lower() not in TEXT_FILES):
        kinds = ", ".join(name for name, _ in others.most_common(5)) + (", ..." if len(others) > 5 else "")
        logger.warning("%s: %d files of other kinds passed over (%s)", path, others.total(), kinds)
    return _files(path, files, on_bad)


def _files(root: Path, files: Iterable[Path], on_bad: Callable[[DataError], None] | None) -> Iterator[Located]:
    for file in files:
        try:
            if not file.is_file():
                continue
            text = file.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            what = f"byte {error.start + 1} is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            bad = DataError(f"{file}: {what}; convert or remove the file")
            if on_bad is None:
                raise bad from None
            on_bad(bad)
            continue
        if not text.strip():  # or its name would be taken for its text
            logger.warning("%s: empty, passed over", file)
            continue
        yield str(file), {"_id": file.relative_to(root).as_posix(), "title": file.stem, "text": text}


def _import_datasets(source: str) -> Any:
    need("datasets", source)
    import datasets

    return datasets


def _parquet(path: Path) -> Iterator[Located]:
    datasets = _import_datasets(str(path))
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise their own types
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _hub(source: str) -> Iterator[Located]:
    datasets = _import_datasets(source)
    name, _, split = source.removeprefix("hf://").partition("#")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}, row {number}", row
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{source}: cannot be read ({first_line(error)}); is there a network?") from error
