import json

import numpy as np
import pytest

from search_r3.errors import DataError
from search_r3.evaluate.metrics import score_queries
from tests.train.conftest import write_set

mteb = pytest.importorskip("mteb", reason="no tests of the mteb adapter: pip install mteb")
from mteb.models.models_protocols import EncoderProtocol, SearchProtocol  # noqa: E402

from search_r3.evaluate.mteb import MtebEncoder, MtebSearch, run, task_of  # noqa: E402


def test_mtebs_own_check_passes(model):
    for adapter, protocol in ((MtebEncoder(model), EncoderProtocol), (MtebSearch(model), SearchProtocol)):
        assert isinstance(adapter, protocol)
        results = mteb.mock_run(adapter)
        getattr(adapter, "close", lambda: None)()
        ran = {name: status for name, status in results.items() if status is not None}
        assert len(ran) >= (20 if protocol is EncoderProtocol else 3)
        assert results.all_passed, {
            name: str(status)[:300] for name, status in ran.items() if "Error" in type(status).__name__
        }


@pytest.mark.parametrize("reason", [False, True])
def test_a_local_task_scores_as_we_do(model, tmp_path, reason):
    folder = write_set(tmp_path / "my-set", 12)
    scores = run(model, [str(folder)], tmp_path / "results", reason=reason)
    task = task_of(folder)
    task.load_data()
    parts = task.dataset["default"]["test"]
    documents = model.encode_documents([row["text"] for row in parts["corpus"]])
    queries = model.encode_queries([row["text"] for row in parts["queries"]], reason=reason)
    ranked = {
        query: {parts["corpus"][d]["id"]: float(row[d]) for d in range(len(documents))}
        for query, row in zip([row["id"] for row in parts["queries"]], queries @ documents.T, strict=True)
    }
    expected = np.mean(list(score_queries(parts["relevant_docs"], ranked)["nDCG@10"].values()))
    assert scores == {"MySet": pytest.approx(expected, abs=1e-5)}
    (path,) = (tmp_path / "results").rglob("MySet.json")
    assert json.loads(path.read_text())["scores"]["test"][0]["main_score"] == pytest.approx(expected, abs=1e-5)
    engine = MtebSearch(model, reason=reason)
    found = mteb.evaluate(engine, task, cache=None, show_progress_bar=False)
    engine.close()
    assert found.task_results[0].get_score() == pytest.approx(expected, abs=1e-5)


def test_unknown_tasks(model, tmp_path):
    with pytest.raises(DataError, match="neither a BEIR folder nor a task"):
        run(model, ["NoSuchTask"], tmp_path)


def test_a_split_that_a_task_has_not_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="--split validation: SciFact is tested on test"):
        run(model, ["SciFact"], tmp_path, split="validation")
    folder = write_set(tmp_path / "my-set", 4, split="dev")
    assert run(model, [str(folder)], tmp_path / "results", split="dev").keys() == {"MySet"}
    (path,) = (tmp_path / "results").rglob("MySet.json")
    assert json.loads(path.read_text())["scores"].keys() == {"dev"}


def test_two_tasks_of_one_name_are_refused(model, tmp_path):
    folders = [str(write_set(tmp_path / name / "my-set", 2)) for name in "ab"]
    with pytest.raises(DataError, match="a second MySet, whose results would replace the first's"):
        run(model, folders, tmp_path / "results")
