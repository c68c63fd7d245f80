"""The embed act as one traceable module, for compilers of graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from search_r3.model.embedding import embed_at
from search_r3.model.engine import Engine


class _Constant(DynamicLayer):
    """One layer of a cache that starts with the prompt and is used for one pass."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self._key, self._value = key, value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = key_states.shape[0]
        return (
            torch.cat([self._key.expand(rows, -1, -1, -1), key_states], dim=2),
            torch.cat([self._value.expand(rows, -1, -1, -1), value_states], dim=2),
        )

    def get_seq_length(self) -> int:
        return self._key.shape[2]


class EmbedAct(torch.nn.Module):
    """Texts behind the constant prompt to embeddings; the model's attention must be one that tracing understands."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.backbone, self.prefix, self.dimension = engine.backbone, engine.prefix("embed"), engine.dimension

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """input_ids: (B, T), padded on the right, each row's last real token the embedding token. lengths: (B,).

        Returns (B, D) float32 unit rows; that the last token is the embedding token is the caller's to see to.
        """
        rows, width = input_ids.shape
        places = torch.arange(width, device=input_ids.device)
        before = self.prefix.length
        mask = torch.arange(before + width, device=input_ids.device)[None] <= places[:, None] + before  # (T, P+T)
        states = self.backbone(
            input_ids=input_ids,
            position_ids=(before + places)[None].expand(rows, -1),
            attention_mask=mask[None, None].expand(rows, 1, -1, -1),
            past_key_values=Cache(
                layers=[_Constant(k, v) for k, v in zip(self.prefix.keys, self.prefix.values, strict=True)]
            ),
            use_cache=True,
        ).last_hidden_state  # (B, T, H)
        return embed_at(states, lengths - 1, self.dimension)
