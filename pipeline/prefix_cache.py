"""Keys and values of a common start, read by the rows that stand behind it, through transformers' own cache classes.

Every layer keeps every token, also of models with sliding windows: their masks are made by token index, and cut out the
window from whatever the cache says that it holds. Caches of transformers grow in place; the ones made here for reading
never change, so one pass's keys and values can stand in front of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pipeline.batching import pad
from pipeline.prefix_tree import Segment


@dataclass(frozen=True, eq=False)
class Past:
    """What a pass left behind: row b's tokens are columns ends[b] - lengths[b] to ends[b]."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [row, head, token, d_head]
    rows: dict[Segment, int]
    ends: list[int]
    lengths: list[int]  # the segment's tokens and all before them

    def behind(self, segments: Sequence[Segment], device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return keys and values in front of segments, aligned at their right end, and which of them are tokens.

        Returns:
            Per layer [segment, head, token, d_head] twice; mask [segment, token].
        """
        rows = [self.rows[segment.parent] for segment in segments if segment.parent is not None]
        width = max(self.lengths[row] for row in rows)
        back = torch.arange(-width, 0, device=device)
        ends = torch.tensor([self.ends[row] for row in rows], device=device)[:, None]
        lengths = torch.tensor([self.lengths[row] for row in rows], device=device)[:, None]
        # Padding repeats the row's own first token: masked, and if it is not finite the row is not finite anyway.
        tokens = ends + torch.maximum(back, -lengths)
        if rows.count(rows[0]) == len(rows):
            whole = slice(self.ends[rows[0]] - width, self.ends[rows[0]])
            index: Any = (slice(rows[0], rows[0] + 1), slice(None), whole)
            found = [(k[index].expand(len(rows), -1, -1, -1), v[index].expand(len(rows), -1, -1, -1))
                     for k, v in self.layers]  # fmt: skip
        else:
            at = torch.tensor(rows, device=device)[:, None]
            found = [(k[at, :, tokens].transpose(1, 2), v[at, :, tokens].transpose(1, 2)) for k, v in self.layers]
        return found, back >= -lengths


class _ReadLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Gives what it holds and what is new, and stays as it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A padded pass over segments: arguments of the base model, and where the segments' tokens lie."""

    arguments: dict[str, Any]
    first: list[int]  # index of each segment's first token among the flattened tokens of the pass
    _segments: Sequence[Segment]
    _before: int  # columns of keys and values in front

    def past(self) -> Past:
        """Return what the pass left in the cache that it was given to fill."""
        layers = [(layer.keys, layer.values) for layer in self.arguments["past_key_values"].layers]
        return Past(
            layers,
            {segment: row for row, segment in enumerate(self._segments)},
            [self._before + len(segment.tokens) for segment in self._segments],
            [segment.stop for segment in self._segments],
        )


def inputs_of(segments: Sequence[Segment], past: Past | None, keep: bool, pad_id: int, device: torch.device) -> Inputs:
    """Return the pass over segments that stand behind `past` (None: at the start); `keep` its keys and values."""
    # Right padding: a causal model never looks at it.
    batch = pad([segment.tokens for segment in segments], side="right", pad_id=pad_id, device=device)
    starts = torch.tensor([segment.start for segment in segments], device=device)[:, None]
    mask, cache, before = batch.attention_mask, None, 0
    if past is not None:
        layers, real = past.behind(segments, device)
        before = real.shape[1]
        mask = torch.cat([real.to(mask.dtype), mask], dim=1)
        cache = Cache(layers=[_layer(DynamicLayer if keep else _ReadLayer, k, v) for k, v in layers])
    elif keep:
        cache = DynamicCache()
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "position_ids": batch.position_ids + starts,
        "use_cache": cache is not None,
    }
    if cache is not None:
        arguments["past_key_values"] = cache
    width = batch.input_ids.shape[1]
    return Inputs(arguments, [row * width for row in range(len(segments))], segments, before)


def _layer(kind: type[DynamicLayer], keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = kind()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
