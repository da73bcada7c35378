"""Keys and values of running rows, preallocated: one slot for each row, as long as the longest row may become."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.lean_llama import LeanLlama

# Rows that one attention call on the CPU reads together, up to the longest of them.
CHUNK_ROWS = 32


class KVSlots:
    """A cache of [slot, position, kv_head, head_dim] for each layer. Zeros at first: what is masked must be finite."""

    def __init__(self, lean: LeanLlama, slots: int, length: int):
        self.slots, self.length = slots, length
        self._shape = (slots, length, lean.n_kv_heads, lean.head_dim)
        shape = (slots * length, lean.n_kv_heads * lean.head_dim)
        self._keys, self._values = (
            [torch.zeros(shape, dtype=lean.dtype, device=lean.device) for _ in range(lean.n_layers)] for _ in range(2)
        )

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [token, kv_head, head_dim] at places [token], each slot * length + position."""
        self._keys[layer].index_copy_(0, places, k.reshape(len(places), -1))
        self._values[layer].index_copy_(0, places, v.reshape(len(places), -1))

    def read(self, layer: int, first: int, end: int, length: int) -> tuple[Tensor, Tensor]:
        """Return views [slot, kv_head, position, head_dim] of slots first to end and their first `length` positions."""
        keys, values = (
            held[layer].view(self._shape)[first:end, :length].transpose(1, 2) for held in (self._keys, self._values)
        )
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for held in (*self._keys, *self._values):
            slots = held.view(self._shape)
            slots[target, :length] = slots[source, :length]


class SlotAttention:
    """Attention of one new token of each row over its slot; rows are slots 0, 1, 2, ... of the cache.

    Queries of the heads that share a key head go together, so that keys are read once and never expanded.
    """

    def __init__(self, lean: LeanLlama, slots: KVSlots, positions: Sequence[int]):
        self._lean, self._slots = lean, slots
        n = len(positions)
        at = torch.tensor(positions, device=lean.device)
        self.places = torch.arange(n, device=lean.device) * slots.length + at
        # (first slot, end, length, by window: mask [slot, 1, 1, position] to add to scores, or None)
        self._chunks: list[tuple[int, int, int, dict[int | None, Tensor | None]]] = []
        step = CHUNK_ROWS if lean.device.type == "cpu" else n  # elsewhere a launch costs more than padding does
        for first in range(0, n, step):
            end = min(first + step, n)
            here = positions[first:end]
            length = max(here) + 1
            masks = {window: self._mask(at[first:end], here, length, window) for window in set(lean.windows)}
            self._chunks.append((first, end, length, masks))

    def _mask(self, at: Tensor, positions: Sequence[int], length: int, window: int | None) -> Tensor | None:
        if min(positions) + 1 == length and (window is None or length <= window):
            return None
        key = torch.arange(length, device=at.device)
        seen = key <= at[:, None]
        if window is not None:
            seen &= key > at[:, None] - window
        mask = torch.zeros(seen.shape, dtype=self._lean.dtype, device=at.device).masked_fill_(~seen, -torch.inf)
        return mask[:, None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lean = self._lean
        self._slots.write(layer, self.places, k, v)
        queries = q.reshape(len(q), lean.n_kv_heads, -1, lean.head_dim)
        out = torch.empty_like(queries)
        for first, end, length, masks in self._chunks:
            keys, values = self._slots.read(layer, first, end, length)
            out[first:end] = functional.scaled_dot_product_attention(
                queries[first:end], keys, values, masks[lean.windows[layer]], scale=lean.scaling
            )
        return out
