import errno
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from search_r3.errors import DataError, StoreError
from search_r3.index.store import Store, StoreManifest
from search_r3.records import Document

WIDTH = 8


def manifest(**changes):
    facts = {
        "checkpoint": "model-a", "fingerprint": "f" * 64, "dimension": WIDTH,
        "passage_tokens": 0, "passage_overlap": 0, "max_tokens": 64,
    }  # fmt: skip
    return StoreManifest(**(facts | changes))


def put(store, *names, text="text", value=1.0):
    documents = [Document(name, f"{text} {name}", metadata={"n": name}) for name in names]
    ranges = [(n, 0, len(d.text)) for n, d in enumerate(documents)]
    store.put(documents, ranges, np.full((len(names), WIDTH), value, np.float32))


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "index", manifest()) as store:
        yield store


def test_documents_come_back_after_reopening(store):
    put(store, "a", "b")
    store.close()
    with Store.open(store.folder) as again:
        assert len(again) == again.passages == 2
        passage = again.get([1])[0]
        assert (passage.document.id, passage.text, passage.document.metadata) == ("b", "text b", {"n": "b"})
        assert again.vectors.tolist() == [[1.0] * WIDTH] * 2


def test_filters_tell_true_from_one_and_from_text(store):
    values = [True, 1, "true", "json true", False]
    documents = [Document(str(n), "text", metadata={"flag": value}) for n, value in enumerate(values)]
    store.put(documents, [(n, 0, 4) for n in range(len(values))], np.ones((len(values), WIDTH), np.float32))
    for row, value in enumerate(values):
        assert np.flatnonzero(store.matching({"flag": value})).tolist() == [row]
    assert np.flatnonzero(store.matching({"flag": [True, "true"]})).tolist() == [0, 2]


def test_a_filter_finds_the_elements_of_a_list(store):
    values = [["a", True, 0.1 + 0.2], "a", {"k": "a"}, [1], [["a"]]]
    documents = [Document(str(n), "text", metadata={'t"[0].': value}) for n, value in enumerate(values)]
    store.put(documents, [(n, 0, 4) for n in range(len(values))], np.ones((len(values), WIDTH), np.float32))
    for wanted, rows in (("a", [0, 1]), (True, [0]), (1, [3]), (0.1 + 0.2, [0]), ("k", []), (["a", 1], [0, 1, 3])):
        assert np.flatnonzero(store.matching({'t"[0].': wanted})).tolist() == rows


def test_a_filter_that_no_metadata_can_equal_is_an_error(store):
    put(store, "a", "b")
    assert store.matching({"n": ("a", "b")}).all()
    assert store.matching({"n": ["a", *map(str, range(29_999))]}).tolist() == [True, False]
    for value, told in (
        (None, "None is no text, number of 64 bits, true or false"),
        (1 << 63, "is no text, number of"),
        ({"a": 1}, "are no bounds; give some of gt, gte, lt, lte"),
        ({}, "are no bounds"),
        ({"gt": True}, "True is no text or number"),
        ({"gt": [1]}, "is no text or number"),
        (["a"] * 40_000, "40000 values are more than 30000"),
        ("\ud800", "surrogates not allowed"),
    ):
        with pytest.raises(DataError, match=told):
            store.matching({"n": value})


@pytest.mark.parametrize(
    ("bounds", "rows"),
    [
        ({"gte": 1980}, [1, 2, 3, 5]),
        ({"gt": 1980}, [2, 3, 5]),
        ({"lte": 1980}, [0, 1, 5]),
        ({"lt": 1980, "gt": -3.5}, [0, 5]),
        ({"gte": 1980, "lte": 1981}, [1, 2, 3]),
        ({"gte": "1981", "lt": "1982-06"}, [3, 5]),
        ({"gt": "2"}, [4]),
        ({"gt": 10**18}, []),
    ],
)
def test_a_filter_with_bounds(store, bounds, rows):
    """Numbers in text are numbers beside a number; of a list one element must be within all bounds."""
    values = [1979, 1980, 1980.5, "1981", "later", [1970, "1982"], True, None, {"n": 1990}, ["1983x"]]
    documents = [Document(str(n), "text", metadata={"year": value}) for n, value in enumerate(values)]
    store.put(documents, [(n, 0, 4) for n in range(len(values))], np.ones((len(values), WIDTH), np.float32))
    assert np.flatnonzero(store.matching({"year": bounds})).tolist() == rows


def test_metadata_that_is_not_json_is_refused_and_nothing_stored(store):
    with pytest.raises(StoreError, match="'x': metadata cannot be stored"):
        store.put([Document("x", "text", metadata={"n": float("inf")})], [(0, 0, 4)], np.ones((1, WIDTH), np.float32))
    put(store, "a")
    assert len(store) == store.passages == 1
    assert np.flatnonzero(store.matching({"n": "a"})).tolist() == [store.rows - 1]


def test_the_number_of_documents_follows_other_writers(store):
    put(store, "a")
    with Store.open(store.folder) as other:
        assert len(other) == 1
        put(store, "b", "c")
        store.delete(["a"])
        assert len(store) == 2
        with other.reading():
            assert len(other) == 2


def test_what_was_derived_from_other_content_is_removed(store):
    put(store, "a")
    present = store.folder / f"graph-{store.generation}"
    killed, begun = store.folder / ".graph-1.77", store.folder / ".graph-1.78"
    for path in (store.folder / "graph-1", killed, begun, present):
        path.touch()
    os.utime(killed, (0, 0))
    assert store.derived("graph") == present
    assert present.exists()
    present.unlink()
    assert not store.derived("graph").exists()
    assert [path for path in store.folder.iterdir() if "graph" in path.name] == [begun]  # perhaps of another process


def test_update_replaces_and_delete_removes(store):
    put(store, "a", "b")
    put(store, "a", text="new", value=2.0)
    assert store.alive.tolist() == [False, True, True]
    assert store.get([2])[0].text == "new a"
    assert store.get([0]) == []
    assert store.delete(["b", "unknown"]) == 1
    assert (len(store), store.passages, list(store.ids())) == (1, 1, ["a"])


def test_compact_drops_dead_rows_and_keeps_the_rest(store):
    for value in range(5):
        put(store, f"d{value}", "same", value=float(value))
    store.compact()
    assert store.rows == store.passages == 6
    found = {p.document.id: store.vectors[row, 0] for row, p in store.scan()}
    assert found == {"d0": 0, "d1": 1, "d2": 2, "d3": 3, "d4": 4, "same": 4}
    with Store.open(store.folder) as again:  # checksums were rewritten too
        assert again.rows == 6
    assert len(list(store.folder.glob("vectors-*.bin"))) == 1


def test_float16_halves_the_file(tmp_path):
    with Store.create(tmp_path / "half", manifest(dtype="float16")) as store:
        put(store, "a", "b")
        assert (store.folder / "vectors-0.bin").stat().st_size == 2 * WIDTH * 2


def test_bytes_of_an_unfinished_batch_are_ignored_and_overwritten(store):
    put(store, "a")
    with (store.folder / "vectors-0.bin").open("ab") as file:
        file.write(b"x" * 50)
    with Store.open(store.folder) as again:
        assert again.rows == 1
        put(again, "b", value=3.0)
        assert again.vectors[1].tolist() == [3.0] * WIDTH
    with Store.open(store.folder) as again:
        assert again.rows == 2


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncate":
        content = content[:-4]
    else:
        content[5] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"), [("truncate", "the file was truncated"), ("flip", "rows 0 to 1 do not match their checksum")]
)
def test_damaged_vectors_are_found_on_opening(store, how, message):
    put(store, "a", "b")
    store.close()
    damage(store.folder / "vectors-0.bin", how)
    with pytest.raises(StoreError, match=message):
        Store.open(store.folder)


def test_damaged_records_and_manifest_are_named(store):
    put(store, "a")
    store.close()
    (store.folder / "records.sqlite").write_bytes(b"not a database at all" * 100)
    for extra in store.folder.glob("records.sqlite-*"):
        extra.unlink()
    with pytest.raises(StoreError, match=r"records\.sqlite: file is not a database"):
        Store.open(store.folder)
    (store.folder / "manifest.json").write_text(json.dumps({"format": 1, "checkpoint": "x"}))
    with pytest.raises(StoreError, match=r"manifest\.json: field fingerprint"):
        Store.open(store.folder)
    (store.folder / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(StoreError, match="format 7 is newer"):
        Store.open(store.folder)


def test_the_home_folder_has_a_short_name(store, monkeypatch):
    monkeypatch.setenv("HOME", str(store.folder.parent))
    with Store.open(Path("~") / store.folder.name) as again:
        assert again.folder == store.folder


def test_not_an_index_and_not_empty(tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(StoreError, match="no index here"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="exists and is not an index"):
        Store.create(tmp_path, manifest())
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_unusable_vectors_change_nothing(store):
    put(store, "a")
    with pytest.raises(StoreError, match="vector of document 'b' is not finite"):
        put(store, "b", value=float("nan"))
    with pytest.raises(StoreError, match="do not fit"):
        store.put([Document("c", "x")], [(0, 0, 1)], np.ones((1, 3), np.float32))
    assert list(store.ids()) == ["a"]


def test_a_full_disk_keeps_what_was_stored(store, monkeypatch):
    put(store, "a")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device; what was stored before is kept"):
        put(store, "b")
    monkeypatch.undo()
    with Store.open(store.folder) as again:
        assert list(again.ids()) == ["a"]


def test_records_that_fill_the_disk_say_so(store):
    put(store, "a")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match="full; what was stored before is kept; free some space"):
        put(store, *map(str, range(3000)), text="text " * 400)
    assert list(store.ids()) == ["a"]


@pytest.mark.parametrize("moment", ["_lost_records", "_map"])
def test_opening_while_another_process_compacts(store, monkeypatch, moment):
    put(store, "a", "b")
    put(store, "c", value=2.0)
    store.delete(["a"])
    original, done = getattr(Store, moment), []

    def compact_first(self):
        if self is not store and not done:
            done.append(True)
            store.compact()
        return original(self)

    monkeypatch.setattr(Store, moment, compact_first)
    with Store.open(store.folder) as reader, reader.reading():
        assert done
        assert sorted(reader.ids()) == ["b", "c"]
        assert reader.vectors[reader.alive].sum() == WIDTH * 3


def test_a_compaction_that_fails_leaves_no_file(store):
    put(store, "a", "b")
    store.delete(["a"])
    store._db.execute(
        "CREATE TEMP TRIGGER full BEFORE UPDATE ON state BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
    )
    for _ in range(2):
        with pytest.raises(StoreError, match="disk is full"):
            store.compact()
    assert [path.name for path in store.folder.glob("vectors-*")] == ["vectors-0.bin"]
    store._db.execute("DROP TRIGGER full")
    store.compact()
    assert [path.name for path in store.folder.glob("vectors-*")] != ["vectors-0.bin"]
    assert store.vectors.shape == (1, WIDTH)


def test_a_look_that_fails_is_taken_again(store, monkeypatch):
    for n, name in enumerate("abc"):
        put(store, name, value=float(n))
    with Store.open(store.folder) as reader:
        store.delete(["a"])
        store.compact()

        def full(self):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(Store, "_map", full)
        with pytest.raises(StoreError, match="Too many open files"), reader.reading():
            pass
        monkeypatch.undo()
        with reader.reading():
            assert reader.vectors[:, 0].tolist() == [1.0, 2.0]
            assert reader.alive.tolist() == [True, True]


def test_a_commit_that_cannot_be_read_back_is_looked_at_again(store, monkeypatch):
    put(store, "a")

    def full(self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Store, "_map", full)
    with pytest.raises(StoreError, match="Too many open files"):
        put(store, "b")
    monkeypatch.undo()
    with store.reading():
        assert len(store.vectors) == len(store.alive) == 2


def test_what_was_derived_before_a_backup_was_restored_is_not_used(store, tmp_path):
    put(store, "a")
    backup = shutil.copytree(store.folder, tmp_path / "backup")
    put(store, "b")
    store.derived("bm25").touch()
    store.close()
    shutil.copytree(backup, store.folder, dirs_exist_ok=True)
    with Store.open(store.folder) as again:
        put(again, "c")
        assert not again.derived("bm25").exists()


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("database is locked", "another program holds it"),
        ("attempt to write a readonly database", "give this user the right to write"),
        ("database disk image is malformed", "restore it, or index again"),
    ],
)
def test_what_sqlite_says_gets_its_own_advice(store, said, advice):
    with pytest.raises(StoreError, match=f"{said}; what was stored before is kept; {advice}"), store._errors():
        raise sqlite3.OperationalError(said)


def test_a_failed_compaction_leaves_nothing(store, monkeypatch):
    put(store, "a", "b")
    store.delete(["a"])
    (store.folder / "vectors-99.bin").touch()  # of a compaction that was killed

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.compact()
    assert len(list(store.folder.glob("vectors-*.bin"))) == 2
    monkeypatch.undo()
    store.compact()
    assert [path.name for path in store.folder.glob("vectors-*.bin")] == [store.vectors_name]


@pytest.mark.parametrize("remove_only", [True, False])
@pytest.mark.parametrize("locked", [True, False])
def test_another_index_in_its_place_is_not_touched(store, remove_only, locked):
    put(store, "a")
    if locked:
        store.writing().__enter__()
    shutil.rmtree(store.folder)
    if not remove_only:
        with Store.create(store.folder, store.manifest) as other:
            put(other, "b", "c")
    uses = [lambda: put(store, "d"), store.compact, lambda: store.delete(["a"]), store.reading().__enter__]
    for use in uses:
        with pytest.raises(StoreError, match="was replaced or removed after"):
            use()
    if not remove_only:
        with Store.open(store.folder) as other:
            assert list(other.ids()) == ["b", "c"]


def test_a_disk_without_locks_is_named(store, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("search_r3.index.store.fcntl.flock", flock)
    with pytest.raises(StoreError, match=r"cannot be locked \(No locks available\); put the index on a disk that has"):
        put(store, "a")


def test_a_long_document_is_read_once(store, monkeypatch):
    ranges = [(n // 3, n, n + 1) for n in range(6)]
    store.put([Document(name, "a long text") for name in "ab"], ranges, np.ones((6, WIDTH), np.float32))
    read, documents = [], store.documents
    monkeypatch.setattr(store, "documents", lambda ids: read.extend(ids) or documents(ids))
    assert [(row, passage.document.id, passage.text) for row, passage in store.scan()] == [
        (n, "ab"[n // 3], "a long text"[n]) for n in range(6)
    ]
    assert [passage.text for passage in store.get([5, 0, 4])] == ["g", "a", "n"]
    assert sorted(read) == ["a", "a", "b", "b"]
    left = [passage.document.id for _, passage in store.scan() if store.delete(["b"]) or True]
    assert left == ["a"] * 3


def test_one_writer_at_a_time_and_readers_see_commits(store):
    with Store.open(store.folder) as reader, Store.open(store.folder) as rival:
        with store.writing():
            put(store, "a")
            with pytest.raises(StoreError, match="another process is writing"):
                put(rival, "b")
        assert reader.moved()
        reader.refresh()
        assert not reader.moved()
        assert reader.get([0])[0].document.id == "a"
        put(rival, "b")  # the lock is free again, and the rival has seen "a"
        assert list(rival.ids()) == ["a", "b"]


WRITER = textwrap.dedent("""
    import sys
    import numpy as np
    from pathlib import Path
    from search_r3.index.store import Store
    from search_r3.records import Document
    store = Store.open(Path(sys.argv[1]))
    first = len(store)
    while True:
        names = [f"{first + n:06}" for n in range(20)]
        documents = [Document(name, "text " + name) for name in names]
        vectors = np.repeat(np.arange(first, first + 20, dtype=np.float32)[:, None], 8, axis=1)
        store.put(documents, [(n, 0, 11) for n in range(20)], vectors)
        first += 20
        print(first, flush=True)
""")


def test_killed_at_any_instant_it_opens_and_holds_every_acknowledged_batch(store):
    rng = random.Random(0)
    acknowledged = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(store.folder)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # it is writing now
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        acknowledged = int(lines[-1]) if lines else acknowledged
        with Store.open(store.folder) as again:  # checksums are verified here
            assert acknowledged <= len(again) <= acknowledged + 40
            assert len(again) == again.passages == again.rows
            acknowledged = len(again)
            for row, passage in again.scan():
                assert again.vectors[row, 0] == int(passage.document.id)


@pytest.mark.parametrize("table", ["passages", "documents", "state"])
def test_records_that_are_gone_are_found_on_opening(store, table):
    put(store, "a", "b")
    store.close()
    with sqlite3.connect(store.folder / "records.sqlite") as database:
        database.execute(f"DELETE FROM {table}")
    database.close()
    with pytest.raises(StoreError, match=r"records\.sqlite: records are missing; index again"):
        Store.open(store.folder)


@pytest.mark.parametrize(("field", "value"), [("dimension", -1), ("passage_tokens", -1), ("passage_overlap", 9)])
def test_impossible_manifests_are_named(store, field, value):
    store.close()
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"passage_tokens": 9} | {field: value}))
    with pytest.raises(StoreError, match=rf"manifest\.json: field {field}"):
        Store.open(store.folder)


def test_a_look_that_fails_at_its_very_beginning_leaves_nothing_open(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            Store, "_committed", lambda self: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error"))
        )
        with pytest.raises(StoreError, match="disk I/O error"), store.reading():
            pass
    with store.reading():
        pass
    put(store, "a")
