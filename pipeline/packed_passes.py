"""Capture passes without padding, for models in the Llama layout: `pipeline.lean_llama` behind keys and values.

Segments lie one after the other. Products see nothing but real tokens; attention is one call for each run of segments
of equal length and equal start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.batching import ran_out_of_memory
from pipeline.lean_llama import LeanLlama, lean_llama, why_not
from pipeline.models import LoadedModel
from pipeline.prefix_tree import Segment
from store.sites import Site

KeysValues = tuple[Tensor, Tensor]  # [token, kv_head, head_dim] twice, from a row's first token on

_LEAN: WeakKeyDictionary[nn.Module, LeanLlama | None] = WeakKeyDictionary()


def lean_form(model: LoadedModel) -> LeanLlama | None:
    """Return the lean form of a model, made once; None where transformers' own modules must serve.

    Only in float32 on the CPU, where it is known to be faster and within the bound.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or why_not(model) is not None:
        return None
    if model.model not in _LEAN:
        try:
            _LEAN[model.model] = lean_llama(model)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            _LEAN[model.model] = None
    return _LEAN[model.model]


def packed_batches(segments: Sequence[Segment], budget: int) -> list[list[Segment]]:
    """Group segments into passes of about equal size, at most `budget` tokens; a longer one goes alone.

    Sorted so that runs of equal length and start are long.
    """
    order = sorted(segments, key=lambda segment: (len(segment.tokens), segment.start, id(segment.parent)))
    total = sum(len(segment.tokens) for segment in order)
    fill = total / max(1, -(-total // budget))
    batches: list[list[Segment]] = []
    size = 0
    for segment in order:
        longer = size + len(segment.tokens)
        if batches and longer <= budget and (size < fill or len(batches) * fill >= total):
            batches[-1].append(segment)
            size = longer
        else:
            batches.append([segment])
            size = len(segment.tokens)
    return batches


@dataclass(frozen=True, eq=False)
class PackedPast:
    """Keys and values of each segment and of what is above it, by layer."""

    layers: list[dict[Segment, KeysValues]]


class PackedPass:
    """One forward pass of a lean model over segments that stand behind `past` (None: at the start).

    Args:
        segments: in the order of `packed_batches`.
        keep: keys and values, for `past`.
    """

    def __init__(self, lean: LeanLlama, segments: Sequence[Segment], past: PackedPast | None, keep: bool):
        self._lean, self._segments, self._past = lean, segments, past
        self._kept: list[dict[Segment, KeysValues]] | None = [] if keep else None
        # Index of each segment's first token among the tokens of the pass.
        self.first = list(accumulate((len(segment.tokens) for segment in segments[:-1]), initial=0))
        self._runs = []
        at = 0
        for (length, start), members in groupby(segments, key=lambda segment: (len(segment.tokens), segment.start)):
            run = _Run(at, length, start, list(members), {})
            self._runs.append(run)
            at += length * len(run.segments)

    def run(self, readers: Mapping[Site, Callable[[Tensor], None]], last: int) -> None:
        """Run it up to block `last`; readers get the values of their sites, [token, d_model]."""
        lean = self._lean
        ids = torch.tensor([token for segment in self._segments for token in segment.tokens])
        positions = torch.tensor([at for segment in self._segments for at in range(segment.start, segment.stop)])

        def at(site: Site, h: Tensor) -> Tensor:
            readers[site](h)
            return h

        h, rotary, sites = lean.embed(ids), lean.rotary(positions), frozenset(readers)
        for layer in range(last + 1):
            h = lean.block(layer, h, rotary, self._attend, at, sites)

    def past(self) -> PackedPast:
        """Return the keys and values that were kept."""
        assert self._kept is not None
        return PackedPast(self._kept)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = None if self._past is None else self._past.layers[layer]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for run in self._runs:
            here = slice(run.first, run.first + run.length * len(run.segments))
            queries, keys, values = (x[here].view(len(run.segments), run.length, *x.shape[1:]) for x in (q, k, v))
            if before is not None:
                parents = [before[segment.parent] for segment in run.segments if segment.parent is not None]
                keys, values = (
                    torch.cat([_stacked([pair[which] for pair in parents]), new], dim=1)
                    for which, new in enumerate((keys, values))
                )
            mask = run.mask(self._lean.windows[layer])
            mixed = functional.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                mask,
                is_causal=mask is None,
                scale=self._lean.scaling,
                enable_gqa=True,
            )
            out[here] = mixed.transpose(1, 2).flatten(0, 1)
            if self._kept is not None:
                if len(self._kept) == layer:
                    self._kept.append({})
                self._kept[layer].update(
                    (segment, (keys[row].clone(), values[row].clone())) for row, segment in enumerate(run.segments)
                )
        return out


@dataclass(frozen=True, eq=False)
class _Run:
    """Segments of equal length and equal start, one after the other."""

    first: int  # token of the pass
    length: int
    start: int
    segments: list[Segment]
    _masks: dict[int | None, Tensor]

    def mask(self, window: int | None) -> Tensor | None:
        """Return which keys [query, key] are seen; None: plainly causal from the first token on."""
        if self.start == 0 and (window is None or self.length <= window):
            return None
        if window not in self._masks:
            query = torch.arange(self.start, self.start + self.length)[:, None]
            behind = query - torch.arange(self.start + self.length)
            self._masks[window] = (behind >= 0) & (behind < (window or self.start + self.length))
        return self._masks[window]


def _stacked(rows: list[Tensor]) -> Tensor:
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), -1, -1, -1)
    return torch.stack(rows)
