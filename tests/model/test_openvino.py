import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from search_r3 import SearchR3
from search_r3.cli import app
from search_r3.errors import CheckpointError, DataError
from search_r3.model.attention import NAME
from search_r3.model.openvino import GRAPH, SETTINGS, OpenVinoEncoder, write
from tests.conftest import TEXTS, build_base


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("graph") / "model"
    write(model, place)
    return place


def test_vectors_are_the_models(model, folder):
    encoder = OpenVinoEncoder(folder, batch_tokens=40)  # several batches, padded
    token = model.manifest.embed_token
    texts = [*TEXTS, f"control {token} tokens <|im_end|>", " spaces \n", " ".join(["long"] * 700), "1"]
    np.testing.assert_allclose(encoder.encode_documents(texts), model.encode_documents(texts), atol=2e-3)
    np.testing.assert_allclose(encoder.encode_queries(texts), model.encode_queries(texts), atol=2e-3)
    assert encoder.fingerprint == model.fingerprint
    assert encoder.encode_queries([]).shape == (0, model.dimension)
    with pytest.raises(TypeError, match="put it into a list"):
        encoder.encode_queries("tar")


def test_settings_kept_with_a_tokenizer_change_nothing(model, folder, tmp_path):
    from tokenizers import Tokenizer

    other = shutil.copytree(folder, tmp_path / "graph")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(other / "tokenizer.json"))
    found = OpenVinoEncoder(other).encode_documents(TEXTS)
    np.testing.assert_array_equal(found, OpenVinoEncoder(folder).encode_documents(TEXTS))


def test_the_model_stays_as_it_was(model, folder):
    assert model.engine.model.config._attn_implementation == NAME


def test_dimensions_and_another_family(tmp_path):
    from search_r3.model.checkpoint import initialise

    initialise(build_base(tmp_path / "base", family="qwen2"), tmp_path / "qwen")
    model = SearchR3.from_pretrained(tmp_path / "qwen", dims=16)
    write(model, tmp_path / "graph")
    found = OpenVinoEncoder(tmp_path / "graph").encode_documents(TEXTS)
    np.testing.assert_allclose(found, model.encode_documents(TEXTS), atol=2e-3)


def test_it_runs_without_torch(folder):
    code = f"""
import sys
from search_r3.model.openvino import OpenVinoEncoder
OpenVinoEncoder({str(folder)!r}).encode_queries(["pack files"])
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(DataError, match="text number 2 is empty"):
        OpenVinoEncoder(folder).encode_queries(["a", "  "])
    with pytest.raises(DataError, match="text number 2 is not UTF-8"):
        OpenVinoEncoder(folder).encode_queries(["a", "a\udcff"])
    with pytest.raises(CheckpointError, match="precision fp8: choose from f32"):
        OpenVinoEncoder(folder, precision="fp8")
    with pytest.raises(CheckpointError, match="no such folder"):
        OpenVinoEncoder(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a folder of `search-r3 export --format openvino`"):
        OpenVinoEncoder(tmp_path)
    settings = json.loads((folder / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 1; export it again"):
        OpenVinoEncoder(tmp_path)


def test_command(checkpoint, tmp_path):
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "new"), "-c", str(checkpoint), "--format", "openvino", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / GRAPH).exists()
