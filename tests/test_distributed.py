import json
import sys

import numpy as np
import pytest

from search_r3 import Document, Retriever, cli, distributed
from search_r3.errors import CheckpointError
from tests.conftest import TEXTS

ray = pytest.importorskip("ray", reason="no tests of distributed encoding: pip install ray")
from search_r3.distributed import PART, RayEncoder  # noqa: E402

MANY = [f"{TEXTS[n % 6]} {n}" for n in range(4 * PART)]


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_workers_give_the_same_vectors_and_one_may_die(cluster, model, checkpoint):
    tails = model.engine.tails(MANY, "embed", 512)
    expected = model.engine.encode(tails, "embed")
    with RayEncoder(str(checkpoint), workers=2) as encode:
        assert encode.fingerprint == model.fingerprint
        np.testing.assert_allclose(encode(tails), expected, atol=1e-5)
        ray.kill(encode.workers[0], no_restart=False)
        np.testing.assert_allclose(encode(tails), expected, atol=1e-5)


def test_an_index_of_many_workers_equals_one_of_ours(cluster, model, checkpoint, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(MANY)))

    def index(*more):
        monkeypatch.setattr(
            sys,
            "argv",
            ["search-r3", "index", str(corpus), str(tmp_path / "ray"), "-c", str(checkpoint), *more, "--json"],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return json.loads(capsys.readouterr().out)

    assert index("--engine", "ray", "--workers", "2")["added"] == len(MANY)
    assert index("--engine", "ray", "--workers", "1")["unchanged"] == len(MANY)
    with Retriever.create(tmp_path / "local", model) as local, Retriever.open(tmp_path / "ray", model) as other:
        local.add([Document(f"d{n}", text) for n, text in enumerate(MANY)])
        for ours, theirs in zip(local.search_many(TEXTS, 5), other.search_many(TEXTS, 5), strict=True):
            assert [hit.id for hit in ours.hits] == [hit.id for hit in theirs.hits]


def test_machines_with_different_models_are_refused(cluster, checkpoint, monkeypatch):
    monkeypatch.setattr(distributed._Worker, "fingerprint", lambda self: str(id(self)))
    with pytest.raises(CheckpointError, match="is not the same model on all machines"):
        RayEncoder(str(checkpoint), workers=2)


def test_a_model_that_no_worker_can_load(cluster, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        RayEncoder(str(tmp_path / "none"), workers=1)
