"""The server as a process: what it promised survives how it ends, and bad clients hurt nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from search_r3.index.store import Store
from search_r3.model.search_r3 import SearchR3
from search_r3.retriever import Retriever
from tests.serve.conftest import DOCUMENTS


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`search-r3 serve` on a free port, ready."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "search_r3", "serve", str(folder), "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the server ended"
            found = re.search(r"http://[\d.]+:\d+", line)
        url = found.group()
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def read_all(connection: socket.socket) -> None:
    while connection.recv(1 << 20):
        pass


@pytest.fixture
def folder(model: SearchR3, tmp_path: Path) -> Path:
    with Retriever.create(tmp_path / "manual", model) as made:
        made.add(DOCUMENTS)
    return tmp_path / "manual"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_acknowledged_documents_survive(folder: Path, end: signal.Signals) -> None:
    acknowledged: list[str] = []
    with serving(folder) as (process, url):

        def add(client: int) -> None:
            with httpx.Client(base_url=url, timeout=30) as connection:
                for number in range(1000):
                    name = f"{client}-{number}"
                    body = {"documents": [{"id": name, "text": f"document {name}"}]}
                    try:
                        if connection.post("/documents", json=body).status_code == 200:
                            acknowledged.append(name)
                    except httpx.TransportError:
                        return

        threads = [threading.Thread(target=add, args=(client,)) for client in range(4)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 20:
            time.sleep(0.01)
        process.send_signal(end)
        code = process.wait(30)
        for thread in threads:
            thread.join()
        assert code == (0 if end is signal.SIGTERM else -signal.SIGKILL)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    with Store.open(folder) as store:
        assert set(acknowledged) <= set(store.ids())


def test_an_index_that_is_made_empty_is_filled(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    with serving(folder, str(tmp_path / "new"), "--create", "-c", str(checkpoint)) as (_, url):
        assert [index["documents"] for index in httpx.get(f"{url}/indexes").json()] == [len(DOCUMENTS), 0]
        assert httpx.post(f"{url}/search", json={"query": "a", "index": "new", "hybrid": True}).json()["hits"] == []
        body = {"documents": [{"id": "a", "text": "a text"}], "index": "new"}
        assert httpx.post(f"{url}/documents", json=body).json()["added"] == 1
    with Store.open(tmp_path / "new") as store:
        assert list(store.ids()) == ["a"]


def test_a_thousand_clients_and_one_that_never_reads(folder: Path) -> None:
    with serving(folder, "--timeout", "20") as (_, url):
        host, port = url.removeprefix("http://").split(":")
        deaf = socket.create_connection((host, int(port)))
        body = json.dumps({"query": "files", "reason": True, "max_new_tokens": 1024}).encode()
        head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        deaf.sendall(head.format("/search/stream", len(body)).encode() + body)
        halted = socket.create_connection((host, int(port)))  # sends half a request and waits
        halted.sendall(
            b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )

        async def crowd() -> list[int]:
            limits = httpx.Limits(max_connections=1000)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
                asked = [client.post("/v1/embeddings", json={"input": f"text {n}"}) for n in range(1000)]
                return [answer.status_code for answer in await asyncio.gather(*asked)]

        assert asyncio.run(crowd()) == [200] * 1000
        deaf.close()
        halted.close()
        assert httpx.get(f"{url}/ready").status_code == 200


def test_a_client_that_does_not_read_is_cut_off(folder: Path) -> None:
    with serving(folder, "--timeout", "2") as (_, url):
        host, port = url.removeprefix("http://").split(":")
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        body = json.dumps({"input": ["a"] * 2000}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        deaf.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(12)
        with pytest.raises(ConnectionResetError):
            read_all(deaf)
        deaf.close()
        assert httpx.get(f"{url}/ready").status_code == 200


def test_nothing_of_a_user_is_logged(folder: Path) -> None:
    with serving(folder) as (process, url):
        httpx.post(f"{url}/search", json={"query": "my secret question"})
        httpx.post(f"{url}/search", content=b'{"query": "my secret')
        httpx.delete(f"{url}/documents/my-secret-id")
        process.terminate()
        process.wait(30)
        assert process.stderr is not None
        assert process.stderr.read() == ""
