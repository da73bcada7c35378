"""Replay through transformers' own modules, attention and caches: every supported family, padded on the left.

Rows that enter are run by themselves and then joined to the running ones: caches are aligned at their right ends, and
what is missing on the left is masked. Positions are explicit, so neither shifts a rotary angle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipeline.batching import pad
from pipeline.effects import Effects
from pipeline.hooks import on_sites
from pipeline.interventions import BatchProgram
from pipeline.models import LoadedModel
from pipeline.runners import Entrant, Passed
from store.conditions import MonitorPlan
from store.sites import Site


class PaddedRunner:
    """Runs rows of any model that `pipeline.architecture` knows."""

    def __init__(
        self,
        model: LoadedModel,
        monitor: MonitorPlan | None = None,
        *,
        sinks: Mapping[Site, float] | None = None,
        effects: Effects | None = None,
    ):
        self.model, self.monitor, self.sinks, self.effects = model, monitor, sinks, effects
        self._ids: list[int] = []  # of each row in the effects
        self._read: list[int] = []  # response tokens of each row so far
        self._rows: list[Entrant] = []
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.int64, device=model.device)  # [row, token], 1 at real tokens
        self._positions = torch.zeros(0, dtype=torch.int64, device=model.device)  # of each row's next token
        self._program: BatchProgram | None = None  # of decoding; made anew when rows enter or leave

    @property
    def open(self) -> bool:
        return self._cache is None or all(type(layer) in _JOINABLE for layer in self._cache.layers)

    def enter(self, entrants: Sequence[Entrant]) -> Passed:
        batch = pad(
            [entrant.prompt for entrant in entrants],
            side="left",
            pad_id=self.model.tokenizer.pad_token_id,
            device=self.model.device,
        )
        cache, program = DynamicCache(config=self.model.model.config), self._program_of(entrants)
        passed = self._pass(
            program, cache, batch.input_ids, batch.attention_mask, batch.position_ids, batch.attention_mask
        )
        if self.effects is not None:
            ids = [self.effects.begin(entrant.job) for entrant in entrants]
            program.record(self.effects, np.array(ids), np.zeros(len(ids), dtype=np.int64))
            self._ids += ids
        self._read += [0] * len(entrants)
        width = max(self._mask.shape[1], batch.attention_mask.shape[1])
        self._cache = cache if self._cache is None else _joined(self._cache, cache)
        self._mask = torch.cat([_padded_left(mask, width) for mask in (self._mask, batch.attention_mask)])
        self._positions = torch.cat([self._positions, batch.position_ids[:, -1] + 1])
        self._rows += entrants
        self._program = None
        return passed

    def step(self, tokens: Tensor) -> Passed:
        if self._program is None:
            self._program = self._program_of(self._rows)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        new, positions = self._mask[:, -1:], self._positions[:, None]
        passed = self._pass(self._program, self._cache, tokens[:, None], self._mask, positions, new, decoding=True)
        if self.effects is not None:
            bases = np.array([len(row.prompt) + n for row, n in zip(self._rows, self._read, strict=True)])
            self._program.record(self.effects, np.array(self._ids), bases)
        self._positions = self._positions + 1
        self._read = [n + 1 for n in self._read]
        return passed

    def keep(self, order: Sequence[int]) -> None:
        self._rows = [self._rows[old] for old in order]
        self._read = [self._read[old] for old in order]
        self._ids = [self._ids[old] for old in order] if self.effects is not None else []
        self._program = None
        if not order:
            self._cache, self._mask, self._positions = None, self._mask[:0, :0], self._positions[:0]
            return
        rows = torch.tensor(list(order), device=self._mask.device)
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.batch_select_indices(rows)
        spare = int(self._mask.any(dim=0).int().argmax())  # columns of padding only
        if spare and self.open:
            self._mask = self._mask[:, spare:]
            _shorten(self._cache, spare)

    def _program_of(self, rows: Sequence[Entrant]) -> BatchProgram:
        labels = None if self.effects is None else [self.effects.labels(row.operations) for row in rows]
        return BatchProgram(
            [row.operations for row in rows], self.model.device, self.monitor, sinks=self.sinks, labels=labels
        )

    def _pass(
        self,
        program: BatchProgram,
        cache: Any,
        input_ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        new: Tensor,
        decoding: bool = False,
    ) -> Passed:
        """Run the model; `mask` [row, token] covers the cache and the new tokens, `new` those alone."""
        program.begin(new, decoding=decoding, read=self._read if decoding else None)
        model = self.model.model
        # A slice that is not contiguous would have the head's weights copied once per row.
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: (inputs[0].contiguous(), *inputs[1:])
        )
        try:
            with on_sites(self.model.architecture, program.hooks()):
                out = model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            handle.remove()
        return Passed(out.logits[:, -1].float(), program.monitored())


# Layers of a cache whose columns end at the newest token.
_JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer)


def _joined(first: Any, second: Any) -> Any:
    """Join the rows of two caches, aligned at their newest tokens; the first one is changed and returned."""
    for into, layer in zip(first.layers, second.layers, strict=True):
        if not layer.is_initialized:  # a layer that reads another one's keys keeps none
            continue
        width = max(into.keys.shape[-2], layer.keys.shape[-2])
        into.keys, into.values = (
            torch.cat([functional.pad(x, (0, 0, width - x.shape[-2], 0)) for x in pair])
            for pair in ((into.keys, layer.keys), (into.values, layer.values))
        )
        if isinstance(into, DynamicSlidingWindowLayer):
            into.cumulative_length = max(into.cumulative_length, layer.cumulative_length)
    return first


def _shorten(cache: Any, columns: int) -> None:
    """Drop the oldest columns of a cache, which are padding in every row."""
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        width = layer.get_seq_length() - columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = width
            width = min(width, layer.sliding_window - 1)
        layer.keys, layer.values = (x[..., x.shape[-2] - width :, :] for x in (layer.keys, layer.values))


def _padded_left(mask: Tensor, width: int) -> Tensor:
    return functional.pad(mask, (width - mask.shape[1], 0))
