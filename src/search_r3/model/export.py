"""A checkpoint as a folder that other libraries load without our code.

One folder, three ways in: `AutoModelForCausalLM` and its tokenizer for text, `SentenceTransformer` for vectors,
`SearchR3` for both. The chat template makes it so: told `embed`, it renders the turn of the embed act with the
embedding token last; otherwise it is the model's own. Sentence-transformers tells it, and where it cuts a long text it
puts the template's end back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search_r3.errors import CheckpointError
from search_r3.files import new_folder, write_json, write_text
from search_r3.model.checkpoint import AVERAGED
from search_r3.model.search_r3 import SearchR3

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def export(model: SearchR3, folder: Path, card: str = "") -> None:
    """Write the folder. card: text of its README.md.

    Sentence-transformers cuts queries and documents at one length, the document's. Raises FileExistsError if the folder
    is not empty, CheckpointError for a model that cannot be written so.
    """
    manifest, engine = model.manifest, model.engine
    if model.dimension != manifest.dimension:
        raise CheckpointError("export: the vectors of an exported model are whole; load it without --dims")
    model.check_seams()
    act = manifest.prompts.embed
    own = engine.tokenizer.chat_template
    if not isinstance(own, str):
        raise CheckpointError(f"export: {model.source} has no chat template, which an instruction model needs")
    turn = f"{_quoted(act.prefix)} + (messages[-1]['content'] | trim) + {_quoted(act.suffix + manifest.embed_token)}"
    fixed = len(engine.prefix_ids("embed")) + len(engine.suffix_ids("embed")) + 1
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.{kind}"}
            for number, (path, kind) in enumerate(
                [
                    ("", "base.modules.transformer.Transformer"),
                    ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
                    ("2_Normalize", "base.modules.normalize.Normalize"),
                ]
            )
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "max_seq_length": fixed + manifest.max_tokens.document,
            "modality_config": {"text": _FORWARD, "message": _FORWARD | {"format": "flat"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"chat_template": {"embed": True}},
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},  # one turn for both; the template holds it
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "embedding_dimension": manifest.dimension,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary / "model")
        for path in (temporary / "model").iterdir():
            path.rename(temporary / path.name)
        (temporary / "model").rmdir()
        template = f"{{%- if embed is defined and embed -%}}{{{{- {turn} -}}}}{{%- else -%}}{own}{{%- endif -%}}"
        write_text(temporary / "chat_template.jinja", template)
        for name, value in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_json(temporary / name, value)
        if card:
            write_text(temporary / "README.md", card)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def card(model: SearchR3, name: str = "FOLDER") -> str:
    """A model card: what it is, where it came from, how to use it. name: by which it is loaded."""
    manifest = model.manifest
    made = f"Written by search-r3 {manifest.versions['search-r3']} on {manifest.created}."
    if manifest.parent is not None:
        sources = manifest.parent.source.split(AVERAGED)
        name_of_parent = AVERAGED.join("/".join(Path(one).parts[-2:]) for one in sources)  # owner/name, or run/model
        made += f"\nMade from `{name_of_parent}` (weights {manifest.parent.weights_sha256[:12]})."
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [search-r3, sentence-transformers, feature-extraction, reasoning]
---

# A language model that thinks, then embeds

{made}
Vectors have {manifest.dimension} dimensions; compare them by cosine.
Documents are cut at {manifest.max_tokens.document} tokens, queries at {manifest.max_tokens.query};
by sentence-transformers both at the former.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
model.similarity(model.encode_query(["a question"]), model.encode_document(["a document"]))
```

To let it reason over a query before it embeds it:

```python
from search_r3 import SearchR3

SearchR3.from_pretrained("{name}").encode_queries(["a question"], reason=True)
```

Control tokens in a text, such as `{manifest.embed_token}`, are plain characters to search-r3; sentence-transformers and
transformers take them for control tokens: remove them from texts that you do not trust.
"""
