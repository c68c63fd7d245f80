import numpy as np
import pytest

from search_r3.environment import dcg
from search_r3.environment.audit import Controller, Interval, interval, weighted_recall
from search_r3.errors import DataError
from search_r3.train.rewards import audited
from tests.environment.test_environment import COUNT, DOCUMENTS, WIDTH, Moving, make, rollouts


def true_error(environment, encoder, batch, given):
    truth = make("frozen", encoder)[0].step(*batch)
    return [abs(dcg(a) - dcg(b)) for a, b in zip(given, truth, strict=True)]


def test_an_audit_of_everything_is_the_truth():
    environment, encoder = make("frozen", Moving(rate=0.1))
    encoder.tick += 3
    batch = rollouts(encoder)
    given = environment.step(*batch)
    before = environment.state_dict()
    audit = environment.audit(sample=COUNT, queries=6)
    assert audit.documents == COUNT
    assert audit.reward_error.mean == pytest.approx(np.mean(true_error(environment, encoder, batch, given)), abs=1e-6)
    fresh = encoder.encode_documents(DOCUMENTS)
    assert audit.cosine.mean == pytest.approx((environment.index.vectors * fresh).sum(axis=1).mean(), abs=1e-5)
    stored, now = batch[1] @ environment.index.vectors.T, batch[1] @ fresh.T
    overlap = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10 for a, b in zip(stored, now, strict=True)]
    assert audit.recall_10 == pytest.approx(np.mean(overlap), abs=1e-6)
    np.testing.assert_array_equal(before["vectors"], environment.index.vectors)
    assert environment.tokens_encoded == before["tokens_encoded"]


def test_a_sample_sees_no_error_where_there_is_none():
    environment, encoder = make("frozen", k=2)
    names, _ = rollouts(encoder)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(names), WIDTH))  # far from the relevant documents, whose ranks only a sample tells
    given = environment.step(names, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert np.mean([outcome.relevant[0].rank for outcome in given]) > 50
    audit = environment.audit(audited("log_rank"), sample=20, depth=10, queries=6)
    assert audit.documents < COUNT / 2
    assert audit.recall_10 == pytest.approx(1, abs=1e-6)
    assert audit.reward_error.mean == pytest.approx(0, abs=1e-6)


def test_an_audit_encodes_what_the_step_has_not_and_counts_it_apart():
    environment, encoder = make("full")
    encoder.tick += 1
    environment.step(*rollouts(encoder))
    before = encoder.encoded, environment.tokens_encoded
    environment.audit(sample=COUNT)
    assert (encoder.encoded, environment.tokens_encoded) == before
    environment, encoder = make("frozen")
    environment.step(*rollouts(encoder))
    environment.audit(sample=COUNT)
    assert environment.report()["audit_tokens"] == environment.lengths.sum()


def test_intervals_cover_the_true_values_at_their_rate():
    environment, encoder = make("frozen", Moving(rate=0.1, noise=0.05))
    encoder.tick += 3
    fresh = encoder.encode_documents(DOCUMENTS)
    true_cosine = (environment.index.vectors * fresh).sum(axis=1).mean()
    environment.step(*rollouts(encoder))
    cosine = []
    for _ in range(200):
        found = environment.audit(sample=60, depth=10, queries=2).cosine
        cosine.append(found.low <= true_cosine <= found.high)
    assert np.mean(cosine) > 0.91
    rng = np.random.default_rng(0)
    skewed = [interval(rng.exponential(size=30) ** 1.5, rng) for _ in range(300)]
    truth = 1.3293403881791370  # gamma(2.5)
    assert np.mean([found.low <= truth <= found.high for found in skewed]) > 0.88


def test_reward_error_intervals_cover_the_error_over_all_queries():
    environment, encoder = make("frozen", Moving(rate=0.1, noise=0.05))
    encoder.tick += 3
    batch = rollouts(encoder, queries=20, group=2)
    given = environment.step(*batch)
    truth = np.mean(true_error(environment, encoder, batch, given))
    found = [environment.audit(sample=150, depth=100, queries=10).reward_error for _ in range(100)]
    assert np.mean([f.low <= truth <= f.high for f in found]) > 0.9


def test_recall_counts_what_each_sampled_document_stands_for():
    fresh, stored = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    assert weighted_recall(stored, fresh, np.ones(4), 2) == 0.5
    assert weighted_recall(stored, fresh, np.array([1, 5.0, 1, 1]), 4) == 0.25


def test_the_controller_spends_what_the_bound_needs_and_says_when_it_cannot():
    controller = Controller(bound=0.01, least=100, most=1000)
    assert controller.adjust(400, Interval(0.02, 0.01, 0.03)) == (600, True)
    assert controller.adjust(900, Interval(0.02, 0.01, 0.03)) == (1000, True)
    assert controller.adjust(1000, Interval(0.02, 0.01, 0.03)) == (1000, False)
    assert controller.adjust(400, Interval(0.001, 0, 0.002)) == (320, True)
    assert controller.adjust(400, Interval(0.008, 0.001, 0.02)) == (400, True)


def test_an_audit_needs_a_step():
    with pytest.raises(DataError, match="call step"):
        make()[0].audit()
