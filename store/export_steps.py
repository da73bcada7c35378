"""A selection cut into steps for a writer: entries in stored order, each block read once, a few blocks in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from store.code_version import code_version
from store.selection import Dtype, Part, Selection

STEP_BYTES = 16 << 20  # of values that are handed to a writer at a time
STEP_RECORDS = 1 << 16  # at most so many vectors, where they are short: each comes with keys and texts


@dataclass(frozen=True)
class Export:
    """A selection about to be written.

    Attributes:
        prompts: row key -> (prompt id, text), as far as known.
        model_name: what the model's studies call it.
    """

    selection: Selection
    prompts: Mapping[str, tuple[str, str | None]]
    dtype: Dtype = "float32"
    model_name: str | None = None

    @cached_property
    def ordered(self) -> Selection:
        """The selection in the order in which it is stored, with a layer axis."""
        ordered = self.selection.in_stored_order()
        ordered.layer_axis = True
        return ordered

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """[row or token, layer, d_model]."""
        return len(self.ordered), len(self.ordered.layers), self.ordered.d_model

    @cached_property
    def value_dtype(self) -> np.dtype[Any]:
        return self.ordered.dtype_of(self.dtype)

    @property
    def about(self) -> dict[str, Any]:
        """What the numbers are, for the file's metadata."""
        selection = self.ordered
        return {
            "component": selection.component,
            "layers": list(selection.layers),
            "position": selection.position,
            "dims": list(selection.dims),
            "dtype": self.value_dtype.name,
            "stored_dtype": selection.stored_dtype.name,
            "model": selection.parts[0].generation.plan.model,
            "model_name": self.model_name,
            "captures": sorted({part.generation.id for part in selection.parts}),
            "resid": code_version(),
        }

    @cached_property
    def rows(self) -> dict[str, list[str | None]]:
        """Columns about the rows: row_key, prompt_id, text."""
        known = [self.prompts.get(key, (None, None)) for key in self.ordered.row_keys]
        return {
            "row_key": list(self.ordered.row_keys),
            "prompt_id": [prompt_id for prompt_id, _ in known],
            "text": [text for _, text in known],
        }

    def rows_of(self, entries: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the row of each entry, and of all tokens which of the row's tokens it is (else 0)."""
        offsets = self.ordered.offsets
        if offsets is None:
            return entries, np.zeros_like(entries)
        rows = np.searchsorted(offsets, entries, side="right") - 1
        return rows, entries - offsets[rows]

    def steps(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield the first entry and the values [row or token, layer, d_model], in C order, step by step."""
        _, n_layers, d_model = self.shape
        most = max(1, STEP_BYTES // (n_layers * d_model * self.value_dtype.itemsize))
        most = max(1, min(most, STEP_RECORDS // n_layers))
        for first, part in self._pieces():
            values = part.to_numpy(self.dtype)
            for start in range(0, len(values), most):
                yield first + start, np.ascontiguousarray(values[start : start + most])
            del values

    def _pieces(self) -> Iterator[tuple[int, Selection]]:
        """Yield consecutive rows of the selection as selections, with the first entry of each.

        A cut lies where no block goes on, so each block is read once. Where captures with different blocks serve
        different layers there may be no such place for long: then a cut lies anywhere.
        """
        ordered = self.ordered
        bounds = [_row_range(part, ordered.offsets) for part in ordered.parts]
        order = sorted(range(len(bounds)), key=bounds.__getitem__)
        longest = max(stop - start for start, stop in bounds)
        cuts, end = [0], 0
        for i in order:
            start, stop = bounds[i]
            if start >= end > cuts[-1]:
                cuts.append(end)
            end = max(end, stop)
        cuts.append(len(ordered.row_keys))
        active: list[int] = []
        waiting = iter(order)
        following = next(waiting, None)
        for lower, upper in pairwise(cuts):
            # A few layers of each of many blocks may overlap in a chain: memory is for two blocks' rows.
            step = upper - lower if upper - lower <= 2 * longest else longest
            for start in range(lower, upper, step):
                stop = min(start + step, upper)
                while following is not None and bounds[following][0] < stop:
                    active.append(following)
                    following = next(waiting, None)
                active = [i for i in active if bounds[i][1] > start]
                yield self._piece(start, stop, [ordered.parts[i] for i in active])

    def _piece(self, start: int, stop: int, parts: list[Part]) -> tuple[int, Selection]:
        """Return rows start to stop (excluded), which these parts hold; like `isel`, without a look at all others."""
        ordered, offsets = self.ordered, None
        low, high = start, stop
        if ordered.offsets is not None:
            low, high = int(ordered.offsets[start]), int(ordered.offsets[stop])
            offsets = ordered.offsets[start : stop + 1] - low
        pieces = []
        for part in parts:
            kept = (part.into >= low) & (part.into < high)
            if kept.any():
                pieces.append(replace(part, within=part.within[kept], into=part.into[kept] - low))
        of = (ordered.layers, ordered.d_model, ordered.component, ordered.position)
        return low, Selection(ordered.row_keys[start:stop], *of, pieces, offsets)


def _row_range(part: Part, offsets: npt.NDArray[np.int64] | None) -> tuple[int, int]:
    """Return the first row of a part, and the last one + 1."""
    first, last = int(part.into.min()), int(part.into.max())
    if offsets is not None:
        first, last = (int(i) - 1 for i in np.searchsorted(offsets, [first, last], side="right"))
    return first, last + 1
