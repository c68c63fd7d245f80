"""The verbs of the command line that make, show and check models."""

from __future__ import annotations

import platform
import re
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from search_r3.cli_common import Checkpoint, Json, Precision, load_model, loading, out, print_json
from search_r3.errors import SearchR3Error, first_line
from search_r3.extras import EXTRAS, installed, need


class Format(StrEnum):
    """What `export` writes."""

    transformers = "transformers"
    openvino = "openvino"
    gguf = "gguf"


def init(
    base: Annotated[
        str, typer.Argument(help="Folder or hub name of an instruction model (Llama or Qwen family), or 'base'.")
    ],
    folder: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="JSON with other system messages than ours; see docs/checkpoints.md."),
    ] = None,
    json_: Json = False,
) -> None:
    """Give an instruction model the embedding token and our prompts.

    Example:  search-r3 init Qwen/Qwen2.5-1.5B-Instruct my-checkpoint
    """
    from search_r3.errors import CheckpointError
    from search_r3.model.checkpoint import initialise
    from search_r3.model.prompts import SystemPrompts, read_prompts

    words = read_prompts(prompt_file) if prompt_file else SystemPrompts()
    if not isinstance(words, SystemPrompts):
        raise CheckpointError(f"{prompt_file}: init needs system messages (embed_system, reason_system, embed_reply)")
    try:
        with loading("preparing the model"):
            manifest = initialise(base, folder, words)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); choose another folder") from error
    if json_:
        print_json(manifest.model_dump())
    else:
        out.print(
            f"Wrote {escape(str(folder))}: {manifest.embed_token} has id {manifest.embed_token_id}. "
            f"Try: search-r3 info {escape(str(folder))}"
        )


def info(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder, an index folder, or 'default'.")],
    json_: Json = False,
) -> None:
    """Show what a checkpoint or an index is made of.

    Example:  search-r3 info default
    """
    from search_r3.files import given_path
    from search_r3.index.store import MANIFEST, Store

    if (path := given_path(Path(folder) / MANIFEST)).is_file():
        with Store.open(path.parent) as store:
            facts = store.manifest.model_dump() | {
                "documents": len(store), "passages": store.passages, "rows": store.rows,
                "bytes": sum(p.stat().st_size for p in path.parent.rglob("*") if p.is_file()),
            }  # fmt: skip
    else:
        from search_r3.errors import CheckpointError
        from search_r3.model.checkpoint import read_manifest, resolve

        with loading("loading the model"):
            path = resolve(folder)
        manifest = read_manifest(path)
        if manifest is None:
            raise CheckpointError(
                f"{folder}: neither an index nor a checkpoint of ours; a plain model becomes one with: "
                f"search-r3 init {folder} NEW_FOLDER"
            )
        facts = {"folder": str(path), "fingerprint": manifest.fingerprint} | manifest.model_dump()
    if json_:
        print_json(facts)
    else:
        out.print_json(data=facts)


def export(
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    checkpoint: Checkpoint = "default",
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to the model hub; a new repository is private."),
    ] = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="openvino embeds on a CPU without PyTorch, gguf in llama.cpp."),
    ] = Format.transformers,
    json_: Json = False,
) -> None:
    """Write a checkpoint as a folder that transformers and sentence-transformers load without our code.

    Example:  search-r3 export my-model -c runs/first/model
    """
    from search_r3.errors import CheckpointError

    if format_ is Format.openvino:
        need("openvino", "--format openvino")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise CheckpointError(f"--push {push}: not a name of the form OWNER/NAME")
    model = load_model(checkpoint, Precision.float32, "cpu")  # what is written is not rounded
    from search_r3.model import export, gguf, openvino

    try:
        if format_ is Format.openvino:
            openvino.write(model, folder)
            use = f"search_r3.model.openvino.OpenVinoEncoder({escape(str(folder))!r}) loads it."
        elif format_ is Format.gguf:
            gguf.write(model, folder)
            use = f"its README.md tells how llama.cpp embeds with {gguf.NAME}."
        else:
            export.export(model, folder, export.card(model, push or "FOLDER"))
            use = f"SentenceTransformer({escape(str(folder))!r}) loads it."
    except FileExistsError as error:
        raise CheckpointError(f"{folder}: exists; choose another folder") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); choose another folder") from error
    if push is not None:
        from huggingface_hub import HfApi

        try:
            HfApi().create_repo(push, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=push, folder_path=folder)
        except Exception as error:  # the hub raises a dozen unrelated types
            raise CheckpointError(
                f"{folder} is written, but was not uploaded to {push}: {first_line(error)}; upload it later with: "
                f"hf upload --private {push} {folder} (log in before: hf auth login)"
            ) from error
    report = {"folder": str(folder), "bytes": sum(p.stat().st_size for p in folder.rglob("*")), "pushed": push}
    if json_:
        print_json(report)
    else:
        out.print(f"Wrote {escape(str(folder))} from {escape(model.source)}: {use}", soft_wrap=True)


def doctor(json_: Json = False) -> None:
    """Check this machine: versions, extras, device, disk, and whether the model computes what it should.

    Example:  search-r3 doctor
    """
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from search_r3.files import cache_home

    home = cache_home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extras": {name: installed(name) for name in EXTRAS},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "cache": str(home),
        "free disk (GB)": round(shutil.disk_usage(existing).free / 1e9, 1),
    }
    for name in ("search-r3", "torch", "transformers", "tokenizers", "numpy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    problem = None
    try:
        from search_r3.demo import self_check

        difference = facts["self-check (max difference)"] = self_check(load_model("default", Precision.float32))
        if not difference < 1e-4:  # nor where it is not a number
            problem = (
                f"the engine's vectors differ from those of a plain forward pass by {difference:.1e}; install the "
                "versions of constraints.txt, or report it with this output"
            )
    except SearchR3Error as error:
        problem = str(error)
    facts |= {"ok": problem is None, "problem": problem}
    if json_:
        print_json(facts)
    else:
        out.print_json(data=facts)
    if not facts["ok"]:
        raise typer.Exit(1)
