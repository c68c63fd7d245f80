"""Vectors of an exported GGUF file in llama.cpp against ours, over pages of the bundled manual and awkward texts.

llama.cpp comes from npm: `npm install node-llama-cpp` in a folder, which --node names.

    python benchmarks/llama_cpp.py --node FOLDER --json
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from common import finish
from search_r3 import SearchR3
from search_r3.corpus import read_documents
from search_r3.evaluate.collection import DEMO
from search_r3.model.gguf import NAME, turn, write

SCRIPT = """
import fs from "fs";
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: process.argv[2]});
const context = await model.createEmbeddingContext({contextSize: 2048});
const rows = [];
for (const turn of JSON.parse(fs.readFileSync(0))) {
  const tokens = model.tokenize(turn, true);
  rows.push({tokens: [...tokens], vector: [...(await context.getEmbeddingFor(tokens)).vector]});
}
fs.writeFileSync(process.argv[3], JSON.stringify(rows));
process.exit(0);
"""
AWKWARD = [
    "def f(x):\n\treturn x**2  # naïve, 12345 and 東京 🙂",
    "HOW's  it  going?\n\n\n2024-01-01",
    "a",
    "{{ x }} \\n",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--node", type=Path, required=True, help="folder in which node-llama-cpp is installed")
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--documents", type=int, default=60)
    args = parser.parse_args()
    model = SearchR3.from_pretrained(args.checkpoint, dtype="float32")
    pages = [document.content for document in read_documents(DEMO)]
    texts = [text.strip() for text in pages[:: len(pages) // args.documents] + AWKWARD]
    prefix, end = model.engine.prefix_ids("embed"), model.engine.embed_token_id
    ours = [[*prefix, *tail, end] for tail in model.engine.tails(texts, "embed", model.manifest.max_tokens.document)]
    texts = [text for text, ids in zip(texts, ours, strict=True) if len(ids) < 512]  # nothing is cut
    ours = [ids for ids in ours if len(ids) < 512]
    with tempfile.TemporaryDirectory() as temporary:
        write(model, Path(temporary) / "out")
        script, found = args.node / "search-r3-embed.mjs", Path(temporary) / "found.json"
        script.write_text(SCRIPT)
        turns = json.dumps([turn(model, text) for text in texts])
        command = ["node", script.name, str(Path(temporary) / "out" / NAME), str(found)]
        subprocess.run(command, input=turns, cwd=args.node, text=True, check=True)
        script.unlink()
        rows = json.loads(found.read_text())
    theirs = np.array([row["vector"] for row in rows])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    difference = np.abs(theirs - model.encode_documents(texts))
    finish(
        {
            "texts": len(texts),
            "same_tokens": float(np.mean([row["tokens"] == ids for row, ids in zip(rows, ours, strict=True)])),
            "largest_difference": float(difference.max()),
        },
        args.json,
    )


if __name__ == "__main__":
    main()
