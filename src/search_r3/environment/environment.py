"""The retrieval environment: rank a corpus with the vectors of rollouts, while the model that made the corpus moves.

One `step` samples a few documents to learn how the space moved and corrects the stored rows, lets the corrected rows
propose documents for the batch, encodes those proposals again with the current model, and ranks. Read-repair and drift
correction are ours; frozen indexes are those of Search-R1 (arXiv 2503.09516), in-batch ranking that of LREM
(arXiv 2510.14321).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.environment.audit import Audit, Controller, Reward, Subject, examine
from search_r3.environment.calibration import Calibration, fit_calibration
from search_r3.environment.config import EnvironmentConfig
from search_r3.environment.drift import Drift, fit_drift
from search_r3.environment.encoder import Encoder
from search_r3.environment.evolving import EvolvingIndex
from search_r3.environment.freshness import POLICIES, by_priority, within_budget
from search_r3.environment.graph import EvolvingGraph
from search_r3.environment.outcome import Outcome, dcg, groups_of, make_outcome
from search_r3.errors import DataError, StoreError
from search_r3.records import Document

STATE = 2  # version of `state_dict`
PROBES = 16  # documents by which a state's model is recognised


class RetrievalEnvironment:
    """A corpus that ranks itself for rollouts.

    Examples:
        >>> model = SearchR3.from_pretrained("default")  # any `Encoder`
        >>> documents = [Document(str(n), f"page number {n}") for n in range(20)]
        >>> environment = RetrievalEnvironment(documents, {"q1": {"7": 1}}, model)
        >>> environment.reset()
        >>> rollouts = model.encode_queries(["page number 7", "page 7"])  # two of one query
        >>> outcomes = environment.step(["q1", "q1"], rollouts)
        >>> [outcome.relevant[0].id for outcome in outcomes]
        ['7', '7']

    documents: the corpus. qrels: relevance by query id and document id. encoder: the model under training.
    lengths: tokens of each document, which the budget counts; default: a quarter of its characters.
    folder: keep the vectors in a file there instead of in memory.
    reward: what audits compare; None of an outcome leaves it out.
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
        reward: Reward = dcg,
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
        self.budget = self._first_budget = share * float(self.lengths.sum()) if share <= 1 else share
        self.folder, self.reward = folder, reward
        self.index: EvolvingIndex | None = None
        self.model_step = 0
        self.drift: Drift | None = None
        self.calibration: Calibration | None = None
        self.steps = 0
        self.last_audit: Audit | None = None
        self.bound_held = True
        self._controller: Controller | None = None
        if self.config.error_bound is not None:
            self._controller = Controller(self.config.error_bound, self.budget / 10, float(self.lengths.sum()))
        self.tokens_encoded = self.tokens_audited = 0
        # By refresh in another thread: the model step of its vectors, and how the space has moved since.
        self._under_way: dict[object, tuple[int, list[Drift]]] = {}
        self._last: tuple[list[str], np.ndarray, list[Outcome]] | None = None
        self._lock = threading.RLock()
        self._worker: ThreadPoolExecutor | None = None
        self._rng = np.random.default_rng(self.config.seed)
        self._refresh_rng = np.random.default_rng([self.config.seed, 1])  # whenever it is, steps draw the same

    def reset(self, model_step: int = 0) -> None:
        """Encode the whole corpus with the current model."""
        vectors = self.encode(np.arange(len(self.documents)))
        with self._lock:
            self.index = self._new_index(vectors.shape[1])
            self.index.write(np.arange(len(self.documents)), vectors, model_step)
            self.model_step, self.drift, self.calibration = model_step, None, None
            self.steps, self.tokens_encoded, self.tokens_audited, self._last, self.last_audit = 0, 0, 0, None, None
            self.budget, self.bound_held = self._first_budget, True
            self._rng = np.random.default_rng(self.config.seed)

    def _new_index(self, width: int) -> EvolvingIndex:
        kind = EvolvingGraph if self.config.index == "graph" else EvolvingIndex
        return kind(len(self.documents), width, self.config.dtype, self.folder)

    @property
    def ages(self) -> np.ndarray:
        """(N,) int64: model steps since each row was encoded."""
        index = self.ready()
        found: np.ndarray = self.model_step - index.encoded  # of what never was, -1, one more than can be
        return found

    def step(self, query_ids: Sequence[str], vectors: np.ndarray, model_step: int | None = None) -> list[Outcome]:
        """Freshen the index for these rollouts and rank with them; one outcome a rollout, in order.

        query_ids: the query that each rollout answers; those of one query share their candidates.
        vectors: (B, D) unit rows. model_step: of the current weights; default: one more than at the last step.
        Raises DataError for an empty batch, a query without relevant documents, or vectors that do not fit.
        """
        with self._lock:
            index = self.ready()
            vectors = self._checked_batch(query_ids, vectors, index)
            now = self.model_step + 1 if model_step is None else model_step
            if now < self.model_step:
                raise DataError(f"model_step {now} lies before the last one, {self.model_step}")
            advanced = now > self.model_step  # more rollouts of the same weights are no new step
            before = self.steps, self.model_step
            self.steps, self.model_step = self.steps + advanced, now
            try:
                return self._step(index, query_ids, vectors, advanced)
            except BaseException:
                self.steps, self.model_step = before  # the call again is the same step
                np.minimum(index.encoded, self.model_step, out=index.encoded)
                raise

    def _step(
        self, index: EvolvingIndex, query_ids: Sequence[str], vectors: np.ndarray, advanced: bool
    ) -> list[Outcome]:
        if self.policy.sample:
            self._sample(index, vectors)
        wanted = self._wanted(index, query_ids, vectors)
        if wanted is not None:
            spent = self.config.sample if self.policy.sample else 0.0
            rows = by_priority(wanted, self.ages, self.lengths)
            limit = np.inf if self.policy.everything or self.policy.relevant_only else self.budget * (1 - spent)
            self._refresh(index, within_budget(rows, self.lengths, limit))
        index.maintain(self._rng)
        outcomes = self._rank(index, query_ids, vectors)
        self._last = list(query_ids), vectors, outcomes
        if self.config.audit_every and advanced and self.steps % self.config.audit_every == 0:
            self.last_audit = self.audit()
            if self._controller is not None:
                self.budget, self.bound_held = self._controller.adjust(self.budget, self.last_audit.reward_error)
        return outcomes

    def report(self) -> dict[str, float]:
        """Figures for a training log: ages, tokens, and what the last audit found."""
        ages = self.ages
        found = {
            "age_mean": float(ages.mean()),
            "age_max": float(ages.max()),
            "tokens": float(self.tokens_encoded),
            "audit_tokens": float(self.tokens_audited),
            "budget": float(self.budget),
            "bound_held": float(self.bound_held),
        }
        if self.drift is not None:
            found |= {"drift_before": self.drift.before, "drift_after": self.drift.after}
        if self.last_audit is not None:
            found |= {
                "audit_step": float(self.last_audit.model_step),
                "audit_reward_error": self.last_audit.reward_error.mean,
                "audit_spearman": self.last_audit.spearman,
                "audit_recall_10": self.last_audit.recall_10,
                "audit_cosine": self.last_audit.cosine.mean,
            }
        return found

    def fresh_rows(self) -> np.ndarray:
        """Rows that were encoded with the current weights in this step."""
        found: np.ndarray = np.flatnonzero(self.ages == 0)
        return found

    def audit(self, reward: Reward | None = None, *, sample: int = 256, depth: int = 100, queries: int = 8) -> Audit:
        """Estimate how far the rewards of the last step are from those of a fresh index. Stores nothing.

        reward: default: the environment's. sample: documents drawn uniformly from those outside the `depth` best of the
        audited queries. queries: how many of the last step's queries are audited. What is encoded is counted apart.
        """
        with self._lock:
            if self._last is None:
                raise DataError("nothing to audit yet; call step() first")
            index, ages = self.ready(), self.ages

            def fresh(rows: np.ndarray) -> np.ndarray:
                vectors, stale = index.read(rows), ages[rows] > 0
                if stale.any():
                    vectors[stale] = self._vectors(rows[stale])
                    self.tokens_audited += int(self.lengths[rows[stale]].sum())
                return vectors

            def calibrate(scores: np.ndarray) -> np.ndarray:
                return scores if self.calibration is None else self.calibration(scores, ages)

            subject = Subject(index, self.documents, self.relevant, fresh, calibrate, self.model_step, self.config.k)
            return examine(subject, *self._last, reward or self.reward, self._rng, sample, depth, queries)

    def refresh(self, encoder: Encoder | None = None) -> int:
        """Encode one budget of the oldest rows again; returns how many. encoder: a copy of the model elsewhere.

        The model step of the rows is that at the call. Encoding holds no lock, so `step` goes on meanwhile; a row
        that `step` has written newer in the meantime keeps the newer vector, and the others get its drift corrections.
        Where the index was replaced meanwhile, by `reset` or `load_state_dict`, nothing is stored.
        """
        index = self.ready()
        with self._lock:
            now = self.model_step
            jitter = self._refresh_rng.random(len(index))
            rows = by_priority(np.ones(len(index)) + 1e-9 * jitter, self.ages, self.lengths)
            rows = within_budget(rows, self.lengths, self.budget)
            ticket, moves = object(), list[Drift]()
            self._under_way[ticket] = now, moves
        try:
            vectors = self.encode(rows, encoder)
            with self._lock:
                for move in moves:
                    vectors = move(vectors)
                older = (index.encoded[rows] < now) & (self.index is index)
                index.write(rows[older], vectors[older], now)
        finally:
            with self._lock:
                del self._under_way[ticket]
        return int(older.sum())

    def refresh_in_background(self, encoder: Encoder | None = None) -> Future[int]:
        """`refresh` in a thread; the encoder must be one that nobody else is changing."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        return self._worker.submit(self.refresh, encoder)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: arrays and plain values."""
        with self._lock:
            index = self.ready()
            return {
                "version": STATE,
                "corpus": self._identity(),
                "vectors": np.array(index.vectors),
                "encoded": index.encoded.copy(),
                "model_step": self.model_step,
                "tokens_encoded": self.tokens_encoded,
                "tokens_audited": self.tokens_audited,
                "budget": self.budget,
                "bound_held": self.bound_held,
                "steps": self.steps,
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
        vectors, encoded = np.asarray(state["vectors"]), np.asarray(state["encoded"])
        newest = np.argsort(-encoded, kind="stable")[:PROBES]
        now = np.asarray(self.encoder.encode_documents([self.documents[row] for row in newest]), np.float32)
        if vectors.shape != (len(self.documents), now.shape[1]):
            raise StoreError(
                f"this environment state holds vectors {vectors.shape}, the model makes {now.shape[1]} components"
            )
        near = now @ vectors[newest].T.astype(np.float32)
        if (near.diagonal() >= near.max(axis=1) - 1e-3).mean() < 0.5:  # copies of a text are equally near
            raise StoreError(
                "this environment state belongs to another model: the newest vectors in it are not near to what this "
                "model makes of the same documents; load the checkpoint that was saved with it, or call reset()"
            )
        with self._lock:
            self.index = self._new_index(now.shape[1])
            self.index.vectors[:] = vectors
            self.index.encoded[:] = encoded
            self.model_step, self.tokens_encoded = int(state["model_step"]), int(state["tokens_encoded"])
            self.tokens_audited, self.steps = int(state.get("tokens_audited", 0)), int(state["steps"])
            if self._controller is not None:
                self.budget, self.bound_held = float(state["budget"]), bool(state.get("bound_held", True))
            self.drift, self.calibration, self._last, self.last_audit = None, None, None, None
            self._rng.bit_generator.state = state["random"]

    def ready(self) -> EvolvingIndex:
        """The index. Raises DataError before `reset`."""
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

    def encode(self, rows: np.ndarray, encoder: Encoder | None = None) -> np.ndarray:
        """Current vectors of these rows, (n, D) float32, counted and checked but not stored."""
        vectors = self._vectors(rows, encoder)
        with self._lock:
            self.tokens_encoded += int(self.lengths[rows].sum())
        return vectors

    def _vectors(self, rows: np.ndarray, encoder: Encoder | None = None) -> np.ndarray:
        if self.index is not None and not len(rows):
            return np.empty((0, self.index.vectors.shape[1]), np.float32)
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
        return vectors

    def _refresh(self, index: EvolvingIndex, rows: np.ndarray) -> None:
        if len(rows):
            index.write(rows, self.encode(rows), self.model_step)

    def _sample(self, index: EvolvingIndex, vectors: np.ndarray) -> None:
        """Encode a uniform sample again; learn from it how the space moved, and move the other rows along."""
        self.drift = self.calibration = None
        share = self.config.sample if self.policy.proposed else 1.0
        rows = within_budget(self._rng.permutation(len(index)), self.lengths, share * self.budget)
        rows = rows[self.ages[rows] > 0]
        if not len(rows):
            return
        old, new, ages = index.read(rows), self.encode(rows), self.ages[rows]
        if self.policy.drift:
            found = fit_drift(old, new, self._rng, self.config.drift_rank)
            if found is not None:
                self.drift, old = found
                for made, moves in self._under_way.values():
                    if made < self.model_step:
                        moves.append(self.drift)
                stale = self.ages > 0
                for block in index.blocks():
                    moved = block if stale[block].all() else np.flatnonzero(stale[block]) + block.start
                    index.vectors[moved] = self.drift(index.vectors[moved])
        if self.config.calibrate:
            self.calibration = fit_calibration(vectors @ old.T, vectors @ new.T, ages, self._rng)
        index.write(rows, new, self.model_step)

    def _wanted(self, index: EvolvingIndex, query_ids: Sequence[str], vectors: np.ndarray) -> np.ndarray | None:
        """(N,) traffic of each row that this batch wants fresh; None where the policy asks for none."""
        policy, wanted = self.policy, np.zeros(len(index))
        if policy.everything:
            return wanted + 1
        if not (policy.relevant_only or policy.local or policy.proposed):
            return None
        groups = groups_of(query_ids)
        relevant = [self.relevant[query][0] for query in groups]
        for rows in relevant:
            wanted[rows] += 1e6  # always first: every reward of the query hangs on them
        if policy.local or policy.proposed:
            asked = (
                [index.read(rows) for rows in relevant]
                if policy.local
                else [vectors[members] for members in groups.values()]
            )
            for near in index.best(asked, self.config.depth):
                wanted[near] += 1 / np.log2(2 + np.arange(len(near)))
        return wanted

    def _rank(self, index: EvolvingIndex, query_ids: Sequence[str], vectors: np.ndarray) -> list[Outcome]:
        ages, outcomes, groups = self.ages, dict[int, Outcome](), groups_of(query_ids)
        asked, relevant = [vectors[m] for m in groups.values()], [self.relevant[query][0] for query in groups]
        if self.policy.relevant_only:
            batch = np.unique(np.concatenate(relevant))
            pools: Iterator[tuple[np.ndarray, ...]] = (
                (batch, np.ones(len(batch)), index.scores(queries, batch)) for queries in asked
            )
        else:
            pools = index.pools(asked, self.config.depth, relevant, self._rng)
        for (query, members), (rows, weights, scores) in zip(groups.items(), pools, strict=True):
            if self.calibration is not None:
                scores = self.calibration(scores, ages[rows])
            for member, line in zip(members, scores, strict=True):
                outcomes[member] = make_outcome(
                    query,
                    self.documents,
                    self.relevant[query],
                    rows,
                    line,
                    weights,
                    min(self.config.k, len(rows)),
                )
        return [outcomes[number] for number in range(len(query_ids))]
