"""Shards as bytes: the one layout of captures as zarr-python writes it, written without it.

A shard is one chunk a layer, then the index. A chunk is its values, little-endian in C order, then their crc32c; the
index is each chunk's offset and size as two uint64, then its own crc32c; every crc32c is a little-endian uint32.

A crc32c over bytes that end in their own crc32c is a constant, so no checksum of the index or of whole chunks can tell
two shards apart. `Shard` therefore keeps the checksums of the values themselves, and every read compares them.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from store.dtypes import NUMPY_DTYPES

CRC_BYTES = 4
WRITE_BYTES = 512 << 10  # gathered, summed and written at a time: stays in the processor's cache


class ShardError(ValueError):
    """A shard's bytes are not what they must be. The message says which (not the path, which the caller knows)."""


@dataclass(frozen=True)
class ShardShape:
    """The shape of one shard: [entry, layer, *inner], an entry being a row or a token.

    Raises:
        ValueError: if a size is not positive, or the dtype is none of the store's in this machine's byte order.
    """

    entries: int
    n_layers: int
    inner: tuple[int, ...]  # (positions, d_model), or (d_model,) of tokens
    dtype: np.dtype[Any]  # float32, float16 or bfloat16

    def __post_init__(self) -> None:
        if min(self.entries, self.n_layers, *self.inner) < 1:
            raise ValueError(f"sizes must be positive: {self}")
        if self.dtype not in NUMPY_DTYPES.values():
            raise ValueError(f"{self.dtype!r} is none of {', '.join(NUMPY_DTYPES)}")
        if sys.byteorder != "little":
            raise ValueError(
                "shards are little-endian and are read and written as they are; this machine is big-endian"
            )

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        """[entry, *inner]: one layer."""
        return (self.entries, *self.inner)

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's values, without its checksum."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of the index, with its checksum."""
        return 16 * self.n_layers + CRC_BYTES

    @cached_property
    def shard_bytes(self) -> int:
        return self.n_layers * (self.chunk_bytes + CRC_BYTES) + self.index_bytes

    @cached_property
    def canonical_index(self) -> bytes:
        """The index of a shard whose chunks lie in the order of the layers, as `write_shard` writes it."""
        size = self.chunk_bytes + CRC_BYTES
        places = (number for layer in range(self.n_layers) for number in (layer * size, size))
        data = struct.pack(f"<{2 * self.n_layers}Q", *places)
        return data + _crc_bytes(crc32c(data))

    @cached_property
    def canonical_offsets(self) -> tuple[int, ...]:
        return tuple(layer * (self.chunk_bytes + CRC_BYTES) for layer in range(self.n_layers))


@dataclass(frozen=True)
class Shard:
    """What a committed shard must look like: all checksums that it stores."""

    size: int  # bytes
    index: int  # crc32c of the index
    chunks: tuple[int, ...]  # crc32c of each layer's chunk, in layer order


def write_shard(stream: BinaryIO, values: npt.NDArray[Any], shape: ShardShape) -> Shard:
    """Write a shard as zarr-python does; values [entry, layer, *inner] in any memory order.

    A last block may have fewer entries than the shard; the rest is NaN. Values are kept bit for bit (payloads of NaN,
    too). Needs less than one chunk of memory beyond the values.

    Raises:
        ValueError: if the values have another dtype, other layers or inner sizes, or more entries than the shard.
    """
    _check_values(values, shape)
    bits = values.view(f"u{shape.dtype.itemsize}")
    entries = min(shape.entries, max(1, WRITE_BYTES * shape.entries // shape.chunk_bytes))
    scratch = np.empty((entries, *shape.inner), bits.dtype)
    nan = np.array(np.nan, shape.dtype).view(bits.dtype)
    chunks = []
    for layer in range(shape.n_layers):
        crc = 0
        for piece in _pieces(bits[:, layer], shape.entries, scratch, nan):
            crc = crc32c(piece, crc)
            _write_all(stream, piece)
        _write_all(stream, memoryview(_crc_bytes(crc)))
        chunks.append(crc)
    index = memoryview(shape.canonical_index)
    _write_all(stream, index)
    return Shard(shape.shard_bytes, crc_of(index[-CRC_BYTES:]), tuple(chunks))


def shard_bytes(values: npt.NDArray[Any], shape: ShardShape) -> tuple[bytes, Shard]:
    """Return what `write_shard` writes, for object storage; raises what that raises."""
    stream = io.BytesIO()
    shard = write_shard(stream, values, shape)
    return stream.getvalue(), shard


def describe(data: bytes | memoryview, shape: ShardShape) -> Shard:
    """Check every byte of a whole shard and return its description.

    Chunks may lie in any order and be compressed, as long as the checksum is the last codec of each.

    Raises:
        ShardError: if a checksum is wrong, or the chunks and the index are not exactly the shard.
    """
    view = memoryview(data).cast("B")
    if len(view) < shape.index_bytes:
        raise ShardError(f"size: {len(view)} bytes are too few for an index of {shape.n_layers} layers")
    index, places = parse_index(view[-shape.index_bytes :], shape, len(view))
    chunks = []
    for layer, (offset, nbytes) in enumerate(places):
        stop = offset + nbytes - CRC_BYTES
        crc, stored = crc32c(view[offset:stop]), crc_of(view[stop : stop + CRC_BYTES])
        if crc != stored:
            raise ShardError(chunk_differs(layer, crc, stored))
        chunks.append(crc)
    return Shard(len(view), index, tuple(chunks))


def parse_index(data: memoryview, shape: ShardShape, size: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the checksum of a shard's index and (offset, bytes) of each layer's chunk, which must fill the shard."""
    crc, stored = crc32c(data[:-CRC_BYTES]), crc_of(data[-CRC_BYTES:])
    if crc != stored:
        raise ShardError(f"index checksum: {crc:08x}, stored {stored:08x}")
    numbers = struct.unpack(f"<{2 * shape.n_layers}Q", data[:-CRC_BYTES])
    places = list(zip(numbers[::2], numbers[1::2], strict=True))
    # Bytes that belong to no chunk would have no checksum; zarr-python writes none. A missing chunk fails here, too.
    stop = 0
    for offset, nbytes in sorted(places):
        if offset != stop or nbytes < CRC_BYTES:
            raise ShardError(f"index: a chunk of {nbytes} bytes at {offset}, where the one before ends at {stop}")
        stop += nbytes
    if stop != size - shape.index_bytes:
        raise ShardError(f"index: chunks end at {stop}, not at {size - shape.index_bytes}")
    return crc, places


def _check_values(values: npt.NDArray[Any], shape: ShardShape) -> None:
    if values.dtype != shape.dtype:
        raise ValueError(f"values are {values.dtype}, not {shape.dtype}")
    wanted = (shape.entries, shape.n_layers, *shape.inner)
    if values.ndim != len(wanted) or values.shape[1:] != wanted[1:] or len(values) > shape.entries:
        raise ValueError(f"values are {values.shape}, not {wanted} or fewer entries of it")


def _pieces(
    values: npt.NDArray[Any], entries: int, scratch: npt.NDArray[Any], nan: npt.NDArray[Any]
) -> Iterator[memoryview]:
    """Yield the bytes of one layer's values [entry, *inner], and NaN up to `entries`; each is valid until the next."""
    for start in range(0, entries, len(scratch)):
        part = values[start : start + len(scratch)]
        count = min(len(scratch), entries - start)
        if len(part) < count or not part.flags.c_contiguous:
            np.copyto(scratch[: len(part)], part)
            scratch[len(part) : count] = nan
            part = scratch[:count]
        yield bytes_of(part)


def bytes_of(part: npt.NDArray[Any]) -> memoryview:
    if not part.flags.c_contiguous:
        raise ValueError("a layer of out is not contiguous")
    # NumPy lends out no buffer of bfloat16.
    return memoryview(part.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # numpy arrays are buffers


def _write_all(stream: BinaryIO, data: memoryview) -> None:
    while data:
        count = stream.write(data)
        if not count:
            raise OSError("the stream takes no more bytes")
        data = data[count:]


def _crc_bytes(crc: int) -> bytes:
    return crc.to_bytes(CRC_BYTES, "little")


def crc_of(data: memoryview) -> int:
    return int.from_bytes(data, "little")


def chunk_differs(layer: int, crc: int, stored: int) -> str:
    return f"chunk of layer position {layer}: checksum {crc:08x}, stored {stored:08x}"
