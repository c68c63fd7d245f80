import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r3 import SearchR3
from search_r3.errors import CheckpointError
from search_r3.model import gguf
from search_r3.model.export import export
from search_r3.model.prompts import Act
from tests.conftest import TEXTS


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(model, folder)
    return folder


@pytest.fixture(scope="module")
def peer(exported):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(exported), device="cpu")


def test_sentence_transformers_gives_the_same_vectors(model, peer):
    texts = [*TEXTS, "  spaces around \n", "two\n\nlines", "{{ messages }}", "12 numbers"]
    np.testing.assert_allclose(peer.encode_document(texts), model.encode_documents(texts), atol=1e-5)
    np.testing.assert_allclose(peer.encode_query(texts), model.encode_queries(texts), atol=1e-5)


def test_a_long_text_is_cut_and_keeps_its_end(model, peer):
    for words in (500, 505, 510, 515, 520, 700, 5000):
        long = " ".join(f"w{n % 10}" for n in range(words))
        np.testing.assert_allclose(peer.encode([long]), model.encode_documents([long]), atol=1e-5)


def test_it_is_a_causal_model_with_its_own_chat_template(model, exported):
    tokenizer, other = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == model.engine.tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    ids = tokenizer("ls lists files", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(other(ids).logits, model.engine.model(ids).logits, atol=1e-5, rtol=0)


def test_our_class_loads_it_and_reasons(model, exported):
    again = SearchR3.from_pretrained(exported)
    assert again.manifest.prompts == model.manifest.prompts
    one, other = again.reason(TEXTS[:2], max_new_tokens=5), model.reason(TEXTS[:2], max_new_tokens=5)
    for a, b in zip(one, other, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.vector, b.vector, atol=1e-5)


def test_what_cannot_be_exported(checkpoint, exported, tmp_path, model):
    with pytest.raises(CheckpointError, match="without --dims"):
        export(SearchR3.from_pretrained(checkpoint, dims=8), tmp_path / "cut")
    with pytest.raises(FileExistsError):
        export(model, exported)
    prompts = model.manifest.prompts
    joined = prompts.model_copy(update={"embed": Act(prefix=prompts.embed.prefix + "Text: ", suffix="")})
    for write in (export, gguf.write):  # " a" is one token
        with pytest.raises(CheckpointError, match=r"the prompt around it \('.*Text: ', ''\) merges with it"):
            write(SearchR3.from_pretrained(checkpoint, prompts=joined), tmp_path / "joined")
        assert not (tmp_path / "joined").exists()
