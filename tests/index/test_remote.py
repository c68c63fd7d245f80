"""Against the client's local mode, which searches exactly and ignores quantisation."""

import shutil

import numpy as np
import pytest

from search_r3.errors import DataError, StoreError
from search_r3.index.exact import ExactIndex
from search_r3.index.store import Store, StoreManifest
from search_r3.records import Document
from search_r3.retriever import Retriever
from tests.conftest import TEXTS

pytest.importorskip("qdrant_client", reason="no tests of the remote index: pip install qdrant-client")
from search_r3.index.remote import RemoteIndex, connect, follower


@pytest.fixture
def store(tmp_path):
    manifest = StoreManifest(
        checkpoint="x", fingerprint="f", dimension=8, passage_tokens=0, passage_overlap=0, max_tokens=9
    )
    with Store.create(tmp_path / "store", manifest) as made:
        put(made, range(600))
        yield made


def put(store, numbers):
    random = np.random.default_rng(min(numbers, default=0))
    documents = [
        Document(f"d{n}", f"text {n}", metadata={"even": n % 2 == 0, "third": n % 3, "a.b": f"k{n % 5}"})
        for n in numbers
    ]
    vectors = random.normal(size=(len(documents), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store.put(documents, [(n, 0, 6) for n in range(len(documents))], vectors)


def same(store, remote, k=7, where=None):
    queries = np.random.default_rng(9).normal(size=(5, 8)).astype(np.float32)
    alive = store.matching(where) if where else store.alive
    expected, rows = ExactIndex(store.vectors, alive).search(queries, k)
    scores, found = remote.search(queries, k, where)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("quantise", [None, "int8", "binary"])
def test_it_follows_the_store(store, quantise):
    client = connect(":memory:")
    remote = RemoteIndex(client, "mine", store, quantise)
    assert len(remote) == 600
    same(store, remote)
    same(store, remote, k=700)
    put(store, range(590, 900))  # ten replaced, three hundred new
    store.delete([f"d{n}" for n in range(0, 100, 3)])
    again = RemoteIndex(client, "mine", store, quantise)
    assert len(again) == store.passages
    same(store, again)
    store.compact()
    same(store, RemoteIndex(client, "mine", store, quantise))
    assert len(again) == store.passages


def test_only_what_is_new_is_sent(store, monkeypatch):
    client = connect(":memory:")
    RemoteIndex(client, "mine", store)
    sent, upsert = [], RemoteIndex._upsert
    monkeypatch.setattr(RemoteIndex, "_upsert", lambda self, rows: (sent.extend(rows.tolist()), upsert(self, rows)))
    RemoteIndex(client, "mine", store)
    assert sent == []
    put(store, range(1000, 1010))
    RemoteIndex(client, "mine", store)
    assert sent == list(range(600, 610))


def test_a_copy_that_was_cut_short_is_made_again(store):
    client = connect(":memory:")
    remote = RemoteIndex(client, "mine", store)
    state = remote._state.read_text()
    put(store, range(700, 720))
    RemoteIndex(client, "mine", store)
    remote._state.write_text(state)  # as if killed before it was written
    store.delete(["d705"])
    again = RemoteIndex(client, "mine", store)
    assert len(again) == store.passages
    same(store, again)


def test_a_restored_backup_is_copied_anew(store, tmp_path):
    client = connect(":memory:")
    backup = shutil.copytree(store.folder, tmp_path / "backup")
    put(store, range(700, 720))
    RemoteIndex(client, "mine", store)
    store.close()
    shutil.copytree(backup, store.folder, dirs_exist_ok=True)
    with Store.open(store.folder) as again:
        put(again, range(800, 820))
        same(again, RemoteIndex(client, "mine", again))


@pytest.mark.parametrize(
    "where",
    [
        {"even": True},
        {"third": [0, 2], "even": False},
        {"a.b": "k3"},
        {"third": 7},
        {"third": 2.0},
        {"third": {"gte": 1}},
    ],
)
def test_filters(store, where):
    same(store, RemoteIndex(connect(":memory:"), "mine", store), where=where)


@pytest.mark.parametrize("bounds", [{"gte": "2025"}, {"from": 1}])
def test_bounds_that_qdrant_does_not_have_are_refused(store, bounds):
    with pytest.raises(DataError, match="Qdrant's bounds are numbers, some of gt, gte, lt, lte"):
        RemoteIndex(connect(":memory:"), "mine", store).search(np.ones((1, store.manifest.dimension)), 1, {"n": bounds})


def test_a_retriever_searches_in_it(model, tmp_path):
    with Retriever.create(tmp_path / "index", model, kind=follower(str(tmp_path / "qdrant"))) as retriever:
        retriever.add([Document(str(n), text) for n, text in enumerate(TEXTS)])
        vectors = model.encode_queries(TEXTS[:3])
        with Retriever.open(tmp_path / "index", model) as local:
            for ours, theirs in zip(
                retriever.search_vectors(vectors, 4), local.search_vectors(vectors, 4), strict=True
            ):
                assert [hit.id for hit in ours] == [hit.id for hit in theirs]
        retriever.delete(["0"])
        assert "0" not in [hit.id for hit in retriever.search_vectors(vectors, 6)[0]]


def test_what_is_not_ours_is_left_alone(store, tmp_path):
    client = connect(":memory:")
    RemoteIndex(client, "mine", store)
    manifest = store.manifest
    with Store.create(tmp_path / "other", manifest) as other, pytest.raises(StoreError, match="did not make it"):
        RemoteIndex(client, "mine", other)
    assert client.count("mine").count == 600
    with pytest.raises(StoreError, match="no Qdrant answers"):
        connect("http://127.0.0.1:9")
    index = RemoteIndex(client, "mine", store)
    with pytest.raises(StoreError, match="Qdrant collection mine"):
        index.search(np.ones((1, 9), np.float32), 1)


def test_a_dropped_collection_is_filled_again(store):
    client = connect(":memory:")
    index = RemoteIndex(client, "mine", store)
    client.delete_collection("mine")
    same(store, index)


def test_one_that_has_read_earlier_leaves_what_another_has_copied(store):
    client = connect(":memory:")
    with Store.open(store.folder) as early:
        put(store, range(700, 720))
        store.delete(["d3"])
        latest = RemoteIndex(client, "mine", store)
        mine = RemoteIndex(client, "mine", early)
        assert len(latest) == store.passages == 619
        same(store, latest)
        assert set(mine.search(np.eye(8, dtype=np.float32), 700)[1].ravel()) == {-1, *range(600)} - {3}
