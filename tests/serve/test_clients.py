"""Other projects' clients, pointed at our server."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from search_r3.model.search_r3 import SearchR3
from search_r3.retriever import Retriever
from search_r3.serve.app import Served, create_app
from tests.serve.conftest import running

TEXTS = ["many files into one", "ls lists files"]


@pytest.fixture
def url(retriever: Retriever) -> Iterator[str]:
    with running(create_app([Served("manual", retriever)])) as address:
        yield f"{address}/v1"


def test_openai(url: str, model: SearchR3) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="any") as client:
        answer = client.embeddings.create(model="manual", input=TEXTS)  # the client asks for base64
        given = np.array([row.embedding for row in answer.data], np.float32)
        np.testing.assert_allclose(given, model.encode_documents(TEXTS), atol=1e-6)
        answer = client.embeddings.create(model="manual", input=TEXTS, extra_body={"reason": True}, dimensions=8)
        assert len(answer.data[0].embedding) == 8
        assert [served.id for served in client.models.list()] == ["manual"]
        with pytest.raises(openai.UnprocessableEntityError, match="is empty"):
            client.embeddings.create(model="manual", input="")


def test_langchain(url: str, model: SearchR3) -> None:
    langchain = pytest.importorskip("langchain_openai")
    embeddings = langchain.OpenAIEmbeddings(
        base_url=url, api_key="any", model="manual", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), model.encode_documents(TEXTS), atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[0]), model.encode_queries(TEXTS[:1])[0], atol=1e-6)


def test_llamaindex(url: str, model: SearchR3) -> None:
    llamaindex = pytest.importorskip("llama_index.embeddings.openai")
    embeddings = llamaindex.OpenAIEmbedding(api_base=url, api_key="any", model_name="manual")
    np.testing.assert_allclose(embeddings.get_text_embedding_batch(TEXTS), model.encode_documents(TEXTS), atol=1e-6)
