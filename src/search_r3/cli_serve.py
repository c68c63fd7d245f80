"""`search-r3 serve`."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from search_r3.cli_common import (
    Arithmetic,
    Device,
    EmbedToken,
    IndexChoice,
    Kind,
    Precision,
    PromptFile,
    QdrantUrl,
    err,
    index_kind,
    load_model,
)
from search_r3.errors import DataError
from search_r3.extras import need
from search_r3.files import given_path, vacant


def serve(
    folders: Annotated[list[Path], typer.Argument(metavar="index...", help="Index folders; the first is the default.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    create: Annotated[
        bool, typer.Option("--create", help="Make what does not exist yet: an empty index, to be filled over HTTP.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="With --create: the model of a new index; else 'default'.")
    ] = None,
    kind: IndexChoice = Kind.exact,
    qdrant: QdrantUrl = None,
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.", min=0.1)] = 60.0,
    queue: Annotated[int, typer.Option(help="Texts that may wait; more are refused with status 429.", min=1)] = 4096,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", min=1)] = 8 << 20,
    max_texts: Annotated[int, typer.Option(help="Texts or documents of a request.", min=1)] = 2048,
    cache: Annotated[int, typer.Option(help="Query vectors kept.", min=0)] = 4096,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web origin whose pages may call (CORS); may be given again.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that the server may be called by; may be given again. Default: any, but on this "
            "machine's own addresses without a key only localhost."
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log requests; their paths hold users' ids.")
    ] = False,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
) -> None:
    """Serve indexes over HTTP: search, OpenAI-compatible embeddings, and a page to watch the model think.

    The environment variable SEARCH_R3_API_KEY, where set, is the key that requests must bring.

    Example:  search-r3 serve notes-index --port 8000
    """
    need("serve", "serving")
    import uvicorn

    from search_r3.index.store import Store
    from search_r3.model.search_r3 import SearchR3
    from search_r3.retriever import Retriever
    from search_r3.serve.app import Served, create_app
    from search_r3.serve.settings import Settings

    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise DataError(f"two indexes have the name {max(names, key=names.count)!r}; rename a folder")
    local = host in ("127.0.0.1", "localhost", "::1")
    key = os.environ.get("SEARCH_R3_API_KEY") or None
    settings = Settings(
        api_key=key,
        timeout=timeout,
        queue=queue,
        body_bytes=max_body,
        texts=max_texts,
        cache=cache,
        hosts=tuple(allow_host or (("localhost", "127.0.0.1", "[::1]") if local and key is None else ())),
        origins=tuple(origin or ()),
    )
    for name in settings.hosts:
        if "*" in name.removeprefix("*.") and name != "*":
            raise DataError(f"--allow-host {name}: * stands alone, or for all before the first dot: *.example.org")
        if re.search(r":\d+$", name):
            raise DataError(f"--allow-host {name}: leave out the port")
    for name in settings.origins:
        if not re.fullmatch(r"\*|null|[\w+.-]+://[^/]+", name):
            raise DataError(f"--origin {name}: give scheme, host and port without a path, e.g. https://example.org")
    if key is None and not local:
        err.print("[yellow]anyone on the network can read and change these indexes:[/yellow] set SEARCH_R3_API_KEY")
    search = index_kind(kind, qdrant)
    if checkpoint and not create:
        raise DataError("--checkpoint is for --create: an index is served by the model that made it; leave it out")
    folders = [given_path(folder) for folder in folders]
    manifests = {}
    for folder in folders:  # a folder that is no index fails before a model is loaded
        if not (create and vacant(folder)):
            with Store.open(folder, verify=False) as store:
                manifests[folder] = store.manifest
    models: dict[tuple[str, str, int], SearchR3] = {}
    with ExitStack() as stack, _bind(host, port) as listening:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # A client that does not read is cut off, and what it did not read is freed.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout))
        if new := [folder for folder in folders if folder not in manifests]:
            model = load_model(checkpoint or "default", precision, device, None, prompt_file, embed_token)
            for folder in new:
                with Retriever.create(folder, model) as made:
                    stored = manifests[folder] = made.store.manifest
                models[stored.checkpoint, stored.fingerprint, stored.dimension] = model
        served = []
        for name, folder in zip(names, folders, strict=True):
            stored = manifests[folder]
            space = stored.checkpoint, stored.fingerprint, stored.dimension
            if space not in models:
                models[space] = load_model(
                    stored.checkpoint, precision, device, stored.dimension, prompt_file, embed_token
                )
            retriever = stack.enter_context(Retriever.open(folder, models[space], search))
            served.append(Served(name, retriever))
        config = uvicorn.Config(
            create_app(served, settings),
            host=host,
            port=port,
            log_level="warning",
            access_log=access_log,
            timeout_graceful_shutdown=int(timeout) + 1,
            server_header=False,
        )
        if access_log:
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[Any] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    address, bound = listening.getsockname()[:2]
                    shown = f"[{address}]" if ":" in address else address
                    what = escape(", ".join(names))
                    err.print(f"serving {what} on http://{shown}:{bound}/ (API: /docs). Ctrl-C ends.")

        # Uvicorn ends gracefully on a signal, then raises it once more: that must not cut short what is left to close.
        signal.signal(signal.SIGTERM, lambda *_: None)
        with suppress(KeyboardInterrupt):
            Server(config).run([listening])


def _bind(host: str, port: int) -> socket.socket:
    """A socket at this address, not listening yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise DataError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another"
        ) from error
    return bound
