"""What reasonings are worth: nDCG@10 without them, by the mean of several, and by that and the direct vector added.

    python benchmarks/reasonings.py data/covid-faq data/perlfaq data/pystdlib:130 --checkpoint runs/sft/model
    python benchmarks/reasonings.py data/covid-faq data/perlfaq data/pystdlib:130 --writer base --told "Answer ..."

A folder may be followed by how many of its queries are taken. Differences from direct search are over all queries, with
their standard errors; use folders that are not your test sets. `--others` asks what the texts are worth in other ways:

hyde         the query and the texts, each embedded as a document, averaged (arXiv 2212.10496)
query2doc    query and text embedded as one query, averaged over the texts (after arXiv 2303.07678)
repeated     the same with the query in the text's place: the control of that, as in arXiv 2402.15449
hybrid       direct search beside BM25; hybrid_fused: the fused vectors beside BM25
hybrid_words the latter, with a fifth of what BM25 finds by the words of the texts
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from search_r3 import SearchR3
from search_r3.evaluate.collection import Collection, load_collection
from search_r3.evaluate.metrics import score_matrix
from search_r3.index.lexical import LexicalIndex
from search_r3.model.prompts import SystemPrompts, render_prompts
from search_r3.model.reasoning import control_ids, mean_vectors
from search_r3.records import Status
from search_r3.retriever import fuse_vectors
from search_r3.train.bootstrap import whole


def others(
    model: SearchR3,
    texts: list[str],
    thoughts: list[str],
    collection: Collection,
    direct: np.ndarray,
    fused: np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Query vectors (N, D) and shares of words (N, documents) by mode. thoughts: those of a query side by side."""
    samples = len(thoughts) // len(texts)
    asked = [text for text in texts for _ in range(samples)]
    written = model.encode_documents([thought.strip() or text for thought, text in zip(thoughts, asked, strict=True)])
    with_query = np.concatenate([direct[:, None], written.reshape(len(texts), samples, -1)], axis=1)
    joined = model.encode_queries([f"{text}\n{thought}" for text, thought in zip(asked, thoughts, strict=True)])
    vectors = {
        "hyde": mean_vectors(with_query.reshape(len(texts) * (samples + 1), -1), samples + 1),
        "query2doc": mean_vectors(joined, samples),
        "repeated": model.encode_queries([f"{text}\n{text}" for text in texts]),
        "hybrid": direct,
        "hybrid_fused": fused,
        "hybrid_words": fused,
    }
    rows = len(collection.documents)
    index = LexicalIndex.build([document.content for document in collection.documents], range(rows))
    words = np.stack([index.worth(text, rows) for text in texts])
    of_thoughts = np.stack([index.worth(thought, rows) for thought in thoughts]).reshape(len(texts), samples, rows)
    shares = {"hybrid": words, "hybrid_fused": words, "hybrid_words": words + 0.2 * of_thoughts.mean(axis=1)}
    return vectors, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="BEIR folders, each perhaps with :NUMBER of queries")
    parser.add_argument("--checkpoint", default="default", help="embeds, and writes where there is no --writer")
    parser.add_argument("--writer", help="checkpoint that writes the reasonings")
    parser.add_argument("--told", help="the writer's system message, in place of its own")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=128, help="of a document")
    parser.add_argument("--others", action="store_true", help="other uses of the texts, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    model = writer = SearchR3.from_pretrained(args.checkpoint, dtype="bfloat16")
    if args.writer:
        writer = SearchR3.from_pretrained(args.writer, dtype="bfloat16")
        if args.told:
            prompts = render_prompts(writer.engine.tokenizer, SystemPrompts(reason_system=args.told))
            writer = SearchR3.from_pretrained(args.writer, dtype="bfloat16", prompts=prompts)
    control = control_ids(writer.engine)
    scores: dict[str, list[list[float]]] = defaultdict(list)
    lengths, forced = [], []
    for given in args.folders:
        path, _, limit = given.partition(":")
        collection = load_collection(Path(path), limit=int(limit) if limit else None)
        texts = [query.text for query in collection.queries]
        documents = model.encode_documents(collection.documents, max_tokens=args.max_tokens)
        direct = model.encode_queries(texts)
        thoughts = writer.reason(
            texts, max_new_tokens=args.max_new_tokens, samples=args.samples, temperature=args.temperature,
            top_p=args.top_p, batch_rows=64,
        )  # fmt: skip
        written = [whole(thought, control) for thought in thoughts]
        lengths += [len(thought.token_ids) for thought in thoughts]
        forced += [thought.status is Status.FORCED for thought in thoughts]
        if writer is model:
            vectors = np.stack([thought.vector for thought in thoughts])
        else:
            repeated = [text for text in texts for _ in range(args.samples)]
            vectors = model.encode_reasoned(repeated, model.engine.plain_ids(written))
        reasoned = mean_vectors(vectors, args.samples)
        queries = {"direct": direct, "reason": reasoned, "fused": fuse_vectors(direct, reasoned, 0.5)}
        shares: dict[str, np.ndarray] = {}
        if args.others:
            more, shares = others(model, texts, written, collection, direct, queries["fused"])
            queries |= more
        for mode, asked in queries.items():
            scores[mode].append(score_matrix(collection, asked @ documents.T + shares.get(mode, 0)))
        print(given, {mode: round(float(np.mean(found[-1])), 4) for mode, found in scores.items()}, flush=True)
    report = {"tokens": float(np.mean(lengths)), "forced": float(np.mean(forced))}
    without = np.concatenate(scores["direct"])
    for mode, found in scores.items():
        gains = np.concatenate(found) - without
        report |= {mode: float(np.mean([np.mean(part) for part in found])), f"{mode}_gain": float(gains.mean())}
        report[f"{mode}_error"] = float(gains.std() / len(gains) ** 0.5)
    print(json.dumps(report) if args.json else "\n".join(f"{name:14} {value:.4f}" for name, value in report.items()))


if __name__ == "__main__":
    main()
