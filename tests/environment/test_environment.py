from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.environment import EnvironmentConfig, Relevant, RetrievalEnvironment, ShardedEncoder, dcg
from search_r3.environment.calibration import fit_calibration
from search_r3.environment.drift import fit_drift
from search_r3.environment.evolving import best_columns
from search_r3.environment.freshness import POLICIES, by_priority
from search_r3.environment.graph import EvolvingGraph
from search_r3.environment.outcome import make_outcome
from search_r3.errors import CheckpointError, DataError, StoreError
from search_r3.records import Document

COUNT, WIDTH = 300, 16
DOCUMENTS = [Document(f"d{n}", f"text {n} " + "x" * (n % 40)) for n in range(COUNT)]
QRELS = {f"q{n}": {f"d{n}": 2, f"d{n + 100}": 1, f"d{n + 1}": 0} for n in range(20)}


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class Moving:
    """An encoder whose space turns a little with every tick, each document with a little noise of its own."""

    def __init__(self, rate=0.05, noise=0.01, seed=0):
        rng = np.random.default_rng(seed)
        self.start = rng.normal(size=(COUNT, WIDTH))
        self.turn = rate * rng.normal(size=(WIDTH, WIDTH))
        self.own = noise * rng.normal(size=(COUNT, WIDTH))
        self.tick, self.calls, self.encoded = 0, 0, 0

    def vectors(self):
        moved = self.start.copy()
        for _ in range(self.tick):
            moved = moved + moved @ self.turn + self.own
        return unit(moved)

    def encode_documents(self, documents):
        self.calls += 1
        self.encoded += len(documents)
        return self.vectors()[[int(document.id[1:]) for document in documents]]


def make(policy="read_repair+drift", encoder=None, **config):
    encoder = encoder or Moving()
    environment = RetrievalEnvironment(
        DOCUMENTS, QRELS, encoder, EnvironmentConfig(policy=policy, **{"budget": 0.3, "depth": 20, **config})
    )
    environment.reset()
    return environment, encoder


def rollouts(encoder, seed=0, queries=6, group=4):
    """Query vectors near a relevant document of each query, as the current model would make them."""
    rng = np.random.default_rng(seed)
    names = [f"q{n}" for n in range(queries) for _ in range(group)]
    rows = [int(name[1:]) for name in names]
    return names, unit(encoder.vectors()[rows] + 0.15 * rng.normal(size=(len(rows), WIDTH)))


def ranks(outcomes):
    return [[(r.id, r.rank) for r in outcome.relevant] for outcome in outcomes]


def test_full_equals_a_fresh_index():
    environment, encoder = make("full")
    for _ in range(3):
        encoder.tick += 1
        names, vectors = rollouts(encoder)
        outcomes = environment.step(names, vectors)
    fresh, _ = make("frozen", encoder)
    expected = fresh.step(names, vectors)
    assert ranks(outcomes) == ranks(expected)
    assert [outcome.ranking for outcome in outcomes] == [outcome.ranking for outcome in expected]
    np.testing.assert_array_equal(environment.index.vectors, encoder.vectors())


def test_an_outcome_tells_what_a_reward_needs():
    environment, encoder = make("frozen")
    vectors = encoder.vectors()
    (outcome,) = environment.step(["q3"], vectors[3:4])
    scores = vectors @ vectors[3]
    order = np.argsort(-scores)
    assert outcome.ranking == tuple(f"d{n}" for n in order[:10])
    np.testing.assert_allclose(outcome.scores, scores[order[:10]], atol=1e-6)
    assert [(r.id, r.grade, r.rank) for r in outcome.relevant] == [
        ("d3", 2, 1),
        ("d103", 1, int((scores > scores[103]).sum()) + 1),
    ]
    negatives = np.delete(scores, [3, 103])
    assert outcome.best_negative == pytest.approx(negatives.max(), abs=1e-6)
    assert outcome.corpus == COUNT
    second = outcome.relevant[1]
    by_hand = 2 * 1.0 + (1 + second.similarity) / 2 / np.log2(1 + second.rank)
    assert dcg(outcome) == pytest.approx(by_hand / (2 + 1 / np.log2(3)), abs=1e-6)
    twins = replace(outcome, relevant=tuple(Relevant(name, 1, 1, 1.0) for name in "ab"))
    assert dcg(twins) == pytest.approx(1)
    lower = replace(outcome, relevant=tuple(Relevant(name, 1, 3, 1.0) for name in "ab"))
    assert dcg(lower) == pytest.approx((1 / 2 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_keeps_to_its_budget(policy):
    environment, encoder = make(policy, budget=0.1)
    before = environment.tokens_encoded
    encoder.tick += 1
    names, vectors = rollouts(encoder)
    outcomes = environment.step(names, vectors)
    spent = environment.tokens_encoded - before
    if policy == "frozen":
        assert spent == 0
    elif policy == "full":
        assert spent == environment.lengths.sum()
    elif policy == "in_batch":
        assert {outcome.corpus for outcome in outcomes} == {12}
    else:
        assert 0 < spent <= 0.1 * environment.lengths.sum()


def test_read_repair_with_drift_is_nearer_to_the_truth_than_what_it_replaces():
    errors = {}
    for policy in ("frozen", "random", "read_repair+drift"):
        environment, encoder = make(policy, Moving(rate=0.08))
        errors[policy] = 0.0
        for turn in range(6):
            encoder.tick += 1
            names, vectors = rollouts(encoder, seed=turn)
            truth = make("frozen", encoder)[0].step(names, vectors)
            given = environment.step(names, vectors)
            errors[policy] += np.mean([abs(dcg(a) - dcg(b)) for a, b in zip(given, truth, strict=True)])
    assert errors["read_repair+drift"] < 0.2 * min(errors["frozen"], errors["random"])


def test_a_step_that_fails_is_none():
    environment, encoder = make(audit_every=2)
    for tick in (1, 2):
        encoder.tick = tick
        names, vectors = rollouts(encoder, seed=tick)
        if tick == 2:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(environment, "_rank", lambda *_: [][0])
                with pytest.raises(IndexError):
                    environment.step(names, vectors)
            assert (environment.steps, environment.model_step, environment.last_audit) == (1, 1, None)
            assert environment.ages.min() == 0
        environment.step(names, vectors)
    assert (environment.steps, environment.model_step) == (2, 2)
    assert environment.last_audit.model_step == 2
    assert environment.ages.max() == 2
    assert environment.ages.min() == 0


def test_drift_is_learnt_where_there_is_one_and_only_there():
    rng = np.random.default_rng(0)
    old = unit(rng.normal(size=(200, WIDTH)))
    turned = unit(old + old @ (0.3 * rng.normal(size=(WIDTH, WIDTH))) + 0.2)
    drift, _ = fit_drift(old[:150], turned[:150], rng)
    assert (drift(old[150:]) * turned[150:]).sum(axis=1).mean() > 0.99
    assert drift.after > drift.before
    assert fit_drift(old, unit(old + 0.1 * rng.normal(size=old.shape)), rng) is None
    assert fit_drift(old[:5], turned[:5], rng) is None


def test_rows_are_corrected_by_maps_that_have_not_seen_them():
    rng = np.random.default_rng(0)
    stored, turn = unit(rng.normal(size=(2000, WIDTH))), 0.2 * rng.normal(size=(WIDTH, WIDTH))
    current = unit(stored + stored @ turn + 0.1 * rng.normal(size=stored.shape))  # the last part no map can know
    drift, corrected = fit_drift(stored[:80], current[:80], rng)
    near = (drift(stored) * current).sum(axis=1)
    held_out = (corrected * current[:80]).sum(axis=1).mean()
    assert held_out == pytest.approx(drift.after)
    assert abs(held_out - near[80:].mean()) < 0.7 * (near[:80].mean() - near[80:].mean())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["tick", "step", "refresh", "save", "fail"]), max_size=12))
def test_rows_and_ages_agree_under_any_interleaving(actions):
    environment, encoder = make("read_repair", Moving(noise=0.05))
    history = {0: encoder.vectors()}
    for action in actions:
        if action == "tick":
            encoder.tick += 1
        elif action == "refresh":
            environment.refresh()
        elif action == "save":
            state = environment.state_dict()
            environment, _ = make("read_repair", encoder)
            environment.load_state_dict(state)
        else:
            names, vectors = rollouts(encoder)
            history[encoder.tick] = encoder.vectors()
            if action == "fail":
                original, environment.encoder = environment.encoder, None
            try:
                environment.step(names, vectors, model_step=encoder.tick)
            except AttributeError:
                pass
            finally:
                if action == "fail":
                    environment.encoder = original
        if action == "tick":  # the environment learns of it at the next step; a refresh before would date rows back
            names, vectors = rollouts(encoder)
            history[encoder.tick] = encoder.vectors()
            environment.step(names, vectors, model_step=encoder.tick)
    for row in range(COUNT):
        expected = history[int(environment.index.encoded[row])][row]
        np.testing.assert_allclose(environment.index.vectors[row], expected, atol=1e-6)


def test_more_rollouts_of_the_same_weights_are_no_new_step():
    environment, encoder = make(audit_every=2)
    for step, audited in ((1, False), (1, False), (2, True)):
        environment.step(*rollouts(encoder), model_step=step)
        assert (environment.last_audit is not None) == audited
    assert environment.steps == 2


def test_a_write_cut_short_leaves_rows_that_count_as_never_encoded():
    environment, encoder = make()
    with pytest.raises(ValueError, match="broadcast"):
        environment.index.write(np.array([1, 2]), np.zeros((2, WIDTH + 1), np.float32), 1)
    assert list(np.flatnonzero(environment.index.encoded < 0)) == [1, 2]
    encoder.tick += 1
    environment.step(*rollouts(encoder), model_step=7)
    assert environment.ages[2] in (0, 8)


def test_a_state_goes_on_as_if_nothing_had_happened(tmp_path):
    one, encoder = make()
    encoder.tick += 1
    one.step(*rollouts(encoder))
    other = RetrievalEnvironment(DOCUMENTS, QRELS, encoder, one.config, folder=tmp_path / "scratch")
    other.load_state_dict(one.state_dict())
    encoder.tick += 1
    batch = rollouts(encoder, seed=1)
    assert ranks(one.step(*batch)) == ranks(other.step(*batch))
    np.testing.assert_array_equal(one.index.vectors, other.index.vectors)
    np.testing.assert_array_equal(one.ages, other.ages)


def test_a_state_with_copies_of_a_text_goes_on_and_another_models_changes_nothing():
    one, encoder = make()
    encoder.start[:16] = encoder.start[0]  # the newest rows are those that are looked up
    one.reset()
    one.load_state_dict(one.state_dict())
    before, spent = one.index.vectors.copy(), one.tokens_encoded
    other, _ = make(encoder=Moving(seed=1))
    with pytest.raises(StoreError, match="another model"):
        one.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(one.index.vectors, before)
    assert one.tokens_encoded == spent


def test_a_refresh_with_nothing_to_do_asks_nobody():
    environment, encoder = make(budget=1e-9)
    calls = encoder.calls
    assert environment.refresh() == 0
    assert encoder.calls == calls


def test_equal_scores_are_ordered_by_number():
    scores = np.zeros(1000, np.float32)
    scores[[700, 900]] = 1
    assert list(best_columns(scores, 5)) == [700, 900, 0, 1, 2]


def test_a_background_refresh_never_overwrites_newer_rows():
    environment, encoder = make("frozen", budget=1)
    encoder.tick += 1
    environment.step(*rollouts(encoder))
    newer = unit(np.ones((10, WIDTH)))

    class Meanwhile:
        """A step writes rows 0 to 9 while they are being encoded elsewhere."""

        def encode_documents(self, documents):
            environment.index.write(np.arange(10), newer, 5)
            return encoder.encode_documents(documents)

    assert environment.refresh_in_background(Meanwhile()).result(timeout=10) == COUNT - 10
    np.testing.assert_array_equal(environment.index.vectors[:10], newer)
    np.testing.assert_allclose(environment.index.vectors[10:], encoder.vectors()[10:], atol=1e-6)


def test_a_background_refresh_follows_the_drift_meanwhile():
    environment, encoder = make(budget=0.5, calibrate=False)
    encoder.tick += 1
    environment.step(*rollouts(encoder))

    class Meanwhile:
        """Three steps of a moving model while its old vectors are on their way."""

        def encode_documents(self, documents):
            old = encoder.encode_documents(documents)
            for seed in range(3):
                encoder.tick += 1
                environment.step(*rollouts(encoder, seed))
            return old

    before = environment.index.encoded.copy()
    assert environment.refresh(Meanwhile()) > 0
    rows = np.flatnonzero((environment.index.encoded == 1) & (before < 1))
    assert len(rows)
    truth = encoder.vectors()[rows]
    encoder.tick = 1
    uncorrected = (encoder.vectors()[rows] * truth).sum(axis=1).mean()
    corrected = (environment.index.vectors[rows] * truth).sum(axis=1).mean()
    assert 1 - corrected < (1 - uncorrected) / 3


class Broken(Moving):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def encode_documents(self, documents):
        return super().encode_documents(documents) if self.tick == 0 else self.answer(len(documents))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: np.full((n, WIDTH), np.nan), "not finite for document"),
        (lambda n: np.ones((n, WIDTH + 1)), "expected width 16"),
        (lambda n: np.ones((max(n - 1, 0), WIDTH)), "expected width 16"),
    ],
)
def test_a_broken_encoder_stores_nothing(answer, message):
    environment, encoder = make(encoder=Broken(answer))
    before = environment.state_dict()
    batch = rollouts(encoder)
    encoder.tick = 1
    with pytest.raises(DataError, match=message):
        environment.step(*batch)
    np.testing.assert_array_equal(before["vectors"], environment.index.vectors)
    np.testing.assert_array_equal(before["encoded"], environment.index.encoded)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_graph_follows_the_model_without_scoring_every_row(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("search_r3.environment.graph.SAMPLE", 100)
    encoder = Moving(rate=0.08)
    config = EnvironmentConfig(budget=0.3, depth=40, index="graph", dtype=dtype)
    environment = RetrievalEnvironment(DOCUMENTS, QRELS, encoder, config, folder=tmp_path)
    environment.reset()
    shared, near = [], []
    for turn in range(4):
        encoder.tick += 1
        batch = rollouts(encoder, seed=turn)
        truth = make("frozen", encoder)[0].step(*batch)
        given = environment.step(*batch)
        shared += [len(set(a.ranking) & set(b.ranking)) / 10 for a, b in zip(given, truth, strict=True)]
        near += [(a.relevant[0].rank, b.relevant[0].rank) for a, b in zip(given, truth, strict=True)]
    assert np.mean(shared) > 0.9
    assert np.mean([abs(a - b) <= max(1, 0.2 * b) for a, b in near]) > 0.9
    assert all(environment.index.encoded[row] in range(5) for row in range(COUNT))
    state = environment.state_dict()
    np.testing.assert_array_equal(state["vectors"], environment.index.vectors)


def test_a_graph_whose_edges_lead_nowhere_is_built_anew(tmp_path):
    rng = np.random.default_rng(0)
    index = EvolvingGraph(5000, WIDTH, folder=tmp_path)
    rows, vectors = np.arange(5000), unit(rng.normal(size=(5000, WIDTH)))
    index.write(rows, vectors, 0)
    assert next(index.best([vectors[7:8]], 3))[0] == 7
    index.write(rows, unit(vectors + vectors @ (0.02 * rng.normal(size=(WIDTH, WIDTH)))), 1)
    index.maintain(rng)
    assert index.builds == 1  # a small move: the edges still fit
    index.write(rows, rng.permutation(vectors), 2)
    index.maintain(rng)
    assert index.builds == 2
    assert len(list(tmp_path.glob("graph-*"))) == 1
    assert next(index.best([index.read(np.array([7]))], 3))[0] == 7


def test_scores_are_computed_in_parts_where_memory_is_short(monkeypatch):
    whole, encoder = make()
    encoder.tick += 1
    batch = rollouts(encoder)
    expected = whole.step(*batch)
    monkeypatch.setattr("search_r3.environment.evolving.SCORE_BYTES", 4 * COUNT * 9)
    parts, _ = make(encoder=Moving())
    parts.encoder.tick += 1
    assert ranks(parts.step(*batch)) == ranks(expected)


def test_ranks_beyond_a_graphs_proposals_are_estimated(monkeypatch):
    monkeypatch.setattr("search_r3.environment.graph.SAMPLE", 150)
    encoder = Moving()
    found = []
    for seed in range(30):
        config = EnvironmentConfig(policy="frozen", depth=10, index="graph", seed=seed)
        environment = RetrievalEnvironment(DOCUMENTS, QRELS, encoder, config)
        environment.reset()
        (outcome,) = environment.step(["q3"], -encoder.vectors()[3:4])  # the relevant document is the last one
        assert outcome.corpus == COUNT
        found.append(max(relevant.rank for relevant in outcome.relevant))
    assert np.mean(found) == pytest.approx(COUNT, rel=0.05)


def test_calibration_lets_stale_rows_compete_fairly():
    rng = np.random.default_rng(0)
    true = rng.uniform(-0.2, 0.9, (6, 300))
    ages = rng.integers(1, 4, 300)
    stale = true - 0.1 * ages + 0.01 * rng.normal(size=true.shape)
    calibration = fit_calibration(stale[:, :200], true[:, :200], ages[:200], rng)
    assert np.abs(calibration(stale[:, 200:], ages[200:]) - true[:, 200:]).mean() < 0.02
    np.testing.assert_allclose(calibration(stale, np.zeros(300, int)), stale, atol=1e-6)
    assert fit_calibration(true, true, ages, rng) is None
    assert fit_calibration(stale[:, :20], true[:, :20], ages[:20], rng) is None


def test_audits_on_schedule_hold_a_bound_and_say_when_they_cannot():
    config = EnvironmentConfig(policy="frozen", budget=0.02, audit_every=2, error_bound=0.001)
    encoder = Moving(rate=0.3)
    environment = RetrievalEnvironment(DOCUMENTS, QRELS, encoder, config)
    environment.reset()
    budgets = [environment.budget]
    for turn in range(30):
        encoder.tick += 1
        environment.step(*rollouts(encoder, seed=turn))
        assert (environment.last_audit is not None) == (turn > 0)
        budgets.append(environment.budget)
        if not environment.bound_held:
            break
    assert not environment.bound_held
    assert budgets[2] == pytest.approx(1.5 * budgets[0])
    assert budgets[1] == budgets[0]
    assert environment.report()["audit_reward_error"] == environment.last_audit.reward_error.mean
    with pytest.raises(ValueError, match="audit_every"):
        EnvironmentConfig(error_bound=0.1)


def share(encoder, rank, world, documents):
    """What one process gives to the others."""
    given = []

    def gather(mine):
        given.extend(mine)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ShardedEncoder(encoder, rank, world, gather).encode_documents(documents)
    return given[0]


def test_processes_share_an_encoding():
    encoder, documents = Moving(), DOCUMENTS[:7]
    shares = [share(encoder, rank, 3, documents) for rank in range(3)]
    for rank in range(3):
        np.testing.assert_array_equal(shares[rank][1], encoder.encode_documents(documents[rank::3]))
        sharded = ShardedEncoder(encoder, rank, 3, lambda mine: shares)
        np.testing.assert_array_equal(sharded.encode_documents(documents), encoder.encode_documents(documents))
    other = share(encoder, 1, 2, documents[:1])
    alone = ShardedEncoder(encoder, 0, 2, lambda mine: [*mine, other])
    assert alone.encode_documents(documents[:1]).shape == (1, WIDTH)
    other = share(encoder, 1, 2, documents)
    with pytest.raises(RuntimeError, match="process 0: broken"):
        ShardedEncoder(Failing(ValueError), 0, 2, lambda mine: [*mine, other]).encode_documents(documents)
    with pytest.raises(DataError, match="process 0: broken"):  # what a user can mend stays that
        ShardedEncoder(Failing(CheckpointError), 0, 2, lambda mine: [*mine, other]).encode_documents(documents)
    with pytest.raises(DataError, match="the processes want different documents encoded"):
        ShardedEncoder(encoder, 0, 2, lambda mine: [*mine, other]).encode_documents(documents[::-1])


def test_a_refresh_of_an_index_that_was_replaced_stores_nothing(tmp_path):
    encoder = Moving()
    environment = RetrievalEnvironment(DOCUMENTS, QRELS, encoder, folder=tmp_path)
    environment.reset()
    names, vectors = rollouts(encoder)
    environment.step(names, vectors)

    class Late:
        def encode_documents(self, documents):
            found = encoder.encode_documents(documents)
            environment.reset(model_step=5)
            return -found

    assert environment.refresh(Late()) == 0
    np.testing.assert_allclose(environment.index.vectors, encoder.encode_documents(DOCUMENTS), atol=1e-6)


def test_of_equally_wanted_rows_the_oldest_come_first_and_the_relevant_before_all():
    wanted, ages = np.array([1.0, 1.0, 2.0, 0.0, 1.0]), np.array([2, 5, 1, 9, 0])
    assert by_priority(wanted, ages, np.ones(5)).tolist() == [1, 0, 2]
    environment, encoder = make(policy="read_repair", budget=60)  # tokens: a few documents
    names, vectors = rollouts(encoder, queries=2)
    encoder.tick += 1
    environment.step(names, vectors)
    relevant = {int(row) for name in set(names) for row in environment.relevant[name][0]}
    assert relevant <= set(environment.fresh_rows().tolist())
    assert len(environment.fresh_rows()) < 20


def test_a_calibration_is_what_rollouts_are_ranked_by():
    environment, encoder = make(policy="frozen")
    names, vectors = rollouts(encoder, queries=1, group=1)
    plain = environment.step(names, vectors)[0]
    environment.calibration = lambda scores, ages: scores + np.float32(0.25)
    shifted = environment.step(names, vectors)[0]
    np.testing.assert_allclose(shifted.scores, plain.scores + 0.25, atol=1e-6)


def test_a_state_keeps_the_budget_that_a_bound_has_led_to():
    environment, encoder = make(error_bound=0.01, audit_every=1)
    environment.budget *= 1.5
    other, _ = make(encoder=encoder, error_bound=0.01, audit_every=1)
    other.load_state_dict(environment.state_dict())
    assert other.budget == environment.budget


def test_one_vector_of_everything_finds_nothing_first():
    outcome = make_outcome(
        "q", DOCUMENTS[:10], (np.array([4, 8]), np.array([1, 1])), np.arange(10), np.full(10, 0.5, np.float32),
        np.ones(10), 3,
    )  # fmt: skip
    assert [(found.id, found.rank) for found in outcome.relevant] == [(DOCUMENTS[4].id, 5), (DOCUMENTS[8].id, 9)]
    assert outcome.ranking == tuple(document.id for document in DOCUMENTS[:3])


class Failing:
    def __init__(self, error):
        self.error = error

    def encode_documents(self, documents):
        raise self.error("broken")


def test_a_document_longer_than_the_budget_stops_no_others():
    environment, encoder = make(policy="read_repair", budget=100)
    environment.lengths[0] = 200  # relevant to q0
    names, vectors = rollouts(encoder)
    assert "q0" in names
    for _ in range(3):
        encoder.tick += 1
        environment.step(names, vectors)
        assert environment.ages[0] > 0
        assert (environment.ages == 0).sum() > 3
    assert environment.refresh() > 3


def test_bad_input_is_named():
    environment, encoder = make()
    names, vectors = rollouts(encoder)
    for ids, given_vectors, message in (
        ([], vectors[:0], "empty batch"),
        (["nope"], vectors[:1], "'nope' has no relevant document"),
        (names, vectors[:, :3], "expected"),
        (names[:1], vectors[:1] * np.nan, "not finite"),
    ):
        with pytest.raises(DataError, match=message):
            environment.step(ids, given_vectors)
    with pytest.raises(DataError, match="'q1': relevant document 'gone'"):
        RetrievalEnvironment(DOCUMENTS, {"q1": {"gone": 1}}, encoder)
    with pytest.raises(DataError, match="fewer than k"):
        RetrievalEnvironment(DOCUMENTS[:3], {}, encoder)
    with pytest.raises(DataError, match="reset"):
        RetrievalEnvironment(DOCUMENTS, QRELS, encoder).step(names, vectors)
    with pytest.raises(StoreError, match="another model"):
        RetrievalEnvironment(DOCUMENTS, QRELS, Moving(seed=9)).load_state_dict(environment.state_dict())
    with pytest.raises(StoreError, match="another corpus"):
        RetrievalEnvironment(DOCUMENTS[:200], {}, encoder).load_state_dict(environment.state_dict())
