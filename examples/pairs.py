"""Pairs of your own as a folder in BEIR layout, for what reads nothing else: mine, bootstrap, train rl, eval, dev sets.

python examples/pairs.py pairs.jsonl data/mine       # lines such as {"query": "...", "positives": ["...", "..."]}

One query in ten becomes a test query; the others are for training. All documents are searched in either case.
"""

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path


def number(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lines(texts: dict[str, str]) -> str:
    return "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in texts.items())


source, folder = Path(sys.argv[1]), Path(sys.argv[2])
documents, queries = dict[str, str](), dict[str, str]()
answers = defaultdict[str, set[str]](set)  # of a query that stands on several lines, all of them
for line in source.read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    for text in record["positives"]:
        documents[number(text)] = text
        queries[number(record["query"])] = record["query"]
        answers[number(record["query"])].add(number(text))

(folder / "qrels").mkdir(parents=True)
(folder / "corpus.jsonl").write_text(lines(documents), encoding="utf-8")
(folder / "queries.jsonl").write_text(lines(queries), encoding="utf-8")
for split in ("train", "test"):
    rows = ["query-id\tcorpus-id\tscore"]
    for place, query in enumerate(sorted(answers)):  # ids are hashes: their order is a random one
        if (split == "test") == (place % 10 == 0):
            rows += [f"{query}\t{document}\t1" for document in sorted(answers[query])]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
print(f"{len(documents)} documents, {len(queries)} queries in {folder}")
