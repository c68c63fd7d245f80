"""The embed act as an OpenVINO graph: vectors on a CPU without PyTorch.

The constant prompt's keys and values are part of the graph, so that only the text's own tokens are computed. `write`
needs the model and PyTorch; `OpenVinoEncoder` needs neither, only what `pip install openvino tokenizers` brings.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from search_r3.errors import CheckpointError, DataError, check_texts, first_line
from search_r3.extras import need
from search_r3.files import new_folder, write_json, write_text

if TYPE_CHECKING:
    from search_r3.model.search_r3 import SearchR3

GRAPH, SETTINGS, TOKENIZER = "openvino_model.xml", "openvino_settings.json", "tokenizer.json"
PRECISIONS = ("f32", "bf16")
FORMAT = 1


def write(model: SearchR3, folder: Path) -> None:
    """Write the graph, its settings and the tokenizer into a new folder; weights are stored in 16 bits.

    Raises MissingExtraError without OpenVINO, CheckpointError where it cannot convert the model, FileExistsError if the
    folder is not empty.
    """
    import torch

    need("openvino", "the openvino format")
    import openvino

    from search_r3.model.attention import NAME
    from search_r3.model.checkpoint import quiet
    from search_r3.model.graph import EmbedAct

    engine = model.engine
    example = torch.full((2, 3), engine.embed_token_id), torch.tensor([3, 2])
    act = EmbedAct(engine).eval()
    engine.model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad(), warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # tracing warns of every branch
            shapes = [openvino.PartialShape([-1, -1]), openvino.PartialShape([-1])]
            graph = openvino.convert_model(act, example_input=example, input=shapes)
    except Exception as error:  # many kinds, of OpenVINO's and of tracing
        raise CheckpointError(f"{model.source}: OpenVINO cannot convert it ({first_line(error)})") from error
    finally:
        engine.model.set_attn_implementation(NAME)
    settings = {
        "format": FORMAT,
        "fingerprint": model.fingerprint,
        "embed_token_id": engine.embed_token_id,
        "suffix_ids": engine.suffix_ids("embed"),
        "dimension": model.dimension,
        "max_tokens": model.manifest.max_tokens.model_dump(),
    }
    with new_folder(folder) as temporary:
        openvino.save_model(graph, temporary / GRAPH, compress_to_fp16=True)
        engine.plain_tokenizer.backend_tokenizer.save(str(temporary / TOKENIZER))
        write_json(temporary / SETTINGS, settings)
        write_text(temporary / "README.md", _card(model))


def _card(model: SearchR3) -> str:
    return f"""# A search embedding model for CPUs, by OpenVINO

Vectors have {model.dimension} dimensions; compare them by cosine. PyTorch and transformers are not needed:
`pip install openvino tokenizers numpy`, `pip install --no-deps search-r3`, then

```python
from search_r3.model.openvino import OpenVinoEncoder

encoder = OpenVinoEncoder("FOLDER")
encoder.encode_queries(["a question"]) @ encoder.encode_documents(["a document"]).T
```

It embeds without reasoning; documents are cut at {model.manifest.max_tokens.document} tokens, queries at
{model.manifest.max_tokens.query}.
"""


class OpenVinoEncoder:
    """Vectors of queries and documents, without reasoning, from a folder that `write` made.

    Examples:
        >>> encoder = OpenVinoEncoder("my-model")  # doctest: +SKIP
        >>> encoder.encode_queries(["pack files"]) @ encoder.encode_documents(["tar packs files"]).T  # doctest: +SKIP

    precision: "f32", or "bf16" for CPUs that compute it natively. batch_tokens: tokens of one batch, padding included.
    Raises CheckpointError for a folder that is not one of these.
    """

    def __init__(self, folder: str | Path, *, precision: str = "f32", batch_tokens: int = 1024):
        try:
            from openvino import Core
            from tokenizers import Tokenizer
        except ImportError as error:
            raise CheckpointError(f"{error.name} is not installed; pip install openvino tokenizers") from error
        place = Path(folder)
        if precision not in PRECISIONS:
            raise CheckpointError(f"precision {precision}: choose from {', '.join(PRECISIONS)}")
        if not place.is_dir():
            raise CheckpointError(
                f"{place}: no such folder; make one with `search-r3 export {place} --format openvino`"
            )
        try:
            settings = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
            if settings["format"] != FORMAT:
                raise CheckpointError(f"{place}: format {settings['format']}, expected {FORMAT}; export it again")
            self.dimension, self.fingerprint = int(settings["dimension"]), str(settings["fingerprint"])
            self._end = [*settings["suffix_ids"], settings["embed_token_id"]]
            self._limits = settings["max_tokens"]
            self._tokenizer = Tokenizer.from_file(str(place / TOKENIZER))
            self._graph = Core().compile_model(place / GRAPH, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        except CheckpointError:
            raise
        except Exception as error:  # OpenVINO and tokenizers raise bare ones
            raise CheckpointError(
                f"{place}: not a folder of `search-r3 export --format openvino` ({first_line(error)})"
            ) from error
        self._tokenizer.encode_special_tokens = True  # control tokens in a text are plain characters
        self._tokenizer.no_padding()  # both are kept in some models' files
        self._tokenizer.no_truncation()
        self.batch_tokens = batch_tokens

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32 unit rows. Raises DataError for an empty text, naming its position."""
        return self._encode(texts, self._limits["query"])

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """As `encode_queries`, cut at the documents' length."""
        return self._encode(texts, self._limits["document"])

    def _encode(self, texts: Sequence[str], limit: int) -> np.ndarray:
        texts = check_texts(texts)
        tails = []
        encoded = self._tokenizer.encode_batch([text.strip() for text in texts], add_special_tokens=False)
        for number, found in enumerate(encoded, 1):
            if not found.ids:
                raise DataError(f"text number {number} is empty: there is nothing to embed; remove it or fill it")
            tails.append(found.ids[:limit] + self._end)
        vectors = np.empty((len(tails), self.dimension), dtype=np.float32)
        order = sorted(range(len(tails)), key=lambda row: -len(tails[row]))
        while order:
            width = len(tails[order[0]])
            count = max(1, self.batch_tokens // width)
            rows, order = order[:count], order[count:]
            ids = np.zeros((len(rows), width), dtype=np.int64)  # padding on the right, which no token looks at
            for place, row in enumerate(rows):
                ids[place, : len(tails[row])] = tails[row]
            lengths = np.array([len(tails[row]) for row in rows], dtype=np.int64)
            vectors[rows] = self._graph([ids, lengths])[0]
        return vectors
