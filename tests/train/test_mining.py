import json
from dataclasses import replace

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import DataError
from search_r3.evaluate.baselines import bm25
from search_r3.model.checkpoint import initialise
from search_r3.model.reasoning import control_ids
from search_r3.records import Reasoned, Status
from search_r3.train.bootstrap import RejectionSampling, bootstrap, quote, whole
from search_r3.train.data import _thoughts
from search_r3.train.mining import Mining, mine, model_search
from tests.conftest import TEXTS
from tests.train.conftest import write_set


def by_hand(texts):
    """One ranking for every query: rows 0, 1, 2, ... with falling scores."""

    def search(queries, k):
        scores = np.tile(np.linspace(1, 0.1, len(texts), dtype=np.float32)[:k], (len(queries), 1))
        return scores, np.tile(np.arange(k), (len(queries), 1))

    return search


def test_near_positives_and_positives_are_passed_over(root):
    records = {r["query_id"]: r for r in mine(root / "train", "train", Mining(3, 20, 0, 0.9), by_hand, False)}
    # q4's positive is row 4; rows 0-3 score higher, row 5 within 90% of it.
    scores = np.linspace(1, 0.1, 20)
    first = int(np.argmax(scores <= 0.9 * scores[4]))
    assert records["q4"] == {"query_id": "q4", "negatives": [f"d{first + n}" for n in range(3)], "rank": 5}
    everything = {r["query_id"]: r for r in mine(root / "train", "train", Mining(2, 20, 1, 0), by_hand, False)}
    assert everything["q4"]["negatives"] == ["d1", "d2"]
    assert everything["q1"]["negatives"] == ["d2", "d3"]


def test_bm25_and_a_model_can_search(root, model):
    for searcher in (bm25, model_search(model)):
        records = list(mine(root / "train", "train", Mining(), searcher, False))
        assert len(records) == 20
        assert all(record["query_id"][1:] != name[1:] for record in records for name in record["negatives"])
        assert any(record["negatives"] for record in records)


def test_bootstrap_keeps_what_helps_and_goes_on(tmp_path, model):
    folder = write_set(tmp_path / "set", 6)
    output = tmp_path / "thoughts.jsonl"
    how = RejectionSampling(samples=3, max_new_tokens=6)
    bootstrap(model, folder, output, how, limit=3, progress=False)
    first = output.read_text()
    assert len(first.splitlines()) == 3
    output.write_text(first[:-1])  # killed before the end of a line
    bootstrap(model, folder, output, how, limit=3, progress=False)
    assert output.read_text() == first
    output.write_text(first + '{"query_id": "q')  # killed while writing
    report = bootstrap(model, folder, output, how, progress=False)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_text().startswith(first)
    assert sorted(record["query_id"] for record in records) == [f"q{n}" for n in range(6)]
    assert [json.loads(line)["query_id"] for line in first.splitlines()] != ["q0", "q1", "q2"]  # drawn, not the first
    assert report["queries"] == 6
    assert bootstrap(model, folder, output, how, limit=3, progress=False)["queries"] == 3
    with pytest.raises(DataError, match=r"thoughts.jsonl: was made with another temperature, seed"):
        bootstrap(model, folder, output, replace(how, temperature=1.0, seed=1), progress=False)
    with pytest.raises(DataError, match=r"was made with another dtype"):
        bootstrap(SearchR3.from_pretrained(model.source, dtype="bfloat16"), folder, output, how, progress=False)
    settings = tmp_path / "thoughts.jsonl.settings.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "dtype"}))
    assert bootstrap(model, folder, output, how, progress=False)["queries"] == 6  # an older version noted none
    settings.unlink()
    with pytest.raises(DataError, match="does not tell how it was made"):
        bootstrap(model, folder, output, how, progress=False)
    for record in records:
        assert record["rank"] == min(record["ranks"])
        assert (record["thought"] is None) or record["rank"] < record["direct_rank"]


def test_a_block_that_was_cut_short_is_drawn_again_as_it_was(tmp_path, model, monkeypatch):
    monkeypatch.setattr("search_r3.train.bootstrap.ROWS", 6)
    folder = write_set(tmp_path / "set", 6)
    output = tmp_path / "thoughts.jsonl"
    how = RejectionSampling(samples=2, max_new_tokens=6, only_better=False)
    bootstrap(model, folder, output, how, progress=False)
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"query_id": "q')
    bootstrap(model, folder, output, how, progress=False)
    assert output.read_text() == whole


def test_another_model_can_write_what_is_embedded(tmp_path, model, base):
    folder = write_set(tmp_path / "set", 6)
    initialise(base, tmp_path / "writer")
    writer = SearchR3.from_pretrained(tmp_path / "writer")
    how = RejectionSampling(samples=2, max_new_tokens=6, only_better=False)
    bootstrap(model, folder, tmp_path / "a.jsonl", how, limit=3, documents=4, writer=writer, progress=False)
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    queries = [f"{TEXTS[n][:18]} {n}" for n in (int(record["query_id"][1:]) for record in records)]
    written = writer.reason(queries, max_new_tokens=6, temperature=0.8, samples=2)
    texts = [whole(one, control_ids(writer.engine)) or None for one in written]
    for number, record in enumerate(records):
        assert record["thought"] in texts[2 * number : 2 * number + 2]
        assert max(record["ranks"]) <= 4


def test_one_sample_is_not_ranked_and_short_ones_are_not_kept(tmp_path, model):
    folder = write_set(tmp_path / "set", 6)
    how = RejectionSampling(samples=1, max_new_tokens=6, only_better=False)
    report = bootstrap(model, folder, tmp_path / "a.jsonl", how, progress=False)
    assert report == {"queries": 6, "kept": 6}
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(record.keys() == {"query_id", "thought"} for record in records)
    words = sorted(len(record["thought"].split()) for record in records)
    least = words[-1]
    assert words[0] < least
    how = RejectionSampling(samples=1, max_new_tokens=6, only_better=False, least_words=least)
    report = bootstrap(model, folder, tmp_path / "b.jsonl", how, progress=False)
    assert report == {"queries": 6, "kept": words.count(least)}


def test_a_reasoning_cut_short_is_taken_back_to_whole_sentences():
    def cut(text, last=1):
        return whole(Reasoned(text, np.zeros(1), (1, last), (), Status.FORCED), {2, 3})

    assert cut("One sentence. Half of anoth") == "One sentence."
    assert cut("Is it? Yes! 3.5 of th") == "Is it? Yes!"
    assert cut("no end") == "no end"
    assert cut("A line\nand half") == "A line"
    assert cut("- tar\n- an archive", 2) == "- tar\n- an archive"  # ended by itself, if not by the embedding token


def test_quotations_are_the_title_and_the_sentence_nearest_to_the_query(root):
    (root / "train" / "corpus.jsonl").write_text(
        '{"_id": "d0", "title": "gzip", "text": "tar packs files. It never compresses. See gzip for that."}\n'
        '{"_id": "d1", "title": "", "text": "one\\ntwo words more\\nthree"}\n'
    )
    (root / "train" / "queries.jsonl").write_text(
        '{"_id": "q0", "text": "that with gzip?"}\n{"_id": "q1", "text": "two words"}\n'
    )
    (root / "train" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    assert quote(root / "train", root / "quotes.jsonl", words=3) == 2
    assert _thoughts(root / "quotes.jsonl") == {"q0": "gzip: See gzip", "q1": "two words more"}
    with pytest.raises(DataError, match=r"quotes\.jsonl: exists already"):
        quote(root / "train", root / "quotes.jsonl")
