"""Keys and values of a common start, read by the rows that stand behind it, through transformers' own cache classes.

Every layer keeps every token, also of models with sliding windows: their masks are made by token index, and cut out the
window from whatever the cache says that it holds. Caches of transformers grow in place; the ones made here for reading
never change, so one pass's keys and values can stand in front of many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pipeline.batching import pad
from pipeline.hooks import on_sites, stop_after
from pipeline.models import LoadedModel
from pipeline.prefix_tree import Segment
from store.sites import Site


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


class PaddedPass:
    """One forward pass of transformers' own modules over segments that stand behind `past` (None: at the start).

    Args:
        keep: its keys and values, for `past`.
    """

    def __init__(self, model: LoadedModel, segments: Sequence[Segment], past: Past | None, keep: bool):
        self._architecture, self._segments, device = model.architecture, segments, model.device
        # Right padding: a causal model never looks at it.
        tokens = [segment.tokens for segment in segments]
        batch = pad(tokens, side="right", pad_id=model.tokenizer.pad_token_id, device=device)
        starts = torch.tensor([segment.start for segment in segments], device=device)[:, None]
        mask, self._before = batch.attention_mask, 0
        self._cache: Any = DynamicCache() if keep else None
        if past is not None:
            layers, real = past.behind(segments, device)
            self._before = real.shape[1]
            mask = torch.cat([real.to(mask.dtype), mask], dim=1)
            self._cache = Cache(layers=[_layer(DynamicLayer if keep else _ReadLayer, k, v) for k, v in layers])
        self._arguments: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": mask,
            "position_ids": batch.position_ids + starts,
            "use_cache": self._cache is not None,
        }
        if self._cache is not None:
            self._arguments["past_key_values"] = self._cache
        # Index of each segment's first token among the flattened tokens of the pass.
        self.first = [row * batch.input_ids.shape[1] for row in range(len(segments))]

    def run(self, readers: Mapping[Site, Callable[[Tensor], None]], last: int) -> None:
        """Run it up to block `last`; readers get the values of their sites, [segment, token, d_model]."""
        with on_sites(self._architecture, readers), stop_after(self._architecture, last):
            self._architecture.base(**self._arguments)

    def past(self) -> Past:
        """Return what the pass left in the cache that it was given to fill."""
        return Past(
            [(layer.keys, layer.values) for layer in self._cache.layers],
            {segment: row for row, segment in enumerate(self._segments)},
            [self._before + len(segment.tokens) for segment in self._segments],
            [segment.stop for segment in self._segments],
        )


def _layer(kind: type[DynamicLayer], keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = kind()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
