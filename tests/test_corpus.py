import gzip
import json
import os

import pytest

from search_r3.corpus import Fields, read_documents, read_judgements, read_queries
from search_r3.errors import DataError
from search_r3.evaluate.collection import DEMO


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


GOOD = {"_id": "1", "title": "T", "text": "body", "year": 1999}


def test_jsonl_with_metadata_and_gzip(tmp_path):
    path = write(tmp_path / "c.jsonl", GOOD, "", {"id": 7, "contents": "only text", "metadata": {"x": [1]}})
    one, two = read_documents(path)
    assert (one.id, one.title, one.text, one.metadata, one.content) == ("1", "T", "body", {"year": 1999}, "T\nbody")
    assert (two.id, two.content, two.metadata) == ("7", "only text", {"x": [1]})
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [d.id for d in read_documents(tmp_path / "c.jsonl.gz")] == ["1", "7"]


def test_beir_folder_and_bundled_demo():
    documents = list(read_documents(DEMO))
    queries, judgements = read_queries(DEMO / "queries.jsonl"), read_judgements(DEMO / "qrels/test.tsv")
    assert (len(documents), len(queries), len(judgements)) == (200, 50, 50)
    assert {d for docs in judgements.values() for d in docs} <= {d.id for d in documents}


def test_csv_tsv_and_named_fields(tmp_path):
    path = write(tmp_path / "c.csv", "key,body,head,lang", '1,"two\nlines, quoted",A,en')
    (document,) = read_documents(path, Fields(id="key", title="head"))
    assert (document.id, document.text, document.title, document.metadata) == (
        "1",
        "two\nlines, quoted",
        "A",
        {"lang": "en"},
    )
    (document,) = read_documents(write(tmp_path / "c.tsv", "id\ttext", "x\thello"))
    assert document.text == "hello"


def test_folder_of_files(tmp_path, caplog):
    for name in ("sub", ".git"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "c.txt", " " if name == "sub" else "hidden")
    write(tmp_path / ".secret.txt", "hidden")
    write(tmp_path / "sub" / "b.md", "# B")
    write(tmp_path / "a.txt", "A")
    write(tmp_path / "ignored.bin", "?")
    assert [(d.id, d.title) for d in read_documents(tmp_path)] == [("a.txt", "a"), ("sub/b.md", "b")]
    assert "1 files of other kinds passed over (.bin)" in caplog.messages[0]
    assert caplog.messages[1].endswith("c.txt: empty, passed over")


def test_line_ends_of_windows_are_none_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    assert [document.text for document in read_documents(tmp_path)] == ["one\ntwo"]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    import pyarrow

    parquet.write_table(pyarrow.table({"id": ["1", "2"], "text": ["a", ""]}), tmp_path / "c.parquet")
    documents = read_documents(tmp_path / "c.parquet")
    assert next(documents).text == "a"
    with pytest.raises(DataError, match=r"c\.parquet, row 2: field 'text' of document '2' is empty"):
        next(documents)
    (tmp_path / "bad.parquet").write_bytes(b"nope")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_documents(tmp_path / "bad.parquet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"c\.jsonl:2: broken JSON \(Expecting property name.* at column 2\)"),
        ("[1]", r"c\.jsonl:2: a list; every line must be one JSON object"),
        ({"text": "x"}, r"c\.jsonl:2: no field for the id .*found text\); name it with --id-field"),
        ({"_id": "2"}, r"c\.jsonl:2: no field for the text"),
        ({"_id": "", "text": "x"}, r"c\.jsonl:2: field '_id' must be a non-empty string"),
        ({"_id": None, "text": "x"}, r"c\.jsonl:2: field '_id' must be"),
        ({"_id": "2", "text": 5}, r"c\.jsonl:2: field 'text' must be text, got int"),
        ({"_id": "2", "text": None}, r"c\.jsonl:2: field 'text' must be text, got nothing"),
        ({"_id": "2", "text": " \n"}, r"c\.jsonl:2: field 'text' of document '2' is empty"),
        ({"_id": "1", "text": "x"}, r"c\.jsonl:2: id '1' was used before, in c\.jsonl:1"),
        ('{"_id": "2", "text": "\\ud800"}', r"c\.jsonl:2: field 'text' holds half of a surrogate pair"),
        ('{"_id": "2", "text": "x", "score": 1e999}', r"c\.jsonl:2: a field's number is not finite"),
    ],
)
def test_bad_records_are_named_or_skipped(tmp_path, line, message):
    path = write(tmp_path / "c.jsonl", GOOD, line, {"_id": "3", "text": "fine"})
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)
    bad = []
    assert [d.id for d in read_documents(path, on_bad=bad.append)] == ["1", "3"]
    assert len(bad) == 1


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"_id": "2", "text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: byte 26 of the line is not UTF-8"):
        list(read_documents(path))
    (tmp_path / "c.csv").write_bytes(b"id,text\n1,caf\xe9\n")
    with pytest.raises(DataError, match=r"c\.csv:2: byte 6 of the line is not UTF-8"):
        list(read_documents(tmp_path / "c.csv"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"x\.txt: byte 4 is not UTF-8"):
        list(read_documents(tmp_path / "d"))


def test_broken_tables_and_archives(tmp_path):
    with pytest.raises(DataError, match=r"c\.csv:3: 1 columns, but the header names 2"):
        list(read_documents(write(tmp_path / "c.csv", "id,text", "1,a", "2")))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="empty; the first line must name the columns"):
        list(read_documents(tmp_path / "empty.csv"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_documents(tmp_path / "cut.jsonl.gz"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("x.docx", "unknown kind of source"),
        ("x.txt.gz", "unknown kind of source"),
    ],
)
def test_unknown_sources(tmp_path, name, message):
    (tmp_path / "x.docx").touch()
    (tmp_path / "x.txt.gz").touch()
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / name))


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"no corpus\.jsonl and no \.txt, \.md or \.markdown file"):
        list(read_documents(tmp_path))


def test_queries_and_judgements_are_checked(tmp_path):
    with pytest.raises(DataError, match=r"q\.jsonl:2: query id 'q' was used before"):
        read_queries(write(tmp_path / "q.jsonl", {"_id": "q", "text": "a"}, {"_id": "q", "text": "b"}))
    with pytest.raises(DataError, match=r"q\.jsonl:1: field 'text' of query 'q' is empty"):
        read_queries(write(tmp_path / "q.jsonl", {"_id": "q", "text": " "}))
    with pytest.raises(DataError, match=r"t\.tsv:2: 2 columns"):
        read_judgements(write(tmp_path / "t.tsv", "query-id\tcorpus-id\tscore", "q\td"))
    with pytest.raises(DataError, match=r"t\.tsv:2: score 'x' is not a whole number"):
        read_judgements(write(tmp_path / "t.tsv", "query-id\tcorpus-id\tscore", "q\td\tx"))

    with pytest.raises(DataError, match=r"t\.tsv:4: query 'q' and document 'd' had another score before"):
        read_judgements(write(tmp_path / "t.tsv", "query-id\tcorpus-id\tscore", "q\td\t2", "q\td\t2", "q\td\t0"))


def test_a_title_field_that_no_record_has_is_an_error(tmp_path):
    path = write(tmp_path / "c.jsonl", {"_id": "a", "text": "a", "head": "h"}, {"_id": "b", "text": "b"})
    with pytest.raises(DataError, match=r"c\.jsonl:1: no field for the title \(looked for haed; found _id, text, h"):
        list(read_documents(path, Fields(title="haed"), on_bad=print))
    assert [document.title for document in read_documents(path, Fields(title="head"))] == ["h", ""]


def test_what_would_lose_records_silently_is_an_error(tmp_path):
    unclosed = tmp_path / "unclosed.csv"
    unclosed.write_text('id,text\na,"foo\nb,bar\nc,baz\n')
    with pytest.raises(DataError, match=r"unclosed\.csv:4: not a valid table"):
        list(read_documents(unclosed))
    short = tmp_path / "short.csv"
    short.write_text("id,text\na,one\nb\nc,three\n")
    with pytest.raises(DataError, match=r"short\.csv:3: 1 columns"):
        list(read_documents(short))
    bad = []
    assert [document.id for document in read_documents(short, on_bad=bad.append)] == ["a", "c"]
    assert len(bad) == 1
    twice = tmp_path / "twice.csv"
    twice.write_text("id,text,text\na,one,two\n")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        list(read_documents(twice))
    number = tmp_path / "number.jsonl"
    number.write_text('{"_id": "a", "text": "x", "score": NaN}\n')
    with pytest.raises(DataError, match=r"number\.jsonl:1: broken JSON \(NaN is not JSON\)"):
        list(read_documents(number))


def test_quotes_in_tab_separated_text_are_characters(tmp_path):
    table = tmp_path / "table.tsv"
    table.write_text('id\ttext\na\t"foo\nb\tbar\n')
    assert [document.text for document in read_documents(table)] == ['"foo', "bar"]


def test_judgements_may_lack_a_header(tmp_path):
    judgements = tmp_path / "test.tsv"
    judgements.write_text("q1\td1\t1\nq2\td2\t0\n")
    assert read_judgements(judgements) == {"q1": {"d1": 1}, "q2": {"d2": 0}}
    judgements.write_text("query-id\tcorpus-id\tscore\nq2\td2\t99999999999999\n")
    with pytest.raises(DataError, match=r"test\.tsv:2: score"):
        read_judgements(judgements)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.md").write_text("one")
    walk = os.walk

    def refused(path, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        return walk(path)

    monkeypatch.setattr(os, "walk", refused)
    with pytest.raises(DataError, match=r"closed: this folder cannot be read \(Permission denied\)"):
        list(read_documents(tmp_path))
    bad = []
    assert [document.text for document in read_documents(tmp_path, on_bad=bad.append)] == ["one"]
    assert len(bad) == 1


def test_broken_rows_of_a_tab_separated_file_are_skipped(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_bytes(b"id\ttext\na\tcaf\xe9\n\nb\ttwo\rlines\nc\nd\tgood\n")
    with pytest.raises(DataError, match=r"t\.tsv:2: byte 6 of the line is not UTF-8"):
        list(read_documents(table))
    bad = []
    assert [document.id for document in read_documents(table, on_bad=bad.append)] == ["b", "d"]
    assert [str(error).split(": ")[0].rsplit(":")[-1] for error in bad] == ["2", "5"]
