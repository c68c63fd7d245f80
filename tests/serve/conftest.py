from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from search_r3.model.search_r3 import SearchR3
from search_r3.records import Document
from search_r3.retriever import Retriever
from search_r3.serve.app import Served, create_app
from search_r3.serve.settings import Settings

DOCUMENTS = [
    Document("tar", "tar packs many files into one archive", "tar", {"kind": "archive", "year": 1979, "old": True}),
    Document("zip", "zip packs and compresses files", "zip", {"kind": "archive", "year": 1989, "old": False}),
    Document("ls", "ls lists the files of a folder", "ls", {"kind": "files", "year": 1971, "old": True}),
    Document("df", "df shows how much space is left on a disk", "df", {"kind": "disk", "year": 1}),
]


@pytest.fixture
def retriever(model: SearchR3, tmp_path: Path) -> Iterator[Retriever]:
    with Retriever.create(tmp_path / "manual", model) as made:
        made.add(DOCUMENTS)
        yield made


@pytest.fixture
def settings() -> Settings:
    return Settings(timeout=20)


@pytest.fixture
def client(retriever: Retriever, settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app([Served("manual", retriever)], settings), raise_server_exceptions=False) as made:
        yield made
