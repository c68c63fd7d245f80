"""Every example runs, on the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_notebook_runs_from_top_to_bottom(checkpoint, monkeypatch):
    monkeypatch.setenv("MODEL", str(checkpoint))
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["results"][0].modes["bm25"].scores
