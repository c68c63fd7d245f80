"""Pairs of your own as a folder in BEIR layout, for what reads nothing else: mine, bootstrap, train rl, eval, dev sets.

python examples/pairs.py pairs.jsonl data/mine       # any file of pairs that train sft reads

One query in ten becomes a test query; the others are for training. All documents are searched in either case. Negatives
and reasonings that pairs have come along as negatives.jsonl and thoughts.jsonl, which a recipe's source can name.
"""

import hashlib
import sys
from pathlib import Path

from search_r3.train.config import Source
from search_r3.train.data import HeldOut, dump, load_examples

given, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
(examples,), _ = load_examples([Source(path=str(given))], HeldOut({}, {}), Path())
documents, queries = dict[str, str](), dict[str, str]()
answers, negatives, thoughts = dict[str, set[str]](), dict[str, dict[str, None]](), dict[str, str]()
for example in examples:
    query = hashlib.sha256(example.query.encode()).hexdigest()[:16]  # asked on several lines, it is one query
    queries[query] = example.query
    documents |= {passage.id[:16]: passage.text for passage in (example.positive, *example.negatives)}
    answers.setdefault(query, set()).add(example.positive.id[:16])
    if example.negatives:
        negatives.setdefault(query, {}).update({passage.id[:16]: None for passage in example.negatives})
    if example.thought:
        thoughts[query] = example.thought

files = {
    "corpus.jsonl": [dump({"_id": name, "text": text}) for name, text in documents.items()],
    "queries.jsonl": [dump({"_id": name, "text": text}) for name, text in queries.items()],
    "negatives.jsonl": [dump({"query_id": name, "negatives": list(found)}) for name, found in negatives.items()],
    "thoughts.jsonl": [dump({"query_id": name, "thought": text}) for name, text in thoughts.items()],
}
for split in ("train", "test"):  # names are hashes: their order is a random one
    split_queries = [name for place, name in enumerate(sorted(answers)) if (split == "test") == (place % 10 == 0)]
    rows = [f"{name}\t{document}\t1\n" for name in split_queries for document in sorted(answers[name])]
    files[f"qrels/{split}.tsv"] = ["query-id\tcorpus-id\tscore\n", *rows]
for name, lines in files.items():
    if lines:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(lines), encoding="utf-8")
print(f"{len(documents)} documents, {len(queries)} queries in {folder}")
