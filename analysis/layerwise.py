"""One layer of a selection at a time, chunk by chunk, for what needs all rows of a layer at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import dask
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from store.selection import Selection

Floats = npt.NDArray[np.float64]
Result = TypeVar("Result")


def layer_chunks(selection: Selection, layer: int) -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
    """Yield (indices into the selection's first axis, values [row or token, d_model]) of one layer, in float64.

    Raises:
        DamageError: if bytes are not those that were committed.
    """
    parts = [part.only(part.layers.index(layer)) for part in selection.parts if layer in part.layers]
    for (part, _), values in selection.chunks(parts):
        yield part.into, values.astype(np.float64)


def layer_values(selection: Selection, layer: int) -> Floats:
    """Return one layer in the selection's order, [row or token, d_model]."""
    found = np.empty((len(selection), selection.d_model))
    for into, values in layer_chunks(selection, layer):
        found[into] = values
    return found


def over_layers(function: Callable[[int], Result], layers: Sequence[int], threads: int = 2) -> list[Result]:
    """Return the function of every layer, in order, computed in threads by Dask: reading and BLAS overlap."""
    tasks = [delayed(function)(layer) for layer in layers]
    return list(dask.compute(*tasks, scheduler="threads", num_workers=threads))


def spectrum(chunks: Iterable[Floats], n: int, d_model: int) -> tuple[Floats, Floats]:
    """Return eigenvalues [rank] and eigenvectors [rank, d_model] of the second moment (1/n) sum x x^T, largest first.

    Up to d_model rows are kept and decomposed (SVD); of more, the moment is summed up, so memory is d_model^2 numbers
    at most. The rank is min(n, d_model) or less; eigenvalues that rounding leaves below zero are zero.
    """
    if n <= d_model:
        rows = np.concatenate(list(chunks))
        _, singular, vectors = np.linalg.svd(rows, full_matrices=False)
        return singular**2 / n, vectors
    moment = np.zeros((d_model, d_model))
    for chunk in chunks:
        moment += chunk.T @ chunk
    values, columns = np.linalg.eigh(moment / n)
    return np.maximum(values[::-1], 0.0), np.ascontiguousarray(columns[:, ::-1].T)
