"""Every example runs, on the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search_r3.evaluate.collection import load_collection
from search_r3.train.config import Source
from search_r3.train.data import HeldOut, load_examples

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "words"), [("search", "reasoned over"), ("environment", "reward error"), ("reward", '"reasoning"')]
)
def test_scripts(name, words, checkpoint, tmp_path):
    environment = os.environ | {"MODEL": str(checkpoint), "OMP_NUM_THREADS": "1", "SEARCH_R3_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_pairs_become_a_collection(tmp_path):
    pairs = [
        {"anchor": f"query {n // 2}", "positives": [f"text\u2028 {n}", "a text of all"], "negative": f"wrong {n % 2}"}
        | {"thought": "a thought"}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs))
    for _ in range(2):  # again is the same
        subprocess.run([sys.executable, EXAMPLES / "pairs.py", "pairs.jsonl", "mine"], check=True, cwd=tmp_path)
    trained, tested = (load_collection(tmp_path / "mine", split) for split in ("train", "test"))
    assert len(trained.documents) == len(tested.documents) == 43
    assert (len(trained.queries), len(tested.queries)) == (18, 2)
    assert not {query.text for query in trained.queries} & {query.text for query in tested.queries}
    assert all(len(judged) == 3 for judged in trained.judgements.values())
    source = Source(path="mine", negatives="mine/negatives.jsonl", thoughts="mine/thoughts.jsonl")
    (examples,), _ = load_examples([source], HeldOut({}, {}), tmp_path)
    assert {example.thought for example in examples} == {"a thought"}
    assert all({passage.text for passage in example.negatives} == {"wrong 0", "wrong 1"} for example in examples)


def test_the_notebook_runs_from_top_to_bottom(checkpoint, monkeypatch):
    monkeypatch.setenv("MODEL", str(checkpoint))
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["results"][0].modes["bm25"].scores
