"""Exact and graph search against brute force."""

import numpy as np
import pytest

from search_r3.errors import StoreError
from search_r3.index import exact
from search_r3.index.exact import ExactIndex
from search_r3.index.graph import GraphIndex


def unit(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def brute(queries, vectors, alive, k):
    scores = queries @ vectors.astype(np.float32).T
    scores[:, ~alive] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("block", [1, 4000, 64 << 20])
@pytest.mark.parametrize(("dtype", "asked"), [("float32", 7), ("float16", exact.FEW), ("float16", exact.FEW + 1)])
def test_exact_equals_brute_force_over_any_block(rng, block, dtype, asked, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_BYTES", block)
    monkeypatch.setattr(exact, "MANY", exact.FEW)
    vectors, queries = unit(rng, 500, 16).astype(dtype), unit(rng, asked, 16)
    alive = rng.random(500) > 0.3
    scores, rows = ExactIndex(vectors, alive).search(queries, 10)
    np.testing.assert_array_equal(rows, brute(queries, vectors, alive, 10))
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.astype(np.float32).T, rows, 1), atol=1e-6)
    assert scores.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_pads_when_there_is_too_little(rng, dtype):
    vectors = unit(rng, 3, 4).astype(dtype)
    alive = np.array([True, False, True])
    scores, rows = ExactIndex(vectors, alive).search(vectors[:1], 5)
    assert rows[0, :2].tolist()[0] == 0
    assert rows[0, 2:].tolist() == [-1, -1, -1]
    assert np.isneginf(scores[0, 2:]).all()
    assert ExactIndex(np.empty((0, 4), dtype)).search(vectors, 2)[1].tolist() == [[-1, -1]] * 3
    assert ExactIndex(vectors).search(vectors[:0], 2)[1].shape == (0, 2)


def test_equal_scores_are_ordered_by_row():
    vectors = np.ones((1000, 2), np.float32)
    vectors[[7, 500]] *= 2
    for k in (1, 4, 10, 1000):
        rows = [7, 500, *(row for row in range(1000) if row not in (7, 500))]
        assert ExactIndex(vectors).search(vectors[:1], k)[1].tolist() == [rows[:k]]


def test_graph_finds_what_exact_finds_and_skips_the_dead(rng, tmp_path):
    pytest.importorskip("usearch")
    vectors, queries = unit(rng, 2000, 32), unit(rng, 400, 32)
    alive = rng.random(2000) > 0.5
    exact_rows = ExactIndex(vectors, alive).search(queries, 10)[1]
    graph = GraphIndex.build(vectors, alive)
    scores, rows = graph.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact_rows, strict=True)])
    assert recall > 0.95
    assert alive[rows].all()
    assert len(graph) == alive.sum()
    np.testing.assert_allclose(scores[:, 0], np.take_along_axis(queries @ vectors.T, rows, 1)[:, 0], atol=1e-6)
    graph.save(tmp_path / "graph")
    loaded = GraphIndex.load(tmp_path / "graph", vectors, alive)
    np.testing.assert_array_equal(loaded.search(queries, 10)[1], rows)


def test_graph_grows_with_the_vectors(rng, tmp_path):
    pytest.importorskip("usearch")
    vectors, queries = unit(rng, 2000, 32), unit(rng, 400, 32)
    alive = rng.random(2000) > 0.1
    graph = GraphIndex.build(vectors[:1500])
    graph.save(tmp_path / "graph")
    loaded = GraphIndex.load(tmp_path / "graph", vectors[:1800])
    assert (loaded.saved, len(loaded)) == (1500, 1800)
    exact_rows = ExactIndex(vectors, alive).search(queries, 10)[1]
    for grown in (graph, loaded):
        grown.extend(vectors, alive)
        rows = grown.search(queries, 10)[1]
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact_rows, strict=True)]) > 0.95
    vectors[700] = vectors[1900]
    with pytest.raises(StoreError, match="rows 0 to 1499 are other vectors"):
        GraphIndex.load(tmp_path / "graph", vectors)


def test_graph_finds_rows_that_no_edge_leads_to(rng, tmp_path):
    pytest.importorskip("usearch")
    vectors = np.repeat(unit(rng, 1, 16), 300, axis=0)
    scores, rows = GraphIndex.build(vectors).search(vectors[:1], 300)
    assert sorted(rows[0].tolist()) == list(range(300))
    np.testing.assert_allclose(scores, 1, atol=1e-6)
    with pytest.raises(OSError, match="No such file"):
        GraphIndex.build(vectors).save(tmp_path / "nowhere" / "graph")


def test_graph_smaller_than_k_and_damaged_file(rng, tmp_path):
    pytest.importorskip("usearch")
    vectors = unit(rng, 3, 8)
    graph = GraphIndex.build(vectors)
    assert sorted(graph.search(unit(rng, 1, 8), 5)[1][0].tolist()) == [-1, -1, 0, 1, 2]
    (tmp_path / "graph").write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="cannot be loaded"):
        GraphIndex.load(tmp_path / "graph", vectors)
    graph.save(tmp_path / "graph")
    with pytest.raises(StoreError, match="it holds 3 rows"):
        GraphIndex.load(tmp_path / "graph", vectors[:2])
