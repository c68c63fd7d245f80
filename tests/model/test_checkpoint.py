import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from search_r3 import SearchR3
from search_r3.errors import CheckpointError
from search_r3.model import checkpoint as module
from search_r3.model.checkpoint import EMBED_TOKEN, MaxTokens, Parent, describe, initialise, read_manifest, resolve
from search_r3.model.prompts import SystemPrompts
from search_r3.retriever import Retriever
from tests.conftest import TEXTS, build_base


def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_vocabulary_grows_only_where_there_is_no_spare_row(tmp_path, base_folder, checkpoint):
    before = json.loads((base_folder / "config.json").read_text())["vocab_size"]
    assert json.loads((checkpoint / "config.json").read_text())["vocab_size"] == before + 1
    build_base(tmp_path / "spare", spare=5)
    initialise(tmp_path / "spare", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == before + 5


@pytest.mark.parametrize("tied", [True, False])
def test_the_new_row_is_the_mean_of_the_trained_rows(tmp_path, tied):
    initialise(build_base(tmp_path / "base", spare=5, tied=tied), tmp_path / "out")
    model = SearchR3.from_pretrained(tmp_path / "out")
    token = model.engine.embed_token_id
    for table in {model.engine.model.get_input_embeddings().weight, model.engine.model.get_output_embeddings().weight}:
        torch.testing.assert_close(table[token], table[:token].mean(dim=0))


def test_save_and_load_keep_vectors_and_prompts(model, tmp_path):
    manifest = model.save_pretrained(tmp_path / "saved")
    again = SearchR3.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(model.encode_documents(TEXTS), again.encode_documents(TEXTS))
    assert again.manifest.prompts == model.manifest.prompts
    assert again.fingerprint == model.fingerprint == manifest.fingerprint
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "saved")


def test_rounded_weights_are_not_saved(checkpoint, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"rounded to torch\.bfloat16 cannot be saved; load it with dtype float32"
    ):
        SearchR3.from_pretrained(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "saved")


def test_a_home_folder_is_the_same_for_making_and_opening(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("~/saved")
    assert SearchR3.from_pretrained("~/saved").fingerprint == model.fingerprint
    with Retriever.create("~/index", model) as retriever:
        assert retriever.store.folder == tmp_path / "index"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "llama has layers of linear_attention; take a plain"),
        ({"final_logit_softcapping": 30.0}, r"llama scales its logits \(final_logit_softcapping\)"),
        ({"model_type": "ours", "auto_map": {"AutoConfig": "mine.Config"}}, "cannot load the model"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(base_folder, tmp_path, monkeypatch, more, message):
    folder = shutil.copytree(base_folder, tmp_path / "copy")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | more))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # nobody is asked
    with pytest.raises(CheckpointError, match=message):
        initialise(folder, tmp_path / "out")
    assert sys.stdin.read() == "y\n"
    assert not (tmp_path / "ran").exists()


def test_own_prompts_change_the_space_but_not_by_the_reason_prompt(checkpoint, model):
    other = SearchR3.from_pretrained(checkpoint, prompts=SystemPrompts(embed_system="Something else."))
    assert other.fingerprint != model.fingerprint
    thinker = SearchR3.from_pretrained(checkpoint, prompts=SystemPrompts(reason_system="Think."))
    assert thinker.fingerprint == model.fingerprint
    assert "Think." in thinker.manifest.prompts.reason.prefix


def test_model_of_another_project_runs_with_its_own_token_and_prompts(base_folder):
    words = SystemPrompts(embed_system="Represent.", reason_system="Reason.", embed_reply="Here:")
    model = SearchR3.from_pretrained(base_folder, prompts=words, embed_token="<|im_start|>")
    assert model.encode_documents(TEXTS).shape == (len(TEXTS), 32)
    assert model.manifest.prompts.embed.suffix.endswith("Here:")


def test_a_model_without_the_token_says_how_to_add_it(base_folder):
    with pytest.raises(CheckpointError, match=r"no <\|embed_token\|>; add it with: search-r3 init"):
        SearchR3.from_pretrained(base_folder)


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def damage_missing(folder):
    (folder / "model.safetensors").unlink()


def damage_manifest(folder):
    (folder / "search_r3.json").write_text("{broken")


def damage_field(folder):
    raw = json.loads((folder / "search_r3.json").read_text())
    raw["dimension"] = "wide"
    (folder / "search_r3.json").write_text(json.dumps(raw))


def damage_newer(folder):
    (folder / "search_r3.json").write_text(json.dumps({"format": 99, "something": "new"}))


def damage_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"model.safetensors: content does not match"),
        (damage_flip, r"model.safetensors: content does not match"),
        (damage_missing, r"model.safetensors: missing"),
        (damage_manifest, r"search_r3.json: not a readable manifest"),
        (damage_field, r"search_r3.json: field dimension"),
        (damage_newer, r"format 99 is newer"),
        (damage_config, r"config.json: missing"),
    ],
)
def test_damage_is_one_line_that_names_the_file(checkpoint, tmp_path, damage, message):
    folder = copy(checkpoint, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        SearchR3.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights_without_a_manifest_are_refused_too(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    (folder / "search_r3.json").unlink()
    damage_truncate(folder)
    with pytest.raises(CheckpointError, match="cannot load the model"):
        SearchR3.from_pretrained(folder)


def test_pickled_weights_are_refused(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "pickle")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights"):
        SearchR3.from_pretrained(folder)


@pytest.mark.parametrize("source", ["no/such/folder/here", "./missing", "missing"])
def test_unknown_source(source):
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(source)


def test_hub_without_network_is_one_line():
    with pytest.raises(CheckpointError, match="someone/model: no such folder, and it cannot be fetched") as caught:
        resolve("someone/model")
    assert "\n" not in str(caught.value)


def test_lora_adapter_loads_on_top_of_its_checkpoint(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = SearchR3.from_pretrained(checkpoint)
    plain = model.encode_documents(TEXTS)
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[model.engine.embed_token_id])
    tuned = get_peft_model(model.engine.model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for _name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.eval()
    tuned.peft_config["default"].base_model_name_or_path = str(checkpoint)
    expected = model.encode_documents(TEXTS)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = SearchR3.from_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not name its base model"):
        SearchR3.from_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(loaded.encode_documents(TEXTS), expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-2
    assert loaded.fingerprint != SearchR3.from_pretrained(checkpoint).fingerprint
    loaded.save_pretrained(tmp_path / "merged")
    merged = SearchR3.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(merged.encode_documents(TEXTS), expected, atol=1e-5)


def test_default_is_the_base_with_the_shipped_adapter_merged_once(base_folder, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from search_r3.model import default

    def embedded():
        return AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)

    monkeypatch.setattr(default, "load_default_base", embedded)
    monkeypatch.setattr(default, "ADAPTER", tmp_path / "adapter")
    base = SearchR3.from_pretrained("base")
    plain = base.encode_documents(TEXTS)
    tuned = get_peft_model(base.engine.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = "base"
    expected = base.encode_documents(TEXTS)
    tuned.save_pretrained(tmp_path / "adapter")
    trained = SearchR3.from_pretrained("default")
    np.testing.assert_allclose(trained.encode_documents(TEXTS), expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-2
    assert trained.manifest.parent.source == "base"
    (kept,) = (tmp_path / "home" / "models").glob(f"{default.TRAINED_NAME}-*")
    whole = (kept / "config.json").read_text()
    (kept / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"config.json: content .*; delete {kept}, which is made anew"):
        SearchR3.from_pretrained("default")
    (kept / "config.json").write_text(whole)
    assert trained.fingerprint != SearchR3.from_pretrained("base").fingerprint
    monkeypatch.setattr(default, "load_default_base", None)  # neither is made again
    assert SearchR3.from_pretrained("default").fingerprint == trained.fingerprint
    asked = base.manifest.prompts.model_copy(update={"reason": base.manifest.prompts.embed})
    lengths, parent = MaxTokens(reasoning=5), Parent(source="base", weights_sha256="of another machine's conversion")
    told = describe(tmp_path / "adapter", base.engine.model, base.engine.tokenizer, asked, EMBED_TOKEN, lengths, parent)
    (tmp_path / "adapter" / "search_r3.json").write_text(told.model_dump_json())
    again = SearchR3.from_pretrained("default").manifest
    assert (again.prompts, again.max_tokens) == (asked, lengths)


def test_the_shipped_adapter_is_small_safe_and_names_its_base():
    from search_r3.model.default import ADAPTER

    weights = load_file(ADAPTER / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size < 16 << 20
    assert json.loads((ADAPTER / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_a_folder_is_written_whole_or_not_at_all(model, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_manifest_says_where_a_checkpoint_came_from(checkpoint, base_folder):
    manifest = read_manifest(checkpoint)
    assert manifest.parent.source == str(base_folder)
    assert manifest.embed_token == EMBED_TOKEN
    assert set(manifest.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert set(manifest.versions) == {"search-r3", "transformers", "torch"}
    assert "transformers_version" not in json.loads((checkpoint / "config.json").read_text())  # it would be hashed


def test_changed_weights_change_the_fingerprint(checkpoint, tmp_path, model):
    folder = copy(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "search_r3.json").unlink()
    assert SearchR3.from_pretrained(folder).fingerprint != model.fingerprint


def test_damaged_weights_are_no_base_of_a_new_checkpoint(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    damage_flip(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: content does not match"):
        initialise(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_chat_template_that_hides_the_user_is_refused(base_folder, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base_folder, copy)
    for template, message in (("hello", "does not show the user's message"), ("{% if", "cannot be used")):
        (copy / "chat_template.jinja").write_text(template)
        with pytest.raises(CheckpointError, match=message):
            initialise(copy, tmp_path / "out")


@pytest.mark.parametrize("system", ["", "{{ raise_exception('no system role') }}"])
def test_words_that_a_chat_template_has_no_place_for_go_to_the_user_s_turn(base_folder, tmp_path, system):
    copy = tmp_path / "base"
    shutil.copytree(base_folder, copy)
    template = "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% else %}U:{{ m.content }}"
    (copy / "chat_template.jinja").write_text(template + "{% endif %}{% endfor %}A:")
    initialise(copy, tmp_path / "out", SystemPrompts(embed_system="Represent it.", reason_system="Enrich it."))
    prompts = read_manifest(tmp_path / "out").prompts
    assert (prompts.embed.prefix, prompts.reason.prefix) == ("U:Represent it.\n\n", "U:Enrich it.\n\n")


def test_an_index_names_its_checkpoint_by_its_full_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    model = SearchR3.from_pretrained(checkpoint.name)
    with Retriever.create(tmp_path / "index", model) as retriever:
        assert retriever.store.manifest.checkpoint == str(checkpoint.resolve())


def test_another_embedding_token_than_the_manifests_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"the embedding token is <\|embed_token\|> .* not <\|im_end\|>"):
        SearchR3.from_pretrained(checkpoint, embed_token="<|im_end|>")
