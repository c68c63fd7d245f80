"""The command line: parse, call, print. Every command takes `--help`; those with results take `--json`."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
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
    check_writable,
    err,
    index_kind,
    interruptible,
    load_model,
    out,
    plain,
    print_json,
)  # fmt: skip
from search_r3.cli_eval import eval_
from search_r3.cli_model import doctor, export, info, init
from search_r3.cli_serve import serve
from search_r3.cli_train import average, bootstrap, mine, overlap, package, plot, train
from search_r3.errors import DataError, SearchR3Error
from search_r3.extras import need

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


def _version(asked: bool) -> None:
    if asked:
        print(version("search-r3"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors that a user can mend become one line and exit status 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for its callers' developers
    try:
        app()
    except SearchR3Error as error:
        err.print(f"[bold red]error:[/bold red] {escape(plain(str(error)))}")
        sys.exit(2)
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
        int | None, typer.Option(help="Split documents at this length (default 256); 0: do not split, only cut.", min=0)
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
    if engine is Engine.ray:
        need("ray", "--engine ray")
    elif workers is not None:
        raise DataError("--workers is for --engine ray: add that, or leave it out")
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
        err.print(f"[yellow]skipped:[/yellow] {escape(plain(str(error)))}")

    def stop(error: DataError) -> None:
        raise DataError(f"{error} (what came before is kept; --skip-bad passes over what cannot be used)") from error

    documents = read_documents(corpus, Fields(id_field, text_field, title_field), skip if skip_bad else stop)
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
        out.print(f"Search it with: search-r3 search {escape(str(folder))} --direct --hybrid")


def _encoder(
    engine: Engine, model: SearchR3, workers: int | None, precision: Precision, device: str | None
) -> AbstractContextManager[Any]:
    if engine is Engine.local:
        return nullcontext()
    from search_r3.distributed import RayEncoder
    from search_r3.model.checkpoint import lasting_name

    encoder = RayEncoder(
        lasting_name(model.source), workers=workers, dtype=precision.value, device=device, dims=model.dimension
    )
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
    reason: Annotated[
        bool | None, typer.Option("--reason/--direct", help="Think before embedding (the default), or embed at once.")
    ] = None,
    samples: Samples = 1,
    fuse: Annotated[
        float | None, typer.Option(help="Mix: weight of the reasoned vector beside the direct one.", min=0, max=1)
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="Reason only where the best direct hit leads the second by less than this.", min=0, max=2),
    ] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Add BM25: words count, too.")] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=VALUE: only documents with this metadata; of one field given again, any value. Also "
            "'FIELD>=VALUE', '>', '<' and '<=': all of them hold. Text that looks like a number goes in quotes: "
            "'date>=\"2026\"'."
        ),
    ] = None,
    kind: IndexChoice = Kind.exact,
    qdrant: QdrantUrl = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="Default: the one that the index names.")
    ] = None,
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Maximum number of reasoning tokens.", min=1)] = None,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
    json_: Json = False,
) -> None:
    """Search an index; the model's reasoning streams before the hits.

    Example:  search-r3 search notes-index "how do I renew the certificate?" --direct --hybrid
    """
    if reason is False and (samples > 1 or fuse is not None or gate is not None or max_new_tokens is not None):
        raise DataError("--direct does not think: leave it out, or --samples, --fuse, --gate and --max-new-tokens")
    reason, filters = reason is not False, _filters(where or [])
    structure = index_kind(kind, qdrant)
    from search_r3.index.store import Store

    with Store.open(folder, verify=False) as store:  # fails at once, before the model is loaded
        stored = store.manifest
    model = load_model(checkpoint or stored.checkpoint, precision, device, None, prompt_file, embed_token)
    model.engine.dimension = min(model.dimension, stored.dimension)  # an index made with --dims
    from search_r3.retriever import Retriever

    with Retriever.open(folder, model, structure) as retriever:
        for text in _queries(query):
            if query is None and not json_ and not sys.stdin.isatty():
                out.print(Text(f"? {text}", style="bold"))
            streaming = reason and not json_ and out.is_terminal
            found = retriever.search(
                text,
                k,
                reason=reason,
                samples=samples,
                fuse=fuse,
                gate=gate,
                hybrid=hybrid,
                where=filters,
                max_new_tokens=max_new_tokens,
                on_text=_stream if streaming else None,
            )
            if json_:
                print_json(_found_json(found))
            else:
                if streaming:
                    out.print()  # ends the line of what was shown as it came
                for thought in found.thoughts[1 if streaming else 0 :]:
                    out.print(Text.assemble(("thought: ", "dim"), (plain(thought.text), "italic cyan")))
                out.print()
                _show_hits(text, found.hits)


def _filters(given: list[str]) -> dict[str, Any]:
    """What each field may be: values, as text and, where they can be one, as a number, true or false; or bounds."""
    from search_r3.index.filters import BOUNDS

    names = {sign: name for name, sign in BOUNDS.items()}
    filters: dict[str, Any] = {}
    for item in given:
        parts = re.fullmatch(r"\s*([^=<>]*[^=<>!\s])\s*(>=|<=|==|[=<>])\s*(|[^=<>].*)", item, re.DOTALL)
        if parts is None or (parts[2] in names and not parts[3]):
            raise DataError(f"--where {item}: must be FIELD=VALUE, such as lang=en, or bounds, such as 'year>=1979'")
        field, sign, text = parts.groups()
        value: Any = text
        with suppress(ValueError):
            read = json.loads(text)
            if isinstance(read, bool | float | str) or (isinstance(read, int) and abs(read) < 2**63):
                value = read
        bound = names.get(sign)
        wanted = filters.setdefault(field, {} if bound else [])
        if isinstance(wanted, dict) != bool(bound):
            raise DataError(f"--where {item}: {field} has a value and bounds; give one kind")
        if bound in wanted:
            raise DataError(f"--where {item}: {field} has such a bound already; give one")
        if bound:
            wanted[bound] = value
        else:  # a quoted value is text and nothing else
            wanted += [value] if isinstance(value, str) else [text, value]
    return filters


def _stream(_: int, piece: str) -> None:
    out.print(Text(plain(piece), style="italic cyan"), end="")


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
        head.append(plain(hit.title or hit.id), style="bold")
        if hit.title and hit.title != hit.id:
            head.append(plain(f"  {hit.id}"), style="dim")
        out.print(head)
        shown, ranges = snippet(plain(" ".join(hit.text.split())), query)
        body = Text(shown)
        for start, end in ranges:
            body.stylize("bold yellow", start, end)
        from rich.padding import Padding

        out.print(Padding(body, (0, 0, 0, 11)))
    if not hits:
        out.print("no hits", style="dim")


@app.command()
def delete(
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    ids: Annotated[list[str], typer.Argument(help="Ids of documents, as search shows them.")],
    json_: Json = False,
) -> None:
    """Remove documents from an index; what an index lacks is named.

    Example:  search-r3 delete notes-index old.md drafts/idea.md
    """
    from search_r3.index.store import Store

    with Store.open(folder, verify=False) as store, store.writing():
        known = store.hashes(ids)
        missing = [name for name in ids if name not in known]
        report = {"deleted": store.delete(ids), "missing": missing, "documents": len(store)}
        store.tidy()
    if json_:
        print_json(report)
        return
    for name in missing:
        err.print(f"[yellow]not in the index:[/yellow] {escape(plain(name))}")
    out.print(f"{report['deleted']:,} deleted, {report['documents']:,} documents left")


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
    if npy is not None:
        check_writable("--npy", npy)
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


app.command("eval")(eval_)
app.command()(init)
app.command()(info)
app.command()(export)
app.command()(doctor)
app.add_typer(train, name="train")
app.command()(serve)
app.command()(mine)
app.command()(overlap)
app.command()(bootstrap)
app.command()(average)
app.command()(package)
app.add_typer(plot, name="plot")
