"""The exported OpenVINO graph against our engine: same weights, texts and threads, in one run.

Both compute the constant prompt once. Ratios above 1 mean that the graph is faster; `single` is one query at a time.

    python benchmarks/export.py --json
"""

import tempfile
from pathlib import Path

import numpy as np

from common import arguments, demo_queries, demo_texts, finish, paired
from search_r3 import SearchR3
from search_r3.model.openvino import OpenVinoEncoder, write


def main() -> None:
    args = arguments(
        __doc__, documents=(48, "documents"), document_tokens=(100, "mean tokens of a document"),
        queries=(64, "queries"), singles=(16, "queries asked one by one"), repeats=(3, "counted runs"),
    )  # fmt: skip
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        first = SearchR3.from_pretrained("default")
        write(first, Path(folder) / "graph")
        documents = demo_texts(args.documents, args.document_tokens, first.engine.tokenizer)
        queries = demo_queries(args.queries, least_words=8)
        works = {
            "documents": lambda side: side.encode_documents(documents),
            "queries": lambda side: side.encode_queries(queries),
            "single": lambda side: [side.encode_queries([text]) for text in queries[: args.singles]],
        }
        for name, precision in (("float32", "f32"), ("bfloat16", "bf16")):
            model = SearchR3.from_pretrained("default", dtype=name)
            graph = OpenVinoEncoder(Path(folder) / "graph", precision=precision)
            for kind, work in works.items():
                times = paired(lambda g=graph, w=work: w(g), lambda m=model, w=work: w(m), args.repeats)
                figures[f"{kind}_{name}_x"] = times["ratio"]
            exact = first.encode_documents(documents)
            figures[f"max_abs_diff_{name}"] = float(np.abs(graph.encode_documents(documents) - exact).max())
    finish({**figures, "threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
