"""What a recipe's training data has in common with test sets: the decontamination report.

Exact overlaps are found as `data.load_examples` finds them (without case, punctuation and spaces); near ones as runs of
13 words, the length by which GPT-3's data was cleaned (arXiv 2005.14165), and as queries of the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from search_r3.evaluate.collection import load_all
from search_r3.train.data import Example, Passage, as_passage, key

RUN = 13  # words


@dataclass(slots=True)
class Overlap:
    """One test set against all training examples; lists hold the test set's ids."""

    queries: int
    """Its queries."""
    judged: int
    """Documents that one of them should find."""
    same_query: list[str] = field(default_factory=list)
    """Queries that are a training query."""
    same_words: list[str] = field(default_factory=list)
    """Other queries that have the words of a training query, in any order."""
    positive: list[str] = field(default_factory=list)
    """Judged documents that are a training query's positive."""
    negative: list[str] = field(default_factory=list)
    """Judged documents that are a training query's negative."""
    shared_run: list[str] = field(default_factory=list)
    """Other judged documents that share a run of 13 words with a positive or a negative."""


def overlaps(sources: Sequence[Sequence[Example]], folders: Sequence[Path], split: str = "test") -> dict[str, Overlap]:
    """By test set; see `Overlap`. Raises DataError for a folder that is not a data set."""
    asked: set[str] = set()
    words: set[frozenset[str]] = set()
    positives: set[Passage] = set()
    negatives: set[Passage] = set()
    for source in sources:
        for example in source:
            asked.add(key(example.query))
            words.add(_bag(example.query))
            positives.add(example.positive)
            negatives.update(example.negatives)
    by_role = {"positive": positives, "negative": negatives}
    known = {role: {k for passage in found for k in passage.keys} for role, found in by_role.items()}
    collections = {collection.name: collection for collection in load_all(folders, split)}
    result: dict[str, Overlap] = {}
    runs: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for name, collection in collections.items():
        relevant = {d for judged in collection.judgements.values() for d, score in judged.items() if score > 0}
        documents = {d.id: d for d in collection.documents if d.id in relevant}
        report = result[name] = Overlap(len(collection.queries), len(documents))
        for query in collection.queries:
            if key(query.text) in asked:
                report.same_query.append(query.id)
            elif _bag(query.text) in words:
                report.same_words.append(query.id)
        for document in documents.values():
            keys = as_passage(document).keys
            exact = [role for role in known if known[role].intersection(keys)]
            for role in exact:
                getattr(report, role).append(document.id)
            if not exact:
                for run in _runs(document.content):
                    runs.setdefault(run, set()).add((name, document.id))
    texts = {max(passage.text, passage.other, key=len) for passage in positives | negatives}
    shared = {owner for text in texts for run in _runs(text) for owner in runs.get(run, ())}
    for name, found in sorted(shared):
        result[name].shared_run.append(found)
    return result


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _bag(text: str) -> frozenset[str]:
    return frozenset(_words(text))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    return zip(*(words[n:] for n in range(RUN)), strict=False)


def markdown(report: dict[str, Overlap], command: str, dropped: dict[str, int]) -> str:
    """The report as a page."""
    columns = ["same_query", "same_words", "positive", "negative", "shared_run"]
    lines = ["# Overlap of training and test data", "", "Made by:", "", f"    {command}", ""]
    lines += ["| test set | queries | judged documents | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines += ["|---" * (len(columns) + 3) + "|"]
    for name, found in report.items():
        cells = [name, str(found.queries), str(found.judged), *(str(len(getattr(found, column))) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "*same query*: test queries that are a training query; *same words*: others made of the words of one;",
        "*positive*, *negative*: judged documents that training queries are taught to find, or not to find;",
        f"*shared run*: others that have {RUN} words in a row in common with a training document.",
        "",
        "Left out of the training data beforehand, by reason:",
        "",
        *([f"- {reason}: {number:,}" for reason, number in sorted(dropped.items())] or ["- nothing"]),
    ]
    return "\n".join(lines) + "\n"
