"""The HTTP API as a FastAPI app, built by a function."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from search_r3 import __version__
from search_r3.errors import DataError, StoreError
from search_r3.model.reasoning import control_ids, mean_vectors
from search_r3.records import Document, Hit, Reasoned
from search_r3.retriever import Retriever, fuse_vectors, margin
from search_r3.serve.guard import Guard, error_body
from search_r3.serve.metrics import Metrics
from search_r3.serve.schemas import (
    Bounds,
    Deleted,
    DocumentIn,
    DocumentOut,
    DocumentsRequest,
    DocumentsResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorOut,
    HitOut,
    IndexOut,
    MapRequest,
    MapResponse,
    Point,
    Reasoning,
    SearchRequest,
    SearchResponse,
    Usage,
)
from search_r3.serve.settings import Settings
from search_r3.serve.worker import BusyError, LateError, Worker
from search_r3.snippet import snippet

PAGE = Path(__file__).parent / "page"
SLICE_CHARS = 20_000  # of documents planned and stored in one step
PING_SECONDS = 15.0
_EITHER = {  # fields of several kinds, of which an error names one
    "input": "must be a text, a list of texts, or lists of token numbers, and not empty",
    "filters": 'must be texts, numbers, true or false, lists of these, or bounds such as {"gte": 1979}, by field',
}
_KINDS = ("body", "path", "str", "int", "float", "bool")  # in places of errors, not fields' names
logger = logging.getLogger("search_r3.serve")


class _Whole(PathConvertor):
    regex = "(?s:.*)"  # to the very end: `path` leaves out a last newline, and so means another document


register_url_convertor("whole", _Whole())


@dataclass(slots=True, eq=False)
class Served:
    """An index and its name."""

    name: str
    """As it is asked for."""
    retriever: Retriever
    """Open; its model may be shared with others."""


class TooLargeError(Exception):
    """More than the server takes at once."""


class UnknownError(Exception):
    """Something that is not there, and how to look what is."""


def create_app(indexes: Sequence[Served], settings: Settings | None = None) -> FastAPI:
    """The app over these indexes, the first being the default. They are the caller's, to open and to close."""
    settings = settings or Settings()
    served = {index.name: index for index in indexes}
    if not served or len(served) != len(indexes):
        raise ValueError("give at least one index, and each a name of its own")
    metrics = Metrics()
    worker = Worker(settings, metrics)
    ready = False

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal ready
        worker.start()
        for index in indexes:  # the prompts' keys and values are computed before the first user waits for them
            await worker.call(partial(index.retriever.model.encode_queries, ["warm up"]))
            await worker.call(partial(index.retriever.model.engine.prefix, "reason"))
        ready = True
        try:
            yield
        finally:
            ready = False
            await asyncio.to_thread(worker.stop)

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorOut, "description": text}
        for status, text in {
            400: "not JSON",
            401: "no key",
            404: "no such index or document",
            408: "the body came too slowly",
            413: "too large",
            422: "not usable",
            429: "too much is waiting; try again",
            503: "the index cannot be used now",
            504: "took too long",
        }.items()
    }
    app = FastAPI(
        title="search-r3",
        version=__version__,
        summary="Think, then embed: embeddings and search.",
        lifespan=lifespan,
        responses=refusals,
    )
    app.state.worker = worker
    app.add_middleware(Guard, settings=settings)
    if settings.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(metrics.watch)
    _handle_errors(app)

    def chosen(name: str | None) -> Served:
        if name is None:
            return indexes[0]
        if name not in served:
            raise UnknownError("no index of this name; GET /indexes lists them")
        return served[name]

    def check(texts: Sequence[str], samples: int = 1) -> None:
        if (count := len(texts) * samples) > settings.texts:
            what = "texts" if samples == 1 else "samples of texts"
            raise TooLargeError(f"{count} {what} are more than {settings.texts}; send them in parts")
        if any(len(text) > settings.text_chars for text in texts):
            raise TooLargeError(f"a text is longer than {settings.text_chars} characters; split it")

    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"])
    async def is_ready() -> Response:
        """Whether it takes requests."""
        up = ready and worker.alive
        return JSONResponse({"status": "ready" if up else "not ready"}, 200 if up else 503)

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(worker), media_type="text/plain; version=0.0.4")

    @app.get("/indexes", tags=["search"])
    async def list_indexes() -> list[IndexOut]:
        """What can be searched."""

        def look() -> list[IndexOut]:
            return [
                IndexOut(
                    name=index.name,
                    checkpoint=Path(index.retriever.store.manifest.checkpoint).name,
                    documents=len(index.retriever.store),
                    dimension=index.retriever.model.dimension,
                )
                for index in indexes
            ]

        return await worker.call(look)

    @app.get("/v1/models", tags=["embeddings"])
    async def models() -> dict[str, Any]:
        """The indexes' names, as OpenAI lists models."""
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "search-r3"} for name in served]}

    @app.post("/v1/embeddings", tags=["embeddings"])
    async def embeddings(body: EmbeddingRequest) -> Response:
        """Embed texts, as OpenAI's endpoint does."""
        index = served.get(body.model or "", indexes[0])
        model, width = index.retriever.model, body.dimensions
        if width is not None and width > model.dimension:
            raise DataError(f"dimensions: {width} is more than the model's {model.dimension}")
        texts, ids = _inputs(body)
        if len(ids) > settings.texts:
            raise TooLargeError(f"{len(ids)} texts are more than {settings.texts}; send them in parts")
        check(texts, body.samples)
        _check_tokens(index, ids)
        limits = model.manifest.max_tokens
        thought = 0
        if body.reason or body.samples > 1:
            if ids:
                raise DataError("reason: needs texts, not tokens")
            think = partial(worker.think, model, max_new_tokens=limits.reasoning, samples=body.samples, held=True)
            with worker.hold(len(texts) * body.samples):  # all of a request is accepted, or nothing
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(think(text=text)) for text in texts]
            results = [task.result() for task in tasks]
            thoughts = [found for every, _ in results for found in every]
            vectors = mean_vectors(np.stack([found.vector for found in thoughts]), body.samples)
            read, thought = sum(count for _, count in results), sum(len(found.token_ids) for found in thoughts)
        else:
            query = body.input_type == "query"
            vectors, read = await worker.embed(
                model, limits.query if query else limits.document, texts, ids, keep=query
            )
        if width is not None:
            vectors = vectors[:, :width]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return _embedding_response(vectors, index.name, body.encoding_format == "base64", read, thought)

    async def find(body: SearchRequest, on_text: Callable[[str], None] | None = None) -> SearchResponse:
        started = time.monotonic()
        index = chosen(body.index)
        check([body.query])
        model, limits = index.retriever.model, index.retriever.model.manifest.max_tokens
        where = {key: asked.given() if isinstance(asked, Bounds) else asked for key, asked in body.filters.items()}
        thoughts: list[Reasoned] = []
        tokens = 0
        think = body.reason or body.samples > 1 or body.fuse is not None or body.gate is not None
        if not think or body.fuse is not None or body.gate is not None:
            direct, tokens = await worker.embed(model, limits.query, [body.query], keep=True)
            vectors = direct
        if body.gate is not None:
            lead = await worker.call(lambda: index.retriever.search_vectors(direct, 2, where=where)[0])
            think = margin([hit.score for hit in lead]) < body.gate
        if think:
            most = body.max_new_tokens or limits.reasoning
            thoughts, read = await worker.think(model, body.query, most, on_text, body.samples)
            tokens += read + sum(len(thought.token_ids) for thought in thoughts)
            vectors = mean_vectors(np.stack([thought.vector for thought in thoughts]), body.samples)
            if body.fuse is not None:
                vectors = fuse_vectors(direct, vectors, body.fuse)
        words = [body.query] if body.hybrid else None
        hits = await worker.call(lambda: index.retriever.search_vectors(vectors, body.k, words, where)[0])
        shown = await asyncio.to_thread(lambda: [_hit(hit, body.query) for hit in hits])
        return SearchResponse(
            query=body.query,
            index=index.name,
            reasoning=_reasoning(thoughts[0]) if thoughts else None,
            others=[_reasoning(thought) for thought in thoughts[1:]],
            hits=shown,
            milliseconds=round(1000 * (time.monotonic() - started), 1),
            tokens=tokens,
        )

    @app.post("/search", tags=["search"])
    async def search(body: SearchRequest) -> SearchResponse:
        """The best documents for a question."""
        return await find(body)

    @app.post(
        "/search/stream",
        tags=["search"],
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "events"}},
    )
    async def search_stream(body: SearchRequest) -> StreamingResponse:
        """The same as server-sent events: `reasoning` pieces as they come, then `hits`; or `error`."""
        chosen(body.index)
        check([body.query])
        if not worker.room(body.samples):
            raise BusyError
        return StreamingResponse(events(body), media_type="text/event-stream")

    async def events(body: SearchRequest) -> AsyncIterator[bytes]:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        task = asyncio.create_task(find(body, pieces.put_nowait))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(pieces.get(), PING_SECONDS)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if piece is None:
                    break
                yield format_sse_event(event="reasoning", data_str=json.dumps({"text": piece}))
            try:
                yield format_sse_event(event="hits", data_str=task.result().model_dump_json())
            except Exception as error:
                status, message = _explain(error)
                yield format_sse_event(event="error", data_str=json.dumps(error_body(message, str(status))))
        finally:
            task.cancel()

    @app.post("/documents", tags=["documents"])
    async def add(body: DocumentsRequest) -> DocumentsResponse:
        """Add or replace documents. The answer comes when they are safely on disk."""
        index = chosen(body.index)
        check([f"{document.title}\n{document.text}" for document in body.documents])
        total = DocumentsResponse(added=0, updated=0, unchanged=0)
        for part in _slices(body.documents):
            documents = [Document(d.id, d.text, d.title, d.metadata) for d in part]
            plan = await worker.call(partial(index.retriever.plan, documents), len(documents))
            if plan.documents:
                vectors, _ = await worker.embed(
                    index.retriever.model, index.retriever.store.manifest.max_tokens, ready=plan.tails
                )
                await worker.call(partial(index.retriever.commit, plan, vectors), len(documents))
            total.added += plan.report.added
            total.updated += plan.report.updated
            total.unchanged += plan.report.unchanged
        return total

    @app.get("/documents/{document:whole}", tags=["documents"])
    async def read(document: str, index: str | None = None) -> DocumentOut:
        """A document, whole."""
        retriever = chosen(index).retriever
        found = await worker.call(lambda: retriever.get([document]))
        if not found:
            raise UnknownError("no document of this id in this index")
        return DocumentOut(**asdict(found[0]))

    @app.delete("/documents/{document:whole}", tags=["documents"])
    async def delete(document: str, index: str | None = None) -> Deleted:
        """Remove a document; one that is not there is no error."""
        retriever = chosen(index).retriever
        return Deleted(deleted=await worker.call(lambda: retriever.delete([document])))

    @app.post("/map", tags=["search"])
    async def draw(body: MapRequest) -> MapResponse:
        """Documents and the question's vectors in the plane of the documents' two principal components."""
        index = chosen(body.index)
        check([body.query])
        model, limits = index.retriever.model, index.retriever.model.manifest.max_tokens
        direct, _ = await worker.embed(model, limits.query, [body.query], keep=True)
        vectors = [direct[0]]
        if body.reason:
            thoughts, _ = await worker.think(model, body.query, body.max_new_tokens or limits.reasoning)
            vectors.append(thoughts[0].vector)
        plane, passages, places = await worker.call(index.retriever.plane)
        spots = plane(np.stack(vectors)).tolist()
        return MapResponse(
            points=[
                Point(id=passage.document.id, title=passage.document.title, x=x, y=y)
                for passage, (x, y) in zip(passages, places.tolist(), strict=True)
            ],
            direct=tuple(spots[0]),
            reasoned=tuple(spots[1]) if body.reason else None,
            explained=plane.explained,
        )

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_page(name: str) -> FileResponse:
        if name not in ("app.js", "style.css"):
            raise HTTPException(404, "not found")
        return FileResponse(PAGE / name)

    return app


def _explain(error: BaseException) -> tuple[int, str]:
    """HTTP status and words for an error."""
    if isinstance(error, ExceptionGroup):  # of several texts, the first that failed speaks for all
        return _explain(error.exceptions[0])
    match error:
        case BusyError():
            return 429, "too much is waiting; try again in a second"
        case LateError() | TimeoutError():
            return 504, "took too long; send less at once, or try again when the server is less busy"
        case UnknownError():
            return 404, str(error)
        case TooLargeError():
            return 413, str(error)
        case DataError():
            return 422, str(error)
        case StoreError():
            logger.error("%s", error)
            return 503, "the index cannot be used now; the server's log says why"
    logger.exception("unexpected error", exc_info=error)
    return 500, "unexpected error; the server's log says more"


def _handle_errors(app: FastAPI) -> None:
    async def explain(request: Request, error: Exception) -> Response:
        status, message = _explain(error)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind), status, {"Retry-After": "1"} if status in (429, 503) else None)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Where a field may be one of several things, the error deepest in the body is about the one that was meant.
        first = max(error.errors(), key=lambda found: (found["type"] == "value_error", len(found["loc"])))
        place = ".".join(
            str(part)
            for part in first["loc"]
            if (part not in _KINDS and str(part).isidentifier()) or isinstance(part, int)
        )
        if first["type"] == "json_invalid":
            place = ""  # where in the text, not a field
        told = str(first["msg"])
        if told.startswith("Input should be a valid") or first["type"] == "extra_forbidden":
            told = _EITHER.get(place.split(".")[0], told)
        message = f"{place}: {told}" if place else told
        if first["type"] == "model_attributes_type" and not place:
            message = "the body must be a JSON object, sent with Content-Type: application/json"
        status = 400 if first["type"] == "json_invalid" else 422
        return JSONResponse(error_body(message, "invalid_request_error"), status)

    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, error.headers)

    for kind in (BusyError, LateError, UnknownError, TooLargeError, DataError, StoreError, ExceptionGroup):
        app.add_exception_handler(kind, explain)
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, refused)  # type: ignore[arg-type]


def _inputs(body: EmbeddingRequest) -> tuple[list[str], list[list[int]]]:
    """Texts, or tokens."""
    given: Any = body.input
    if isinstance(given, str):
        return [given], []
    if isinstance(given[0], str):
        return given, []
    return [], [given] if isinstance(given[0], int) else given


def _check_tokens(index: Served, ids: Sequence[Sequence[int]]) -> None:
    if not ids:
        return
    engine = index.retriever.model.engine
    split = {token for token, added in engine.plain_tokenizer.added_tokens_decoder.items() if added.special}
    size, control = len(engine.tokenizer), control_ids(engine) | split  # what is no token where a text has it
    for number, tokens in enumerate(ids):
        for token in tokens:
            if token >= size:
                raise DataError(
                    f"input.{number}: token {token} is not in this model's vocabulary of {size}; tokens of another "
                    "model's tokenizer cannot be used: send texts (LangChain: check_embedding_ctx_length=False)"
                )
            if token in control:
                raise DataError(f"input.{number}: token {token} is a control token, which no text may hold")


def _embedding_response(vectors: np.ndarray, model: str, packed: bool, read: int, thought: int) -> Response:
    """Written by hand: validating every component of every vector would cost more than computing them."""
    rows = np.ascontiguousarray(vectors, dtype="<f4")
    data = [
        Embedding.model_construct(
            object="embedding",
            index=number,
            embedding=base64.b64encode(row.tobytes()).decode() if packed else row.tolist(),
        )
        for number, row in enumerate(rows)
    ]
    usage = Usage(prompt_tokens=read, total_tokens=read + thought)
    answer = EmbeddingResponse.model_construct(object="list", data=data, model=model, usage=usage)
    return Response(answer.model_dump_json(), media_type="application/json")


def _slices(documents: Sequence[DocumentIn]) -> list[list[DocumentIn]]:
    """Documents in order, few enough at a time that others need not wait long."""
    parts: list[list[DocumentIn]] = []
    room = 0
    for document in documents:
        if not parts or room <= 0:
            parts.append([])
            room = SLICE_CHARS
        parts[-1].append(document)
        room -= len(document.title) + len(document.text)
    return parts


def _reasoning(thought: Reasoned) -> Reasoning:
    return Reasoning(text=thought.text, status=thought.status.value, tokens=len(thought.token_ids))


def _hit(hit: Hit, query: str) -> HitOut:
    shown, ranges = snippet(" ".join(hit.text[:5000].split()), query[:1000])
    return HitOut(**asdict(hit), snippet=shown, highlights=ranges)
