"""Attention over packed rows behind one shared prefix: no padding anywhere but inside the attention itself.

Texts of a batch stand one after another in a single row, so the linear layers, which take most of the time, see real
tokens only. Each text attends to the shared prefix and, causally, to itself. Gradients flow through all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from search_r3.model.cache import Prefix

NAME = "search_r3_packed"  # transformers calls an attention by name


@dataclass(frozen=True, slots=True)
class Packed:
    """How B texts of N tokens in all lie in one row, and the prefix before each."""

    prefix: Prefix | None
    """P tokens that every text follows, computed before; None where they are the first P tokens of this row."""
    prefix_length: int
    """P."""
    slots: Tensor
    """(B, T) place in the row of each text's tokens; padding on the right repeats the text's last token."""
    ends: Tensor
    """(B,) place of each text's last token."""
    positions: Tensor
    """(1, N) position of each token in its own turn, counted from the prefix's first token."""
    mask: Tensor
    """(T, P+T) bool, true where a query may look: the prefix, and no token after itself."""
    places: Tensor
    """Where each token of a text stands in the flattened slots, in the order of the row."""

    @classmethod
    def of(cls, lengths: Sequence[int], prefix: Prefix | int, device: torch.device) -> Packed:
        """Lay out texts of these lengths (tokens after the prefix, each at least 1).

        prefix: computed before, or its number of tokens where the row starts with them, so that it is trained too.
        """
        inside = 0 if isinstance(prefix, Prefix) else prefix
        before = prefix.length if isinstance(prefix, Prefix) else prefix
        counts = torch.tensor(lengths)  # (B,)
        width = int(counts.max())
        column = torch.arange(width)
        starts = inside + counts.cumsum(0) - counts
        slots = starts[:, None] + torch.minimum(column[None], counts[:, None] - 1)
        real = column[None] < counts[:, None]
        positions = torch.cat([torch.arange(inside), before + column.expand(len(lengths), -1)[real]])
        mask = torch.ones(width, before + width, dtype=torch.bool).tril(before)
        parts = slots, starts + counts - 1, positions[None], mask, real.flatten().nonzero()[:, 0]
        return cls(prefix if isinstance(prefix, Prefix) else None, before, *(part.to(device) for part in parts))


def packed_states(backbone: torch.nn.Module, ids: Tensor, packed: Packed) -> Tensor:
    """Final hidden states (1, N, H) of packed tokens (1, N); the backbone must use the attention named `NAME`."""
    states: Tensor = backbone(
        input_ids=ids,
        position_ids=packed.positions,
        attention_mask=ids.new_empty(1, 1, 1, 1),  # four dimensions: transformers builds no mask of its own
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    return states


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The signature is transformers'. query: (B, heads, T, width); key, value: (B, key heads, T, width)."""
    if packed is None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return usual
    rows, width = packed.slots.shape
    if (window := kwargs.get("sliding_window")) and window < packed.mask.shape[1]:
        raise ValueError(f"turns of {packed.mask.shape[1]} tokens exceed the model's attention window of {window}")

    def unpack(part: Tensor) -> Tensor:  # (1, heads, N, width) -> (B, heads, T, width)
        return part[0].index_select(1, packed.slots.flatten()).reshape(-1, rows, width, part.shape[3]).transpose(0, 1)

    inside = 0
    if packed.prefix is None:
        inside = packed.prefix_length
        shared_key, shared_value = key[:, :, :inside], value[:, :, :inside]
    else:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        shared_key, shared_value = packed.prefix.keys[layer], packed.prefix.values[layer]
    grouped = query.shape[1] != key.shape[1]
    asked = unpack(query)
    keys = torch.cat([shared_key.expand(rows, -1, -1, -1), unpack(key)], dim=2)
    values = torch.cat([shared_value.expand(rows, -1, -1, -1), unpack(value)], dim=2)
    if asked.requires_grad and asked.device.type == "cpu":
        attended = _plain_attention(asked, keys, values, packed.mask, scaling)
    else:
        attended = torch.nn.functional.scaled_dot_product_attention(
            asked, keys, values, attn_mask=packed.mask, scale=scaling, enable_gqa=grouped
        )  # (B, heads, T, width)
    output: Tensor = attended.transpose(1, 2).flatten(0, 1).index_select(0, packed.places)
    if inside:
        first = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, :inside], shared_key, shared_value, is_causal=True, scale=scaling, enable_gqa=grouped
        )  # (1, heads, P, width)
        output = torch.cat([first[0].transpose(0, 1), output])
    return output[None], None  # (1, N, heads, width)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """What PyTorch's fused attention computes, (B, heads, T, width), in steps.

    On a CPU the backward pass of the fused one takes longer than that of the steps, by far in bfloat16.
    """
    rows, heads, length, width = query.shape
    together = query.reshape(rows, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = (together @ key.transpose(2, 3)).view(rows, heads, length, -1).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).to(value.dtype)
    return (weights.view(rows, key.shape[1], -1, key.shape[2]) @ value).view(rows, heads, length, width)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
