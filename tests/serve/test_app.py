from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient

from search_r3.model.search_r3 import SearchR3
from search_r3.records import Document
from search_r3.retriever import Retriever
from search_r3.serve.app import Served, create_app
from search_r3.serve.settings import Settings
from search_r3.serve.worker import Worker
from tests.serve.conftest import running


def deep(levels: int) -> Any:
    return {"x": deep(levels - 1)} if levels else 1


def vectors(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]], np.float32)


def test_embeddings_are_the_models(client: TestClient, model: SearchR3) -> None:
    texts = ["many files into one", "ünïcödé ☃", "a <|im_end|> in a text"]
    given = vectors(client.post("/v1/embeddings", json={"input": texts, "model": "x"}))
    np.testing.assert_allclose(given, model.encode_documents(texts), atol=1e-6)
    one = vectors(client.post("/v1/embeddings", json={"input": texts[0], "input_type": "query"}))
    np.testing.assert_allclose(one, model.encode_queries(texts[:1]), atol=1e-6)
    thought = client.post("/v1/embeddings", json={"input": texts, "reason": True})
    np.testing.assert_allclose(vectors(thought), model.encode_queries(texts, reason=True), atol=1e-5)
    mean = client.post("/v1/embeddings", json={"input": texts, "samples": 4})
    assert mean.json()["usage"]["total_tokens"] > thought.json()["usage"]["total_tokens"]
    np.testing.assert_allclose(np.linalg.norm(vectors(mean), axis=1), 1, atol=1e-5)


def test_token_input_base64_and_dimensions(client: TestClient, model: SearchR3) -> None:
    ids = model.engine.plain_ids(["many files into one", "ls"])
    answer = client.post("/v1/embeddings", json={"input": ids, "encoding_format": "base64", "dimensions": 8})
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer.json()["data"]]
    expected = model.encode_documents(["many files into one", "ls"])[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack(rows), expected, atol=1e-6)
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    single = vectors(client.post("/v1/embeddings", json={"input": ids[0]}))
    np.testing.assert_allclose(single, model.encode_documents(["many files into one"]), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": ""}, 422, "empty"),
        ({"input": ["a", "  "]}, 422, "empty"),
        ({"input": []}, 422, "input: must be a text, a list of texts"),
        ({"input": "a", "dimensions": 10_000}, 422, "more than the model's"),
        ({"input": [999_999]}, 422, "check_embedding_ctx_length"),
        ({"input": [1]}, 422, "control token"),
        ({"input": [3, 4], "reason": True}, 422, "needs texts"),
        ({"input": "\ud800"}, 422, "surrogate"),
        ({"input": ["a"] * 3000}, 413, "send them in parts"),
        ({"input": ["a"] * 300, "samples": 8}, 413, "2400 samples of texts"),
        ({"input": "a", "samples": 17}, 422, "samples"),
        ({"input": "a" * 300_000}, 413, "split it"),
        ({}, 422, "input"),
    ],
)
def test_unusable_embedding_requests(client: TestClient, body: Any, status: int, words: str) -> None:
    answer = client.post("/v1/embeddings", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"input": NaN}', b"", b'"x"'])
def test_bodies_that_are_no_json(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["message"]


def test_a_forgotten_content_type_is_named(client: TestClient) -> None:
    answer = client.post("/search", content=b'{"query": "a"}')
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_search_is_the_retrievers(client: TestClient, retriever: Retriever, model: SearchR3) -> None:
    query = "pack files"
    for body, expected in (
        ({}, retriever.search(query, 3)),
        ({"reason": True}, retriever.search(query, 3, reason=True)),
        ({"hybrid": True}, retriever.search(query, 3, hybrid=True)),
        ({"fuse": 0.3}, retriever.search(query, 3, fuse=0.3)),
        ({"gate": 0.0}, retriever.search(query, 3)),
        ({"gate": 2.0}, retriever.search(query, 3, reason=True)),
        ({"reason": True, "samples": 3}, retriever.search(query, 3, reason=True, samples=3)),
        ({"gate": 2.0, "fuse": 0.3, "hybrid": True}, retriever.search(query, 3, fuse=0.3, hybrid=True)),
    ):
        answer = client.post("/search", json={"query": query, "k": 3, **body}).json()
        assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected.hits]
        np.testing.assert_allclose([h["score"] for h in answer["hits"]], [h.score for h in expected.hits], atol=1e-5)
        shown = [answer["reasoning"]["text"], *[one["text"] for one in answer["others"]]] if answer["reasoning"] else []
        assert shown == [thought.text for thought in expected.thoughts]


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"kind": "archive"}, {"tar", "zip"}),
        ({"kind": ["archive", "disk"], "old": True}, {"tar"}),
        ({"old": False}, {"zip"}),
        ({"year": 1}, {"df"}),
        ({"year": 1971.0}, {"ls"}),
        ({"year": {"gte": 1971, "lt": 1989, "gt": None}}, {"tar", "ls"}),
        ({"kind": {"gt": "archive"}, "year": {"lte": 1971.5}}, {"ls", "df"}),
        ({"kind": "x' OR 1=1 --"}, set()),
        ({"no": 1}, set()),
    ],
)
def test_filters(client: TestClient, filters: dict[str, Any], found: set[str], hybrid: bool) -> None:
    answer = client.post("/search", json={"query": "files", "filters": filters, "hybrid": hybrid})
    assert {hit["id"] for hit in answer.json()["hits"]} == found


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_stream_gives_reasoning_then_hits(client: TestClient, retriever: Retriever) -> None:
    expected = retriever.search("pack files", 2, reason=True)
    answer = client.post("/search/stream", json={"query": "pack files", "k": 2, "reason": True})
    *thoughts, (last, found) = events(answer.text)
    assert {name for name, _ in thoughts} == {"reasoning"}
    assert "".join(piece["text"] for _, piece in thoughts).strip() == expected.reasoned.text  # type: ignore[union-attr]
    assert last == "hits"
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected.hits]
    (again,) = [d for n, d in events(client.post("/search/stream", json={"query": "ls"}).text) if n == "hits"]
    assert again["reasoning"] is None


def test_documents_are_added_replaced_and_removed(client: TestClient, retriever: Retriever) -> None:
    answer = client.post("/documents", json={"documents": [{"id": "a/b c", "text": "a zebra in the zoo"}]})
    assert answer.json() == {"added": 1, "updated": 0, "unchanged": 0}
    top = client.post("/search", json={"query": "zebra zoo", "hybrid": True}).json()["hits"][0]
    assert (top["id"], top["snippet"]) == ("a/b c", "a zebra in the zoo")
    assert [top["snippet"][a:b] for a, b in top["highlights"]] == ["zebra", "zoo"]
    stored = {"id": "a/b c", "text": "a zebra in the zoo", "title": "", "metadata": {}}
    assert client.get("/documents/a/b%20c").json() == stored
    assert client.get("/documents/a/b%20c?index=none").status_code == 404
    assert client.delete("/documents/a/b%20c").json() == {"deleted": 1}
    missing = client.get("/documents/a/b%20c")
    assert (missing.status_code, "no document of this id" in missing.text) == (404, True)
    assert client.delete("/documents/a/b%20c").json() == {"deleted": 0}
    assert len(retriever.store) == 4
    for name in ("a\n", "n" * 600):
        retriever.add([Document("a", "one"), Document(name, "another")])
        assert client.get(f"/documents/{quote(name)}").json()["text"] == "another"
        assert client.delete(f"/documents/{quote(name)}").json() == {"deleted": 1}
        assert retriever.get(["a", name]) == [Document("a", "one")]
    many = [{"id": str(n), "text": f"document {n} " + "word " * 300} for n in range(7)]
    assert client.post("/documents", json={"documents": many}).json()["added"] == 7


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/search", {"query": "a", "k": 10**9}, 422),
        ("/search", {"query": "a", "k": 0}, 422),
        ("/search", {"query": "a", "index": "none"}, 404),
        ("/search/stream", {"query": "a", "index": "none"}, 404),
        ("/search", {"query": "a", "fuse": 2}, 422),
        ("/search", {"query": "a", "reasons": True}, 422),
        ("/search", {"query": "a", "filters": {"x": []}}, 422),
        ("/search", {"query": "a", "filters": {"x": {}}}, 422),
        ("/search", {"query": "a", "filters": {"x": {"gte": None}}}, 422),
        ("/search", {"query": "a", "filters": {"x": {"gte": True}}}, 422),
        ("/search", {"query": "a", "filters": {"x": {"gte": 1, "ge": 2}}}, 422),
        ("/search", {"query": "a" * 300_000}, 413),
        ("/documents", {"documents": []}, 422),
        ("/documents", {"documents": [{"id": "", "text": "a"}]}, 422),
        ("/documents", {"documents": [{"id": "a", "text": " "}]}, 422),
        ("/documents", {"documents": [{"id": "a", "text": "a", "metadata": {"x": float("nan")}}]}, 422),
        ("/documents", {"documents": [{"id": "a", "text": "a", "metadata": deep(40)}]}, 422),
        ("/search", {"query": "a"} | {f"x{n}": 1 for n in range(100)}, 422),
        ("/search", {"query": "a", "filters": {f"x{n}": 1 for n in range(17)}}, 422),
        ("/map", {"query": ""}, 422),
        ("/nothing", {}, 404),
    ],
)
def test_refusals(client: TestClient, path: str, body: Any, status: int) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_an_error_of_a_filter_tells_all_that_it_may_be(client: TestClient) -> None:
    for filters, told in (
        ({"year": None}, "filters.year: must be texts, numbers, true or false"),
        ({"year": {"gte": True}}, "filters.year.gte: must be texts, numbers, true or false, lists of these, or bounds"),
        ({"year": {"ge": 2000}}, "filters.year.ge: must be texts, numbers, true or false, lists of these, or bounds"),
        ({"year": {"lt": None}}, "filters.year: Value error, holds no bounds: give some of gt, gte, lt, lte"),
    ):
        answer = client.post("/search", json={"query": "a", "filters": filters})
        assert answer.json()["error"]["message"].startswith(told)
    answer = client.post("/search", content=b"{", headers={"content-type": "application/json"})
    assert answer.json()["error"]["message"].startswith("JSON decode error")


def test_a_key_is_asked_for(retriever: Retriever) -> None:
    app = create_app([Served("manual", retriever)], Settings(api_key="sésame"))
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer no"}, {"x-api-key": "s"}, {"authorization": "Basic x"}):
            answer = client.post("/search", json={"query": "a"}, headers=headers)
            assert answer.status_code == 401
            assert "Bearer" in answer.json()["error"]["message"]
        key = "sésame".encode()
        assert client.post("/search", json={"query": "a"}, headers={"x-api-key": key}).status_code == 200
        assert (
            client.post("/search", json={"query": "a"}, headers={"authorization": b"Bearer " + key}).status_code == 200
        )
        assert client.get("/metrics").status_code == 401


def test_only_pages_of_an_allowed_origin_may_call(retriever: Retriever) -> None:
    app = create_app([Served("manual", retriever)], Settings(api_key="k", origins=("https://example.org",)))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    with TestClient(app) as client:
        answer = client.options("/search", headers={"origin": "https://example.org", **asked})
        assert answer.status_code == 200  # a browser asks first, without the key
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        answer = client.options("/search", headers={"origin": "https://example.com", **asked})
        assert "access-control-allow-origin" not in answer.headers
        headers = {"origin": "https://example.org", "x-api-key": "k"}
        answer = client.post("/search", json={"query": "a"}, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"


def test_large_bodies_and_full_queues_are_refused(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app([Served("manual", retriever)], Settings(body_bytes=1000, queue=3))
    with TestClient(app) as client:
        assert client.post("/search", content=b" " * 2000).status_code == 413
        parts = (b" " * 400 for _ in range(10))  # no content-length
        assert client.post("/search", content=parts).status_code == 413
        assert client.post("/v1/embeddings", json={"input": ["a"] * 4}).status_code == 200  # nothing else waits
        monkeypatch.setattr(Worker, "room", lambda *_: False)
        busy = client.post("/v1/embeddings", json={"input": ["b"] * 4})
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")


def test_bodies_in_progress_are_bounded_together(retriever: Retriever) -> None:
    app = create_app([Served("manual", retriever)], Settings(held_bytes=500))
    with TestClient(app) as client:
        for _ in range(3):  # what has been answered is no longer counted
            assert client.post("/search", json={"query": "a " * 100}).status_code == 200
        refused = client.post("/search", json={"query": "a " * 300})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


def test_a_million_wrong_things_are_one_error(client: TestClient) -> None:
    for path, body in (
        ("/v1/embeddings", b'{"input": [' + b"null," * 1_000_000 + b"null]}"),
        ("/search", b'{"query": "a", "filters": {' + b",".join(b'"%d": {}' % n for n in range(300_000)) + b"}}"),
        ("/search", b'{"query": "a", "filters": {"a": [' + b"{}," * 1_000_000 + b"{}]}}"),
        ("/search", b'{"query": "a", ' + b",".join(b'"%d": 1' % n for n in range(300_000)) + b"}"),
        ("/documents", b'{"documents": [' + b"{}," * 1_000_000 + b"{}]}"),
    ):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert len(answer.content) < 1000


@pytest.mark.parametrize("halves", [(b'{"query": ', None), (b'{"query": ', b'"files"}')])
def test_a_body_that_comes_too_slowly_is_refused(retriever: Retriever, halves: tuple[bytes, bytes | None]) -> None:
    app = create_app([Served("manual", retriever)], Settings(timeout=0.5))
    with running(app) as url, socket.create_connection(url.removeprefix("http://").split(":")) as connection:
        head = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n"
        first, second = halves
        connection.sendall(head + first)
        if second is not None:
            time.sleep(0.1)
            connection.sendall(second)
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408" if second is None else b"HTTP/1.1 200")


def test_a_client_that_goes_away_is_thought_for_no_more(retriever: Retriever) -> None:
    app = create_app([Served("manual", retriever)], Settings(timeout=20))
    body = json.dumps({"query": "files", "reason": True, "max_new_tokens": 1024}).encode()
    head = "POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    with running(app) as url:
        with socket.create_connection(url.removeprefix("http://").split(":")) as connection:
            connection.sendall(head.format(len(body)).encode() + body)
            wait_until(lambda: app.state.worker.waiting > 0)
        wait_until(lambda: app.state.worker.waiting == 0)
        assert not app.state.worker._known  # what was thought to the end would be kept


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_slow_answers_are_given_up(retriever: Retriever) -> None:
    app = create_app([Served("manual", retriever)], Settings(timeout=1.0))
    with TestClient(app) as client:
        held, free = threading.Event(), threading.Event()

        async def block() -> None:
            await app.state.worker.call(lambda: (held.set(), free.wait(10)))

        assert client.portal is not None
        task = client.portal.start_task_soon(block)
        assert held.wait(5)
        answer = client.post("/search", json={"query": "a"})
        assert answer.status_code == 504
        free.set()
        task.result()
        assert client.post("/search", json={"query": "a"}).status_code == 200


def test_requests_share_a_pass_and_repeated_queries_need_none(client: TestClient, settings: Settings) -> None:
    for _ in range(2):
        assert client.post("/search", json={"query": "the same"}).status_code == 200
    text = client.get("/metrics").text
    assert "search_r3_cache_hits 1.0" in text
    assert 'search_r3_request_seconds_count{route="/search",status="200"} 2.0' in text
    assert 'search_r3_tokens_total{kind="embed"}' in text
    assert "search_r3_queue_texts 0.0" in text
    assert "the same" not in text


def test_openapi_models_indexes_and_readiness(client: TestClient) -> None:
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "manual"
    (index,) = client.get("/indexes").json()
    assert (index["name"], index["documents"], index["dimension"]) == ("manual", 4, 32)
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/search", "/search/stream", "/documents", "/metrics"} <= set(paths)


def test_map(client: TestClient, model: SearchR3) -> None:
    answer = client.post("/map", json={"query": "files"}).json()
    assert {point["id"] for point in answer["points"]} == {"tar", "zip", "ls", "df"}
    assert 0 < answer["explained"] <= 1
    assert answer["reasoned"] is not None


def test_page_is_self_contained(client: TestClient) -> None:
    for path in ("/", "/page/app.js", "/page/style.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
    assert client.get("/page/..%2fapp.py").status_code == 404


def test_a_server_on_this_machine_answers_to_its_own_names_only(retriever: Retriever) -> None:
    app = create_app([Served("manual", retriever)], Settings(hosts=("localhost",)))
    with TestClient(app) as client:
        assert client.get("/health", headers={"host": "localhost:8000"}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_an_unexpected_error_is_counted_and_says_nothing(
    client: TestClient, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(retriever, "search_vectors", fail)
    answer = client.post("/search", json={"query": "a"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert 'route="/search",status="500"' in client.get("/metrics").text


def test_usage_counts_the_query_in_every_mode(client: TestClient, model: SearchR3) -> None:
    read = len(model.engine.plain_ids(["pack files"])[0])
    direct = client.post("/search", json={"query": "pack files"}).json()
    reasoned = client.post("/search", json={"query": "pack files", "reason": True}).json()
    assert direct["tokens"] == read
    assert reasoned["tokens"] == read + reasoned["reasoning"]["tokens"]
    usage = client.post("/v1/embeddings", json={"input": "pack files", "reason": True}).json()["usage"]
    assert usage == {"prompt_tokens": read, "total_tokens": reasoned["tokens"]}


def test_several_indexes(model: SearchR3, retriever: Retriever, tmp_path: Path) -> None:
    with Retriever.create(tmp_path / "empty", model) as other:
        app = create_app([Served("manual", retriever), Served("empty", other)])
        with TestClient(app) as client:
            assert client.post("/search", json={"query": "a", "index": "empty"}).json()["hits"] == []
            assert client.post("/map", json={"query": "a", "index": "empty"}).json()["points"] == []
            assert len(client.post("/search", json={"query": "a"}).json()["hits"]) == 4
