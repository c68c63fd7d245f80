import gguf
import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r3 import SearchR3
from search_r3.errors import CheckpointError
from search_r3.model.checkpoint import initialise
from search_r3.model.gguf import NAME, _interleaved, turn, write
from tests.conftest import TEXTS, build_base, build_tokenizer


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_another_reader_of_the_file_gets_our_vectors(tmp_path, family, tied):
    initialise(build_base(tmp_path / "base", family=family, tied=tied), tmp_path / "checkpoint")
    model = SearchR3.from_pretrained(tmp_path / "checkpoint")
    write(model, tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=NAME)
    expected = model.encode_documents(TEXTS)
    for text, vector in zip(TEXTS, expected, strict=True):
        ids = tokenizer(turn(model, text), return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert ids[0, -1] == model.engine.embed_token_id
        with torch.inference_mode():
            last = other.model(ids).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(last / np.linalg.norm(last), vector, atol=2e-3)  # weights are float16
    fields = gguf.GGUFReader(tmp_path / "out" / NAME).fields
    assert fields[f"{family}.pooling_type"].contents() == gguf.PoolingType.LAST
    assert turn(model) in (tmp_path / "out" / "README.md").read_text()


def test_added_tokens_and_biases_are_written_as_llama_cpp_reads_them(tmp_path):
    folder = build_base(tmp_path / "base", spare=8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    initialise(folder, tmp_path / "checkpoint")
    model = SearchR3.from_pretrained(tmp_path / "checkpoint")
    write(model, tmp_path / "out")
    types = gguf.GGUFReader(tmp_path / "out" / NAME).fields["tokenizer.ggml.token_type"].contents()
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == gguf.TokenType.USER_DEFINED
    assert types[model.engine.embed_token_id] == gguf.TokenType.CONTROL
    weight = np.arange(48.0).reshape(16, 3)  # 2 heads of 8
    swapped = _interleaved(weight, 2)
    assert swapped[:4, 0].tolist() == weight[[0, 4, 1, 5], 0].tolist()
    assert _interleaved(weight[:, 0], 2).tolist() == swapped[:, 0].tolist()


def test_what_llama_cpp_would_read_otherwise_is_refused(model, checkpoint, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="vectors of an exported model are whole"):
        write(SearchR3.from_pretrained(checkpoint, dims=8), tmp_path / "cut")
    monkeypatch.setattr(model.engine.model.config, "model_type", "gemma3")
    with pytest.raises(CheckpointError, match="gemma3 models are not known"):
        write(model, tmp_path / "unknown")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="rounded to int8 cannot be saved"):
        write(SearchR3.from_pretrained(checkpoint, dtype="int8"), tmp_path / "int8")
    for part, value, message in [
        ("pre_tokenizer", None, "tokenizer of this kind"),
        ("normalizer", normalizers.Lowercase(), "does not normalise text; the tokenizer does .Lowercase"),
    ]:
        tokenizer = build_tokenizer()
        setattr(tokenizer.backend_tokenizer, part, value)
        monkeypatch.setattr(model.engine, "tokenizer", tokenizer)
        with pytest.raises(CheckpointError, match=message):
            write(model, tmp_path / part)
    assert not list(tmp_path.glob("*/model.gguf"))
