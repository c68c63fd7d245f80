"""What the benchmarks share: bundled real text, paired timing, one JSON object at the end."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from search_r3.corpus import read_documents, read_queries
from search_r3.evaluate.collection import DEMO


def arguments(description: str | None, **options: tuple[Any, str]) -> argparse.Namespace:
    """Parse `--json`, `--threads` and integer options given as name=(default, help)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads for both sides")
    for name, (default, text) in options.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text} ({default})"
        )
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Run both in turn, after one warm-up each; medians in seconds and the median of the pairs' ratios theirs/ours."""
    ours(), theirs()
    pairs = []
    for _ in range(repeats):
        times = []
        for side in (ours, theirs):
            started = time.perf_counter()
            side()
            times.append(time.perf_counter() - started)
        pairs.append(times)
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def demo_words() -> list[str]:
    """The words of the bundled documents, in order."""
    return " ".join(document.content for document in read_documents(DEMO)).split()


def demo_texts(count: int, tokens: int, tokenizer: Any) -> list[str]:
    """Bundled documents cut or joined to lengths spread evenly over tokens x [0.7, 1.3]."""
    words = demo_words()
    texts, position = [], 0
    for number in range(count):
        wanted = round(tokens * (0.7 + 0.6 * number / max(count - 1, 1)))
        size = wanted  # at least as many words as needed; cut below
        piece = words[position : position + size]
        while len(tokenizer(" ".join(piece), add_special_tokens=False)["input_ids"]) > wanted:
            piece = piece[: -max(1, len(piece) // 30)]
        position = (position + len(piece)) % (len(words) - 2 * tokens)
        texts.append(" ".join(piece))
    return texts


def demo_queries(count: int, least_words: int = 0) -> list[str]:
    """Bundled questions of at least so many words, repeated with a number when there are too few."""
    texts = [query.text for query in read_queries(DEMO / "queries.jsonl").values()]
    texts = [text for text in texts if len(text.split()) >= least_words]
    return [texts[n % len(texts)] + (f" {n // len(texts)}" if n >= len(texts) else "") for n in range(count)]


def finish(report: dict[str, Any], as_json: bool) -> None:
    """Print the report for people on standard error and, if asked, for machines on standard output."""
    for key, value in report.items():
        print(f"{key:>28}  {value:.4g}" if isinstance(value, float) else f"{key:>28}  {value}", file=sys.stderr)
    if as_json:
        print(json.dumps(report))
