"""Our server against a sentence-transformers model behind a plain FastAPI endpoint: same weights, texts, threads.

Both answer `POST /v1/embeddings` with one text a request, from 1, 8 and 64 clients that ask again as soon as they have
been answered; our cache is off and no text comes twice. The peer encodes in the endpoint, one request after the other,
which on a CPU is faster than its encoding in many threads at once. Then: memory over many requests, and SIGKILL at
random moments while documents are added.

    python benchmarks/serve.py --json
"""

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil

from common import arguments, demo_queries, finish
from search_r3 import Document, Retriever, SearchR3
from search_r3.index.store import Store


def serve_peer(port: int) -> None:
    """The plain endpoint."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from encode import sentence_transformer

    model = SearchR3.from_pretrained("base")
    peer = sentence_transformer(model)
    act, token = model.manifest.prompts.embed, model.manifest.embed_token
    app = FastAPI()

    class Request(BaseModel):
        input: str

    @app.post("/v1/embeddings")
    async def embeddings(body: Request) -> dict[str, object]:
        (vector,) = peer.encode([f"{act.prefix}{body.input}{act.suffix}{token}"], show_progress_bar=False)
        return {"data": [{"embedding": vector.tolist()}]}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


@contextmanager
def running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server, once it is ready."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {' '.join(command)}")
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


async def load(port: int, clients: int, requests: int, texts: Iterator[str]) -> tuple[float, list[float], int]:
    """Seconds for all requests, the seconds of each, and how many failed."""
    seconds, errors, left = [], 0, iter(range(requests))
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as client:

        async def ask() -> None:
            nonlocal errors
            for _ in left:
                body = {"input": next(texts), "input_type": "query"}
                started = time.perf_counter()
                answer = await client.post("/v1/embeddings", json=body)
                seconds.append(time.perf_counter() - started)
                errors += answer.status_code != 200

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        return time.perf_counter() - started, seconds, errors


def killed(folder: Path, port: int, kills: int) -> int:
    """Documents that were acknowledged and are not there after SIGKILL, over so many kills."""
    acknowledged: set[str] = set()
    numbers = itertools.count()
    for _ in range(kills):
        with running(["-m", "search_r3", "serve", str(folder), "--port", str(port)], port) as process:
            end = time.monotonic() + random.uniform(0.05, 1.5)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                timer = threading.Timer(end - time.monotonic(), process.send_signal, [signal.SIGKILL])
                timer.start()
                try:
                    while True:
                        names = [f"killed-{next(numbers)}" for _ in range(random.randint(1, 4))]
                        body = {"documents": [{"id": name, "text": f"document {name}"} for name in names]}
                        if client.post("/documents", json=body).status_code == 200:
                            acknowledged.update(names)
                except httpx.TransportError:
                    timer.join()
    with Store.open(folder) as store:
        return len(acknowledged - set(store.ids()))


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        serve_peer(int(sys.argv[2]))
        return
    args = arguments(
        __doc__, requests=(256, "requests of each load"), port=(8765, "of the servers"),
        many=(10_000, "requests while memory is watched"), kills=(50, "SIGKILLs"), seed=(0, "of the kills"),
    )  # fmt: skip
    random.seed(args.seed)
    words = demo_queries(200, least_words=8)
    texts = (f"{text} {number}" for number in itertools.count() for text in words)
    report: dict[str, object] = {"threads": args.threads, "errors": 0}
    rates: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        with Retriever.create(folder, SearchR3.from_pretrained("base")) as retriever:
            retriever.add([Document(str(n), text) for n, text in enumerate(words[:20])])
        ours = ["-m", "search_r3", "serve", str(folder), "--port", str(args.port), "--cache", "0"]
        for name, command in (("peer", [__file__, "--peer", str(args.port)]), ("ours", ours)):
            with running(command, args.port) as process:
                asyncio.run(load(args.port, 8, 32, texts))  # warm-up
                for clients in (1, 8, 64):
                    total, seconds, errors = asyncio.run(load(args.port, clients, args.requests, texts))
                    rates[name, clients] = args.requests / total
                    for q in (50, 95, 99):
                        report[f"{name}_{clients}_p{q}_ms"] = 1000 * float(np.percentile(seconds, q))
                    if name == "ours":
                        report["errors"] = int(report["errors"]) + errors  # type: ignore[call-overload]
                if name == "ours" and args.many:
                    memory = psutil.Process(process.pid).memory_info
                    before = memory().rss
                    report["errors"] = (
                        int(report["errors"])
                        + asyncio.run(  # type: ignore[call-overload]
                            load(args.port, 64, args.many, texts)
                        )[2]
                    )
                    report["memory_growth_mb"] = (memory().rss - before) / 2**20
        report |= {f"{name}_{clients}_per_s": rate for (name, clients), rate in rates.items()}
        report |= {f"throughput_x_{n}": rates["ours", n] / rates["peer", n] for n in (1, 8, 64)}
        report["lost_after_sigkill"] = killed(folder, args.port, args.kills)
    finish(report, args.json)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
