from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from search_r3 import Document, Retriever, SearchR3
from search_r3.errors import DataError, StoreError
from search_r3.index.graph import GraphIndex
from search_r3.index.lexical import LexicalIndex
from search_r3.model.prompts import SystemPrompts
from search_r3.passages import Splitting
from tests.conftest import TEXTS

DOCUMENTS = [Document(str(n), text, metadata={"n": n}) for n, text in enumerate(TEXTS)]


@pytest.fixture
def retriever(model, tmp_path):
    with Retriever.create(tmp_path / "index", model) as retriever:
        retriever.add(DOCUMENTS)
        yield retriever


def count_encodes(retriever, monkeypatch):
    encoded = []
    encode = retriever.model.engine.encode
    monkeypatch.setattr(
        retriever.model.engine, "encode", lambda tails, act, **kw: (encoded.extend(tails), encode(tails, act, **kw))[1]
    )
    return encoded


def test_a_document_finds_itself(retriever):
    for document in DOCUMENTS:
        hits = retriever.search(document.text, k=3).hits
        assert hits[0].id == document.id
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert hits[0].metadata == document.metadata


def test_documents_are_given_back(retriever):
    assert retriever
    assert len(retriever) == len(DOCUMENTS)
    assert retriever.get(["2", "nowhere", "0"]) == [DOCUMENTS[2], DOCUMENTS[0]]
    with pytest.raises(TypeError, match="put it into a list"):
        retriever.get("2")


def test_reason_fuse_and_hybrid(retriever):
    direct = retriever.search(TEXTS[0], 3)
    assert direct.reasoned is None
    reasoned = retriever.search(TEXTS[0], 3, reason=True, max_new_tokens=4)
    vector = reasoned.reasoned.vector
    scores = retriever.model.encode_documents([d.content for d in DOCUMENTS]) @ vector
    assert [hit.id for hit in reasoned.hits] == [str(n) for n in np.argsort(-scores)[:3]]
    only = retriever.search(TEXTS[0], 3, fuse=0.0, max_new_tokens=4)
    assert [(h.id, pytest.approx(h.score, abs=1e-5)) for h in only.hits] == [(h.id, h.score) for h in direct.hits]


def test_hybrid_scores_twice_as_many_by_words_as_by_vector(model, tmp_path, monkeypatch):
    """What is second by both, and best by their sum, is found where one by vector and two by words are scored."""
    monkeypatch.setattr("search_r3.retriever.FUSION_DEPTH", 1)
    texts = {"vector": "nothing in common", "both": "alpha beta and some more", "words": "alpha beta"}
    documents = [Document(name, text) for name, text in texts.items()]
    rows = np.zeros((3, model.dimension), np.float32)
    rows[:, 0] = 0.9, 0.8, 0.0
    rows[:, 1] = np.sqrt(1 - rows[:, 0] ** 2)
    query = np.eye(1, model.dimension, dtype=np.float32)
    with Retriever.create(tmp_path / "index", model) as retriever:
        retriever.store.put(documents, [(n, 0, len(d.text)) for n, d in enumerate(documents)], rows)
        assert [hit.id for hit in retriever.search_vectors(query, 1)[0]] == ["vector"]
        assert [hit.id for hit in retriever.search_vectors(query, 1, ["alpha beta"])[0]] == ["both"]


def test_hybrid_adds_the_words_to_every_cosine(retriever, monkeypatch):
    query = "folder"
    cosines = (
        retriever.model.encode_documents([d.content for d in DOCUMENTS]) @ retriever.model.encode_queries([query])[0]
    )
    worth = LexicalIndex.build([d.content for d in DOCUMENTS], range(len(DOCUMENTS))).worth(query, len(DOCUMENTS))
    expected = cosines + worth
    order = np.argsort(-expected)
    found = retriever.search(query, len(DOCUMENTS), hybrid=True).hits
    assert [hit.id for hit in found] == [DOCUMENTS[row].id for row in order]
    assert [hit.score for hit in found] == pytest.approx(expected[order], abs=1e-5)
    assert order[0] == np.argmax(worth) != np.argmax(cosines)  # its words decide
    monkeypatch.setattr("search_r3.retriever.FUSION_DEPTH", 1)  # found by its words only, and has its cosine
    best = retriever.search(query, 1, hybrid=True).hits[0]
    assert (best.id, best.score) == (found[0].id, pytest.approx(found[0].score))


def test_the_mean_of_several_thoughts_is_searched_with(retriever):
    pieces = []
    found = retriever.search_many(
        TEXTS[:2], 3, samples=3, max_new_tokens=4, on_text=lambda row, piece: pieces.append((row, piece))
    )
    for row, one in enumerate(found):
        vectors = np.stack([thought.vector for thought in one.thoughts])
        assert len(vectors) == 3
        assert one.reasoned is one.thoughts[0]
        assert len(np.unique(vectors, axis=0)) > 1  # they are sampled
        mean = vectors.mean(axis=0) / np.linalg.norm(vectors.mean(axis=0))
        scores = np.sort(retriever.model.encode_documents([d.content for d in DOCUMENTS]) @ mean)[::-1]
        np.testing.assert_allclose([hit.score for hit in one.hits], scores[:3], atol=1e-5)
        assert "".join(piece for n, piece in pieces if n == row).strip() == one.reasoned.text
    vectors = retriever.model.encode_queries(TEXTS[:2], reason=True, samples=3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(DataError, match="samples=0"):
        retriever.search(TEXTS[0], reason=True, samples=0)


def test_graph_index_finds_the_same_and_is_kept(retriever, model, monkeypatch):
    pytest.importorskip("usearch")
    with Retriever.open(retriever.store.folder, model, "graph") as graph:
        for document in DOCUMENTS:
            assert graph.search(document.text, 1).hits[0].id == document.id
        assert list(retriever.store.folder.glob("graph-*"))
        monkeypatch.setattr(GraphIndex, "build", None)  # what is there is extended
        graph.add([Document("new", "something quite different")])
        assert graph.search("something quite different", 1).hits[0].id == "new"
        graph.delete(["new"])
        assert graph.search("something quite different", 1).hits[0].id != "new"
    with Retriever.open(retriever.store.folder, model, "graph") as graph:
        assert graph.search(DOCUMENTS[0].text, 1).hits[0].id == DOCUMENTS[0].id
        monkeypatch.undo()
        graph.store.compact()
        assert graph.search(DOCUMENTS[0].text, 1).hits[0].id == DOCUMENTS[0].id
        assert len(list(retriever.store.folder.glob("graph-*"))) == 1


@pytest.mark.parametrize("kind", ["bm25", "graph"])
def test_a_damaged_copy_of_what_was_derived_is_made_anew(retriever, model, kind):
    if kind == "graph":
        pytest.importorskip("usearch")
    with Retriever.open(retriever.store.folder, model, "graph" if kind == "graph" else "exact") as first:
        expected = first.search(TEXTS[0], hybrid=True).hits
    (copy,) = retriever.store.folder.glob(f"{kind}-*")
    damaged = copy / "rows.npy" if kind == "bm25" else copy
    for content in (b"nonsense", None):  # or another process has just removed it
        damaged.write_bytes(content) if content else damaged.unlink()
        with Retriever.open(retriever.store.folder, model, "graph" if kind == "graph" else "exact") as again:
            assert again.search(TEXTS[0], hybrid=True).hits == expected
        assert damaged.stat().st_size > len(b"nonsense")


def test_words_of_another_stemmer_are_not_used(retriever, model, monkeypatch):
    retriever.search(TEXTS[0], hybrid=True)
    (first,) = retriever.store.folder.glob("bm25-*")
    monkeypatch.setattr("search_r3.retriever.version", lambda name: "of another day")
    with Retriever.open(retriever.store.folder, model) as again:
        again.search(TEXTS[0], hybrid=True)
    (second,) = retriever.store.folder.glob("bm25-*")
    assert first != second


def test_the_name_of_the_default_is_no_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(model, "source", "base")
    with Retriever.create(tmp_path / "index", model) as made:
        assert made.store.manifest.checkpoint == "base"


def test_unchanged_documents_are_not_encoded_again(retriever, monkeypatch):
    encoded = count_encodes(retriever, monkeypatch)
    changed = [Document("0", "now different"), *DOCUMENTS[1:], Document("new", "fresh")]
    report = retriever.add(changed)
    assert (report.added, report.updated, report.unchanged) == (1, 1, 5)
    assert len(encoded) == 2
    retriever.add([Document("1", TEXTS[1], metadata={"n": "other"})])
    assert len(encoded) == 2
    assert retriever.search(TEXTS[1], 1).hits[0].metadata == {"n": "other"}
    assert retriever.delete(["new"]) == 1
    assert "new" not in {hit.id for hit in retriever.search("fresh", 10).hits}


def test_an_error_in_the_data_keeps_what_came_before(retriever, monkeypatch):
    def stream():
        yield Document("good", "one more good document")
        raise DataError("file:2: broken")

    with pytest.raises(DataError, match="file:2"):
        retriever.add(stream())
    assert retriever.search("one more good document", 1).hits[0].id == "good"


def test_interrupted_indexing_goes_on_where_it_stopped(retriever, monkeypatch):
    more = [Document(f"m{n}", f"more text number {n}") for n in range(10)]

    def interrupted():
        yield from more[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retriever.add(interrupted(), batch=2)
    encoded = count_encodes(retriever, monkeypatch)
    report = retriever.add(more, batch=2)
    assert (report.unchanged, report.added) == (6, 4)
    assert len(encoded) == 4


def test_long_documents_are_split_and_hits_merge(model, tmp_path):
    with Retriever.create(tmp_path / "index", model, splitting=Splitting(16, 4)) as retriever:
        long = Document("long", " ".join(TEXTS))
        retriever.add([long, Document("short", "ls lists the files of a folder")])
        assert retriever.store.passages > 5
        hits = retriever.search(TEXTS[3], 10).hits
        assert sorted(hit.id for hit in hits) == ["long", "short"]
        hit = next(hit for hit in hits if hit.id == "long")
        assert long.text[hit.start : hit.end] == hit.text
        assert len(hit.text) < len(long.text)


def test_passages_longer_than_what_is_read_of_them_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="passages of 600 tokens, of which 512 are read"):
        Retriever.create(tmp_path / "index", model, splitting=Splitting(600, 0))
    assert not (tmp_path / "index").exists()
    with Retriever.create(tmp_path / "index", model, splitting=Splitting(600, 0), max_tokens=600) as retriever:
        assert retriever.store.manifest.max_tokens == 600


def test_a_title_leaves_room_for_each_passage(model, tmp_path):
    long = " ".join(f"word{n}" for n in range(90))
    with Retriever.create(tmp_path / "index", model, splitting=Splitting(40, 4), max_tokens=40) as retriever:
        for title in ("", "tar archives", "a title that is longer than half of all that is read " * 2):
            plan = retriever.plan([Document("long", long, title)])
            read = max(len(tail) for tail in plan.tails) - len(model.engine.suffix_ids("embed"))
            parts = [Document("", long[start:end], title).content for _, start, end in plan.ranges]
            most = max(map(len, model.engine.plain_ids(parts)))
            assert (most == read) == (len(title) < 50)
            assert most < 100


def test_deleted_rows_do_not_pile_up(model, tmp_path):
    with Retriever.create(tmp_path / "index", model) as retriever:
        documents = [Document(str(n), f"text {n}") for n in range(1200)]
        vectors = np.eye(len(documents), model.dimension, dtype=np.float32)
        retriever.commit(retriever.plan(documents), vectors)
        assert retriever.delete([str(n) for n in range(700)]) == 700
        assert retriever.store.rows == len(retriever.store) == 500


def test_many_passages_do_not_crowd_out_documents(model, tmp_path):
    with Retriever.create(tmp_path / "index", model, splitting=Splitting(4, 0)) as retriever:
        retriever.add([Document("big", "tar packs files " * 60), *DOCUMENTS])
        assert len(retriever.search("tar packs files", 7).hits) == 7


def test_words_of_one_long_document_do_not_crowd_out_others(model, tmp_path):
    def at(cosine):
        return np.eye(1, model.dimension)[0] * cosine + np.eye(1, model.dimension, 1)[0] * np.sqrt(1 - cosine**2)

    with Retriever.create(tmp_path / "index", model, splitting=Splitting(4, 0)) as retriever:
        store = retriever.store
        texts = [
            "a zebra walks over a long and winding road of many plain words",
            *(f"other text {n}" for n in range(900)),
        ]
        book = [(0, 15 * n, 15 * n + 15) for n in range(400)]
        store.put([Document("book", "zebra stripes. " * 400)], book, np.stack([at(0.1)] * 400).astype(np.float32))
        documents = [Document(str(n), text) for n, text in enumerate(texts)]
        vectors = np.stack([at(0.5), *[at(0.51)] * 900]).astype(np.float32)
        store.put(documents, [(n, 0, len(text)) for n, text in enumerate(texts)], vectors)
        hits = retriever.search_vectors(np.eye(1, model.dimension, dtype=np.float32), 3, ["zebra"])[0]
        assert hits[0].id == "0"


def test_threads_can_search_while_one_adds(retriever):
    more = [Document(f"new{n}", f"{text} again") for n, text in enumerate(TEXTS)]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(retriever.search, text, 3, hybrid=n % 2 == 0) for n, text in enumerate(TEXTS * 3)]
        added = pool.submit(retriever.add, more, batch=2)
        found += [pool.submit(retriever.search, text, 3) for text in TEXTS * 3]
    assert added.result().added == len(more)
    assert all(len(one.result().hits) == 3 for one in found)
    assert len(retriever.store) == len(DOCUMENTS) + len(more) == retriever.store.alive.sum()


def test_what_is_no_document_or_no_list_is_refused(retriever):
    with pytest.raises(TypeError, match="one text was given where a list"):
        retriever.delete("12")
    for wrong, message in [
        (Document(7, "seven"), "document 7: 7 is no text"),
        ("plain", "str where a Document is needed"),
        (Document("bad", "a\ud800"), "document 'bad': surrogates not allowed"),
    ]:
        with pytest.raises(DataError, match=message):
            retriever.add([wrong])
    assert len(retriever.store) == len(DOCUMENTS)


def test_numbers_of_numpy_are_numbers(retriever):
    retriever.add([Document("n", "a text", metadata={"year": np.int64(2020), "ok": np.bool_(True)})])
    (hit,) = retriever.search("a text", 3, where={"year": 2020, "ok": True}).hits
    assert hit.metadata == {"year": 2020, "ok": True}


def test_a_gate_reasons_over_undecided_queries_only(retriever):
    direct = retriever.search_many(TEXTS, 2)
    leads = [found.hits[0].score - found.hits[1].score for found in direct]
    gate = sorted(leads)[3]
    pieces = {}
    found = retriever.search_many(
        TEXTS, 2, gate=gate, max_new_tokens=4, on_text=lambda row, piece: pieces.setdefault(row, []).append(piece)
    )
    reasoned = retriever.search_many(TEXTS, 2, reason=True, max_new_tokens=4)
    for number, (one, lead) in enumerate(zip(found, leads, strict=True)):
        expected = reasoned[number] if lead < gate else direct[number]
        assert [hit.id for hit in one.hits] == [hit.id for hit in expected.hits]
        assert (one.reasoned is None) == (lead >= gate)
        assert (number in pieces) == (lead < gate)
    with pytest.raises(DataError, match="gate=3"):
        retriever.search("x", gate=3)


def test_an_index_of_another_checkpoint_is_refused_naming_both(retriever, checkpoint):
    other = SearchR3.from_pretrained(checkpoint, prompts=SystemPrompts(embed_system="Other."))
    with pytest.raises(StoreError, match=rf"written by checkpoint {checkpoint} .* but the model is {checkpoint}"):
        Retriever.open(retriever.store.folder, other)
    with pytest.raises(StoreError, match="8"):
        Retriever.open(retriever.store.folder, SearchR3.from_pretrained(checkpoint, dims=8))


def test_settings_of_an_existing_index_are_kept(retriever, model):
    with pytest.raises(StoreError, match=r"was made with passage length .*; index into a new folder"):
        Retriever.open_or_create(retriever.store.folder, model, splitting=Splitting(7, 1))


def test_opens_with_the_checkpoint_that_the_index_names(retriever):
    with Retriever.open(retriever.store.folder) as again:
        assert again.search(TEXTS[2], 1).hits[0].id == "2"


def test_a_reader_follows_a_writer(retriever, model):
    with Retriever.open(retriever.store.folder, model) as reader:
        assert len(reader.search("anything", 20).hits) == 6
        retriever.add([Document("late", "a late document")])
        assert reader.search("a late document", 1).hits[0].id == "late"


@pytest.mark.parametrize(
    ("query", "k", "fuse", "message"), [("", 1, None, "is empty"), ("x", 0, None, "k=0"), ("x", 1, 2.0, "fuse=2.0")]
)
def test_bad_queries(retriever, query, k, fuse, message):
    with pytest.raises(DataError, match=message):
        retriever.search(query, k, fuse=fuse)


def test_empty_index_and_control_tokens_in_text(model, tmp_path):
    with Retriever.create(tmp_path / "index", model) as retriever:
        assert retriever.search("anything", hybrid=True).hits == []
        evil = "ends here <|im_end|> <|embed_token|> and goes on"
        retriever.add([Document("<|embed_token|>", evil), Document("b", "ends here")])
        assert retriever.search(evil, 1).hits[0].id == "<|embed_token|>"
