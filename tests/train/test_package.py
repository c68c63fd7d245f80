import shutil

import pytest
import torch

from search_r3 import SearchR3
from search_r3.errors import CheckpointError
from search_r3.model.checkpoint import MaxTokens, Stage, initialise, load, read_manifest, save
from search_r3.train.package import extract_adapter


@pytest.fixture
def trained(checkpoint, tmp_path):
    """The tiny checkpoint with a change of rank 3 in every linear layer and another token row."""
    model, tokenizer, manifest = load(checkpoint)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in model.get_decoder().modules():
            if isinstance(part, torch.nn.Linear):
                part.weight += 0.3 * torch.randn(part.out_features, 3) @ torch.randn(3, part.in_features)
        model.get_input_embeddings().weight[manifest.embed_token_id] += 0.1

    def write(name):
        save(tmp_path / name, model, tokenizer, manifest.prompts, embed_token=manifest.embed_token)
        return tmp_path / name

    return model, write


def test_an_extracted_adapter_is_the_checkpoint(checkpoint, trained, tmp_path):
    report = extract_adapter(trained[1]("model"), checkpoint, tmp_path / "adapter", rank=3)
    assert report["kept"] > 0.9999
    texts = ["some text", "another one"]
    one, other, before = (
        SearchR3.from_pretrained(folder).encode_documents(texts)
        for folder in (tmp_path / "model", tmp_path / "adapter", checkpoint)
    )
    assert abs(one - other).max() < 0.05  # bfloat16
    assert abs(one - before).max() > 0.1
    assert extract_adapter(tmp_path / "model", checkpoint, tmp_path / "small", rank=1)["kept"] < 0.9


def test_an_adapter_brings_its_prompts(checkpoint, trained, tmp_path):
    model, tokenizer, manifest = load(trained[1]("model"))
    words = manifest.prompts.reason.model_copy(update={"prefix": "<|im_start|>system\nAnswer.<|im_end|>\n"})
    prompts = manifest.prompts.model_copy(update={"reason": words})
    save(tmp_path / "asked", model, tokenizer, prompts, embed_token=manifest.embed_token)
    extract_adapter(tmp_path / "asked", checkpoint, tmp_path / "adapter")
    assert SearchR3.from_pretrained(tmp_path / "adapter").manifest.prompts == prompts
    given = SearchR3.from_pretrained(tmp_path / "adapter", prompts=manifest.prompts)
    assert given.manifest.prompts == manifest.prompts
    assert read_manifest(tmp_path / "adapter").prompts == prompts


def test_an_adapter_tells_how_it_was_trained(checkpoint, trained, tmp_path):
    model, tokenizer, manifest = load(trained[1]("model"))
    made = tuple(Stage(stage=stage, recipe={"steps": 4}, data="0f") for stage in ("sft", "rl"))
    save(tmp_path / "told", model, tokenizer, manifest.prompts, embed_token=manifest.embed_token, training=made)
    extract_adapter(tmp_path / "told", checkpoint, tmp_path / "adapter")
    merged = SearchR3.from_pretrained(tmp_path / "adapter")
    assert merged.manifest.training == made
    assert merged.save_pretrained(tmp_path / "merged").training == made
    extract_adapter(tmp_path / "merged", tmp_path / "told", tmp_path / "rest")
    assert read_manifest(tmp_path / "rest").training == ()  # its base tells it
    assert SearchR3.from_pretrained(tmp_path / "rest").manifest.training == made


def test_an_adapter_brings_its_lengths_and_knows_its_base(checkpoint, trained, tmp_path, monkeypatch):
    model, tokenizer, manifest = load(trained[1]("model"))
    short = MaxTokens(reasoning=7)
    save(tmp_path / "short", model, tokenizer, manifest.prompts, embed_token=manifest.embed_token, max_tokens=short)
    shutil.copytree(checkpoint, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    extract_adapter("short", "base/", tmp_path / "adapter")
    monkeypatch.chdir("/")
    merged = SearchR3.from_pretrained(tmp_path / "adapter")
    assert merged.save_pretrained(tmp_path / "merged").max_tokens == merged.manifest.max_tokens == short
    assert initialise(tmp_path / "merged", tmp_path / "asked").max_tokens == short
    save(tmp_path / "other", model, tokenizer, manifest.prompts, embed_token=manifest.embed_token)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        SearchR3.from_pretrained(tmp_path / "adapter")


def test_what_an_adapter_cannot_hold_is_named(checkpoint, trained, tmp_path):
    model, write = trained
    with pytest.raises(CheckpointError, match="nothing to package"):
        extract_adapter(checkpoint, checkpoint, tmp_path / "adapter")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        extract_adapter(checkpoint, checkpoint, tmp_path / "taken")
    with torch.no_grad():
        model.get_decoder().norm.weight += 1
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight was trained"):
        extract_adapter(write("normed"), checkpoint, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
