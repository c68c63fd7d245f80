"""The public face of a model that thinks, then embeds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from search_r3.errors import CheckpointError, DataError, first_line, refuse_string
from search_r3.model.checkpoint import Manifest, Parent, load, resolve, save
from search_r3.model.engine import Engine
from search_r3.model.prompts import Prompts, SystemPrompts
from search_r3.model.reasoning import (
    TEMPERATURE,
    Between,
    ResultCallback,
    Sampling,
    Stop,
    TextCallback,
    mean_vectors,
    reason,
)
from search_r3.records import Document, Reasoned

Dtype = Literal["auto", "float32", "bfloat16", "int8"]


class SearchR3:
    """An instruction model with an embedding token: encodes documents, and queries with or without reasoning.

    Examples:
        >>> model = SearchR3.from_pretrained("default")
        >>> documents = model.encode_documents(["tar archives files", "ls lists files"])
        >>> queries = model.encode_queries(["pack a folder into one file"], reason=True)
        >>> model.similarity(queries, documents).shape
        (1, 2)
    """

    def __init__(self, engine: Engine, manifest: Manifest, source: str):
        self.engine, self.manifest, self.source = engine, manifest, source

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "default",
        *,
        device: str | None = None,
        dtype: Dtype = "auto",
        dims: int | None = None,
        prompts: Prompts | SystemPrompts | None = None,
        embed_token: str | None = None,
        batch_tokens: int | None = None,
    ) -> SearchR3:
        """Load a checkpoint.

        source: "default" (the embedded model, fetched once), a folder, an adapter folder, or a hub name.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        dtype: "auto" is float32 on a CPU and bfloat16 on a GPU; "int8" (CPU only) stores linear weights in 8 bits.
            Vectors are always returned as float32.
        dims: keep only the first components of each vector.
        prompts, embed_token: for models of other projects, which carry no manifest of ours.
        batch_tokens: tokens in one forward pass; lower it if memory runs out.
        Raises CheckpointError when the model cannot be found, trusted or run.
        """
        if dtype not in get_args(Dtype):
            raise CheckpointError(f"dtype {dtype}: choose from {', '.join(get_args(Dtype))}")
        try:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise CheckpointError(f"device {device}: {first_line(error)}") from error
        if dtype == "int8" and place.type != "cpu":
            raise CheckpointError("dtype int8 is for CPUs; on a GPU use bfloat16")
        if dtype == "auto":
            dtype = "float32" if place.type == "cpu" else "bfloat16"
        folder = resolve(source)
        precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        model, tokenizer, manifest = load(folder, precision, prompts=prompts, embed_token=embed_token)
        if dims is not None and not 1 <= dims <= manifest.dimension:
            raise CheckpointError(f"dims={dims}: must be between 1 and the model's {manifest.dimension}")
        try:
            model.to(place)
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(f"device {place}: {first_line(error)}") from error
        if dtype == "int8":
            _quantise(model)
        engine = Engine(
            model, tokenizer, manifest.prompts, manifest.embed_token_id, dims=dims, batch_tokens=batch_tokens
        )
        return cls(engine, manifest, str(source))

    @property
    def dimension(self) -> int:
        """Width of the vectors this object returns."""
        return self.engine.dimension

    @property
    def fingerprint(self) -> str:
        """Names the space that document vectors live in; an index accepts only its own."""
        return self.manifest.fingerprint

    def encode_documents(
        self,
        documents: Iterable[str | Document],
        *,
        max_tokens: int | None = None,
        progress: bool | None = False,
    ) -> np.ndarray:
        """Embed documents. Returns (N, dimension) float32 with unit rows, in input order.

        max_tokens: cut longer texts; default: the checkpoint's. Raises DataError for an empty text.
        """
        refuse_string(documents)
        texts = [item.content if isinstance(item, Document) else item for item in documents]
        tails = self.engine.tails(texts, "embed", _length(max_tokens, self.manifest.max_tokens.document))
        return self.engine.encode(tails, "embed", progress=progress)

    def encode_queries(
        self,
        queries: Sequence[str],
        *,
        reason: bool = False,
        samples: int = 1,
        max_tokens: int | None = None,
        progress: bool | None = False,
    ) -> np.ndarray:
        """Embed queries, after reasoning over them if `reason`. Returns (N, dimension) float32 with unit rows.

        samples: think that many times about each query and take the mean; several imply `reason`.
        """
        if reason or samples > 1:
            results = self.reason(queries, samples=samples, max_tokens=max_tokens, progress=progress)
            vectors = np.stack([r.vector for r in results]) if results else np.empty((0, self.dimension), np.float32)
            return mean_vectors(vectors, samples)
        tails = self.engine.tails(queries, "embed", _length(max_tokens, self.manifest.max_tokens.query))
        return self.engine.encode(tails, "embed", label="queries", progress=progress)

    def reason(
        self,
        queries: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        samples: int = 1,
        batch_rows: int = 32,
        on_text: TextCallback | None = None,
        on_result: ResultCallback | None = None,
        between: Between | None = None,
        stop: Stop | None = None,
        progress: bool | None = False,
    ) -> list[Reasoned]:
        """Think about each query, then embed it. Returns len(queries) x samples results, a query's side by side.

        max_new_tokens: most tokens to think; default: the checkpoint's. temperature: 0 is greedy; default: 0 for one
        sample, 0.8 for several. The same seed gives the same text. on_text(row, piece) is called as text appears,
        on_result(row, result) when a row is done, between() before each token; a row for which stop(row) is true is
        embedded as it stands.
        """
        limit = _length(max_new_tokens, self.manifest.max_tokens.reasoning)
        if temperature is None:
            temperature = TEMPERATURE if samples > 1 else 0.0
        tails = self.engine.tails(queries, "reason", _length(max_tokens, self.manifest.max_tokens.query))
        return reason(
            self.engine,
            tails,
            Sampling(limit, temperature, top_p, seed),
            samples=samples,
            batch_rows=batch_rows,
            on_text=on_text,
            on_result=on_result,
            between=between,
            stop=stop,
            progress=progress,
        )

    def encode_reasoned(
        self, queries: Sequence[str], thoughts: Sequence[Sequence[int]], *, max_tokens: int | None = None
    ) -> np.ndarray:
        """Embed queries after given reasonings, as if the model had written them. Returns (N, dimension) float32.

        thoughts: tokens of each reasoning without control tokens; `engine.plain_ids` makes them from text.
        """
        tails = self.engine.tails(queries, "reason", _length(max_tokens, self.manifest.max_tokens.query))
        return self.engine.encode([tail + list(ids) for tail, ids in zip(tails, thoughts, strict=True)], "reason")

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosines, (Q, N) float32, of unit vectors (Q, D) and (N, D)."""
        scores: np.ndarray = np.asarray(queries, np.float32) @ np.asarray(documents, np.float32).T
        return scores

    def check_whole(self) -> None:
        """Raises CheckpointError for a model whose weights are no longer those of its checkpoint."""
        quantised = any("quantized" in type(part).__module__ for part in self.engine.model.modules())
        if quantised or self.engine.model.dtype != torch.float32:
            raise CheckpointError(
                f"a model rounded to {'int8' if quantised else self.engine.model.dtype} cannot be saved; load it with "
                "dtype float32 first"
            )

    def check_seams(self) -> None:
        """Raises CheckpointError if a text merges with the prompt around it where both are tokenised as one string."""
        act, engine = self.manifest.prompts.embed, self.engine
        for text in ("a text", "12 numbers", "(signs)"):
            apart = [*engine.prefix_ids("embed"), *engine.plain_ids([text])[0], *engine.suffix_ids("embed")]
            whole = f"{act.prefix}{text}{act.suffix}{self.manifest.embed_token}"
            if engine.tokenizer(whole, add_special_tokens=False)["input_ids"] != [*apart, engine.embed_token_id]:
                raise CheckpointError(
                    f"export: other libraries would make other vectors: tokenised with a text, the prompt around it "
                    f"({act.prefix[-9:]!r}, {act.suffix[:9]!r}) merges with it; let it end and go on with a line break "
                    "or a control token (`init --prompts`)"
                )

    def save_pretrained(self, folder: str | Path) -> Manifest:
        """Write the model (an adapter merged) as a plain checkpoint folder.

        Raises FileExistsError if it exists, CheckpointError for a model that was not loaded in float32.
        """
        manifest, model = self.manifest, self.engine.model
        self.check_whole()
        return save(
            Path(folder),
            model,
            self.engine.tokenizer,
            manifest.prompts,
            embed_token=manifest.embed_token,
            max_tokens=manifest.max_tokens,
            parent=manifest.parent or Parent(source=self.source, weights_sha256=manifest.weights_sha256),
            training=manifest.training,
        )


def _quantise(model: torch.nn.Module) -> None:
    """8-bit linear weights (one scale a row) with activations quantised on the fly; changes the model.

    The MLP's last projection stays in float32: a few of its inputs are far larger than the rest, and one
    scale for all of them would lose the others.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = dict.fromkeys((name for name in linear if "down_proj" not in name), per_channel_dynamic_qconfig)
        quantize_dynamic(model, spec, inplace=True)


def _length(given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise DataError(f"a length of {given} tokens: must be at least 1")
    return default if given is None else given
