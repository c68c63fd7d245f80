"""Run one model in several modes over test collections and score every query."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from search_r3.evaluate.baselines import Search, bm25, minilm, minilm_hybrid
from search_r3.evaluate.collection import Collection, load_all
from search_r3.evaluate.controls import CONTROLS, FIXED_TEXT, control_thoughts
from search_r3.evaluate.gate import best, curve, signals
from search_r3.evaluate.metrics import METRICS, paired_p_value, score_queries
from search_r3.extras import need
from search_r3.files import cache_home, write_text
from search_r3.model.reasoning import control_ids, mean_vectors
from search_r3.model.search_r3 import SearchR3
from search_r3.passages import Splitting
from search_r3.records import Document, Reasoned, Status
from search_r3.retriever import Retriever, fuse_vectors

Mode = Literal[
    "direct",
    "reason",
    "fused",
    "hybrid",
    "reason-hybrid",
    "fused-hybrid",
    "control-repeat",
    "control-fixed",
    "control-other",
    "control-fused",
    "bm25",
    "minilm",
    "minilm-hybrid",
]
MODES: tuple[Mode, ...] = get_args(Mode)
BASELINES: dict[Mode, Callable[[Sequence[Document]], Search]] = {
    "bm25": bm25,
    "minilm": minilm,
    "minilm-hybrid": minilm_hybrid,
}
DEPTH = 101  # documents retrieved for each query: one more than the metrics look at, as one may be the query itself
PAIRS: list[tuple[Mode, Mode]] = [  # tested against each other, besides all against direct
    *(("reason", control) for control in CONTROLS),
    ("fused", "control-fused"),
    ("reason-hybrid", "hybrid"),
    ("fused-hybrid", "hybrid"),
    ("hybrid", "bm25"),
    ("hybrid", "minilm-hybrid"),
]
ENCODING = 2
"""Raised by a change after which the same texts, model and settings give other results: what is cached is left."""


@dataclass(slots=True)
class ModeResult:
    """One mode on one collection."""

    scores: dict[str, dict[str, float]]
    """Metric -> query id -> value."""
    seconds: float
    """Wall time of all queries: reasoning, encoding and search."""
    tokens: int = 0
    """Tokens that the model read or wrote for all queries, shared prompt prefix excluded."""
    top: dict[str, list[str]] = field(default_factory=dict)
    """The ten best document ids of each query."""


@dataclass(slots=True)
class CollectionResult:
    """All modes on one collection."""

    name: str
    """The collection's name."""
    documents: int
    """Size of the corpus."""
    encoded: int
    """Documents encoded in this run; 0 when all vectors were cached."""
    skipped: list[str]
    """What was wrong with each document left out."""
    queries: dict[str, str]
    """Query id -> text."""
    modes: dict[Mode, ModeResult]
    """Results in the order asked."""
    reasoned: dict[str, list[Reasoned]]
    """Query id -> its reasonings, where a mode needed them."""
    signals: dict[str, dict[str, float]] = field(default_factory=dict)
    """Query id -> what a gate can go by (`gate.signals`), where direct search was asked for."""


def need_extras(modes: Sequence[str]) -> None:
    """Raises MissingExtraError for what these modes need and is not installed."""
    need("eval", "measuring")
    for mode in modes:
        if mode.startswith("minilm"):
            need("baselines", f"mode {mode}")


def evaluate(
    model: SearchR3 | None,
    folders: Sequence[str | Path],
    modes: Sequence[Mode] = ("direct", "reason", *CONTROLS, "bm25", "minilm"),
    *,
    split: str = "test",
    limit: int | None = None,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    fuse: float = 0.5,
    samples: int = 1,
    precision: str = "auto",
    ignore_identical_ids: bool = False,
    index_folder: Path | None = None,
    progress: bool | None = None,
    on_result: Callable[[CollectionResult], None] | None = None,
    on_done: Callable[[list[CollectionResult]], None] | None = None,
) -> list[CollectionResult]:
    """Score each mode on each BEIR folder.

    model: None if only baselines are asked for. limit: first queries only. max_tokens, max_new_tokens: lengths of
    documents and of reasonings; default: the checkpoint's. fuse: weight of the reasoned vector in mode `fused`.
    samples: reasonings of each query, whose vectors' mean is searched with; the controls have as many.
    precision: the model's arithmetic, as given to `from_pretrained`; cached vectors of another are not used.
    ignore_identical_ids: a document with the query's own id is not counted as found, as BEIR's ArguAna needs it.
    index_folder: an index of the (one) collection to use instead of the cached one. on_result: called after each
    collection. on_done: called with all results, before what was kept of them is removed: where it fails, the same
    evaluation measures nothing again. Interrupted, the same evaluation goes on with the collection it had reached.
    Raises DataError for a broken collection, before anything is encoded.
    """
    need_extras(modes)
    collections = load_all(folders, split, limit)
    if model:  # what is cached is known by the length itself: the checkpoint's may change
        max_tokens = max_tokens or model.manifest.max_tokens.document
    results, kept = [], []
    given = max_tokens, max_new_tokens, fuse, samples, ignore_identical_ids
    for collection, folder in zip(collections, folders, strict=True):
        cached = index_folder or _cached(collection, Path(folder), model, max_tokens, precision)
        used = model and (model.manifest, model.dimension, str(model.engine.device))
        settings = cached, used, modes, precision, *given, version("search-r3")
        content = collection.queries, collection.judgements, collection.skipped, *collection.documents
        digest = hashlib.sha256(repr(settings).encode())
        for part in content:
            digest.update(repr(part).encode())
        kept.append(cache_home() / "eval" / f"{collection.name}-{digest.hexdigest()[:16]}.json")
        result = _load(kept[-1]) if kept[-1].exists() else None
        if result is None:
            result = _evaluate_one(model, collection, cached, modes, *given, progress)
            kept[-1].parent.mkdir(parents=True, exist_ok=True)
            write_text(kept[-1], json.dumps(asdict(result), default=lambda vector: []))
        results.append(result)
        if on_result:
            on_result(result)
    if on_done:
        on_done(results)
    for path in kept:  # an evaluation that was not interrupted is done anew when it is asked for again
        path.unlink(missing_ok=True)
    return results


def _load(path: Path) -> CollectionResult | None:
    """What an interrupted evaluation kept of a collection, the reasonings without their vectors; None if damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["modes"] = {mode: ModeResult(**values) for mode, values in kept["modes"].items()}
        for several in kept["reasoned"].values():
            several[:] = [Reasoned(**one | {"vector": np.empty(0), "status": Status(one["status"])}) for one in several]
        return CollectionResult(**kept)
    except (ValueError, TypeError, KeyError):
        return None


def _evaluate_one(
    model: SearchR3 | None,
    collection: Collection,
    index_folder: Path,
    modes: Sequence[Mode],
    max_tokens: int | None,
    max_new_tokens: int | None,
    fuse: float,
    samples: int,
    ignore_identical_ids: bool,
    progress: bool | None,
) -> CollectionResult:
    texts = [query.text for query in collection.queries]
    queries = {query.id: query.text for query in collection.queries}
    result = CollectionResult(collection.name, len(collection.documents), 0, collection.skipped, queries, {}, {})

    def record(mode: Mode, ids: list[list[tuple[str, float]]], started: float, tokens: int = 0) -> None:
        seconds = time.perf_counter() - started
        run = {query.id: dict(found) for query, found in zip(collection.queries, ids, strict=True)}
        top = {name: list(found)[:10] for name, found in run.items()}
        result.modes[mode] = ModeResult(score_queries(collection.judgements, run), seconds, tokens, top)

    if set(modes) - set(BASELINES):
        assert model is not None, "a model is needed for every mode but the baselines"
        opened = Retriever.open_or_create(index_folder, model, splitting=Splitting(0, 0), max_tokens=max_tokens)
        with opened as retriever:
            result.encoded = _fill(retriever, collection, progress)
            settings = modes, max_new_tokens, fuse, samples, ignore_identical_ids
            _run_model(model, retriever, texts, *settings, record, result, progress)
    for mode, baseline in BASELINES.items():
        if mode in modes:
            find = baseline(collection.documents)
            started = time.perf_counter()
            scores, rows = find(texts, DEPTH)
            names = [document.id for document in collection.documents]
            found = [
                [(names[row], float(score)) for row, score in zip(*of_query, strict=True) if row >= 0]
                for of_query in zip(rows, scores, strict=True)
            ]
            if ignore_identical_ids:
                found = [[hit for hit in hits if hit[0] != name] for name, hits in zip(queries, found, strict=True)]
            record(mode, found, started)
    result.modes = {mode: result.modes[mode] for mode in modes}
    return result


def _cached(
    collection: Collection, folder: Path, model: SearchR3 | None, max_tokens: int | None, precision: str
) -> Path:
    """Where the index of this collection under this model is kept: a second run encodes only what has changed."""
    key = [ENCODING, str(folder.resolve()), max_tokens, precision]
    if model:
        key += [model.fingerprint, model.dimension, model.engine.model.dtype]  # `auto` is not the same everywhere
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()[:16]
    return cache_home() / "eval" / f"{collection.name}-{digest}"


def _fill(retriever: Retriever, collection: Collection, progress: bool | None) -> int:
    added = retriever.add(collection.documents, progress=progress)
    gone = set(retriever.store.ids()) - {document.id for document in collection.documents}
    if gone:
        retriever.delete(sorted(gone))
    return added.added + added.updated


def _run_model(
    model: SearchR3,
    retriever: Retriever,
    texts: list[str],
    modes: Sequence[Mode],
    max_new_tokens: int | None,
    fuse: float,
    samples: int,
    ignore_identical_ids: bool,
    record: Callable[..., None],
    result: CollectionResult,
    progress: bool | None,
) -> None:
    engine = model.engine
    if any(mode.endswith("hybrid") for mode in modes):
        retriever.lexical()  # built before any clock runs
    started = time.perf_counter()
    direct = model.encode_queries(texts)
    direct_seconds = time.perf_counter() - started
    direct_tokens = sum(map(len, engine.tails(texts, "embed", model.manifest.max_tokens.query))) + len(texts)

    def search(mode: Mode, vectors: np.ndarray, spent: float, tokens: int, words: list[str] | None = None) -> None:
        if mode not in modes:
            return
        started = time.perf_counter() - spent
        hits = retriever.search_vectors(vectors, DEPTH, words)
        if ignore_identical_ids:
            hits = [[hit for hit in found if hit.id != name] for name, found in zip(result.queries, hits, strict=True)]
        if mode == "direct":
            told = (signals(text, found) for text, found in zip(texts, hits, strict=True))
            result.signals = dict(zip(result.queries, told, strict=True))
        record(mode, [[(hit.id, hit.score) for hit in found] for found in hits], started, tokens)

    search("direct", direct, direct_seconds, direct_tokens)
    search("hybrid", direct, direct_seconds, direct_tokens, texts)
    if set(modes) <= {"direct", "hybrid", *BASELINES}:
        return
    started = time.perf_counter()
    reasoned = model.reason(texts, max_new_tokens=max_new_tokens, samples=samples, progress=progress)
    vectors = mean_vectors(np.stack([r.vector for r in reasoned]), samples)
    seconds = time.perf_counter() - started
    result.reasoned = {
        name: reasoned[place * samples : (place + 1) * samples] for place, name in enumerate(result.queries)
    }
    control = control_ids(engine)
    thoughts = [[token for token in r.token_ids if token not in control] for r in reasoned]
    prompt_tokens = sum(map(len, engine.tails(texts, "reason", model.manifest.max_tokens.query)))
    tokens = prompt_tokens + sum(len(thought) + 1 for thought in thoughts)  # each ends in the embedding token
    search("reason", vectors, seconds, tokens)
    search("reason-hybrid", vectors, seconds, tokens, texts)
    both = fuse_vectors(direct, vectors, fuse), seconds + direct_seconds, tokens + direct_tokens
    search("fused", *both)
    search("fused-hybrid", *both, texts)
    for mode in CONTROLS:
        fused = mode == "control-fixed" and "control-fused" in modes
        if not fused and mode not in modes:
            continue
        fixed = engine.plain_ids([FIXED_TEXT])[0]
        stand_ins = control_thoughts(mode, engine.plain_ids(texts), thoughts, fixed, samples)
        started = time.perf_counter()
        asked = [text for text in texts for _ in range(samples)]
        vectors = mean_vectors(model.encode_reasoned(asked, stand_ins), samples)
        seconds = time.perf_counter() - started
        tokens = samples * prompt_tokens + sum(len(text) + 1 for text in stand_ins)
        search(mode, vectors, seconds, tokens)
        if fused:
            both = fuse_vectors(direct, vectors, fuse), seconds + direct_seconds, tokens + direct_tokens
            search("control-fused", *both)


def summarise(results: Sequence[CollectionResult], model: SearchR3 | None, **settings: Any) -> dict[str, Any]:
    """Everything a report needs, as JSON values: means per collection and mode, averages, p-values, how it was made."""
    modes = list(results[0].modes)
    report: dict[str, Any] = {
        "versions": {name: version(name) for name in ("search-r3", "torch", "transformers")},
        "settings": settings,
        "model": None,
        "collections": {},
        "average": {m: {name: _mean([r.modes[m].scores[name] for r in results]) for name in METRICS} for m in modes},
        "difference_per_query": {},
        "p_versus_direct": {},
        "pairs": [],
    }
    if model is not None:
        report["model"] = {
            "checkpoint": model.source,
            "fingerprint": model.fingerprint,
            "parent": model.manifest.parent.model_dump() if model.manifest.parent else None,
            "prompts": model.manifest.prompts.model_dump(),
            "max_tokens": model.manifest.max_tokens.model_dump(),
            "dimension": model.dimension,
        }
    for result in results:
        count = len(result.queries)
        report["collections"][result.name] = {
            "documents": result.documents,
            "encoded": result.encoded,
            "skipped": result.skipped,
            "queries": count,
            "forced": _share([r.status is Status.FORCED for several in result.reasoned.values() for r in several]),
            "modes": {
                mode: {name: float(np.mean(list(values.values()))) for name, values in outcome.scores.items()}
                | {"ms_per_query": 1000 * outcome.seconds / count, "tokens_per_query": outcome.tokens / count}
                for mode, outcome in result.modes.items()
            },
        }
    pooled = {m: [v for r in results for v in r.modes[m].scores["nDCG@10"].values()] for m in modes}
    for mode in modes if "direct" in modes else []:
        if mode != "direct":
            report["difference_per_query"][mode] = _difference(pooled[mode], pooled["direct"])
            report["p_versus_direct"][mode] = paired_p_value(pooled[mode], pooled["direct"])
    for mode, other in PAIRS:
        if mode in pooled and other in pooled:
            difference, p = _difference(pooled[mode], pooled[other]), paired_p_value(pooled[mode], pooled[other])
            report["pairs"].append({"mode": mode, "against": other, "difference_per_query": difference, "p": p})
    report["summary"] = _summary(report, pooled)
    if "direct" in modes and "reason" in modes:
        report["gate"] = _gate(results)
        report["examples"] = _examples(results)
    return report


def _summary(report: dict[str, Any], pooled: dict[Mode, list[float]]) -> dict[str, float | str]:
    """The figures that decide whether reasoning pays; those whose modes were not asked for are left out."""
    average = {mode: values["nDCG@10"] for mode, values in report["average"].items()}
    summary = {f"average_{mode.replace('-', '_')}": value for mode, value in average.items()}
    if "direct" in average and "reason" in average:
        summary["reason_minus_direct"] = average["reason"] - average["direct"]
        summary["p_reason_vs_direct"] = report["p_versus_direct"]["reason"]
        if set(CONTROLS) <= set(average):  # the best of fewer is not what has to be beaten
            best_control = max(CONTROLS, key=lambda mode: average[mode])
            summary["best_control"] = best_control
            summary["reason_minus_best_control"] = average["reason"] - average[best_control]
            summary["p_reason_vs_best_control"] = paired_p_value(pooled["reason"], pooled[best_control])
    return summary


def _gate(results: Sequence[CollectionResult]) -> dict[str, Any]:
    """Quality against cost over all queries of all collections, by what the direct search tells."""
    told = [result.signals[name] for result in results for name in result.queries]
    columns: list[list[float]] = [[], [], [], []]
    for result in results:
        direct, reason = result.modes["direct"], result.modes["reason"]
        for name in result.queries:
            values = (
                direct.scores["nDCG@10"][name],
                reason.scores["nDCG@10"][name],
                direct.tokens / len(result.queries),
                reason.tokens / len(result.queries),
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    curves = {
        signal: curve(np.array([values[signal] for values in told]), *(np.array(column) for column in columns))
        for signal in told[0]
    }
    points = curves.pop("margin")
    others = {signal: [point["score"] for point in found] for signal, found in curves.items()}
    return {"signal": "margin", "points": points, "best": best(points), "others": others}


def _examples(results: Sequence[CollectionResult], count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The queries where reasoning helped most, and where it hurt most."""
    rows: list[tuple[float, dict[str, Any]]] = []
    for result in results:
        direct, reason = (result.modes[mode].scores["nDCG@10"] for mode in ("direct", "reason"))
        for name, text in result.queries.items():
            said = result.reasoned[name][0].text
            row = {"set": result.name, "query": text, "reasoning": said, "direct": direct[name], "reason": reason[name]}
            rows.append((reason[name] - direct[name], row))
    rows.sort(key=lambda pair: pair[0])
    return {
        "helped": [row for gain, row in rows[::-1][:count] if gain > 0],
        "hurt": [row for gain, row in rows[:count] if gain < 0],
    }


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return float(np.subtract(ours, theirs).mean())


def _mean(parts: Sequence[dict[str, float]]) -> float:
    """Mean over collections of the means over queries."""
    return float(np.mean([np.mean(list(part.values())) for part in parts]))


def _share(flags: Sequence[bool]) -> float | None:
    return float(np.mean(flags)) if flags else None
