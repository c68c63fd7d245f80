"""One thread that owns the model and the index, and gathers what many requests ask for into few passes.

Everything that touches model, tokenizer or index runs here, so nothing of it needs to be thread-safe. Texts that wait
are embedded together; reasoning goes token by token, and what has come in meanwhile is done between two tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from search_r3.model.search_r3 import SearchR3
from search_r3.records import Reasoned
from search_r3.serve.settings import Settings

Result = TypeVar("Result")


class BusyError(Exception):
    """The queue is full, or the worker is going down."""


class LateError(Exception):
    """The job was not begun before its time was over."""


class Observer(Protocol):
    """Is told what the worker does; called on the worker's thread."""

    def batch(self, kind: str, texts: int, tokens: int, seconds: float) -> None:
        """A pass of the model is done."""


@dataclass(slots=True, eq=False)
class Job:
    """Something to be done on the worker's thread."""

    size: int
    """Texts."""
    deadline: float
    """On the monotonic clock; a job that has not begun by then fails with LateError."""
    future: Future[Any] = field(default_factory=Future)
    """Gets the result; cancelling it takes the job out."""


@dataclass(slots=True, eq=False)
class Embed(Job):
    """What is to be embedded: texts, the tokens of texts, or whole turns that are ready."""

    model: SearchR3 = field(kw_only=True)
    texts: Sequence[str] = field(kw_only=True, default=())
    ids: Sequence[Sequence[int]] = field(kw_only=True, default=())
    ready: Sequence[list[int]] = field(kw_only=True, default=())
    max_tokens: int = field(kw_only=True)
    tokens: int = field(kw_only=True, default=0)
    """About so many."""

    def tails(self) -> list[list[int]]:
        """What follows the prefix of the embed act."""
        if self.ready:
            return list(self.ready)
        if self.ids:
            return [[*ids[: self.max_tokens], *self.model.engine.suffix_ids("embed")] for ids in self.ids]
        return self.model.engine.tails(self.texts, "embed", self.max_tokens)


@dataclass(slots=True, eq=False)
class Think(Job):
    """A query to be reasoned over."""

    model: SearchR3 = field(kw_only=True)
    text: str = field(kw_only=True)
    max_new_tokens: int = field(kw_only=True)
    samples: int = field(kw_only=True, default=1)
    found: dict[int, Reasoned] = field(kw_only=True, default_factory=dict)
    on_text: Callable[[str], None] | None = field(kw_only=True, default=None)
    gone: bool = field(kw_only=True, default=False)
    """Nobody waits for it any more."""


@dataclass(slots=True, eq=False)
class Call(Job):
    """Any function."""

    function: Callable[[], Any] = field(kw_only=True)


class Worker:
    """Start it, ask it from one event loop, stop it: what has been accepted by then is still done."""

    def __init__(self, settings: Settings, observer: Observer | None = None):
        self.settings, self._observer = settings, observer
        self._jobs: deque[Job] = deque()
        self._more = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="search-r3 model", daemon=True)
        self._known: OrderedDict[tuple[Any, ...], tuple[int, Any]] = OrderedDict()  # with the number of its vectors
        self._kept = 0
        self.waiting = 0
        """Texts accepted and not yet answered."""
        self.cache_hits = 0
        """Answers that needed no model."""

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more, finish what has been taken, end."""
        with self._more:
            self._stopping = True
            self._more.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._stopping

    async def embed(
        self,
        model: SearchR3,
        max_tokens: int,
        texts: Sequence[str] = (),
        ids: Sequence[Sequence[int]] = (),
        ready: Sequence[list[int]] = (),
        keep: bool = False,
    ) -> tuple[np.ndarray, int]:
        """Embed texts, tokens, or whole turns (`Plan.tails`).

        Returns (N, D) float32 unit rows, and the tokens read of the texts themselves. keep: look the vectors up, and
        keep them. Raises BusyError, LateError, or DataError for an empty text.
        """
        names = [(id(model), max_tokens, _digest(text)) for text in texts] if keep else []
        if names and all(name in self._known for name in names):
            self.cache_hits += len(names)
            found = [self._look_up(name) for name in names]
            return np.stack([vector for vector, _ in found]), sum(tokens for _, tokens in found)
        lengths = [len(tokens) for tokens in ready or ids] or [len(text) // 4 for text in texts]  # tokens, about
        parts = []
        with self.hold(len(lengths)):
            # One part after the other: a request of many texts does not stand in the way of small ones.
            for part, tokens in self._parts([min(length, max_tokens) for length in lengths]):
                job = Embed(
                    part.stop - part.start,
                    self._deadline(),
                    model=model,
                    texts=texts[part],
                    ids=ids[part],
                    ready=ready[part],
                    max_tokens=max_tokens,
                    tokens=tokens,
                )
                parts.append(await self._submit(job))
        vectors = np.concatenate([vectors for vectors, _ in parts])
        counts = [count for _, part in parts for count in part]
        for name, vector, count in zip(names, vectors, counts, strict=False):
            self._put(name, (vector.copy(), count))  # a copy: a row would keep its whole batch
        return vectors, sum(counts)

    async def think(
        self,
        model: SearchR3,
        text: str,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None = None,
        samples: int = 1,
        held: bool = False,
    ) -> tuple[list[Reasoned], int]:
        """Reason over a query. Returns the results, one a sample, and the tokens read of the query.

        on_text is called on this event loop with each new piece of the first. held: the caller holds its places.
        Cancelling takes the query out of its batch. Raises BusyError, or LateError if there was no time to think to
        the end.
        """
        name = (id(model), "think", max_new_tokens, samples, _digest(text))
        if name in self._known:
            self.cache_hits += 1
            known: tuple[list[Reasoned], int] = self._look_up(name)
            if on_text is not None:
                on_text(known[0][0].text)
            return known
        loop = asyncio.get_running_loop()

        def show(piece: str) -> None:
            assert on_text is not None
            loop.call_soon_threadsafe(on_text, piece)

        job = Think(
            samples,
            self._deadline(),
            model=model,
            text=text,
            max_new_tokens=max_new_tokens,
            samples=samples,
            on_text=None if on_text is None else show,
        )
        with nullcontext() if held else self.hold(samples):
            try:
                result: tuple[list[Reasoned], int] = await self._submit(job)
            finally:
                job.gone = True
        if time.monotonic() > job.deadline:  # it was cut short
            raise LateError
        self._put(name, result, samples)
        return result

    async def call(self, function: Callable[[], Result], size: int = 1) -> Result:
        """Run a function on the worker's thread. size: the texts it stands for in the queue."""
        with self.hold(size):
            result: Result = await self._submit(Call(size, self._deadline(), function=function))
            return result

    def _parts(self, lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
        """Ranges of texts of these lengths that one pass may hold, and their tokens."""
        start, tokens = 0, 0
        for number, length in enumerate(lengths):
            full = number - start == self.settings.batch or tokens + length > self.settings.batch_tokens
            if full and number > start:
                yield slice(start, number), tokens
                start, tokens = number, 0
            tokens += length
        yield slice(start, len(lengths)), tokens

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.timeout

    def _look_up(self, name: tuple[Any, ...]) -> Any:
        self._known.move_to_end(name)
        return self._known[name][1]

    def _put(self, name: tuple[Any, ...], value: Any, vectors: int = 1) -> None:
        self._kept += vectors - self._known.pop(name, (0, None))[0]
        self._known[name] = vectors, value
        while self._kept > self.settings.cache:
            self._kept -= self._known.popitem(last=False)[1][0]

    def room(self, size: int) -> bool:
        """Whether so many texts more would be accepted now; where none wait, as many as a request may hold."""
        return self.alive and (not self.waiting or self.waiting + size <= self.settings.queue)

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds the places of so many texts in the queue. Raises BusyError where there is no room."""
        if not self.room(size):
            raise BusyError
        self.waiting += size
        try:
            yield
        finally:
            self.waiting -= size

    async def _submit(self, job: Job) -> Any:
        with self._more:
            if self._stopping:
                raise BusyError
            self._jobs.append(job)
            self._more.notify()
        return await asyncio.wrap_future(job.future)

    # The worker's thread.

    def _run(self) -> None:
        while True:
            with self._more:
                while not self._jobs and not self._stopping:
                    self._more.wait()
                if not self._jobs:
                    return
            self._turn()
            self._think()

    def _turn(self) -> None:
        """Do what waits, all but reasoning: the first batch of texts together, calls as they come."""
        with self._more:
            jobs = [job for job in self._jobs if not isinstance(job, Think)]
            texts, tokens = 0, 0
            taken: list[Job] = []
            for job in jobs:
                if isinstance(job, Embed):
                    texts, tokens = texts + job.size, tokens + job.tokens
                if taken and (texts > self.settings.batch or tokens > self.settings.batch_tokens):
                    break
                taken.append(job)
            chosen = set(map(id, taken))
            self._jobs = deque(job for job in self._jobs if id(job) not in chosen)
        embeds = [job for job in taken if isinstance(job, Embed) and self._begin(job)]
        for model in {id(job.model): job.model for job in embeds}.values():
            self._embed(model, [job for job in embeds if job.model is model])
        for job in taken:
            if isinstance(job, Call) and self._begin(job):
                with _failing([job]):
                    job.future.set_result(job.function())

    def _begin(self, job: Job) -> bool:
        if not job.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() > job.deadline:
            job.future.set_exception(LateError())
            return False
        return True

    def _embed(self, model: SearchR3, jobs: list[Embed]) -> None:
        tails: list[list[list[int]]] = []
        ready: list[Embed] = []
        for job in jobs:
            with _failing([job]):
                tails.append(job.tails())
                ready.append(job)
        everything = [tail for part in tails for tail in part]
        if not everything:
            return
        suffix = len(model.engine.suffix_ids("embed"))
        with _failing(ready):
            started = time.monotonic()
            vectors = model.engine.encode(everything, "embed")
            self._observe("embed", everything, time.monotonic() - started)
            for job, part, rows in zip(
                ready, tails, np.split(vectors, np.cumsum([len(part) for part in tails])[:-1]), strict=True
            ):
                job.future.set_result((rows, [len(tail) - suffix for tail in part]))

    def _think(self) -> None:
        """Reason over a batch of queries that want the same; other jobs are done between the tokens."""
        with self._more:
            waiting = [job for job in self._jobs if isinstance(job, Think)]
            if not waiting:
                return
            model, length, samples = waiting[0].model, waiting[0].max_new_tokens, waiting[0].samples
            alike = [job for job in waiting if (job.model, job.max_new_tokens, job.samples) == (model, length, samples)]
            alike = alike[: max(1, self.settings.thinkers // samples)]
            chosen = set(map(id, alike))
            self._jobs = deque(job for job in self._jobs if id(job) not in chosen)
        jobs = [job for job in alike if self._begin(job)]
        if not jobs:
            return

        def show(row: int, piece: str) -> None:
            job = jobs[row // samples]
            if job.on_text is not None and not job.gone and row % samples == 0:
                job.on_text(piece)

        def keep(row: int, result: Reasoned) -> None:
            job = jobs[row // samples]
            job.found[row % samples] = result
            if len(job.found) == samples:
                job.future.set_result(([job.found[n] for n in range(samples)], read[row // samples]))

        with _failing(jobs):
            started = time.monotonic()
            longest = model.manifest.max_tokens.query
            read = [min(len(ids), longest) for ids in model.engine.plain_ids([job.text for job in jobs])]
            results = model.reason(
                [job.text for job in jobs],
                max_new_tokens=length,
                samples=samples,
                batch_rows=len(jobs) * samples,
                on_text=show if any(job.on_text for job in jobs) else None,
                on_result=keep,
                between=self._turn,
                stop=lambda row: jobs[row // samples].gone or time.monotonic() > jobs[row // samples].deadline,
            )
            self._observe("reason", [result.token_ids for result in results], time.monotonic() - started)

    def _observe(self, kind: str, tokens: Sequence[Sequence[int]], seconds: float) -> None:
        if self._observer is not None:
            self._observer.batch(kind, len(tokens), sum(map(len, tokens)), seconds)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@contextmanager
def _failing(jobs: Sequence[Job]) -> Iterator[None]:
    """Hands an exception to the jobs that it befell; the worker lives on."""
    try:
        yield
    except BaseException as error:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)
