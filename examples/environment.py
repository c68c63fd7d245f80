"""The retrieval environment without a trainer: a model moves, and the index follows on a tenth of the tokens.

python examples/environment.py
"""

import os

import numpy as np
import torch

from search_r3 import Document, SearchR3
from search_r3.environment import EnvironmentConfig, RetrievalEnvironment, dcg
from search_r3.evaluate.collection import DEMO, cut, load_collection

model = SearchR3.from_pretrained(os.environ.get("MODEL", "default"))
collection = cut(load_collection(DEMO), 8, 120)
asked = [query.id for query in collection.queries]
texts = [query.text for query in collection.queries]


class Encoder:
    """Anything that embeds documents will do; this one cuts them short to save time."""

    def encode_documents(self, documents: list[Document]) -> np.ndarray:
        return model.encode_documents(documents, max_tokens=48)


config = EnvironmentConfig(budget=0.1, depth=20)
environment = RetrievalEnvironment(collection.documents, collection.judgements, encoder=Encoder(), config=config)
environment.reset()
generator = torch.Generator().manual_seed(0)
for step in range(3):
    with torch.no_grad():  # in place of an optimiser's step
        for weight in model.engine.model.parameters():
            weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    outcomes = environment.step(asked, model.encode_queries(texts))
    print(f"step {step}: mean reward {np.mean([dcg(outcome) for outcome in outcomes]):.3f}")
print("reward error against a fresh index:", environment.audit().reward_error)
