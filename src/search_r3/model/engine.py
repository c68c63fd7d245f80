"""From texts to vectors, fast: the constant prompt prefix is computed once, batches hold little padding, and only the
backbone runs (no language-model head).

A turn is `prefix + tail`. The prefix is fixed by the act and shared as a key-value cache by every row of every batch;
the tail is the user's text (control tokens disabled), the act's suffix, anything the assistant has said, and E.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from search_r3.errors import CheckpointError, DataError, check_texts
from search_r3.model.attention import NAME as PACKED_ATTENTION
from search_r3.model.attention import Packed, packed_states
from search_r3.model.cache import Prefix, take_prefix
from search_r3.model.embedding import embed
from search_r3.model.prompts import ActName, Prompts
from search_r3.progress import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Engine:
    """Turns token sequences into embeddings with one model.

    dims: keep the first components of each vector; None keeps all.
    batch_tokens: upper bound of rows x longest tail in one forward pass; the default suits the device.
    device: where the model will be when it is used; default, where it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        embed_token_id: int,
        *,
        dims: int | None = None,
        batch_tokens: int | None = None,
        device: torch.device | None = None,
    ):
        if embed_token_id == 0:
            raise ValueError("the embedding token must not have id 0, which pads batches")
        self.model, self.tokenizer, self.prompts, self.embed_token_id = model, tokenizer, prompts, embed_token_id
        self.dimension: int = dims or model.config.get_text_config().hidden_size
        self.plain_tokenizer = _plain(tokenizer, embed_token_id)
        """For users' texts, in which control tokens are ordinary characters."""
        model.set_attn_implementation(PACKED_ATTENTION)
        self.backbone = model.get_decoder()
        self.context = _context(model.config.get_text_config())
        """Most tokens that the model reads, prompt included; None: not known."""
        self.device: torch.device = device or model.device
        self.batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else 32768)
        self._prefixes: dict[ActName, tuple[int, Prefix]] = {}
        self._fixed = {
            act: (self._control_ids(getattr(prompts, act).prefix), self._control_ids(getattr(prompts, act).suffix))
            for act in ("embed", "reason")
        }

    def _control_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of users' texts, stripped at both ends. Control tokens written in them stay ordinary characters."""
        texts = check_texts(texts)
        if not texts:
            return []
        stripped = [text.strip() for text in texts]
        # Without `verbose`, no warning of lengths: what is too long is cut by those who ask.
        encoded = self.plain_tokenizer(stripped, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def prefix_ids(self, act: ActName) -> list[int]:
        """Tokens before the user's text."""
        return self._fixed[act][0]

    def suffix_ids(self, act: ActName) -> list[int]:
        """Tokens between the user's text and what the model writes or the embedding token."""
        return self._fixed[act][1]

    @property
    def reply_ids(self) -> list[int]:
        """What the assistant says before the embedding token in the embed act; empty where it says nothing."""
        spoken, silent = self.suffix_ids("embed"), self.suffix_ids("reason")
        return spoken[len(silent) :] if spoken[: len(silent)] == silent else []

    def tails(self, texts: Sequence[str], act: ActName, max_tokens: int) -> list[list[int]]:
        """What follows the prefix, up to where the model speaks: text cut to `max_tokens`, then the suffix.

        Raises DataError for an empty text, or one that is too long for the model, naming its position.
        """
        suffix = self.suffix_ids(act)
        around = len(self.prefix_ids(act)) + len(suffix) + 1
        tails = []
        for number, ids in enumerate(self.plain_ids(texts)):
            if not ids:
                raise DataError(f"text number {number + 1} is empty: there is nothing to embed; remove it or fill it")
            whole = around + min(len(ids), max_tokens)
            if self.context and whole > self.context:
                raise DataError(
                    f"text number {number + 1} and its prompt are {whole} tokens, of which the model reads "
                    f"{self.context}; cut texts at {self.context - around} (max_tokens)"
                )
            tails.append(ids[:max_tokens] + suffix)
        return tails

    def encode(
        self, tails: Sequence[Sequence[int]], act: ActName, *, label: str = "encode", progress: bool | None = False
    ) -> np.ndarray:
        """Embed each `prefix + tail + E`. Returns (N, D) float32 with unit rows, in input order.

        tails: tokens after the prefix, without the final E, which is appended here and so survives any truncation.
        progress: True draws a bar, None draws it on a terminal only.
        """
        complete = [[*tail, self.embed_token_id] for tail in tails]
        vectors = np.empty((len(complete), self.dimension), dtype=np.float32)
        with Meter(label, len(complete), "texts", progress) as meter:
            for rows in self._batches([len(tail) for tail in complete]):
                vectors[rows] = self._fitting([complete[row] for row in rows], act)
                meter.advance(len(rows), sum(len(complete[row]) for row in rows))
        return vectors

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers by falling length: a batch holds nearly equal texts, and the largest comes first."""
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _fitting(self, tails: Sequence[Sequence[int]], act: ActName) -> np.ndarray:
        """(B, D) embeddings of one batch; it and all later ones are halved where the device's memory is too small."""
        with suppress(torch.OutOfMemoryError):
            return self._forward(tails, act).cpu().numpy()
        if len(tails) == 1:
            raise CheckpointError(
                f"{self.device}: not enough memory for a text of {len(tails[0])} tokens; cut texts shorter, free "
                "some, or use a smaller model"
            )
        self.batch_tokens = min(self.batch_tokens, sum(map(len, tails))) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(tails) // 2
        return np.concatenate([self._fitting(tails[:half], act), self._fitting(tails[half:], act)])

    @torch.inference_mode()
    def _forward(self, tails: Sequence[Sequence[int]], act: ActName) -> Tensor:
        """(B, D) embeddings of one batch."""
        packed = Packed.of([len(tail) for tail in tails], self.prefix(act), self.device)
        ids = torch.tensor([list(chain.from_iterable(tails))], device=self.device)  # (1, N)
        states = packed_states(self.backbone, ids, packed)  # (1, N, H)
        return self.embed(states[0, packed.ends, None], ids[0, packed.ends, None])

    def embed(self, last_hidden_state: Tensor, input_ids: Tensor) -> Tensor:
        """`embedding.embed` with this model's token and width: (B, T, H), (B, T) -> (B, D)."""
        return embed(last_hidden_state, input_ids, self.embed_token_id, self.dimension)

    def forget(self) -> None:
        """Compute the prompts' keys and values anew when they are needed next."""
        self._prefixes.clear()

    def prefix(self, act: ActName) -> Prefix:
        """Keys and values of the act's constant prefix under the current weights.

        PyTorch counts in-place writes to each parameter; when the count has moved (loaded weights, most optimisers),
        the prefix is computed anew. Fused optimisers write uncounted: call `forget` after them.
        """
        version = sum(parameter._version for parameter in self.model.parameters())
        cached = self._prefixes.get(act)
        if cached is None or cached[0] != version:
            with torch.inference_mode():
                ids = torch.tensor([self.prefix_ids(act)], device=self.device)
                cache = DynamicCache()
                self.backbone(input_ids=ids, past_key_values=cache, use_cache=True)
                cached = self._prefixes[act] = (version, take_prefix(cache))
        return cached[1]


def _context(config: Any) -> int | None:
    """Positions that a model was made for, or its attention's window; not told where positions are stretched."""
    stretched = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    positions = None if stretched else getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None) if slides else None
    return min(filter(None, (positions, window)), default=None)


def _plain(tokenizer: PreTrainedTokenizerBase, embed_token_id: int) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy. It splits what it calls special; some models do not call all control tokens so, such as
    Qwen3's `<think>`, and nobody may have called another project's embedding token so. In the copy all of them are."""
    from tokenizers import AddedToken

    bare = [
        token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.special and (number == embed_token_id or re.fullmatch(r"<.+>|\[.+\]", token.content))
    ]
    if not bare:
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.add_tokens([AddedToken(text, normalized=False, special=True) for text in bare], special_tokens=True)
    return plain
