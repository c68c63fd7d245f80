"""Our engine against SentenceTransformer.encode: same weights, prompts, texts and threads, in one run.

Sentence-transformers reads every turn whole, prompt included; the engine computes the constant prompt once. Then
bfloat16 and int8: their speed against our float32, and their cost in nDCG@10 on the bundled collection.

    python benchmarks/encode.py --json
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from common import arguments, demo_queries, demo_texts, finish, paired
from search_r3 import SearchR3
from search_r3.evaluate.collection import DEMO, load_collection
from search_r3.evaluate.metrics import score_matrix
from search_r3.model.checkpoint import quiet, resolve
from search_r3.model.search_r3 import Dtype


def sentence_transformer(model: SearchR3) -> SentenceTransformer:
    """The same backbone behind the peer's own pipeline: last-token pooling and normalisation."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        for path in resolve("base").iterdir():
            if path.name != "chat_template.jinja":  # with a template the peer would wrap our rendered turns once more
                (Path(folder) / path.name).symlink_to(path)
        transformer = Transformer(folder, max_seq_length=2048)
        pooling = Pooling(model.manifest.dimension, pooling_mode="lasttoken")
        return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def lighter(dtype: Dtype) -> tuple[float, float]:
    """Seconds to encode the bundled collection, documents cut at 64 tokens to save time, and its direct nDCG@10."""
    model, collection = SearchR3.from_pretrained("base", dtype=dtype), load_collection(DEMO)
    queries = [query.text for query in collection.queries]
    model.encode_queries(queries)  # warm-up
    started = time.perf_counter()
    documents, asked = model.encode_documents(collection.documents, max_tokens=64), model.encode_queries(queries)
    seconds = time.perf_counter() - started
    return seconds, float(np.mean(score_matrix(collection, asked @ documents.T)))


def main() -> None:
    args = arguments(
        __doc__, documents=(48, "documents"), document_tokens=(100, "mean tokens of a document"),
        queries=(64, "queries"), repeats=(3, "counted runs"), batch_size=(32, "the peer's batch size, its default"),
    )  # fmt: skip
    model = SearchR3.from_pretrained("base")
    peer = sentence_transformer(model)
    documents = demo_texts(args.documents, args.document_tokens, model.engine.tokenizer)
    queries = demo_queries(args.queries, least_words=8)
    act, token = model.manifest.prompts.embed, model.manifest.embed_token

    def whole(texts: list[str]) -> list[str]:
        return [f"{act.prefix}{text}{act.suffix}{token}" for text in texts]

    def theirs(texts: list[str]) -> np.ndarray:
        return peer.encode(whole(texts), batch_size=args.batch_size, show_progress_bar=False)

    difference = max(
        float(np.abs(model.encode_documents(documents) - theirs(documents)).max()),
        float(np.abs(model.encode_queries(queries) - theirs(queries)).max()),
    )
    by_document = paired(lambda: model.encode_documents(documents), lambda: theirs(documents), args.repeats)
    by_query = paired(lambda: model.encode_queries(queries), lambda: theirs(queries), args.repeats)
    tokens = [sum(map(len, model.engine.plain_ids(texts))) / len(texts) for texts in (documents, queries)]
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "int8")
    light = {dtype: lighter(dtype) for dtype in dtypes}
    finish(
        {
            "documents_x": by_document["ratio"],
            "queries_x": by_query["ratio"],
            "max_abs_diff": difference,
            "document_tokens": tokens[0],
            "query_tokens": tokens[1],
            "prefix_tokens": len(model.engine.prefix_ids("embed")),
            "documents_per_s": len(documents) / by_document["ours_s"],
            "queries_per_s": len(queries) / by_query["ours_s"],
            **{f"{dtype}_x": light["float32"][0] / seconds for dtype, (seconds, _) in light.items()},
            **{f"ndcg10_{dtype}": score for dtype, (_, score) in light.items()},
            "threads": args.threads,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
