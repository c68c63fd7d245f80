"""What it gains on CPUs that freed memory is kept (`search_r3.memory`): the same work in processes with and without.

Processes alternate, since the setting cannot be taken back in one. Work: thinking eight times about each query in
bfloat16, embedding documents, and steps of stage 1. `sys` is the share of processor time that the system took.

    python benchmarks/allocator.py --json
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, demo_queries, demo_texts, finish
from search_r3 import SearchR3
from search_r3.memory import keep_freed_memory
from search_r3.train.config import read_recipe
from search_r3.train.supervised import prepare, train
from train_sft import Stopwatch

ROOT = Path(__file__).parents[1]
STEP = (
    "batch={queries: 16, negatives: 1, chunk_tokens: 2048, query_tokens: 32, document_tokens: 112}",
    "precision=bfloat16",
    "lora={r: 16, alpha: 32}",
    "steps=4",
    "save_every=100",
)


def work(name: str, queries: int) -> dict[str, float]:
    """Do it once after a warm-up; seconds, the system's share of processor time, and the process's peak in MB."""
    if name == "train":
        watch = Stopwatch()
        recipe = read_recipe(ROOT / "recipes" / "smoke-cpu.yaml", STEP)
        with tempfile.TemporaryDirectory() as output:
            prepared = prepare(recipe, ROOT / "src" / "search_r3" / "data")
            before = os.times()
            train(prepared, Path(output) / "run", progress=False, callbacks=[watch])
        seconds = watch.seconds
    else:
        model = SearchR3.from_pretrained("default", dtype="bfloat16")
        asked = demo_queries(queries)
        texts = demo_texts(2 * queries, 128, model.engine.tokenizer)

        def job(share: int) -> None:
            if name == "encode":
                model.encode_documents(texts[: len(texts) // share])
            else:
                model.reason(asked[: len(asked) // share], samples=8, temperature=0.8, max_new_tokens=40)

        job(4)
        before, started = os.times(), time.perf_counter()
        job(1)
        seconds = time.perf_counter() - started
    after = os.times()
    spent = after.user - before.user + after.system - before.system
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"s": seconds, "sys": (after.system - before.system) / spent, "peak_mb": peak}


def child(name: str, keep: bool, args: Any) -> dict[str, float]:
    """`work` in a process of its own."""
    command = [sys.executable, __file__, "--work", name, "--keep", str(int(keep)), "--queries", str(args.queries)]
    done = subprocess.run([*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments(
        __doc__, queries=(32, "queries, and half of the documents"), repeats=(3, "counted pairs of processes"),
        work=("", "do this one here: reason, encode or train"), keep=(0, "with --work: keep freed memory"),
    )  # fmt: skip
    if args.work:
        if args.keep:
            keep_freed_memory()
        print(json.dumps(work(args.work, args.queries)))
        return
    figures: dict[str, float] = {}
    for name in ("reason", "encode", "train"):
        pairs = [[child(name, keep, args) for keep in (True, False)] for _ in range(args.repeats)]
        figures[f"{name}_x"] = statistics.median(without["s"] / kept["s"] for kept, without in pairs)
        for place, side in enumerate(("kept", "returned")):
            for figure in ("s", "sys", "peak_mb"):
                figures[f"{name}_{side}_{figure}"] = statistics.median(pair[place][figure] for pair in pairs)
    finish(figures | {"threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
