"""THE definition of an embedding. Training, rewards, inference, evaluation and every export call this file.

The embedding of a turn is the backbone's hidden state after its final norm, at the position of the last embedding
token, cast to float32 and scaled to unit length. Source: arXiv 2510.07048, section 3; similarity is the cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def embed_positions(input_ids: Tensor, embed_token_id: int) -> Tensor:
    """Position of the last embedding token in each row.

    input_ids: (B, T) integers. Returns (B,) int64. Raises ValueError for a row without the token: an embedding is
    never silently taken from another position.
    """
    is_embed = input_ids == embed_token_id  # (B, T)
    if not bool(is_embed.any(dim=1).all()):
        row = int((~is_embed.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} of the batch has no embedding token (id {embed_token_id})")
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(is_embed, positions, -1).amax(dim=1)


def embed(last_hidden_state: Tensor, input_ids: Tensor, embed_token_id: int, dims: int | None = None) -> Tensor:
    """Unit-length float32 embeddings, (B, D).

    last_hidden_state: (B, T, H), after the final norm. input_ids: (B, T), aligned with it, padded on either side.
    dims: keep the first `dims` of H components before normalising; None keeps all.
    """
    return embed_at(last_hidden_state, embed_positions(input_ids, embed_token_id), dims)


def embed_at(last_hidden_state: Tensor, positions: Tensor, dims: int | None = None) -> Tensor:
    """`embed` where the positions of the embedding tokens, (B,), are known: for graphs, which cannot check them."""
    rows = torch.arange(positions.shape[0], device=positions.device)
    states = last_hidden_state[rows, positions]  # (B, H)
    return torch.nn.functional.normalize(states.float()[:, :dims], dim=-1)
