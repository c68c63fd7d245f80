"""A key-value cache whose first part is shared: one prefix, computed once, stands before every row of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, slots=True)
class Prefix:
    """The keys and values of a constant prompt prefix of P tokens."""

    keys: list[Tensor]
    """One tensor a layer, each (1, heads, P, head_dim)."""
    values: list[Tensor]
    """As `keys`."""
    length: int
    """P, in tokens."""

    def cache(self, rows: int, room: int) -> Cache:
        """A fresh cache for `rows` sequences that start with this prefix and grow by at most `room` tokens."""
        return Cache(layers=[_RoomyLayer(k, v, rows, room) for k, v in zip(self.keys, self.values, strict=True)])


class _RoomyLayer(DynamicLayer):
    """One layer with its room allocated at once: a step writes its own tokens instead of copying all earlier ones."""

    def __init__(self, key: Tensor, value: Tensor, rows: int, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self.length = key.shape[2]
        self._keys, self._values = (self._allocate(part, rows, room) for part in (key, value))

    @staticmethod
    def _allocate(part: Tensor, rows: int, room: int) -> Tensor:
        _, heads, length, width = part.shape
        buffer = part.new_empty(rows, heads, length + room, width)
        buffer[:, :, :length] = part
        return buffer

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, head_dim) and return all keys and values so far, as views."""
        end = self.length + key_states.shape[2]
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._keys = self._keys.repeat_interleave(repeats, dim=0)
        self._values = self._values.repeat_interleave(repeats, dim=0)


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep only these rows of a batch: finished sequences stop costing anything."""
    for layer in cache.layers:
        layer.batch_select_indices(rows)


def repeat_rows(cache: Cache, times: int) -> None:
    """Repeat every row `times` times in place (row-major): one prefill serves several samples."""
    for layer in cache.layers:
        layer.batch_repeat_interleave(times)


def take_prefix(cache: Cache) -> Prefix:
    """The content of a one-row cache as a prefix."""
    keys = [torch.as_tensor(layer.keys) for layer in cache.layers]
    values = [torch.as_tensor(layer.values) for layer in cache.layers]
    return Prefix(keys=keys, values=values, length=keys[0].shape[2])
