"""The examples in docstrings, with a tiny model in place of the default one."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import search_r3
from search_r3 import Document, SearchR3

ROOT = Path(search_r3.__file__).parent
NAMES = [
    "search_r3." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]
FINDER = doctest.DocTestFinder()


@pytest.fixture
def globs(checkpoint, monkeypatch, tmp_path):
    load = SearchR3.from_pretrained
    monkeypatch.setattr(SearchR3, "from_pretrained", lambda source="default": load(checkpoint))
    monkeypatch.chdir(tmp_path)
    return {"SearchR3": SearchR3, "Document": Document}


def examples():
    for name in NAMES:
        for test in FINDER.find(import_module(name), name):
            if test.examples and "SKIP" not in test.docstring:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("test", examples())
def test_example(test, globs):
    test.globs |= globs
    assert doctest.DocTestRunner().run(test).failed == 0


def test_there_are_some():
    assert len(list(examples())) >= 5
