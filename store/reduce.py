"""Sums over selections, fused with reading: one pass, a few chunks in memory whatever the size of the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from store.dtypes import to_float32
from store.selection import Part, Selection

# Rows that are converted and summed at a time: a slab of them stays in a core's cache.
SLAB = 256


def group_sums(
    selection: Selection, groups: npt.NDArray[np.int64], n_groups: int, parts: Iterable[Part] | None = None
) -> npt.NDArray[np.float64]:
    """Return the sum of each group of rows at every layer, [group, layer, d_model].

    float32 is summed in float64. The 16-bit types, of 8 or 11 significant bits, are summed in float32 over at most
    `SLAB` rows, which loses less than a rounding of the result to float32 does, and these sums in float64. The order is
    that of the parts, so a repeat gives the same bits.

    Args:
        groups: group of each row (token) of the selection, in [0, n_groups).
        parts: sum over these only; all if None.

    Raises:
        DamageError: if bytes are not those that were committed.
    """
    total = np.zeros((n_groups, len(selection.layers), selection.d_model))
    scratch = np.empty((SLAB, selection.d_model), dtype=np.float32)
    wide = np.empty((SLAB, selection.d_model), dtype=np.float64)
    for (part, index), values in selection.chunks(parts, "stored"):
        work: npt.NDArray[Any] = wide if values.dtype == np.float32 else scratch
        mine = groups[part.into]
        at = int(part.at[index])
        only = int(mine[0])
        if (mine == only).all():
            total[only, at] += column_sums(values, work)
            continue
        for group in np.unique(mine):
            total[group, at] += column_sums(values[mine == group], work)
    return total


def column_sums(values: npt.NDArray[Any], work: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float64]:
    """Return the sum over the first axis, [d_model], of values [row, d_model] in a storage dtype; see `group_sums`.

    Args:
        work: memory for a slab, [SLAB, d_model]: float64 for float32 values, float32 for others.
    """
    if work is None:
        kind = np.float64 if values.dtype == np.float32 else np.float32
        work = np.empty((SLAB, values.shape[1]), dtype=kind)
    total = np.zeros(values.shape[1])
    for start in range(0, len(values), SLAB):
        slab = values[start : start + SLAB]
        converted = work[: len(slab)]
        if work.dtype == np.float64:
            np.copyto(converted, slab)
        else:
            to_float32(slab, converted)
        total += converted.sum(axis=0)
    return total
