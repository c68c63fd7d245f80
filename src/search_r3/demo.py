"""The main job on bundled data: reason, embed, search, and measure against BM25."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from search_r3.evaluate.collection import DEMO
from search_r3.evaluate.report import rich_tables
from search_r3.evaluate.run import Mode, evaluate, need_extras, summarise
from search_r3.files import cache_home
from search_r3.model.search_r3 import SearchR3
from search_r3.passages import Splitting
from search_r3.records import Hit
from search_r3.retriever import Retriever

QUESTIONS = (
    "how much free space is left on my disk",
    "pack a folder into one compressed file",
    "see which process is using the most memory",
)


def run_demo(model: SearchR3, out: Console | None, show_hits: Callable[[str, list[Hit]], None]) -> dict[str, Any]:
    """Search the bundled corpus for three questions, then score 50 judged ones. Prints to `out`; returns the facts."""
    from search_r3.corpus import read_documents

    def say(text: str) -> None:
        if out:
            out.print(f"\n[bold]{text}[/bold]")

    modes: tuple[Mode, ...] = ("direct", "reason", "hybrid", "bm25")
    need_extras(modes)
    started = time.perf_counter()
    folder = cache_home() / "demo" / model.fingerprint[:16]
    say("1. Index 200 manual pages (tldr-pages, CC BY 4.0)")
    with Retriever.open_or_create(folder, model, splitting=Splitting(0, 0)) as retriever:
        added = retriever.add(read_documents(DEMO), batch=64, progress=None if out else False)
        if out:
            seconds = time.perf_counter() - started
            out.print(
                f"{added.added} encoded, {added.unchanged} known already, in {seconds:.0f} s; kept in {folder}",
                highlight=False,
            )
        answers = []
        for number, question in enumerate(QUESTIONS, 2):
            say(f"{number}. {question}?")
            direct = retriever.search(question, 3)
            live = out is not None and out.is_terminal
            if out:
                out.print("The model thinks: ", style="dim", end="")
            found = retriever.search(
                question, 3, reason=True, on_text=(lambda _, piece: _stream(out, piece)) if live else None
            )
            assert found.reasoned is not None
            if out:
                if not live:
                    out.print(Text(found.reasoned.text, style="italic cyan"), end="")
                out.print(f"  [dim]({found.reasoned.status.value}, {len(found.reasoned.token_ids)} tokens)[/dim]")
                for label, hits in (("Found after thinking:", found.hits), ("Found without:", direct.hits)):
                    out.print(label, style="dim")
                    show_hits(question, hits)
            answers.append(
                {
                    "query": question,
                    "reasoning": found.reasoned.text,
                    "status": found.reasoned.status.value,
                    "reason": [hit.id for hit in found.hits],
                    "direct": [hit.id for hit in direct.hits],
                }
            )
    say("5. Measure on 50 judged questions")
    report = summarise(evaluate(model, [DEMO], modes, index_folder=folder, progress=None if out else False), model)
    seconds = time.perf_counter() - started
    if out:
        out.print(*rich_tables(report))
        out.print(f"\nAll of it took {seconds:.0f} s. Now try your own files:")
        out.print("    search-r3 index FOLDER my-index\n    search-r3 search my-index --direct --hybrid")
    scores = {mode: values["nDCG@10"] for mode, values in report["average"].items()}
    return {"seconds": seconds, "encoded": added.added, "answers": answers, "nDCG@10": scores}


def _stream(out: Console | None, piece: str) -> None:
    if out:
        out.print(Text(piece, style="italic cyan"), end="")


def self_check(model: SearchR3) -> float:
    """Largest difference between the engine's vector and one plain forward pass over the whole turn."""
    engine = model.engine
    text = "The engine must agree with a plain forward pass."
    tail = engine.tails([text], "embed", model.manifest.max_tokens.document)[0]
    ids = torch.tensor([[*engine.prefix_ids("embed"), *tail, engine.embed_token_id]], device=engine.device)
    with torch.inference_mode():
        plain = engine.embed(engine.backbone(input_ids=ids, use_cache=False).last_hidden_state, ids)
    return float(np.abs(model.encode_documents([text]) - plain.cpu().numpy()).max())
