"""What all commands share: consoles, options, loading a model, ending politely."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from search_r3.errors import DataError, StoreError
from search_r3.extras import need
from search_r3.files import write_json, write_text

if TYPE_CHECKING:  # heavy modules are imported inside the commands, so that --help answers at once
    from search_r3.model.search_r3 import SearchR3
    from search_r3.retriever import IndexKind

IMAGES = (".png", ".svg", ".pdf")
out, err = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)


class Precision(StrEnum):
    """Arithmetic of the model."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Kind(StrEnum):
    """Search structure."""

    exact = "exact"
    graph = "graph"
    qdrant = "qdrant"


Checkpoint = Annotated[
    str, typer.Option("--checkpoint", "-c", help="'default', a folder, an adapter folder or a hub name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Arithmetic = Annotated[
    Precision, typer.Option(help="int8: smaller and faster on CPUs, less exact; measure what it costs.")
]
Samples = Annotated[
    int, typer.Option(help="Reason this many times about each query and average the vectors.", min=1, max=64)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: a GPU if there is one.")]
Dims = Annotated[int | None, typer.Option(help="Keep only the first components of each vector.")]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="JSON with the prompts of another project's model; see docs/checkpoints.md."),
]
EmbedToken = Annotated[str | None, typer.Option(help="The embedding token of another project's model.")]

IndexChoice = Annotated[
    Kind, typer.Option("--index", help="exact; graph for very large indexes; qdrant for more than one machine.")
]
QdrantUrl = Annotated[
    str | None, typer.Option("--qdrant", help="With --index qdrant: the server's URL; default: $QDRANT_URL.")
]


def index_kind(kind: Kind, qdrant: str | None) -> IndexKind:
    """What `Retriever` takes."""
    if qdrant and kind is not Kind.qdrant:
        raise StoreError(f"--qdrant is for --index qdrant, not for --index {kind.value}; leave one of them out")
    if kind is Kind.exact:
        return "exact"
    need(kind.value, f"--index {kind.value}")
    if kind is Kind.graph:
        return "graph"
    qdrant = qdrant or os.environ.get("QDRANT_URL")
    if not qdrant:
        raise StoreError("--index qdrant: name the server with --qdrant URL, e.g. http://localhost:6333")
    from search_r3.index.remote import follower

    return follower(qdrant)


def check_writable(option: str, path: Path, endings: Sequence[str] = ()) -> None:
    """Raises DataError for a file that could not be written, before the work is done."""
    if endings and path.suffix not in endings:
        raise DataError(f"{option} {path}: must end in {', '.join(endings[:-1])} or {endings[-1]}")
    special = path.exists() and not path.is_file()  # a folder, or a device
    if not path.name or special or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"{option} {path}: cannot be written; name a file in a folder that exists and is yours")


def check_reports(paths: Sequence[Path] | None) -> None:
    """Where a report is to go; see `check_writable`."""
    for path in paths or []:
        check_writable("--output", path, (".json", ".md"))


def write_reports(paths: Sequence[Path], values: Any, page: str) -> None:
    """The values into every .json, the page into every .md."""
    for path in paths:
        write_json(path, values) if path.suffix == ".json" else write_text(path, page)


CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


def plain(text: str) -> str:
    """Without what would command the terminal: documents come from anywhere."""
    return text.translate(CONTROLS)


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Ctrl-C ends with status 130 and says what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"\ninterrupted; {kept}")
        raise typer.Exit(130) from None


@contextmanager
def loading(what: str = "loading") -> Iterator[None]:
    """While modules or data are: what libraries print on import (DeepSpeed does) is none of our output."""
    with err.status(what), redirect_stdout(sys.stderr):
        yield


def load_model(
    checkpoint: str,
    precision: Precision = Precision.auto,
    device: str | None = None,
    dims: int | None = None,
    prompt_file: Path | None = None,
    embed_token: str | None = None,
) -> SearchR3:
    """Load a checkpoint as the options say."""
    with loading("loading the model"):
        from search_r3.model.prompts import read_prompts
        from search_r3.model.search_r3 import SearchR3
    prompts = read_prompts(prompt_file) if prompt_file else None
    with redirect_stdout(sys.stderr):
        return SearchR3.from_pretrained(
            checkpoint, device=device, dtype=precision.value, dims=dims, prompts=prompts, embed_token=embed_token
        )


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False))
