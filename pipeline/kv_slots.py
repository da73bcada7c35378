"""Keys and values of running rows, preallocated: one slot for each row, as long as the longest row may become."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.lean_llama import LeanLlama

# Rows that one attention call on the CPU reads together, up to the longest of them.
CHUNK_ROWS = 32


class KVSlots:
    """A cache of [slot, position, kv_head, head_dim] for each layer. Zeros at first: what is masked must be finite.

    It may serve any number of runs. To touch so much memory for the first time takes as long as several decoding steps.
    """

    def __init__(self, lean: LeanLlama, slots: int, length: int):
        self.slots, self.length = slots, length
        self._shape = (slots, length, lean.n_kv_heads, lean.head_dim)
        shape = (slots * length, lean.n_kv_heads * lean.head_dim)
        self._keys, self._values = (
            [torch.zeros(shape, dtype=lean.dtype, device=lean.device) for _ in range(lean.n_layers)] for _ in range(2)
        )

    def holds(self, slots: int, length: int) -> bool:
        """Tell whether so many rows of such a length find room."""
        return slots <= self.slots and length <= self.length

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [token, kv_head, head_dim] at places [token], each slot * length + position."""
        self._keys[layer].index_copy_(0, places, k.reshape(len(places), -1))
        self._values[layer].index_copy_(0, places, v.reshape(len(places), -1))

    def read(self, layer: int, slots: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return [slot, kv_head, position, head_dim] of some slots' first `length` positions: views for a slice."""
        return self._read(self._keys[layer], slots, length), self._read(self._values[layer], slots, length)

    def _read(self, held: Tensor, slots: slice | Tensor, length: int) -> Tensor:
        whole = held.view(self._shape)[:, :length]
        part = whole[slots] if isinstance(slots, slice) else whole.index_select(0, slots)
        return part.transpose(1, 2)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy keys and values from places [token] to other places, each slot * length + position, at every layer."""
        for held in (*self._keys, *self._values):
            held.index_copy_(0, targets, held.index_select(0, sources))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for held in (*self._keys, *self._values):
            slots = held.view(self._shape)
            slots[target, :length] = slots[source, :length]


class SlotAttention:
    """Attention of one new token of each row over its slot; rows are slots 0, 1, 2, ... of the cache.

    Queries of the heads that share a key head go together, so that keys are read once and never expanded. Rows that
    are one segment share their query: `shared` is then (the row that leads each segment, the segment of each row), the
    new keys go to the slots of all rows, and those of the leaders are read.
    """

    def __init__(
        self, lean: LeanLlama, slots: KVSlots, positions: Sequence[int], shared: tuple[Tensor, Tensor] | None = None
    ):
        self._lean, self._slots, self._shared = lean, slots, shared
        every = torch.tensor(positions, device=lean.device)
        self._places = torch.arange(len(positions), device=lean.device) * slots.length + every
        at = every if shared is None else every.index_select(0, shared[0])
        here = at.tolist()
        step = CHUNK_ROWS if lean.device.type == "cpu" else len(here)  # elsewhere a launch costs more than padding does
        # (first segment, end, positions read, by window: mask [slot, 1, 1, position] to add to scores, or None)
        self._chunks: list[tuple[int, int, int, dict[int | None, Tensor | None]]] = []
        for first in range(0, len(here), step):
            end = min(first + step, len(here))
            length = max(here[first:end]) + 1
            masks = {window: self._mask(at[first:end], here[first:end], length, window) for window in set(lean.windows)}
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
        if self._shared is None:
            self._slots.write(layer, self._places, k, v)
        else:
            segment = self._shared[1]
            self._slots.write(layer, self._places, k.index_select(0, segment), v.index_select(0, segment))
        queries = q.reshape(len(q), lean.n_kv_heads, -1, lean.head_dim)
        out = torch.empty_like(queries)
        for first, end, length, masks in self._chunks:
            rows = slice(first, end) if self._shared is None else self._shared[0][first:end]
            keys, values = self._slots.read(layer, rows, length)
            out[first:end] = functional.scaled_dot_product_attention(
                queries[first:end], keys, values, masks[lean.windows[layer]], scale=lean.scaling
            )
        return out


class SlotCausal:
    """Causal attention of tokens that enter, behind what their rows' slots hold already.

    Segments lie one after the other: segment i has the positions begins[i] to begins[i] + lengths[i] of the row in slot
    slots_of[i], where its keys and values have been written before the call. Runs of segments of equal length and equal
    begin are one call.
    """

    def __init__(
        self, lean: LeanLlama, slots: KVSlots, slots_of: Sequence[int], begins: Sequence[int], lengths: Sequence[int]
    ):
        self._lean, self._slots = lean, slots
        # (first token, begin, length, slots of the run, by window: mask [query, key], or None for a plainly causal one)
        self._runs: list[tuple[int, int, int, Tensor, dict[int | None, Tensor | None]]] = []
        at = 0
        alike = groupby(zip(begins, lengths, slots_of, strict=True), key=lambda segment: segment[:2])
        for (begin, length), members in alike:
            rows = torch.tensor([slot for _, _, slot in members], device=lean.device)
            masks = {window: self._mask(begin, length, window) for window in set(lean.windows)}
            self._runs.append((at, begin, length, rows, masks))
            at += len(rows) * length

    def _mask(self, begin: int, length: int, window: int | None) -> Tensor | None:
        end = begin + length
        if begin == 0 and (window is None or length <= window):
            return None
        key = torch.arange(end, device=self._lean.device)
        behind = key[begin:, None] - key
        return (behind >= 0) & (behind < (window or end))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lean, out = self._lean, torch.empty_like(q, memory_format=torch.contiguous_format)
        for first, begin, length, rows, masks in self._runs:
            end = first + len(rows) * length
            queries, keys, values = (
                x[first:end].reshape(len(rows), length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
            )
            if begin:
                keys, values = self._slots.read(layer, rows, begin + length)
            mask = masks[lean.windows[layer]]
            mixed = functional.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=lean.scaling, enable_gqa=True
            )
            out[first:end] = mixed.transpose(1, 2).flatten(0, 1)
        return out
