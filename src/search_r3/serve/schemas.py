"""What goes in and out over HTTP."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: there is nothing to embed")
    return text


def _few(value: Any) -> Any:
    """Fields are counted before each is looked at, so that a million of them are one error."""
    if isinstance(value, dict) and len(value) > 64:
        raise ValueError("has more than 64 fields")
    return value


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [value]
    for _ in range(32):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    if level:
        raise ValueError("is nested deeper than 32 levels")
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, UnicodeEncodeError, RecursionError):
        raise ValueError("holds a number or text that JSON cannot carry") from None
    return value


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


Text = Annotated[str, AfterValidator(_encodable), AfterValidator(_not_blank)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512), AfterValidator(_encodable)]
Bound = (
    Annotated[str, AfterValidator(_encodable)]
    | Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
    | Annotated[float, Field(allow_inf_nan=False, strict=True)]
)
Scalar = bool | Bound
# fail_fast: a list of a million wrong things is one error, not a million.
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1, fail_fast=True)]


class Model(BaseModel):
    """Unknown fields are errors that name themselves."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _few(value)


class EmbeddingRequest(BaseModel):
    """OpenAI's request, with three fields of ours; fields of OpenAI's that mean nothing here are passed over."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": ["many files into one"], "model": "default", "input_type": "query"}]}
    )

    input: Text | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    """A text, texts, the tokens of a text (this model's), or of texts."""
    model: Annotated[str, AfterValidator(_encodable)] | None = None
    """Name of an index; a name that is none means the first."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep the first so many components, scaled to unit length."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian float32."""
    input_type: Literal["query", "document"] = "document"
    """(ours) Queries are cut at the query length."""
    reason: bool = False
    """(ours) Think before embedding; for texts that are queries."""
    samples: int = Field(default=1, ge=1, le=16)
    """(ours) Think so often, at random, and give the mean of the vectors. Several imply `reason`."""


class Embedding(Model):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(Model):
    """Tokens: read, and read plus thought."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Model):
    """OpenAI's answer."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Bounds(Model):
    """What a value lies between: numbers bound numbers, also those written as text, and text bounds text."""

    gt: Bound | None = None
    gte: Bound | None = None
    lt: Bound | None = None
    lte: Bound | None = None

    @model_validator(mode="after")
    def _some(self) -> Bounds:
        if not self.given():
            raise ValueError("holds no bounds: give some of gt, gte, lt, lte")
        return self

    def given(self) -> dict[str, Any]:
        """As `Store.matching` takes them."""
        return self.model_dump(exclude_none=True)


class SearchRequest(Model):
    """A question to an index."""

    query: Text = Field(examples=["pack a folder into one file"])
    index: Annotated[str, AfterValidator(_encodable)] | None = None
    """Name of an index; default: the first."""
    k: int = Field(default=10, ge=1, le=1000)
    """Number of hits."""
    reason: bool = False
    """Think before embedding."""
    samples: int = Field(default=1, ge=1, le=16)
    """Think so often, and search with the mean of the vectors. Several imply `reason`, and are drawn at random: answers
    may differ."""
    fuse: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Weight of the reasoned vector beside the direct one; implies `reason`."""
    gate: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """Reason only where the best direct hit leads the second by less than this; implies `reason`."""
    hybrid: bool = False
    """Add BM25: words count, too."""
    filters: Annotated[
        dict[Name, Scalar | Annotated[list[Scalar], Field(min_length=1, max_length=100, fail_fast=True)] | Bounds],
        BeforeValidator(_few),
        Field(max_length=16),
    ] = {}
    """Only documents whose metadata has these values; a list accepts any of its values."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=1024)
    """Most tokens to think; default: the checkpoint's."""


class Reasoning(Model):
    """What the model thought."""

    text: str
    status: str
    """`finished`: the model ended it itself; `forced`: it was cut."""
    tokens: int


class HitOut(Model):
    """One result."""

    rank: int
    id: str
    score: float
    title: str
    text: str
    start: int
    end: int
    metadata: dict[str, Any]
    snippet: str
    """The part of `text` worth showing."""
    highlights: list[tuple[int, int]]
    """Character ranges of the query's words in `snippet`."""


class SearchResponse(Model):
    """Hits, best first, and what they cost."""

    query: str
    index: str
    reasoning: Reasoning | None
    others: list[Reasoning]
    """The other reasonings, where several were asked for."""
    hits: list[HitOut]
    milliseconds: float
    """From the question's arrival to this answer."""
    tokens: int
    """Read of the query, and thought."""


class DocumentIn(Model):
    """A document to be found."""

    id: Name
    text: Text
    title: Annotated[str, AfterValidator(_encodable)] = ""
    metadata: Annotated[dict[str, Any], AfterValidator(_plain_json)] = {}


class DocumentOut(Model):
    """A document as it is stored."""

    id: str
    text: str
    title: str
    metadata: dict[str, Any]


class DocumentsRequest(Model):
    """Documents to be added; those with a known id are replaced."""

    documents: Annotated[list[DocumentIn], Field(min_length=1, fail_fast=True)]
    index: Annotated[str, AfterValidator(_encodable)] | None = None


class DocumentsResponse(Model):
    """What was stored, safely on disk."""

    added: int
    updated: int
    unchanged: int


class Deleted(Model):
    """How many documents were removed."""

    deleted: int


class IndexOut(Model):
    """An index that can be searched."""

    name: str
    checkpoint: str
    documents: int
    dimension: int


class MapRequest(Model):
    """A question to be drawn among the documents."""

    query: Text
    index: Annotated[str, AfterValidator(_encodable)] | None = None
    reason: bool = True
    max_new_tokens: int | None = Field(default=None, ge=1, le=1024)


class Point(Model):
    """A document on the map."""

    id: str
    title: str
    x: float
    y: float


class MapResponse(Model):
    """Documents and a question in the plane of the documents' two principal components."""

    points: list[Point]
    direct: tuple[float, float]
    reasoned: tuple[float, float] | None
    explained: float
    """Share of the documents' variance that the plane shows."""


class ErrorDetail(Model):
    """What went wrong, and what to do."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorOut(Model):
    """An error, as OpenAI words it."""

    error: ErrorDetail
