"""A checkpoint as one GGUF file, for llama.cpp and what is built on it.

llama.cpp pools the last token if the file says so; the caller writes the turn of the embed act around the text,
embedding token last (`turn`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import CheckpointError
from search_r3.files import new_folder, write_text
from search_r3.model.search_r3 import SearchR3

NAME = "model.gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # also the names of transformers' model types
QWEN2 = (  # how Qwen 2 and 3 split text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def turn(model: SearchR3, text: str = "TEXT") -> str:
    """What llama.cpp is to embed for a text."""
    act = model.manifest.prompts.embed
    return f"{act.prefix}{text}{act.suffix}{model.manifest.embed_token}"


def write(model: SearchR3, folder: Path) -> None:
    """Write `model.gguf` (float16, norms in float32) and a README.md with the turn to embed.

    Raises FileExistsError if the folder is not empty, CheckpointError for a model that llama.cpp would read otherwise
    than we do.
    """
    import gguf

    model.check_whole()
    config, tokenizer = model.engine.model.config, model.engine.tokenizer
    if config.model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"--format gguf: {config.model_type} models are not known; known: {', '.join(ARCHITECTURES)}"
        )
    if model.dimension != model.manifest.dimension:
        raise CheckpointError(
            "--format gguf: the vectors of an exported model are whole; export the checkpoint as it is"
        )
    if config.rope_parameters.get("rope_type", "default") != "default" or getattr(config, "use_sliding_window", False):
        raise CheckpointError("--format gguf: scaled positions and sliding windows are not supported")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _pre_tokenizer(described)
    model.check_seams()
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    with new_folder(folder) as temporary:
        writer = gguf.GGUFWriter(temporary / NAME, config.model_type)
        writer.add_name(Path(model.source).name)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(shared)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_pooling_type(gguf.PoolingType.LAST)

        added = tokenizer.added_tokens_decoder
        tokens = [f"[unused {n}]" for n in range(config.vocab_size)]
        types = [gguf.TokenType.UNUSED] * config.vocab_size
        for token, index in tokenizer.get_vocab().items():
            tokens[index] = token
            if index not in added:
                types[index] = gguf.TokenType.NORMAL
            else:
                types[index] = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        merges = described["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
        writer.add_add_bos_token(False)
        if tokenizer.bos_token_id is not None:
            writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
        for name, tensor in model.engine.model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.detach().float().cpu().numpy()
            if config.model_type == "llama" and ("q_proj." in name or "k_proj." in name):
                values = _interleaved(values, heads if "q_proj" in name else shared)
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise CheckpointError(f"--format gguf: llama.cpp has no place for {name}")
            writer.add_tensor(known, values if values.ndim == 1 else values.astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_text(temporary / "README.md", _card(model))


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before byte pairs are merged."""
    normalizer = (described["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes text as it is; nearly all text is in NFC
        raise CheckpointError(f"--format gguf: llama.cpp does not normalise text; the tokenizer does ({normalizer})")
    parts = described["pre_tokenizer"] or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    if described["model"]["type"] == "BPE" and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") == QWEN2:
            return "qwen2"
    raise CheckpointError(
        f"--format gguf: a tokenizer of this kind is not known ({described['model']['type']}, {kinds})"
    )


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of (heads x width, ...) in the order of llama.cpp's rotary positions: pairs side by side."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _card(model: SearchR3) -> str:
    return f"""# A search embedding model for llama.cpp

Vectors have {model.dimension} dimensions; compare them by cosine. To embed a text, give llama.cpp this, with the text
in the place of TEXT (remove control tokens such as `{model.manifest.embed_token}` from texts that you do not trust):

```
{turn(model)}
```

`llama-server -m {NAME} --embeddings -b 2048 -ub 2048` takes it as the input of POST /v1/embeddings. search-r3 strips a
text, and cuts a document at {model.manifest.max_tokens.document} tokens and a query at
{model.manifest.max_tokens.query}; a longer one has another vector here.
"""
