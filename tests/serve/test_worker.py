from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from search_r3.errors import DataError
from search_r3.model.search_r3 import SearchR3
from search_r3.serve.settings import Settings
from search_r3.serve.worker import BusyError, LateError, Worker


class Passes:
    """Remembers the passes of the model."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def batch(self, kind: str, texts: int, tokens: int, seconds: float) -> None:
        self.seen.append((kind, texts))


def working(test: Callable[[Worker, Passes], Awaitable[None]], **settings: Any) -> None:
    """Run a test on an event loop with a worker."""
    passes = Passes()
    worker = Worker(Settings(**settings), passes)
    worker.start()
    try:
        asyncio.run(test(worker, passes))  # type: ignore[arg-type]
    finally:
        worker.stop()


class Held:
    """Keeps the worker busy until it is let go."""

    def __init__(self, worker: Worker):
        self._go, begun = threading.Event(), threading.Event()
        self._task = asyncio.ensure_future(worker.call(lambda: (begun.set(), self._go.wait(10))))
        self._begun = begun

    async def begun(self) -> None:
        while not self._begun.is_set():
            await asyncio.sleep(0.001)

    async def release(self) -> None:
        self._go.set()
        await self._task


def test_what_waits_shares_a_pass_and_bad_texts_fail_alone(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        held = Held(worker)
        await held.begun()
        texts = ["one", "two words", "  ", "three of them"]
        tasks = [asyncio.ensure_future(worker.embed(model, 64, [text])) for text in texts]
        await asyncio.sleep(0)
        await held.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert passes.seen == [("embed", 3)]
        assert isinstance(results.pop(2), DataError)
        texts.remove("  ")
        for text, (vectors, tokens) in zip(texts, results, strict=True):  # type: ignore[misc]
            np.testing.assert_allclose(vectors, model.encode_documents([text]), atol=1e-6)
            assert tokens == len(model.engine.plain_ids([text])[0])

    working(test)


def test_a_large_request_lets_small_ones_through(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        ended = []

        async def ask(name: str, count: int) -> None:
            vectors, _ = await worker.embed(model, 64, [f"text {n}" for n in range(count)])
            assert len(vectors) == count
            ended.append(name)

        await asyncio.gather(ask("large", 40), ask("small", 1))
        assert ended == ["small", "large"]
        assert max(texts for _, texts in passes.seen) <= 8

    working(test, batch=8)


def test_a_pass_holds_no_more_than_it_may(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        await worker.embed(model, 64, ["word " * 20] * 6)  # about 25 tokens each, of which 60 may be in a pass
        assert [texts for _, texts in passes.seen] == [2, 2, 2]
        passes.seen.clear()
        await worker.embed(model, 64, ["word " * 60, "a"])  # more than may be, by itself
        assert [texts for _, texts in passes.seen] == [1, 1]
        passes.seen.clear()
        held = Held(worker)
        await held.begun()
        asked = [
            ("a", 1, 2),
            ("b", 1, 2),
            ("g", 1, 2),
            ("c", 2, 1),
            ("d", 2, 1),
            ("e", 2, 1),
            ("f", 2, 5),
        ]  # text, tokens, samples
        tasks = [asyncio.ensure_future(worker.think(model, t, m, samples=n)) for t, m, n in asked]
        await asyncio.sleep(0)
        await held.release()
        await asyncio.gather(*tasks)
        await worker.call(lambda: None)
        assert passes.seen == [
            ("reason", 4),
            ("reason", 2),
            ("reason", 3),
            ("reason", 5),
        ]  # 4 rows of one kind, or one query

    working(test, batch_tokens=60, thinkers=4)


def test_texts_are_embedded_between_the_tokens_of_a_reasoning(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        thinking = asyncio.Event()
        task = asyncio.ensure_future(worker.think(model, "pack files", 200, lambda _: thinking.set()))
        await thinking.wait()
        vectors, _ = await worker.embed(model, 64, ["ls"])
        np.testing.assert_allclose(vectors, model.encode_documents(["ls"]), atol=1e-6)
        expected = model.reason(["pack files"], max_new_tokens=200)[0]
        assert (await task)[0][0].token_ids == expected.token_ids
        await worker.call(lambda: None)  # answers go out before the pass is told of
        assert [kind for kind, _ in passes.seen] == ["embed", "reason"]  # begun after the reasoning, ended before it

    working(test)


def test_a_cancelled_reasoning_leaves_its_batch(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        held, begun = Held(worker), asyncio.Event()
        await held.begun()
        gone = asyncio.ensure_future(worker.think(model, "pack files", 5000, lambda _: begun.set()))
        await asyncio.sleep(0)
        await held.release()
        await begun.wait()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert worker.waiting == 0
        await asyncio.wait_for(worker.call(lambda: None), 5)
        (short,), _ = await asyncio.wait_for(worker.think(model, "ls", 3), 10)  # would wait for 5,000 tokens otherwise
        assert len(short.token_ids) <= 3

    working(test)


def test_queue_deadline_cache_and_end(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        held = Held(worker)
        await held.begun()
        late = asyncio.ensure_future(worker.embed(model, 64, ["a"]))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await worker.embed(model, 64, ["a", "b", "c"])
        await asyncio.sleep(1.2)
        await held.release()
        with pytest.raises(LateError):
            await late
        for text in ("a", "b", "c", "b", "c"):  # two are kept: the last three lookups find the last two
            await worker.embed(model, 64, [text], keep=True)
        assert worker.cache_hits == 2
        (first,), read = await worker.think(model, "a", 3)
        assert (await worker.think(model, "a", 3))[0][0] is first
        assert read == 1
        hits = worker.cache_hits
        await worker.think(model, "a", 3, samples=2)  # two vectors: all that may be kept
        await worker.think(model, "a", 3)
        assert worker.cache_hits == hits
        kept = asyncio.ensure_future(worker.call(lambda: 7))
        await asyncio.sleep(0)
        await asyncio.to_thread(worker.stop)
        assert await kept == 7
        with pytest.raises(BusyError):
            await worker.call(lambda: 8)

    working(test, queue=3, timeout=1.0, cache=2)


def test_a_reasoning_cut_short_by_its_deadline_is_not_kept(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        with pytest.raises(LateError):
            await worker.think(model, "pack files", 100_000)
        (result,), _ = await worker.think(model, "pack files", 3)
        assert result.token_ids == model.reason(["pack files"], max_new_tokens=3)[0].token_ids
        assert len(worker._known) == 1

    working(test, timeout=1.0)


def test_a_request_of_many_thoughts_has_room_where_none_wait(model: SearchR3) -> None:
    async def test(worker: Worker, passes: Passes) -> None:
        with worker.hold(6):
            found = await asyncio.gather(*(worker.think(model, f"text {n}", 2, held=True) for n in range(6)))
            assert len(found) == 6
            with pytest.raises(BusyError):
                await worker.think(model, "another", 2)
        assert worker.waiting == 0

    working(test, queue=4)
