import json
from pathlib import Path

import pytest

from search_r3.train.config import Recipe, read_recipe
from tests.conftest import TEXTS, build_base

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke-cpu.yaml"


def write_set(folder: Path, count: int = 20, split: str = "train") -> Path:
    """A BEIR folder of near-copies of our texts."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{n}", "title": "", "text": f"{TEXTS[n % 6]} {n}"} for n in range(count)]
    queries = [{"_id": f"q{n}", "text": f"{TEXTS[n % 6][:18]} {n}"} for n in range(count)]
    for name, records in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = "".join(f"q{n}\td{n}\t1\n" for n in range(count))
    for name in {split, "test"}:
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    """A data folder with the set `train`, mined negatives and reasonings."""
    folder = tmp_path / "data"
    write_set(folder / "train")
    mined = [{"query_id": f"q{n}", "negatives": [f"d{(n + 6) % 20}", f"d{(n + 1) % 20}"]} for n in range(20)]
    (folder / "mined.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mined))
    thoughts = [{"query_id": f"q{n}", "thought": f"files and folders, {n}"} for n in range(0, 20, 2)]
    (folder / "thoughts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in thoughts))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny model without an embedding token."""
    return build_base(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture
def recipe(base) -> Recipe:
    """The smoke recipe with every term of the loss at work."""
    source = "sources=[{path: train, negatives: mined.jsonl, thoughts: thoughts.jsonl}]"
    return read_recipe(RECIPE, [f"model={base}", source, "loss.kl=0.5", "loss.sft=0.5", "dev.sets=[]"])
