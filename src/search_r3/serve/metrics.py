"""What Prometheus reads."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from search_r3.serve.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server; an ASGI middleware's worth of them is made by `watch`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "search_r3_request_seconds",
            "Time to answer.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._texts = Histogram(
            "search_r3_batch_texts", "Texts in one pass of the model.", ["kind"], buckets=_TEXTS, registry=self.registry
        )
        self._pass = Histogram(
            "search_r3_batch_seconds", "Time of one pass.", ["kind"], buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter(
            "search_r3_tokens", "Tokens read (embed) or thought (reason).", ["kind"], registry=self.registry
        )
        self._waiting = Gauge("search_r3_queue_texts", "Texts accepted and not yet answered.", registry=self.registry)
        self._hits = Gauge("search_r3_cache_hits", "Query vectors that needed no model.", registry=self.registry)

    def batch(self, kind: str, texts: int, tokens: int, seconds: float) -> None:
        """See `worker.Observer`."""
        self._texts.labels(kind).observe(texts)
        self._pass.labels(kind).observe(seconds)
        self._tokens.labels(kind).inc(tokens)

    def text(self, worker: Worker) -> bytes:
        """The exposition."""
        self._waiting.set(worker.waiting)
        self._hits.set(worker.cache_hits)
        return generate_latest(self.registry)

    def watch(self, app: Any) -> Any:
        """The ASGI app, with its requests timed, by the route's pattern and never by what a user put into it."""

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            started, status = time.monotonic(), 499

            async def sending(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, sending)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self._seconds.labels(route, str(status)).observe(time.monotonic() - started)

        return watched
