"""Training sets: from files to examples, without duplicates and without what evaluation sets hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.corpus import read_documents, read_judgements, read_queries, read_records
from search_r3.errors import DataError, EmptyTextError
from search_r3.evaluate.collection import load_collection
from search_r3.records import Document
from search_r3.train.config import Recipe, Source


@dataclass(frozen=True, slots=True)
class Passage:
    """A document as a training example holds it."""

    id: str
    """Unique within its source."""
    text: str
    """As it is embedded: title and body, or the body alone where the title is the query."""
    other: str = field(default="", repr=False)
    """The other of the two, where it has a title."""

    @property
    def keys(self) -> set[str]:
        """Its `key` with title and without."""
        return {key(text) for text in (self.text, self.other) if text}


@dataclass(frozen=True, slots=True)
class Example:
    """A query, one document that answers it, and some that do not."""

    source: str
    """Where it comes from."""
    id: str
    """The query's id within its source."""
    query: str
    """Its text."""
    positive: Passage
    """The document to find."""
    negatives: tuple[Passage, ...] = ()
    """Mined documents that look right and are not, hardest first."""
    relevant: frozenset[str] = frozenset()
    """Ids of all documents that are relevant to the query."""
    thought: str | None = None
    """A reasoning to learn from."""


@dataclass(slots=True)
class Dropped:
    """What was left out of the training data, and why."""

    counts: Counter[str] = field(default_factory=Counter)
    """Examples by reason."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    """The first ids of each reason."""

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        if len(found := self.samples.setdefault(reason, [])) < 5:
            found.append(name)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What test sets hold; the name of the set by `key`."""

    queries: dict[str, str]
    """Of its queries."""
    documents: dict[str, str]
    """Of its relevant documents, with title and without."""


def load_examples(sources: Sequence[Source], held_out: HeldOut, root: Path) -> tuple[list[list[Example]], Dropped]:
    """Examples of each source, cleaned, in the order of the sources.

    Dropped are second copies of a query with the same positive, and whatever overlaps with a held-out set: a query
    equal to a test query, or a positive or a negative equal to a document that a test query should find (after removing
    case, punctuation and spaces). Where a source asks the same text again, the answers of each are right for both.
    Raises DataError for a source that cannot be used.
    """
    queries, documents = held_out.queries, held_out.documents
    dropped, result = Dropped(), []
    for source in sources:
        kept: list[Example] = []
        before = dropped.counts.copy()
        seen: set[tuple[str, str]] = set()
        tests: dict[str, str | None] = {}  # by passage: which test set has it
        folder = (root / source.path).is_dir()  # read to its end in any case, for all answers
        answers: dict[str, frozenset[str]] = {}  # by the text, not by `key`: `ls -l` is not `ls -L`
        for example in _read(source, root, dropped):
            name = f"{example.source}:{example.id}"
            answers[example.query] = answers.get(example.query, frozenset()) | example.relevant
            if len(kept) == source.limit:
                continue
            if source.only_thoughts and not example.thought:
                dropped.add("query without a reasoning", name)
                continue
            for passage in (example.positive, *example.negatives):
                if passage.id not in tests:
                    tests[passage.id] = next((documents[k] for k in sorted(passage.keys) if k in documents), None)
            pair = key(example.query), key(example.positive.text)
            if pair in seen:
                dropped.add("duplicate", name)
            elif pair[0] in queries:
                dropped.add(f"query is in {queries[pair[0]]}", name)
            elif (test := tests[example.positive.id]) is not None:
                dropped.add(f"positive is in {test}", name)
            else:
                seen.add(pair)
                for passage in example.negatives:
                    if (test := tests[passage.id]) is not None:
                        dropped.add(f"negative is in {test}", f"{name}:{passage.id}")
                hard = tuple(passage for passage in example.negatives if tests[passage.id] is None)
                kept.append(replace(example, negatives=hard))
                if len(kept) == source.limit and not folder:
                    break
        if not kept:
            why = ", ".join(f"{reason}: {count}" for reason, count in (dropped.counts - before).items())
            raise DataError(f"{root / source.path}: no usable training example ({why or 'it holds none'})")
        result.append([_with_answers(example, answers[example.query], dropped) for example in kept])
    return result, dropped


def _with_answers(example: Example, relevant: frozenset[str], dropped: Dropped) -> Example:
    for passage in example.negatives:
        if passage.id in relevant:
            dropped.add("negative answers the same query elsewhere", f"{example.source}:{example.id}:{passage.id}")
    wrong = tuple(passage for passage in example.negatives if passage.id not in relevant)
    return replace(example, negatives=wrong, relevant=relevant)


def fingerprint(examples: Iterable[Iterable[Example]]) -> str:
    """A hash over all examples: a resumed run must see the same."""
    digest = hashlib.sha256()
    for source in examples:
        for example in source:
            digest.update(repr(replace(example, relevant=frozenset())).encode())
            digest.update(repr(sorted(example.relevant)).encode())
    return digest.hexdigest()


def plan(sources: Sequence[Sequence[Example]], recipe: Recipe) -> list[Example]:
    """The examples of every step in order, `batch.queries` a step, each step from one source.

    Sources are drawn by weight; a source is passed through in a new random order each time.
    """
    random = np.random.default_rng(recipe.seed)
    weights = np.array([source.weight for source in recipe.sources])
    turns = random.choice(len(sources), size=recipe.steps, p=weights / weights.sum())
    streams = [_endless(source, np.random.default_rng([recipe.seed, n])) for n, source in enumerate(sources)]
    return [next(streams[turn]) for turn in turns for _ in range(recipe.batch.queries)]


def _endless(source: Sequence[Example], random: np.random.Generator) -> Iterator[Example]:
    while True:
        for number in random.permutation(len(source)):
            yield source[number]


def key(text: str) -> str:
    """What is left of a text without case, punctuation and spaces, hashed: equal for texts that are the same."""
    return hashlib.sha256(re.sub(r"[\W_]+", "", text.casefold()).encode()).hexdigest()


def read_held_out(paths: Sequence[str], root: Path) -> HeldOut:
    """What the test splits of these BEIR folders hold."""
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    for path in paths:
        collection = load_collection(root / path)
        queries |= {key(query.text): collection.name for query in collection.queries}
        relevant = {name for judged in collection.judgements.values() for name, score in judged.items() if score > 0}
        for document in collection.documents:
            if document.id in relevant:
                documents |= dict.fromkeys(as_passage(document).keys, collection.name)
    for found in (queries, documents):  # texts without a letter or a digit are not the same
        found.pop(key(""), None)
    return HeldOut(queries, documents)


def _read(source: Source, root: Path, dropped: Dropped) -> Iterator[Example]:
    if (source.negatives or source.titles) and (source.path.startswith("hf://") or not (root / source.path).is_dir()):
        raise DataError(f"{source.path}: negatives and titles are for folders in BEIR layout; records hold their own")
    if source.titles:
        examples = _from_titles(source, root, dropped)
    elif source.path.startswith("hf://"):
        examples = _from_records(source.path, source.path)
    elif (root / source.path).is_dir():
        examples = _from_beir(source, root, dropped)
    else:
        examples = _from_records(source.path, str(root / source.path))
    if not source.thoughts:
        yield from examples
        return
    path = _made(root, source.thoughts, source, "bootstrap")
    thoughts, met = _thoughts(path), False
    for example in examples:
        met |= example.id in thoughts
        yield replace(example, thought=thoughts.get(example.id) or example.thought)
    if thoughts and not met:
        raise DataError(f"{path}: no query of {root / source.path} has a reasoning there; make it of this source")


def _made(root: Path, name: str, source: Source, command: str) -> Path:
    path = root / name
    if not path.exists():
        raise DataError(f"{path}: no such file; make it with: search-r3 {command} {root / source.path} -o {path} ...")
    return path


def _from_beir(source: Source, root: Path, dropped: Dropped) -> Iterator[Example]:
    folder = root / source.path
    path = folder / "qrels" / f"{source.split}.tsv"
    queries, judgements = read_queries(folder / "queries.jsonl"), read_judgements(path)
    documents = {document.id: document for document in _documents(folder, dropped)}
    mined = read_negatives(_made(root, source.negatives, source, "mine")) if source.negatives else {}
    if source.negatives and not mined.keys() & judgements.keys():
        raise DataError(f"{root / str(source.negatives)}: none of its queries is judged in {path}; mine again")
    for name, judged in judgements.items():
        if name not in queries:
            raise DataError(f"{path}: judges query {name!r}, which is not in {folder / 'queries.jsonl'}")
        relevant = frozenset(document for document, score in judged.items() if score > 0)
        if not relevant:
            dropped.add("query without a positive", f"{source.path}:{name}")
        negatives = []
        for document in mined.get(name, ()):
            if document in relevant:
                raise DataError(
                    f"{root / str(source.negatives)}: document {document!r} is a negative of query {name!r}, but "
                    f"{path} says it is relevant; mine again"
                )
            if document not in documents:
                raise DataError(f"{root / str(source.negatives)}: document {document!r} is not in {folder}; mine again")
            negatives.append(as_passage(documents[document]))
        for document in sorted(relevant):
            if document not in documents:
                dropped.add("positive missing from the corpus", f"{source.path}:{name}")
                continue
            yield Example(
                source.path, name, queries[name].text, as_passage(documents[document]), tuple(negatives), relevant
            )


def _documents(folder: Path, dropped: Dropped) -> Iterator[Document]:
    def skip(error: DataError) -> None:
        if not isinstance(error, EmptyTextError):
            raise error
        dropped.add("empty document", str(error))

    return read_documents(folder, on_bad=skip)


def _from_titles(source: Source, root: Path, dropped: Dropped) -> Iterator[Example]:
    bodies: dict[str, list[Passage]] = {}
    for document in _documents(root / source.path, dropped):
        if document.title and document.title != document.text:
            bodies.setdefault(document.title, []).append(Passage(document.id, document.text, document.content))
    for title, passages in bodies.items():
        relevant = frozenset(passage.id for passage in passages)
        for passage in passages:
            yield Example(source.path, passage.id, title, passage, relevant=relevant)


def as_passage(document: Document) -> Passage:
    """A document as a training example holds it."""
    return Passage(document.id, document.content, document.text if document.title else "")


def _from_records(name: str, path: str) -> Iterator[Example]:
    """Records with a query, its positives and perhaps negatives, under the names that the field uses."""
    for number, (where, record) in enumerate(read_records(path)):
        query = _texts(where, record, ("query", "anchor", "question"))
        positives = _texts(where, record, ("positives", "positive", "pos", "answer"))
        negatives = _texts(where, record, ("negatives", "negative", "neg"), required=False)
        right, wrong = ([_named(text) for text in texts] for texts in (positives, negatives))
        relevant = frozenset(passage.id for passage in right)
        if both := [passage.text for passage in wrong if passage.id in relevant]:
            raise DataError(f"{where}: {both[0][:60]!r} is both a positive and a negative")
        thought = record.get("thought")
        if not isinstance(thought, str | None):
            raise DataError(f"{where}: field 'thought' must be a text")
        for passage in right:
            yield Example(name, str(number), query[0], passage, tuple(wrong), relevant, thought)


def _named(text: str) -> Passage:
    """A text without an id, under one that only the same text has: `a == b` is not `a != b`, as it is to `key`."""
    return Passage(hashlib.sha256(text.strip().encode()).hexdigest(), text)


def _texts(where: str, record: Any, names: tuple[str, ...], required: bool = True) -> list[str]:
    for name in names:
        if (value := record.get(name)) is not None:
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) and text.strip() for text in texts) or (required and not texts):
                raise DataError(f"{where}: field {name!r} must be a text or a list of texts, none of them empty")
            return texts
    if required:
        raise DataError(f"{where}: no field {names[0]!r} (also accepted: {', '.join(names[1:])})")
    return []


def read_negatives(path: Path) -> dict[str, list[str]]:
    """Mined negatives: document ids by query id, hardest first."""
    found: dict[str, list[str]] = {}
    for where, record in read_records(path):
        if not isinstance(record.get("query_id"), str) or not isinstance(record.get("negatives"), list):
            raise DataError(f"{where}: needs 'query_id' and 'negatives', a list of document ids")
        found[record["query_id"]] = [str(name) for name in record["negatives"]]
    return found


def _thoughts(path: Path) -> dict[str, str | None]:
    """Reasonings by query id; None or "" for a query that none was kept of."""
    found: dict[str, str | None] = {}
    for where, record in read_records(path):
        thought = record.get("thought", 0)
        if not isinstance(record.get("query_id"), str) or not (thought is None or isinstance(thought, str)):
            raise DataError(f"{where}: needs 'query_id' and 'thought', a text or null")
        found[record["query_id"]] = thought
    return found


def dump(record: Any) -> str:
    """One JSONL line."""
    return json.dumps(record, ensure_ascii=False) + "\n"
