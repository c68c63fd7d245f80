from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
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


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The app on a real port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


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
