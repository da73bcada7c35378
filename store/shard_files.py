"""Committed shards on local disk, read without zarr-python: near the speed of memory, every byte checked."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from store.shards import CRC_BYTES, Shard, ShardError, ShardShape, bytes_of, chunk_differs, crc_of, parse_index

READ_BYTES = 2 << 20  # read and summed at a time: a huge page, see `_fault_in`
# Linux reads ahead at most this much (the default read_ahead_kb) per request on some disks, and drops the rest.
ADVICE_BYTES = 128 << 10
MOST_BUFFERS = 1024  # of one preadv: IOV_MAX of Linux and macOS


class ShardFile:
    """A committed shard on local disk without compression, open for reading; use it in a `with` statement.

    Threads may read from one at the same time.
    """

    def __init__(self, path: Path | str, shape: ShardShape, expected: Shard) -> None:
        """Open a shard and check its size and index.

        Raises:
            FileNotFoundError: if there is no such file.
            ShardError: if size or index are not those expected, or its chunks are compressed.
        """
        self._shape, self._expected = shape, expected
        self._file = io.FileIO(path)
        try:
            self._offsets = self._read_index()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, layers: Sequence[int], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return layers, as positions in the shard, as [layer, entry, *inner]; every chunk is checked whole.

        `out` is filled and returned if given. It may have fewer entries than the shard (a last block): the first ones
        are kept. Each of its layers must be contiguous, so a range of entries of a larger array will do.

        Raises:
            IndexError: if the shard has no such layer.
            ValueError: if `out` has another shape or dtype, or a layer of it is not contiguous.
            ShardError: if bytes are not those expected; `out` then holds anything.
        """
        shape = self._shape
        for layer in layers:
            if not 0 <= layer < shape.n_layers:
                raise IndexError(f"no layer position {layer} in a shard of {shape.n_layers}")
        if out is None:
            out = np.empty((len(layers), *shape.chunk_shape), shape.dtype)
        elif out.dtype != shape.dtype or out.ndim != len(shape.chunk_shape) + 1:
            raise ValueError(f"out is {out.dtype} {out.shape}, not {shape.dtype} {(len(layers), *shape.chunk_shape)}")
        elif (len(out), *out.shape[2:]) != (len(layers), *shape.inner) or out.shape[1] > shape.entries:
            raise ValueError(f"out is {out.shape}, not {(len(layers), *shape.chunk_shape)} or fewer entries of it")
        self._read_chunks([(layer, bytes_of(part)) for layer, part in zip(layers, out, strict=True)])
        return out

    def verify(self) -> None:
        """Check every byte of the file as it is now.

        Raises:
            ShardError: if one is not what it must be.
        """
        self._offsets = self._read_index()
        self._read_chunks([(layer, memoryview(b"")) for layer in range(self._shape.n_layers)])

    def _read_index(self) -> tuple[int, ...]:
        """Check size and index and return where each layer's chunk begins."""
        shape, expected = self._shape, self._expected
        size = os.fstat(self._file.fileno()).st_size
        if size != expected.size:
            raise ShardError(f"size: {size} bytes, not {expected.size}")
        if (size, len(expected.chunks)) != (shape.shard_bytes, shape.n_layers):
            raise ShardError(f"size: {size} bytes of {len(expected.chunks)} chunks were committed, not {shape}")
        data = memoryview(bytearray(shape.index_bytes))
        _read_exactly(self._file.fileno(), [data], size - shape.index_bytes)
        if data == shape.canonical_index and crc_of(data[-CRC_BYTES:]) == expected.index:
            return shape.canonical_offsets
        index, places = parse_index(data, shape, size)
        if index != expected.index:
            raise ShardError(f"index checksum: {index:08x}, committed {expected.index:08x}")
        for layer, (_, nbytes) in enumerate(places):
            if nbytes != shape.chunk_bytes + CRC_BYTES:
                raise ShardError(f"index: chunk of layer position {layer} has {nbytes} bytes, not those of {shape}")
        return tuple(offset for offset, _ in places)

    def _read_chunks(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Read and check chunks whole: the beginning into the buffer beside each, the rest of it nowhere."""
        dropped = sum(self._shape.chunk_bytes - len(buffer) for _, buffer in wanted)
        scratch = bytes_of(np.empty(min(dropped, READ_BYTES) + CRC_BYTES * len(wanted), np.uint8))
        crc = 0
        for batch in _batches(self._segments(wanted)):
            buffers = []
            used = 0
            for segment in batch:
                if segment.buffer is None:
                    buffers.append(scratch[used : used + segment.nbytes])
                    used += segment.nbytes
                else:
                    _fault_in(segment.buffer)
                    buffers.append(segment.buffer)
            _read_exactly(self._file.fileno(), buffers, batch[0].offset)
            for segment, buffer in zip(batch, buffers, strict=True):
                if segment.is_crc:
                    self._check(segment.layer, crc, crc_of(buffer))
                    crc = 0
                else:
                    crc = crc32c(buffer, crc)

    def _segments(self, wanted: Sequence[tuple[int, memoryview]]) -> Iterator[_Segment]:
        """Yield what there is to read, in the order of the file, so that neighbours are read at once."""
        chunk_bytes = self._shape.chunk_bytes
        for layer, buffer in sorted(wanted, key=lambda pair: self._offsets[pair[0]]):
            offset, kept = self._offsets[layer], len(buffer)
            for start in range(0, kept, READ_BYTES):
                part = buffer[start : start + READ_BYTES]
                yield _Segment(layer, offset + start, len(part), part)
            for start in range(kept, chunk_bytes, READ_BYTES):
                yield _Segment(layer, offset + start, min(READ_BYTES, chunk_bytes - start), None)
            yield _Segment(layer, offset + chunk_bytes, CRC_BYTES, None, is_crc=True)

    def _check(self, layer: int, crc: int, stored: int) -> None:
        committed = self._expected.chunks[layer]
        if not crc == stored == committed:
            raise ShardError(f"{chunk_differs(layer, crc, stored)}, committed {committed:08x}")


def will_need(path: Path | str, shape: ShardShape, layers: Sequence[int]) -> None:
    """Ask the system to read layers of a shard into memory ahead. Does nothing where it cannot, or without the file.

    The chunks are assumed where `write_shard` puts them: looking into the index would wait for the disk.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    size = shape.chunk_bytes + CRC_BYTES
    ranges = [(layer * size, (layer + 1) * size) for layer in sorted(layers)]
    ranges.append((shape.shard_bytes - shape.index_bytes, shape.shard_bytes))
    # Advice that fails costs time and nothing else; reading meets the fault again, and raises.
    with contextlib.suppress(OSError), io.FileIO(path) as file:
        for start, stop in ranges:
            if _in_memory(file.fileno(), start) and _in_memory(file.fileno(), stop - 1):
                continue
            for at in range(start, stop, ADVICE_BYTES):
                os.posix_fadvise(file.fileno(), at, min(ADVICE_BYTES, stop - at), os.POSIX_FADV_WILLNEED)


def _in_memory(file: int, at: int) -> bool:
    """Tell whether a byte of a file is in the page cache; False where the system does not say."""
    flag = getattr(os, "RWF_NOWAIT", 0)
    if not flag:
        return False
    try:
        return os.preadv(file, [bytearray(1)], at, flag) == 1
    except OSError:  # not in memory, or not supported by the file system
        return False


class _Segment(NamedTuple):
    """A run of bytes in a chunk, and where it goes: None is scratch."""

    layer: int
    offset: int  # in the file
    nbytes: int
    buffer: memoryview | None
    is_crc: bool = False


def _batches(segments: Iterable[_Segment]) -> Iterator[list[_Segment]]:
    """Group segments that lie one after the other into reads of READ_BYTES of values (checksums come on top)."""
    batch: list[_Segment] = []
    stop = values = 0
    for segment in segments:
        full = len(batch) == MOST_BUFFERS or (not segment.is_crc and values + segment.nbytes > READ_BYTES)
        if batch and (full or segment.offset != stop):
            yield batch
            batch, values = [], 0
        batch.append(segment)
        stop = segment.offset + segment.nbytes
        values += 0 if segment.is_crc else segment.nbytes
    if batch:
        yield batch


def _fault_in(buffer: memoryview) -> None:
    """Touch the end of a buffer that is about to be filled.

    NumPy has large arrays in huge pages, which Linux clears at first touch, towards the touched end. When the touch is
    the beginning of a read, that costs a fourth of its speed; when it is the end of the page, almost nothing.
    """
    buffer[-1] = 0


def _preadv_by_pread(file: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Do the first buffer of a `preadv` where there is none (some macOS builds)."""
    data = os.pread(file, len(buffers[0]), offset)
    buffers[0][: len(data)] = data
    return len(data)


_preadv = getattr(os, "preadv", _preadv_by_pread)


def _read_exactly(file: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill buffers, none of them empty, from a file; a read may return less than it was asked for."""
    rest = list(buffers)
    while rest:
        count = _preadv(file, rest, offset)
        if not count:
            raise ShardError(f"size: the file ends at {offset} bytes")
        offset += count
        done = 0
        while done < len(rest) and count >= len(rest[done]):
            count -= len(rest[done])
            done += 1
        del rest[:done]
        if count:
            rest[0] = rest[0][count:]
