"""Cold start of reasoning: the model's own enrichments, kept where they help (rejection sampling). (ours)

For each training query several enrichments are sampled; the one whose embedding ranks the query's document best is
kept, and stage 1 learns to write such. No teacher model is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import DataError
from search_r3.evaluate.collection import Collection, cut, load_collection
from search_r3.files import write_json, write_text
from search_r3.model.reasoning import control_ids
from search_r3.model.search_r3 import SearchR3
from search_r3.progress import Meter
from search_r3.records import Document, Reasoned
from search_r3.train.data import dump

ROWS = 64  # enrichments sampled, ranked and written at once


@dataclass(frozen=True, slots=True)
class RejectionSampling:
    """How enrichments are drawn."""

    samples: int = 4
    """Enrichments of each query."""
    temperature: float = 0.8
    """Of the sampling."""
    max_new_tokens: int = 48
    """Most tokens of one."""
    seed: int = 0
    """Same seed, same enrichments."""
    least_words: int = 1
    """Shorter enrichments are not kept."""
    only_better: bool = True
    """Leave out queries whose best enrichment ranks the document no better than no reasoning does."""


def bootstrap(
    model: SearchR3,
    folder: Path,
    output: Path,
    how: RejectionSampling,
    *,
    split: str = "train",
    limit: int | None = None,
    documents: int | None = None,
    writer: SearchR3 | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Append a record `{"query_id", "thought", "rank", "direct_rank", "ranks"}` a query to a JSONL file.

    limit: so many queries, drawn at random. documents: cut the corpus to so many, the relevant ones first. writer: the
    model that writes the enrichments; by default the one that embeds after them. Ranks are of the best relevant
    document within the corpus; `thought` is null where nothing is kept. A file that holds records is gone on with: what
    an interruption left is not done again. FILE.settings.json beside it tells how they were drawn, and others are
    refused (DataError). One sample that is kept in any case is not ranked, and has no ranks. Returns counts and mean
    ranks.
    """
    ranking, size = how.samples > 1 or how.only_better, max(1, ROWS // how.samples)
    collection = cut(_drawn(load_collection(folder, split), limit, how.seed), None, documents)
    rows = {document.id: row for row, document in enumerate(collection.documents)}
    relevant = {
        name: [rows[document] for document, score in judged.items() if score > 0 and document in rows]
        for name, judged in collection.judgements.items()
    }
    if ranking:  # a query without a relevant document has no rank
        collection = replace(collection, queries=[query for query in collection.queries if relevant[query.id]])
    done = _done(output)
    settings = asdict(how) | {"split": split, "documents": documents, "model": model.fingerprint}
    told = (writer or model).manifest
    dtypes = [str(one.engine.model.dtype) for one in (model, writer or model)]
    settings |= {"writer": told.weights_sha256, "prompts": told.prompts.model_dump(mode="json"), "dtype": dtypes}
    _check_settings(output, settings, bool(done))
    control = control_ids((writer or model).engine)
    names = {query.id for query in collection.queries}
    todo = names - done.keys()
    if ranking and todo:
        stored = model.encode_documents(collection.documents, progress=progress)
    with Meter("bootstrap", len(todo), "queries", progress) as meter, output.open("a", encoding="utf-8") as file:
        for start in range(0, len(collection.queries), size):
            # Of a block that an interruption cut short all is drawn again, for the draws go by the place within it.
            block = collection.queries[start : start + size]
            if not any(query.id in todo for query in block):
                continue
            texts = [query.text for query in block]
            reasoned = (writer or model).reason(
                texts,
                max_new_tokens=how.max_new_tokens,
                temperature=how.temperature,
                seed=how.seed + start,
                samples=how.samples,
                batch_rows=ROWS,
            )
            thoughts = [whole(sample, control) for sample in reasoned]
            long = [len(thought.split()) >= how.least_words for thought in thoughts]
            meter.advance(sum(query.id in todo for query in block), sum(len(sample.token_ids) for sample in reasoned))
            if ranking:
                direct = model.encode_queries(texts)
                repeated = [text for text in texts for _ in range(how.samples)]
                vectors = model.encode_reasoned(repeated, model.engine.plain_ids(thoughts))
            lines = []
            for number, query in enumerate(block):
                mine = slice(number * how.samples, (number + 1) * how.samples)
                best, kept, ranked = 0, long[mine][0], dict[str, Any]()
                if ranking:
                    before, *ranks = _ranks(np.vstack([direct[number], vectors[mine]]), stored, relevant[query.id])
                    best = min(range(how.samples), key=lambda n: (not long[mine][n], ranks[n]))
                    kept = long[mine][best] and (ranks[best] < before or not how.only_better)
                    ranked = {"rank": ranks[best], "direct_rank": before, "ranks": ranks}
                if query.id in todo:
                    thought = thoughts[mine][best] if kept else None
                    lines.append(dump({"query_id": query.id, "thought": thought} | ranked))
            file.write("".join(lines))
            file.flush()
    records = [record for name, record in _done(output).items() if name in names]
    return {
        "queries": len(records),
        "kept": sum(record["thought"] is not None for record in records),
    } | {
        f"mean_reciprocal_{field}": _mean_reciprocal(records, field)
        for field in ("rank", "direct_rank")
        if all(field in record for record in records)
    }


def _drawn(collection: Collection, limit: int | None, seed: int) -> Collection:
    """So many of the queries, in their order: the first of a set are often about one thing."""
    order = np.random.default_rng(seed).permutation(len(collection.queries))[:limit]
    return replace(collection, queries=[collection.queries[n] for n in sorted(order.tolist())])


def quote(
    folder: Path, output: Path, *, split: str = "train", limit: int | None = None, seed: int = 0, words: int = 32
) -> int:
    """Write a record `{"query_id", "thought"}` a query: its document's title and the sentence nearest to the query.

    To learn to write what an answer would say; no model is asked. limit: so many queries, drawn at random. words: most
    words of a quotation. Returns how many. Raises DataError where `output` exists.
    Source: Mao et al., 2021 (arXiv 2009.08553), who train a generator on answers, sentences and titles.
    """
    if output.exists():
        raise DataError(f"{output}: exists already; quotations are made in one go: remove it or name another file")
    collection = _drawn(load_collection(folder, split), limit, seed)
    documents = {document.id: document for document in collection.documents}
    lines = []
    for query in collection.queries:
        judged = collection.judgements[query.id]
        best = next((name for name, score in judged.items() if score > 0 and name in documents), None)
        if best:
            lines.append(dump({"query_id": query.id, "thought": _nearest(query.text, documents[best], words)}))
    write_text(output, "".join(lines))
    return len(lines)


def _nearest(query: str, document: Document, words: int) -> str:
    """The document's title and the sentence or line that shares most words with the query, the first of equals."""
    asked = set(re.findall(r"\w+", query.casefold()))
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", document.text) if part.strip()] or [document.text]
    best = max(sentences, key=lambda part: len(asked & set(re.findall(r"\w+", part.casefold()))))
    said = f"{document.title}: {best}" if document.title else best
    return " ".join(said.split()[:words])


def whole(sample: Reasoned, control: Container[int]) -> str:
    """A reasoning's text; one that ran out of tokens is cut back to its last whole sentence, where it has one.

    control: tokens that end one, such as the end of turn, which is all that an untrained model ends with.
    """
    text = sample.text.strip()
    if sample.token_ids[-1] not in control and (ends := list(re.finditer(r"[.!?](?=\s)|\n", text + " "))):
        return text[: ends[-1].end()].strip()
    return text


def _ranks(vectors: np.ndarray, documents: np.ndarray, relevant: list[int]) -> list[int]:
    """Rank of the best relevant row for each vector, 1 is best; equal scores count against it."""
    scores = vectors @ documents.T  # (S, N)
    best = scores[:, relevant].max(axis=1, keepdims=True)
    return [int(rank) for rank in np.maximum(1, (scores >= best).sum(axis=1))]


def _mean_reciprocal(records: list[dict[str, Any]], field: str) -> float:
    return float(sum(1 / record[field] for record in records)) / max(len(records), 1)


def _check_settings(output: Path, settings: dict[str, Any], begun: bool) -> None:
    """Note how a file's records are drawn, or raise DataError where those it holds were drawn otherwise.

    What an older version did not note is not held against a file.
    """
    path = output.with_name(f"{output.name}.settings.json")
    if not begun:
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if name in before and before[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{output}: {path.name} does not tell how it was made ({error}); remove both") from error
    if changed:
        raise DataError(f"{output}: was made with another {', '.join(changed)}; restore that, or remove the file")
    write_json(path, settings | before)


def _done(output: Path) -> dict[str, dict[str, Any]]:
    """Records of an earlier run; a last line without its end, cut short by a kill, is dropped from the file."""
    if not output.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    whole = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                found[record["query_id"]] = {"thought": record["thought"]} | record
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{output}:{number}: not a record of an earlier bootstrap; give a new file") from error
            whole += len(line)
    with output.open("r+b") as file:
        file.truncate(whole)
    return found
