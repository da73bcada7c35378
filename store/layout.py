"""The Zarr layout of a generation: what is written of which rows, as metadata files and as the bytes of shards.

Two layouts. Named positions: ``[row, layer, position, d_model]``. All tokens: ``[token, layer, d_model]``, where the
array `offsets` ``[row, 2]`` says which tokens (half-open) are a row's; a block of rows begins at a shard's first token,
so the tokens at a shard's end may belong to nobody (NaN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import BaseModel, ConfigDict, Field, model_validator
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from store import remote
from store.dtypes import NUMPY_DTYPES, DTypeName
from store.location import Location
from store.shards import ShardError, ShardShape, bytes_of
from store.sites import ALL_TOKENS, Component

TARGET_CHUNK_BYTES = 4 << 20
Compression = Literal["none", "zstd"]


class GenerationPlan(BaseModel):
    """What one generation holds of each of its rows. Layers are absolute; sites are components at these layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    d_model: int = Field(ge=1)
    components: tuple[Component, ...] = Field(min_length=1)
    layers: tuple[int, ...] = Field(min_length=1)
    positions: tuple[str, ...] = Field(min_length=1)
    dtype: DTypeName
    n_rows: int = Field(ge=1)
    block_rows: int = Field(ge=1)  # of all tokens: the most that a block has
    block_tokens: int = Field(default=0, ge=0)  # tokens of a shard; all tokens only
    block_starts: tuple[int, ...] = ()  # first row of every block; all tokens only
    compression: Compression = "none"

    @model_validator(mode="after")
    def _consistent(self) -> GenerationPlan:
        for values in (self.components, self.layers, self.positions):
            if len(set(values)) < len(values):
                raise ValueError(f"one of {values} occurs twice")
        if ALL_TOKENS in self.positions and len(self.positions) > 1:
            raise ValueError(f"{ALL_TOKENS} stands alone, not beside {self.positions}")
        starts = self.block_starts
        if self.ragged != bool(self.block_tokens) or self.ragged != bool(starts):
            raise ValueError(f"block_tokens and block_starts belong to {ALL_TOKENS}, and only there")
        if starts and (starts[0] != 0 or starts[-1] >= self.n_rows or list(starts) != sorted(set(starts))):
            raise ValueError("block_starts must begin at row 0 and grow, below n_rows")
        return self

    @property
    def ragged(self) -> bool:
        """Whether it holds all tokens of its rows, as many as each one has."""
        return self.positions == (ALL_TOKENS,)

    @property
    def n_blocks(self) -> int:
        return len(self.block_starts) if self.ragged else -(-self.n_rows // self.block_rows)

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the half-open range of rows of a block."""
        if self.ragged:
            after = self.block_starts[block + 1] if block + 1 < self.n_blocks else self.n_rows
            return self.block_starts[block], after
        start = block * self.block_rows
        return start, min(start + self.block_rows, self.n_rows)

    def blocks_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the block of each row index; negative indices stay negative."""
        if self.ragged:
            return np.searchsorted(np.array(self.block_starts), rows, side="right") - 1
        return rows // self.block_rows

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one row (or token) at one layer."""
        return (self.d_model,) if self.ragged else (len(self.positions), self.d_model)

    @cached_property
    def shard_shape(self) -> ShardShape:
        entries = self.block_tokens if self.ragged else self.block_rows
        return ShardShape(entries, len(self.layers), self.inner, NUMPY_DTYPES[self.dtype])

    @property
    def entry_bytes(self) -> int:
        """Bytes of one row (or token) over all components, layers and positions."""
        values = len(self.components) * len(self.layers) * math.prod(self.inner)
        return values * NUMPY_DTYPES[self.dtype].itemsize


def default_block_rows(n_rows: int, positions: int, d_model: int, dtype: str) -> int:
    """Return rows per block: chunks of about 4 MiB, but at least eight blocks of a small capture.

    The upper bound is the chunk size that reads well (design: 2-8 MB); the lower one keeps what a kill can lose small.
    """
    by_size = TARGET_CHUNK_BYTES // (positions * d_model * NUMPY_DTYPES[dtype].itemsize)
    return max(1, min(by_size, max(16, -(-n_rows // 8))))


def ragged_blocks(lengths: Sequence[int], block_rows: int | None, d_model: int, dtype: str) -> dict[str, Any]:
    """Cut rows into blocks for all tokens: whole rows, in order, chunks of about 4 MiB (`default_block_rows`).

    Args:
        lengths: tokens of each row.
        block_rows: rows of a block on average; None for no limit but the chunk's size.

    Returns:
        block_rows, block_tokens and block_starts of a `GenerationPlan`.
    """
    by_size = TARGET_CHUNK_BYTES // (d_model * NUMPY_DTYPES[dtype].itemsize)
    if block_rows is None:
        # As for rows: at least eight blocks, unless they would be of fewer than 16 rows.
        some = max(16 * max(lengths), -(-sum(lengths) // 8))
    else:
        # Of tokens, not of rows: all shards are as long as the longest, and rows may be of very different lengths.
        some = -(-block_rows * sum(lengths) // len(lengths))
    limit = max(min(by_size, some), max(lengths))
    starts, tokens, most = [0], 0, 0
    for index, length in enumerate(lengths):
        if tokens + length > limit:
            starts.append(index)
            tokens = 0
        tokens += length
        most = max(most, tokens)
    widest = max(b - a for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True))
    return {"block_rows": widest, "block_tokens": most, "block_starts": tuple(starts)}


def token_offsets(plan: GenerationPlan, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which tokens of the array are each row's, [row, 2], half-open; for a plan of all tokens."""
    offsets = np.empty((len(lengths), 2), dtype=np.int64)
    for block in range(plan.n_blocks):
        start, stop = plan.block_range(block)
        ends = block * plan.block_tokens + np.cumsum(lengths[start:stop])
        offsets[start:stop, 0] = ends - lengths[start:stop]
        offsets[start:stop, 1] = ends
    return offsets


def zarr_store(location: Location, *, read_only: bool) -> LocalStore | FsspecStore:
    """Open a location as a zarr store."""
    if location.is_local:
        return LocalStore(location.path, read_only=read_only)
    store = FsspecStore.from_url(location.url, storage_options=location.storage_options, read_only=read_only)
    remote.bound(store.fs)
    return store


def encode_shard(values: npt.NDArray[Any], plan: GenerationPlan) -> memoryview:
    """Return the bytes of one shard as zarr-python writes it; values [row or token, layer, *inner].

    The general path, for any codec; `store.shards` writes the same bytes faster where nothing is compressed. A block
    may be shorter than its shard; the rest is filled with NaN.
    """
    memory = MemoryStore()
    array = _create_array(memory, "shard", plan, plan.shard_shape.entries)
    array[: len(values)] = values
    buffer = sync(memory.get("shard/c/" + "/".join("0" * array.ndim), prototype=default_buffer_prototype()))
    assert buffer is not None
    # Not to_bytes(): a copy of a whole shard takes as long as encoding it.
    return bytes_of(buffer.as_numpy_array())


def decode_shard(data: bytes, plan: GenerationPlan) -> npt.NDArray[Any]:
    """Return the values of a shard, [row or token, layer, *inner]: the inverse of `encode_shard`.

    Raises:
        ShardError: if zarr-python cannot read it.
    """
    memory = MemoryStore()
    array = _create_array(memory, "shard", plan, plan.shard_shape.entries)
    buffer = default_buffer_prototype().buffer.from_bytes(data)
    sync(memory.set("shard/c/" + "/".join("0" * array.ndim), buffer))
    try:
        return np.asarray(array[:])
    except (ValueError, RuntimeError) as error:  # what zarr and its codecs raise
        raise ShardError(str(error)) from None


def _create_array(store: Any, name: str, plan: GenerationPlan, entries: int) -> zarr.Array[Any]:
    shape = plan.shard_shape
    itemsize = shape.dtype.itemsize
    # Bytes of like weight together: exponents compress, fractions do not. zstd's default blocks are too small for it.
    shuffle = BloscCodec(typesize=itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=1 << 20)
    names = ["token", "layer", "d_model"] if plan.ragged else ["row", "layer", "position", "d_model"]
    return zarr.create_array(
        store,
        name=name,
        shape=(entries, shape.n_layers, *shape.inner),
        chunks=(shape.entries, 1, *shape.inner),
        shards=(shape.entries, shape.n_layers, *shape.inner),
        dtype=shape.dtype,
        compressors=[Crc32cCodec()] if plan.compression == "none" else [shuffle, Crc32cCodec()],
        fill_value=float("nan"),
        dimension_names=names,
        # Without it every chunk is compared with the fill value before it is written: 2.5 times slower.
        config={"write_empty_chunks": True},
    )


def metadata_files(
    plan: GenerationPlan, row_keys: Sequence[str], lengths: npt.NDArray[np.int64], identity: str
) -> dict[str, bytes]:
    """Return the files of an empty generation's Zarr group by name: metadata of all arrays, and coordinates.

    Args:
        lengths: tokens of each row, [row].
    """
    files: dict[str, Buffer] = {}
    attributes: dict[str, Any] = {"resid": {"generation": identity, **plan.model_dump(mode="json")}}
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3, attributes=attributes)
    entries = plan.n_blocks * plan.block_tokens if plan.ragged else plan.n_rows
    for component in plan.components:
        _create_array(group.store, component, plan, entries)

    def add(name: str, values: npt.NDArray[Any], dtype: str, dimensions: list[str]) -> None:
        array = group.create_array(
            name, shape=values.shape, chunks=values.shape, dtype=dtype, dimension_names=dimensions
        )
        array[:] = values

    # Under the dimension's name, as xarray expects.
    add("row", np.array(row_keys, dtype=object), "string", ["row"])
    add("layer", np.array(plan.layers, dtype="int32"), "int32", ["layer"])
    if plan.ragged:
        add("offsets", token_offsets(plan, lengths), "int64", ["row", "bound"])
    else:
        add("position", np.array(plan.positions, dtype=object), "string", ["position"])
    return {name: bytes(buffer.to_bytes()) for name, buffer in files.items()}
