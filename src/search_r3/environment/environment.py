"""The retrieval environment: rank a corpus with the vectors of rollouts, while the model that made the corpus moves.

One `step` samples a few documents to learn how the space moved and corrects the stored rows, lets the corrected rows
propose documents for the batch, encodes those proposals again with the current model, and ranks. Read-repair and drift
correction are ours; frozen indexes are those of Search-R1 (arXiv 2503.09516), in-batch ranking that of LREM
(arXiv 2510.14321).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from search_r3.environment.audit import Audit, Reward, summarise, weighted_rank, weighted_recall
from search_r3.environment.drift import Drift, fit_drift
from search_r3.environment.evolving import NEVER, EvolvingIndex
from search_r3.environment.freshness import POLICIES, by_priority, within_budget
from search_r3.environment.outcome import Outcome, Relevant, dcg
from search_r3.errors import DataError, StoreError
from search_r3.records import Document

STATE = 1  # version of `state_dict`


class Encoder(Protocol):
    """Anything that embeds documents with the current weights; `SearchR3` does."""

    def encode_documents(self, documents: Sequence[Document]) -> np.ndarray:
        """(n, D) unit rows."""


class EnvironmentConfig(BaseModel):
    """How the environment keeps its index fresh."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["frozen", "full", "in_batch", "random", "local", "read_repair", "read_repair+drift"] = (
        "read_repair+drift"
    )
    """What a step encodes again; see `freshness.POLICIES`."""
    budget: float = Field(default=0.05, gt=0)
    """Tokens that a step may encode again: a share of the corpus up to 1, a number of tokens above."""
    sample: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the budget for the uniform sample that shows the drift."""
    depth: int = Field(default=100, ge=1)
    """Documents that the index proposes for a query."""
    k: int = Field(default=10, ge=1)
    """Documents in an outcome's ranking."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    drift_rank: int = Field(default=64, ge=1)
    """Rank of the drift map."""
    seed: int = 0
    """Of the samples."""


class RetrievalEnvironment:
    """A corpus that ranks itself for rollouts.

    >>> environment = RetrievalEnvironment(documents, {"q1": {"d7": 1}}, encoder)  # doctest: +SKIP
    >>> environment.reset()  # doctest: +SKIP
    >>> outcomes = environment.step(["q1", "q1"], vectors)  # two rollouts of one query  # doctest: +SKIP
    >>> outcomes[0].relevant[0].rank  # doctest: +SKIP
    3

    documents: the corpus. qrels: relevance by query id and document id. encoder: the model under training.
    lengths: tokens of each document, which the budget counts; default: a quarter of its characters.
    folder: keep the vectors in a file there instead of in memory.
    Raises DataError for a judged document that is not in the corpus and for a corpus smaller than `config.k`.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        qrels: Mapping[str, Mapping[str, int]],
        encoder: Encoder,
        config: EnvironmentConfig | None = None,
        *,
        lengths: Sequence[int] | None = None,
        folder: Path | None = None,
    ):
        self.documents, self.encoder, self.config = list(documents), encoder, config or EnvironmentConfig()
        self.policy = POLICIES[self.config.policy]
        count = len(self.documents)
        if count < self.config.k:
            raise DataError(f"the corpus holds {count} documents, fewer than k={self.config.k}; lower k")
        rows = {document.id: row for row, document in enumerate(self.documents)}
        if len(rows) < count:
            raise DataError("two documents of the corpus have the same id; make them unique")
        self.relevant: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for query, judged in qrels.items():
            missing = [name for name, grade in judged.items() if grade > 0 and name not in rows]
            if missing:
                raise DataError(
                    f"query {query!r}: relevant document {missing[0]!r} is not in the corpus; add or unjudge it"
                )
            kept = [(rows[name], grade) for name, grade in judged.items() if grade > 0]
            if kept:
                numbers, grades = zip(*kept, strict=True)
                self.relevant[query] = np.array(numbers), np.array(grades)
        if lengths is None:
            lengths = [len(document.content) // 4 + 1 for document in self.documents]
        if len(lengths) != count:
            raise DataError(f"{len(lengths)} lengths for {count} documents")
        self.lengths = np.asarray(lengths, np.int64)
        share = self.config.budget
        self.budget = share * float(self.lengths.sum()) if share <= 1 else share
        self.folder = folder
        self.index: EvolvingIndex | None = None
        self.model_step = 0
        self.drift: Drift | None = None
        self.tokens_encoded = 0
        self._last: tuple[list[str], np.ndarray, list[Outcome]] | None = None
        self._lock = threading.RLock()
        self._worker: ThreadPoolExecutor | None = None
        self._rng = np.random.default_rng(self.config.seed)

    def reset(self, model_step: int = 0) -> None:
        """Encode the whole corpus with the current model."""
        vectors = self._encode(np.arange(len(self.documents)))
        with self._lock:
            self.index = EvolvingIndex(len(self.documents), vectors.shape[1], self.config.dtype, self.folder)
            self.index.write(np.arange(len(self.documents)), vectors, model_step)
            self.model_step, self.drift, self.tokens_encoded, self._last = model_step, None, 0, None
            self._rng = np.random.default_rng(self.config.seed)

    @property
    def ages(self) -> np.ndarray:
        """(N,) int64: model steps since each row was encoded."""
        index = self._ready()
        found: np.ndarray = np.where(index.encoded == NEVER, self.model_step + 1, self.model_step - index.encoded)
        return found

    def step(self, query_ids: Sequence[str], vectors: np.ndarray, model_step: int | None = None) -> list[Outcome]:
        """Freshen the index for these rollouts and rank with them; one outcome a rollout, in order.

        query_ids: the query that each rollout answers; those of one query share their candidates.
        vectors: (B, D) unit rows. model_step: of the current weights; default: one more than at the last step.
        Raises DataError for an empty batch, a query without relevant documents, or vectors that do not fit.
        """
        with self._lock:
            index = self._ready()
            vectors = self._checked_batch(query_ids, vectors, index)
            now = self.model_step + 1 if model_step is None else model_step
            if now < self.model_step:
                raise DataError(f"model_step {now} lies before the last one, {self.model_step}")
            self.model_step = now
            if self.policy.sample:
                self._sample(index)
            wanted = self._wanted(index, query_ids, vectors)
            if wanted is not None:
                spent = self.config.sample if self.policy.sample else 0.0
                rows = by_priority(wanted, self.ages, self.lengths)
                limit = np.inf if self.policy.everything or self.policy.relevant_only else self.budget * (1 - spent)
                self._refresh(index, within_budget(rows, self.lengths, limit))
            outcomes = self._rank(index, query_ids, vectors)
            self._last = list(query_ids), vectors, outcomes
            return outcomes

    def audit(self, reward: Reward = dcg, *, sample: int = 256, depth: int = 100, queries: int = 8) -> Audit:
        """Estimate how far the rewards of the last step are from those of a fresh index. Stores nothing.

        reward: what is made of an outcome; None leaves the rollout out. sample: documents drawn uniformly from those
        outside the `depth` best of the audited queries. queries: how many of the last step's queries are audited.
        """
        with self._lock:
            index, config = self._ready(), self.config
            if self._last is None:
                raise DataError("nothing to audit yet; call step() first")
            query_ids, vectors, given = self._last
            groups = _groups(query_ids)
            names = [str(name) for name in self._rng.permutation(list(groups))[:queries]]
            members = [member for name in names for member in groups[name]]
            stored = index.scores(vectors[members])  # (B, N)
            wanted = np.zeros(len(index))
            for name in names:
                wanted[self.relevant[name][0]] = 1
            for row in stored:
                _add_best(wanted, row, max(depth, config.k))
            rest = np.flatnonzero(wanted == 0)
            drawn = self._rng.permutation(rest)[:sample]
            rows = np.sort(np.concatenate([np.flatnonzero(wanted), drawn]))
            near = wanted[rows] > 0
            weights = np.where(near, 1.0, len(rest) / max(len(drawn), 1))
            fresh = self._encode(rows)
            self.tokens_encoded -= int(self.lengths[rows].sum())  # counted apart: it refreshes nothing
            cosines = (index.read(rows) * fresh).sum(axis=1)
        scores = vectors[members] @ fresh.T  # (B, n)
        every = np.ones(len(rows), bool)
        rewards: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        recalls: dict[int, list[float]] = {10: [], 100: []}
        for member, was, now in zip(members, stored, scores, strict=True):
            outcome = given[member]
            true = self._outcome(outcome.query_id, now, rows, weights, every)
            pair = reward(outcome), reward(true)
            if pair[0] is not None and pair[1] is not None:
                rewards[outcome.query_id].append((pair[0], pair[1]))
            for k, found in recalls.items():
                if k <= min(len(was), max(depth, config.k)):
                    threshold = np.partition(was, -k)[-k]
                    found.append(weighted_recall(was[rows] >= threshold, now, weights, k))
        return summarise(self.model_step, rewards, recalls, cosines[near], cosines[~near], len(rest), self._rng)

    def refresh(self, encoder: Encoder | None = None) -> int:
        """Encode one budget of the oldest rows again; returns how many. encoder: a copy of the model elsewhere.

        The model step of the rows is that at the call. Encoding holds no lock, so `step` goes on meanwhile; a row
        that `step` has written newer in the meantime keeps the newer vector.
        """
        index = self._ready()
        with self._lock:
            now = self.model_step
            jitter = self._rng.random(len(index))
            rows = by_priority(np.ones(len(index)) + 1e-9 * jitter, self.ages, self.lengths)
            rows = within_budget(rows, self.lengths, self.budget)
        vectors = self._encode(rows, encoder)
        with self._lock:
            older = index.encoded[rows] < now
            index.write(rows[older], vectors[older], now)
        return int(older.sum())

    def refresh_in_background(self, encoder: Encoder | None = None) -> Future[int]:
        """`refresh` in a thread; the encoder must be one that nobody else is changing."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        return self._worker.submit(self.refresh, encoder)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: arrays and plain values."""
        with self._lock:
            index = self._ready()
            return {
                "version": STATE,
                "corpus": self._identity(),
                "vectors": np.array(index.vectors),
                "encoded": index.encoded.copy(),
                "model_step": self.model_step,
                "tokens_encoded": self.tokens_encoded,
                "budget": self.budget,
                "random": self._rng.bit_generator.state,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises StoreError for the state of another corpus, model width or version."""
        if state.get("version") != STATE:
            raise StoreError(f"environment state of version {state.get('version')}, this one reads {STATE}")
        if state["corpus"] != self._identity():
            raise StoreError(
                "this environment state belongs to another corpus; load it with the documents it was made of"
            )
        vectors = np.asarray(state["vectors"])
        width = self._encode(np.arange(1)).shape[1]
        if vectors.shape != (len(self.documents), width):
            raise StoreError(
                f"this environment state holds vectors {vectors.shape}, the model makes {width} components"
            )
        with self._lock:
            self.index = EvolvingIndex(*vectors.shape, self.config.dtype, self.folder)
            self.index.vectors[:] = vectors
            self.index.encoded[:] = state["encoded"]
            self.model_step, self.tokens_encoded = int(state["model_step"]), int(state["tokens_encoded"])
            self.budget, self.drift, self._last = float(state["budget"]), None, None
            self._rng.bit_generator.state = state["random"]

    def _ready(self) -> EvolvingIndex:
        if self.index is None:
            raise DataError("the environment has no vectors yet; call reset() or load_state_dict() first")
        return self.index

    def _identity(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.id, document.content):
                digest.update(part.encode("utf-8", "replace") + b"\0")
        return digest.hexdigest()

    def _checked_batch(self, query_ids: Sequence[str], vectors: np.ndarray, index: EvolvingIndex) -> np.ndarray:
        vectors = np.ascontiguousarray(vectors, np.float32)
        if not len(query_ids):
            raise DataError("an empty batch: give at least one rollout")
        if vectors.shape != (len(query_ids), index.vectors.shape[1]):
            raise DataError(
                f"{len(query_ids)} query ids and vectors {vectors.shape}: expected ({len(query_ids)}, "
                f"{index.vectors.shape[1]}), as wide as the corpus was encoded"
            )
        for number, query in enumerate(query_ids):
            if query not in self.relevant:
                raise DataError(f"rollout {number}: query {query!r} has no relevant document; leave it out of training")
            if not np.isfinite(vectors[number]).all():
                raise DataError(f"rollout {number} (query {query!r}): its vector is not finite")
        return vectors

    def _encode(self, rows: np.ndarray, encoder: Encoder | None = None) -> np.ndarray:
        vectors = np.asarray(
            (encoder or self.encoder).encode_documents([self.documents[row] for row in rows]), np.float32
        )
        width = vectors.shape[-1] if self.index is None else self.index.vectors.shape[1]
        if vectors.shape != (len(rows), width):
            raise DataError(f"the encoder returned {vectors.shape} for {len(rows)} documents, expected width {width}")
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():
            name = self.documents[rows[int(bad.argmax())]].id
            raise DataError(
                f"the encoder returned a vector that is not finite for document {name!r}; nothing was stored"
            )
        self.tokens_encoded += int(self.lengths[rows].sum())
        return vectors

    def _refresh(self, index: EvolvingIndex, rows: np.ndarray) -> None:
        if len(rows):
            index.write(rows, self._encode(rows), self.model_step)

    def _sample(self, index: EvolvingIndex) -> None:
        """Encode a uniform sample again; learn from it how the space moved, and move the other rows along."""
        share = self.config.sample if self.policy.proposed else 1.0
        rows = within_budget(self._rng.permutation(len(index)), self.lengths, share * self.budget)
        rows = rows[self.ages[rows] > 0]
        if not len(rows):
            return
        new = self._encode(rows)
        if self.policy.drift:
            self.drift = fit_drift(index.read(rows), new, self._rng, self.config.drift_rank)
            if self.drift is not None:
                stale = self.ages > 0
                for block in index.blocks():
                    moved = np.flatnonzero(stale[block]) + block.start
                    index.vectors[moved] = self.drift(index.vectors[moved])
        index.write(rows, new, self.model_step)

    def _wanted(self, index: EvolvingIndex, query_ids: Sequence[str], vectors: np.ndarray) -> np.ndarray | None:
        """(N,) traffic of each row that this batch wants fresh; None where the policy asks for none."""
        policy, wanted = self.policy, np.zeros(len(index))
        if policy.everything:
            return wanted + 1
        if not (policy.relevant_only or policy.local or policy.proposed):
            return None
        for query, members in _groups(query_ids).items():
            relevant = self.relevant[query][0]
            wanted[relevant] += 1e6  # always first: every reward of the query hangs on them
            if policy.local:
                _add_best(wanted, index.scores(index.read(relevant)).max(axis=0), self.config.depth)
            elif policy.proposed:
                _add_best(wanted, index.scores(vectors[members]).max(axis=0), self.config.depth)
        return wanted

    def _rank(self, index: EvolvingIndex, query_ids: Sequence[str], vectors: np.ndarray) -> list[Outcome]:
        fresh = self.ages == 0
        rows = np.arange(len(index))
        if self.policy.relevant_only:
            rows = np.unique(np.concatenate([self.relevant[query][0] for query in set(query_ids)]))
        outcomes: dict[int, Outcome] = {}
        for query, members in _groups(query_ids).items():
            scores = index.scores(vectors[members])[:, rows]  # (G, n)
            for member, row in zip(members, scores, strict=True):
                outcomes[member] = self._outcome(query, row, rows, np.ones(len(rows)), fresh[rows])
        return [outcomes[number] for number in range(len(query_ids))]

    def _outcome(
        self, query: str, scores: np.ndarray, rows: np.ndarray, weights: np.ndarray, fresh: np.ndarray
    ) -> Outcome:
        """The outcome of one rollout among some rows, each of which stands for `weights` documents.

        scores, weights, fresh: (n,). rows: (n,) ascending, every relevant one among them.
        """
        relevant, grades = self.relevant[query]
        places = np.searchsorted(rows, relevant)
        found = [
            Relevant(
                self.documents[rows[at]].id,
                int(grade),
                round(weighted_rank(scores, weights, at)),
                float(scores[at]),
                bool(fresh[at]),
            )
            for at, grade in zip(places, grades, strict=True)
        ]
        k = min(self.config.k, len(rows))
        top = np.argpartition(-scores, k - 1)[:k]
        top = top[np.lexsort((top, -scores[top]))]
        others = scores.copy()
        others[places] = -np.inf
        return Outcome(
            query,
            tuple(self.documents[row].id for row in rows[top]),
            scores[top],
            tuple(sorted(found, key=lambda r: r.rank)),
            float(others.max()),
            round(float(weights.sum())),
            float(fresh[top].mean()),
        )


def _groups(query_ids: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, query in enumerate(query_ids):
        groups.setdefault(query, []).append(number)
    return groups


def _add_best(wanted: np.ndarray, scores: np.ndarray, depth: int) -> None:
    """Add traffic to the `depth` best rows, more to better ones."""
    depth = min(depth, len(scores))
    top = np.argpartition(-scores, depth - 1)[:depth]
    top = top[np.argsort(-scores[top])]
    wanted[top] += 1 / np.log2(2 + np.arange(depth))
