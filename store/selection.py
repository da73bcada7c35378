"""Selections: activations of given rows, wherever in the store they lie, as a lazy array.

Reading goes part by part: a part is some rows of one block with some of the layers, and every (row, layer) occurs in
exactly one part. Within a part one layer after the other is read, a few chunks ahead, so memory stays at a few chunks
whatever is selected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from store.buffers import Pool
from store.dtypes import NUMPY_DTYPES, to_float32
from store.errors import ResidError
from store.generation import Generation
from store.read_ahead import announced, fetched
from store.readers import DirectReader, OpenShard
from store.sites import ALL_TOKENS

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray

Dtype = Literal["float32", "stored"]


@dataclass(frozen=True)
class Part:
    """The selected rows (or tokens) and layers of one block."""

    generation: Generation
    block: int
    within: npt.NDArray[np.int64]  # rows (tokens), as indices within the block
    into: npt.NDArray[np.int64]  # the same, as indices into the selection's first axis
    layers: tuple[int, ...]  # absolute
    at: npt.NDArray[np.int64]  # the same layers, as indices into the selection's layers
    position: int | None  # which of the block's positions; None where a chunk has none (all tokens)

    @cached_property
    def stored_at(self) -> tuple[int, ...]:
        """The layers as positions in the shard."""
        return tuple(self.generation.plan.layers.index(layer) for layer in self.layers)

    @cached_property
    def whole(self) -> int | None:
        """The number of entries if they are the first ones of the block, in order and without gaps; else None."""
        count = len(self.within)
        return count if np.array_equal(self.within, np.arange(count)) else None

    def only(self, index: int) -> Part:
        """Return the part with one of its layers, given by its index."""
        chosen = slice(index, index + 1)
        return replace(self, layers=self.layers[chosen], at=self.at[chosen])

    def pick(self, chunk: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the selected entries of a chunk [entry, *inner]: [entry, d_model]."""
        values = chunk if self.position is None else chunk[:, self.position]
        return values[: self.whole] if self.whole is not None else values[self.within]


@dataclass(frozen=True)
class Block:
    """Some rows (tokens) of a selection with some of its layers, in memory."""

    rows: npt.NDArray[np.int64]  # indices into the selection's first axis
    layers: tuple[int, ...]
    values: npt.NDArray[Any]  # [row or token, layer, d_model]


class Selection:
    """Activations of given rows at one component and position: a lazy array [row, layer, d_model].

    With one layer given as a number there is no layer axis; with the position `all_tokens` the first axis is token, and
    `offsets` ``[row + 1]`` says where each row's begin and end. Values come as float32, which holds every storage dtype
    exactly: arithmetic on 16-bit floats overflows or loses.
    """

    def __init__(
        self,
        row_keys: tuple[str, ...],
        layers: tuple[int, ...],
        d_model: int,
        component: str,
        position: str,
        parts: Sequence[Part],
        offsets: npt.NDArray[np.int64] | None = None,
        layer_axis: bool = True,
    ):
        self.row_keys, self.layers, self.d_model = row_keys, layers, d_model
        self.component, self.position = component, position
        self.parts, self.offsets, self.layer_axis = tuple(parts), offsets, layer_axis

    # -- what it looks like ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The length of the first axis."""
        return len(self.row_keys) if self.offsets is None else int(self.offsets[-1])

    @property
    def dims(self) -> tuple[str, ...]:
        first = "row" if self.offsets is None else "token"
        return (first, "layer", "d_model") if self.layer_axis else (first, "d_model")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), len(self.layers), self.d_model) if self.layer_axis else (len(self), self.d_model)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The dtype on disk; float32 where captures of different dtypes serve the rows."""
        names = {part.generation.plan.dtype for part in self.parts}
        return NUMPY_DTYPES[names.pop() if len(names) == 1 else "float32"]

    def dtype_of(self, dtype: Dtype) -> np.dtype[Any]:
        """Return the dtype that values of this selection come in.

        Raises:
            ValueError: for anything but "float32" and "stored".
        """
        if dtype not in ("float32", "stored"):
            raise ValueError(f'dtype is "float32" or "stored", not {dtype!r}')
        return self.stored_dtype if dtype == "stored" else np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the selected values as they are stored."""
        values = len(self) * len(self.layers) * self.d_model
        return values * self.stored_dtype.itemsize

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {size}" for name, size in zip(self.dims, self.shape, strict=True))
        layers = f"{self.layers[0]}" if len(self.layers) == 1 else f"{self.layers[0]}..{self.layers[-1]}"
        return (
            f"<Selection ({sizes}) {self.component}.{layers} at {self.position}, stored as {self.stored_dtype}, "
            f"{self.nbytes / 1e6:,.1f} MB in {len(self.parts)} blocks; .to_numpy() reads it>"
        )

    @cached_property
    def digest(self) -> str:
        """Hash of the row keys, in their order."""
        return hashlib.sha256("\n".join(self.row_keys).encode()).hexdigest()

    def in_stored_order(self) -> Selection:
        """Return the same rows in the order in which they are stored: reading by blocks is then reading in order."""
        first: dict[int, None] = {}
        for part in self.parts:
            rows = part.into if self.offsets is None else np.searchsorted(self.offsets, part.into, side="right") - 1
            first.update(dict.fromkeys(int(row) for row in rows))
        return self.isel(np.array(list(first), dtype=np.int64))

    def isel(self, rows: npt.ArrayLike | slice) -> Selection:
        """Return some of the rows, by index into `row_keys` (a slice, a list or a mask), in the order given.

        Raises:
            IndexError: if there is no such row, or a mask has another length.
        """
        index: Any = rows if isinstance(rows, slice) else np.asarray(rows)
        if not isinstance(rows, slice) and (index.ndim != 1 or not index.size):
            raise ValueError(f"choose at least one row, by a slice, a list of indices or a mask, not {rows!r}")
        chosen = np.arange(len(self.row_keys))[index]
        if not len(chosen) or len(np.unique(chosen)) < len(chosen):
            raise ValueError("choose at least one row, and each at most once")
        # Old index of the first axis -> new one, or -1.
        offsets, lookup = None, np.full(len(self), -1, dtype=np.int64)
        if self.offsets is None:
            lookup[chosen] = np.arange(len(chosen))
        else:
            lengths = np.diff(self.offsets)[chosen]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            lookup[ranges(self.offsets[:-1][chosen], lengths)] = np.arange(offsets[-1])
        parts = []
        for part in self.parts:
            into = lookup[part.into]
            kept = into >= 0
            if kept.any():
                parts.append(replace(part, within=part.within[kept], into=into[kept]))
        keys = tuple(self.row_keys[i] for i in chosen)
        return Selection(
            keys, self.layers, self.d_model, self.component, self.position, parts, offsets, self.layer_axis
        )

    # -- reading -----------------------------------------------------------------------------------------------

    def read(self, part: Part, dtype: Dtype = "float32", pool: Pool | None = None) -> npt.NDArray[Any]:
        """Return the values of one part: [row or token, layer, d_model].

        Args:
            pool: where to take the memory from; None for fresh memory.

        Raises:
            DamageError: if its bytes are not those that were committed.
        """
        shape = (len(part.layers), len(part.within), self.d_model)
        kind = self.dtype_of(dtype)
        values = np.empty(shape, kind) if pool is None else pool.take(shape, kind)
        for index, found in self.chunks([part], dtype, into=lambda _, index: values[index]):
            del index, found
        return values.transpose(1, 0, 2)

    def chunks(
        self, parts: Iterable[Part] | None = None, dtype: Dtype = "float32", into: Any = None
    ) -> Iterator[tuple[tuple[Part, int], npt.NDArray[Any]]]:
        """Yield ((part, index into its layers), values [row or token, d_model]), one layer of one part at a time.

        The memory of values that nobody holds any more is used again.

        Args:
            into: called with part and index; returns the array to put the values into.

        Raises:
            DamageError: if bytes are not those that were committed.
        """
        target_dtype = self.dtype_of(dtype)
        pool = Pool()
        for part, index, opened in self._opened(self.parts if parts is None else parts):
            shape = (len(part.within), self.d_model)
            out = pool.take(shape, target_dtype) if into is None else into(part, index)
            plan = part.generation.plan
            plain = part.whole is not None and (part.position is None or len(plan.positions) == 1)
            if plain and target_dtype == NUMPY_DTYPES[plan.dtype] and out.flags.c_contiguous:
                opened.read([part.stored_at[index]], out.reshape(1, len(out), *plan.inner))
            else:
                scratch = pool.take((1, *plan.shard_shape.chunk_shape), NUMPY_DTYPES[plan.dtype])
                opened.read([part.stored_at[index]], scratch)
                found = part.pick(scratch[0])
                if target_dtype == found.dtype:
                    np.copyto(out, found)
                else:
                    to_float32(found, out)
            yield (part, index), out

    def _opened(self, parts: Iterable[Part]) -> Iterator[tuple[Part, int, OpenShard]]:
        """Iterate over every layer of every part with its opened shard, announcing or fetching what comes next."""
        steps = [(part, index) for part in parts for index in range(len(part.layers))]
        if all(isinstance(part.generation.reader, DirectReader) for part, _ in steps):
            return announced(self.component, steps)
        return fetched(self.component, steps)

    def blocks(self, dtype: Dtype = "float32") -> Iterator[Block]:
        """Yield the selection block by block as it is stored; see `Block`.

        Raises:
            DamageError: if bytes are not those that were committed.
        """
        # While one is in use the next is read; the one before is free again, unless somebody kept it.
        pool = Pool(2)
        for part in self.parts:
            yield Block(part.into, part.layers, self.read(part, dtype, pool))

    # -- conversions -------------------------------------------------------------------------------------------

    def to_numpy(self, dtype: Dtype = "float32") -> npt.NDArray[Any]:
        """Return everything, in the order of `row_keys`, with the axes of `dims`.

        In memory the layers come first, so that what is taken of one layer is contiguous.

        Raises:
            DamageError: if bytes are not those that were committed.
        """
        values = np.empty((len(self.layers), len(self), self.d_model), self.dtype_of(dtype))
        straight = {id(part): _as_slice(part.into) for part in self.parts}

        def into(part: Part, index: int) -> npt.NDArray[Any]:
            rows = straight[id(part)]
            layer = values[part.at[index]]
            return layer[rows] if rows is not None else np.empty((len(part.into), self.d_model), values.dtype)

        for (part, index), found in self.chunks(None, dtype, into):
            if straight[id(part)] is None:
                values[part.at[index], part.into] = found
        return values.transpose(1, 0, 2) if self.layer_axis else values[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a selection is on disk: it has no array without a copy")
        return self.to_numpy() if dtype is None else self.to_numpy().astype(dtype, copy=False)

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean over the first axis, [layer, d_model] (or [d_model]), in one pass over the blocks.

        How exactly it is summed: `store.reduce.group_sums`.
        """
        from store.reduce import group_sums

        sums = group_sums(self, np.zeros(len(self), dtype=np.int64), 1)[0] / len(self)
        mean: npt.NDArray[np.float64] = sums if self.layer_axis else sums[0]
        return mean

    def to_dask(self, dtype: Dtype = "float32") -> dask.array.Array:
        """Return a Dask array over the selection, a chunk per block and layer; `in_stored_order` first is fastest."""
        from store.bridges import to_dask

        return to_dask(self, dtype)

    def to_xarray(self, dtype: Dtype = "float32") -> xarray.DataArray:
        """Return a lazy xarray.DataArray (over `to_dask`) with coordinates row and layer, of all tokens token_index."""
        from store.bridges import to_xarray

        return to_xarray(self, dtype)

    def to_torch(self, dtype: Dtype = "float32") -> torch.Tensor:
        """Return `to_numpy` as a torch tensor on the CPU; "stored" gives torch.bfloat16 where that is stored."""
        from store.bridges import to_torch

        return to_torch(self, dtype)

    @property
    def token_rows(self) -> npt.NDArray[np.int64]:
        """Which row each token belongs to, [token]; all tokens only."""
        if self.offsets is None:
            raise ResidError(f"only the position {ALL_TOKENS} has tokens; this selection is at {self.position}")
        rows: npt.NDArray[np.int64] = np.repeat(np.arange(len(self.row_keys)), np.diff(self.offsets))
        return rows


def ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return start, start + 1, ..., start + length - 1 of every pair, one after the other."""
    ends = np.cumsum(lengths)
    found: npt.NDArray[np.int64] = np.repeat(starts - (ends - lengths), lengths)
    return found + np.arange(len(found))


def _as_slice(indices: npt.NDArray[np.int64]) -> slice | None:
    start = int(indices[0])
    return slice(start, start + len(indices)) if (np.diff(indices) == 1).all() else None
