"""Keys and values of running rows, preallocated: one slot for each row, as long as the longest row may become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.lean_llama import LeanLlama

# Rows that one attention call on the CPU reads together, up to the longest of them.
CHUNK_ROWS = 32
# Queries that such a call may be filled up with, beside a quarter of its own: a call costs about as much as these.
CHUNK_PADDING = 8


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

    def clear(self, places: Tensor) -> None:
        """Put zeros at places [token], each slot * length + position, at every layer."""
        for held in (*self._keys, *self._values):
            held.index_fill_(0, places, 0)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for held in (*self._keys, *self._values):
            slots = held.view(self._shape)
            slots[target, :length] = slots[source, :length]


@dataclass(frozen=True)
class _Chunk:
    """Segments of one attention call."""

    first: int  # segment
    end: int
    start: int  # token
    stop: int
    width: int  # queries of each segment
    length: int  # positions read
    filled: Tensor | None  # [token] which of those queries is each token's, for a width of more than 1
    masks: dict[int | None, Tensor | None]  # by window: [segment, 1, 1 or width * group, position], added to scores

    def spread(self, queries: Tensor) -> Tensor:
        """Return [segment, kv_head, width * group, head_dim] of queries [token, kv_head, group, head_dim]."""
        here = queries[self.start : self.stop]
        if self.filled is None:
            return here
        n, shape = self.end - self.first, here.shape[1:]
        padded = here.new_zeros((n * self.width, *shape)).index_copy_(0, self.filled, here)
        return padded.view(n, self.width, *shape).transpose(1, 2).flatten(2, 3)

    def gather(self, mixed: Tensor, out: Tensor) -> None:
        """Put what `spread` led to in the place of the queries."""
        here = out[self.start : self.stop]
        if self.filled is None:
            here.copy_(mixed)
            return
        n, heads, _, size = mixed.shape
        padded = mixed.reshape(n, heads, self.width, -1, size).transpose(1, 2).flatten(0, 1)
        torch.index_select(padded, 0, self.filled, out=here)


class SlotAttention:
    """Attention of new tokens of each row over its slot; rows are slots 0, 1, 2, ... of the cache.

    A row has one new token, or as many as `counts` says, which follow each other from its position on. Queries of the
    heads that share a key head go together, so that keys are read once and never expanded; so do those of a row's
    tokens, filled up to the most of some neighbouring rows. Rows that are one segment share their queries: `shared` is
    then (the row that leads each segment, the token of the pass that each new token of each row is), the new keys go
    to the slots of all rows, and those of the leaders are read.
    """

    def __init__(
        self,
        lean: LeanLlama,
        slots: KVSlots,
        positions: Sequence[int],
        shared: tuple[Tensor, Tensor] | None = None,
        counts: Sequence[int] | None = None,
    ):
        self._lean, self._slots, self._shared = lean, slots, shared
        counts = [1] * len(positions) if counts is None else counts
        places = [row * slots.length + positions[row] + i for row, n in enumerate(counts) for i in range(n)]
        self._places = torch.tensor(places, device=lean.device)
        leaders = range(len(positions)) if shared is None else shared[0].tolist()
        here, counts = [positions[row] for row in leaders], [counts[row] for row in leaders]
        self._chunks: list[_Chunk] = []
        first = start = 0
        while first < len(here):
            end = self._end(counts, first)
            width = max(counts[first:end])
            at = [here[i] + min(j, counts[i] - 1) for i in range(first, end) for j in range(width)]
            queries = torch.tensor(at, device=lean.device).view(-1, width)
            length = max(at) + 1
            masks = {window: self._mask(queries, min(at), length, window) for window in set(lean.windows)}
            filled = None
            if width > 1:
                real = [i * width + j for i, n in enumerate(counts[first:end]) for j in range(n)]
                filled = torch.tensor(real, device=lean.device)
            stop = start + sum(counts[first:end])
            self._chunks.append(_Chunk(first, end, start, stop, width, length, filled, masks))
            first, start = end, stop

    def _end(self, counts: Sequence[int], first: int) -> int:
        """Return where a call that begins with a segment ends."""
        if self._lean.device.type != "cpu":  # a launch costs more than padding does
            return len(counts)
        most = tokens = 0
        for end in range(first, min(first + CHUNK_ROWS, len(counts))):
            most, tokens = max(most, counts[end]), tokens + counts[end]
            if most * (end + 1 - first) > tokens * 5 / 4 + CHUNK_PADDING:
                return end
        return min(first + CHUNK_ROWS, len(counts))

    def _mask(self, at: Tensor, least: int, length: int, window: int | None) -> Tensor | None:
        """Return what to add to the scores of queries at positions [segment, query], or None for nothing."""
        if least + 1 == length and (window is None or length <= window):
            return None
        key = torch.arange(length, device=at.device)
        seen = key <= at[..., None]
        if window is not None:
            seen &= key > at[..., None] - window
        mask = torch.zeros(seen.shape, dtype=self._lean.dtype, device=at.device).masked_fill_(~seen, -torch.inf)
        group = self._lean.n_heads // self._lean.n_kv_heads
        return mask[:, None] if at.shape[1] == 1 else mask.repeat_interleave(group, dim=1)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lean = self._lean
        if self._shared is None:
            self._slots.write(layer, self._places, k, v)
        else:
            token = self._shared[1]
            self._slots.write(layer, self._places, k.index_select(0, token), v.index_select(0, token))
        queries = q.reshape(len(q), lean.n_kv_heads, -1, lean.head_dim)
        out = torch.empty_like(queries)
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.end) if self._shared is None else self._shared[0][chunk.first : chunk.end]
            keys, values = self._slots.read(layer, rows, chunk.length)
            mixed = functional.scaled_dot_product_attention(
                chunk.spread(queries), keys, values, chunk.masks[lean.windows[layer]], scale=lean.scaling
            )
            chunk.gather(mixed, out)
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
