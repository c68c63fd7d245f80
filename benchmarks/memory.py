"""Peak memory of indexing: a corpus, and one of ten times as many documents of the same length.

Each is indexed by the command a user types, in a process of its own, with a tiny random model so that reading and
storing is what is measured. If the text were kept, the second would need more by what the text grew; it may only need
what its vectors take.

    python benchmarks/memory.py --json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common import arguments, demo_words, finish
from search_r3.model.checkpoint import initialise, resolve

WIDTH = 64


def tiny_checkpoint(folder: Path) -> Path:
    """A random model with the default model's tokenizer, fast enough that text volume can be large."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    initialise(folder / "base", folder / "checkpoint")
    return folder / "checkpoint"


def write(path: Path, documents: int, words: int) -> int:
    """A JSONL corpus; returns its size in bytes."""
    source = demo_words()
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(source[(number * 7 + place) % len(source)] for place in range(words))
            file.write(json.dumps({"_id": str(number), "text": f"{number} {text}"}) + "\n")
    return path.stat().st_size


def peak(checkpoint: Path, corpus: Path, index: Path) -> int:
    """Peak resident bytes of `search-r3 index`. Documents are cut, not split: one vector each."""
    command = [sys.executable, "-m", "search_r3", "index", str(corpus), str(index)]
    process = subprocess.Popen(
        [*command, "--checkpoint", str(checkpoint), "--passage-tokens", "0", "--json"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "search-r3 index failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    args = arguments(__doc__, documents=(18_000, "documents"), words=(1200, "words of a document"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = tiny_checkpoint(folder)
        text, peaks = [], []
        for count in (args.documents // 10, args.documents):
            corpus = folder / f"{count}.jsonl"
            text.append(write(corpus, count, args.words) / 2**20)
            peaks.append(peak(checkpoint, corpus, folder / f"{count}-index") / 2**20)
    finish(
        {
            "text_grew_mib": text[1] - text[0],
            "peak_grew_mib": peaks[1] - peaks[0],
            "share_of_text": (peaks[1] - peaks[0]) / (text[1] - text[0]),
            "vectors_grew_mib": 0.9 * args.documents * WIDTH * 4 / 2**20,
            "peak_mib": peaks,
            "text_mib": text,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
