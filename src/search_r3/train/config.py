"""Recipes: everything that decides a run, strictly checked, in one YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from search_r3.errors import TrainingError


class Strict(BaseModel):
    """An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys that belong to another kind of recipe, and what to do about it."""


StrictT = TypeVar("StrictT", bound=Strict)


STAGE_2 = "a key of stage 2; this recipe is for: search-r3 train rl"
STAGE_1 = "a key of stage 1; this recipe is for: search-r3 train sft"


class Source(Strict):
    """One training set. Batches are drawn from one source at a time, so that in-batch negatives are meaningful."""

    elsewhere = {"documents": STAGE_2}

    path: str
    """BEIR folder, JSONL file of query, positives, negatives, or hf://owner/name; relative to the data folder."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the batches, relative to the other sources."""
    split: str = "train"
    """Which judgements of a BEIR folder."""
    limit: int | None = Field(default=None, gt=0)
    """First examples only."""
    negatives: str | None = None
    """JSONL of mined negatives (`search-r3 mine`), for BEIR folders."""
    thoughts: str | None = None
    """JSONL of reasonings (`search-r3 bootstrap`, or written by a teacher)."""
    only_thoughts: bool = False
    """Leave out examples without a reasoning."""
    titles: bool = False
    """Queries are the titles of a BEIR folder's documents, to find their bodies by: a search by keywords."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.titles and (self.negatives or self.thoughts):
            raise ValueError(f"{self.path}: negatives and thoughts belong to queries; titles have none")
        return self


class Lora(Strict):
    """Low-rank adapters on all linear layers; in stage 1 the embedding token's row is trained beside them."""

    r: int = Field(default=16, gt=0)
    """Rank."""
    alpha: int = Field(default=32, gt=0)
    """Scale of the update is alpha / r."""


class Loss(Strict):
    """Weights and settings of the terms; the defaults are ours."""

    sft: float = Field(default=0.1, ge=0)
    """a1: next-token cross-entropy on the assistant turn."""
    kl: float = Field(default=0.1, ge=0)
    """a2: divergence from the base model on the assistant turn."""
    info_nce: float = Field(default=1.0, ge=0)
    """a3: contrastive term."""
    triplet: float = Field(default=1.0, ge=0)
    """a4: triplet margin term; 0 where there are no mined negatives."""
    temperature: float = Field(default=0.03, gt=0)
    """Divides the cosines of the contrastive term."""
    margin: float = Field(default=0.15, ge=0)
    """Of the triplet term, in cosine."""
    distillation: float = Field(default=1.0, ge=0)
    """a5: divergence from the similarities of `teacher`, where there is one."""
    teacher_temperature: float = Field(default=0.03, gt=0)
    """Divides the teacher's cosines; `temperature` those that learn from them."""
    reasoned: bool = True
    """Contrast queries after their reasonings as well; false while reasonings quote the answers, which is too easy."""
    false_negative_margin: float | None = 0.1
    """Candidates more similar than the positive by this much are taken for unlabelled positives; null keeps them."""


class Batch(Strict):
    """Sizes of one step."""

    queries: int = Field(default=32, gt=1)
    """Queries of one step over all processes; each is compared with every document of the step."""
    negatives: int = Field(default=1, ge=0)
    """Hard negatives of each query, where it has any."""
    chunk_tokens: int = Field(default=4096, gt=0)
    """Tokens in memory at once; changes speed and memory, never the result (gradient cache)."""
    query_tokens: int = Field(default=64, gt=0)
    """Longer queries are cut."""
    document_tokens: int = Field(default=128, gt=0)
    """Longer documents are cut."""
    thought_tokens: int = Field(default=64, gt=0)
    """Longer reasonings are cut."""


class Dev(Strict):
    """A small retrieval test on held-out sets while training; documents are cut at 128 tokens and queries at 64,
    whatever the recipe trains with, so that the figures of runs compare."""

    sets: list[str] = []
    """BEIR folders, relative to the data folder."""
    every: int = Field(default=100, gt=0)
    """Steps between tests; there is one before the first step and one after the last."""
    queries: int = Field(default=50, gt=0)
    """First queries of each set."""
    documents: int = Field(default=300, gt=0)
    """Size each corpus is cut to: all relevant documents, then the first others."""
    reason: int = Field(default=0, ge=0)
    """Tokens of a reasoning to test with as well; 0: test without reasoning only."""


class Run(Strict):
    """What recipes of both stages decide."""

    held_out: list[str] = []
    """BEIR folders; what overlaps with their test queries or relevant documents is not trained on."""
    steps: int = Field(gt=0)
    """Optimiser steps; in stage 2 each on fresh rollouts."""
    lora: Lora | None = Lora()
    """Adapters; null trains all weights."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, for GPUs and CPUs with native bfloat16. What is trained, and saved, is in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    dev: Dev = Dev()
    """Test while training."""
    report_to: list[str] = []
    """Also log to tensorboard, trackio or wandb."""
    seed: int = Field(default=0, ge=0)
    """Of data order, initialisation and, but for backend vllm, which seeds itself, rollouts."""


class Recipe(Run):
    """A supervised run: the keys of `Run`, and these."""

    elsewhere = dict.fromkeys(("group", "reward", "objective", "environment", "guards"), STAGE_2)

    model: str = "base"
    """What is trained: `base` (the untrained default), a folder or a hub name; given an embedding token if need be."""
    sources: list[Source] = Field(min_length=1)
    """Training sets."""
    teacher: str | None = None
    """Embedder whose similarities are learned besides: a folder or hub name for sentence-transformers, or `minilm`."""
    batch: Batch = Batch()
    """Sizes of one step."""
    loss: Loss = Loss()
    """Terms and weights."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak; linear warm-up, then cosine decay to a tenth."""
    shared_prefix: bool = True
    """Compute the constant prompt once a chunk instead of once a text; false only for measuring what that saves."""
    save_every: int = Field(default=100, gt=0)
    """Steps between checkpoints to resume from."""
    keep: int = Field(default=2, gt=0)
    """Checkpoints kept."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines."""

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        taught = self.teacher and self.loss.distillation
        if not (self.loss.info_nce or self.loss.triplet or self.loss.sft or taught):
            raise ValueError("loss: info_nce, triplet and sft are all 0 without a teacher, so nothing would be learned")
        if self.loss.info_nce == 0 and self.loss.triplet > 0 and self.batch.negatives == 0:
            raise ValueError("loss.triplet needs batch.negatives of at least 1")
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of stage 1; see `read_yaml`."""
    return read_yaml(path, overrides, Recipe)


def read_yaml(path: Path, overrides: Sequence[str], kind: type[StrictT]) -> StrictT:
    """A recipe of this kind from YAML. overrides: `key.inner=value` strings that replace single values.

    Raises TrainingError that names file and field, and the nearest key for one that does not exist.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise TrainingError(f"{path}: a recipe is a mapping of keys to values; see recipes/")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise TrainingError(f"--set {override}: write key=value, e.g. --set batch.queries=16")
        place: Any = raw
        *outer, last = key.split(".")
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise TrainingError(f"--set {override}: {part} is not a group of settings")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise TrainingError(f"--set {override}: not valid YAML ({' '.join(str(error).split())})") from error
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise TrainingError(f"{path}: {_explain(error, kind)}") from error


def _explain(error: ValidationError, kind: type[Strict]) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    *outer, last = first["loc"]
    model: Any = kind
    for part in outer:
        if isinstance(part, str):
            model = _inner(model.model_fields[part].annotation)
    if hint := getattr(model, "elsewhere", {}).get(str(last)):
        return f"{place}: {hint}"
    near = difflib.get_close_matches(str(last), model.model_fields, 1, cutoff=0)[0]
    return f"{place}: no such key; did you mean {near}?"


def _inner(annotation: Any) -> Any:
    """The model in `Model`, `Model | None` or `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_inner(part) for part in annotation.__args__ if part is not type(None))
