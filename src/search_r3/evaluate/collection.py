"""A test collection: documents, queries and judgements in a BEIR folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from search_r3.corpus import read_documents, read_judgements, read_queries
from search_r3.errors import DataError, EmptyTextError
from search_r3.records import Document, Query

DEMO = Path(__file__).parent.parent / "data" / "tldr"
"""The bundled collection: a sample of tldr-pages (CC BY 4.0)."""


@dataclass(frozen=True, slots=True)
class Collection:
    """One data set, ready to be searched and scored."""

    name: str
    """The folder's name."""
    documents: list[Document]
    """All documents."""
    queries: list[Query]
    """The judged queries of the split."""
    judgements: dict[str, dict[str, int]]
    """Relevance by query id and document id."""
    skipped: list[str]
    """What was wrong with each document left out. Published collections hold empty documents; nothing can find them."""


def load_collection(folder: str | Path, split: str = "test", limit: int | None = None) -> Collection:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`.

    limit: keep the first queries only. Empty documents are left out and named in `skipped`. Raises DataError when a
    file is missing or broken, when a judged query does not exist, or when no judged document does.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the path of a BEIR folder")
    needed = [root / "corpus.jsonl", root / "queries.jsonl", root / "qrels" / f"{split}.tsv"]
    for path in needed:
        if not path.is_file():
            others = sorted(p.stem for p in path.parent.glob("*.tsv")) if path.suffix == ".tsv" else []
            hint = f" (splits here: {', '.join(others)})" if others else ""
            raise DataError(f"{path}: missing{hint}; a data set is a BEIR folder: corpus.jsonl, queries.jsonl, qrels/")
    judgements = read_judgements(needed[2])
    queries = read_queries(needed[1])
    for query in judgements:
        if query not in queries:
            raise DataError(f"{needed[2]}: judges query {query!r}, which is not in {needed[1]}")
    kept = [query for query in queries.values() if query.id in judgements][:limit]
    skipped: list[str] = []

    def skip(error: DataError) -> None:
        if not isinstance(error, EmptyTextError):
            raise error
        skipped.append(str(error))

    documents = list(read_documents(root, on_bad=skip))
    known = {document.id for document in documents}
    if not any(known & judgements[query.id].keys() for query in kept):
        raise DataError(f"{needed[2]}: no judged document is in {needed[0]}; do the files belong together?")
    return Collection(root.resolve().name, documents, kept, {q.id: judgements[q.id] for q in kept}, skipped)


def load_all(folders: Sequence[str | Path], split: str = "test", limit: int | None = None) -> list[Collection]:
    """`load_collection` of each. Raises DataError for two of one name, too: results go by names."""
    collections = [load_collection(folder, split, limit) for folder in folders]
    names = [collection.name for collection in collections]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two data sets are named {twice[0]!r}; results go by these names, so rename a folder")
    return collections


def cut(collection: Collection, queries: int | None, documents: int | None) -> Collection:
    """The first queries, and the documents relevant to them and the first others up to so many; None keeps all.

    The documents stay in their order: equal scores must not bring the relevant ones to the top.
    """
    kept = collection.queries[:queries]
    judgements = {query.id: collection.judgements[query.id] for query in kept}
    relevant = {name for judged in judgements.values() for name, score in judged.items() if score > 0}
    chosen = collection.documents
    if documents is not None:
        others = documents - sum(document.id in relevant for document in chosen)
        rest = [document.id for document in chosen if document.id not in relevant]
        wanted = relevant.union(rest[: max(0, others)])
        chosen = [document for document in chosen if document.id in wanted]
    return Collection(collection.name, chosen, kept, judgements, collection.skipped)
