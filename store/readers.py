"""How the chunks of a committed block are read: directly from local disk, or through zarr-python from anywhere.

Both return the same bytes, compared with the checksums of the block's commit; a test holds them to that. The direct
one knows the one layout that `store.shards` describes; zarr-python knows every codec and object storage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from store import remote
from store.layout import GenerationPlan, zarr_store
from store.location import Location
from store.shard_files import ShardFile, will_need
from store.shards import CRC_BYTES, Shard, ShardError, ShardShape


class OpenShard(Protocol):
    """A committed shard, opened."""

    def read(self, layers: Sequence[int], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return the chunks of some layers (as positions in the shard), [layer, entry, *inner], as stored.

        Args:
            out: what to read into; with fewer entries than the shard has, the last ones are left out.

        Raises:
            ShardError: if the bytes are not those of the commit.
            FileNotFoundError: if the shard has gone.
        """
        ...


class Reader(Protocol):
    """Opens committed shards of one generation."""

    def open(self, component: str, block: int, expected: Shard) -> contextlib.AbstractContextManager[OpenShard]:
        """Open a shard; it is compared with its commit before or while it is read.

        Raises:
            ShardError: if its size or index are not those of the commit.
            FileNotFoundError: if it is missing.
        """
        ...

    def will_need(self, component: str, block: int, layers: Sequence[int]) -> None:
        """Announce that these layers are read next."""
        ...


def shard_location(group: Location, component: str, block: int, plan: GenerationPlan) -> Location:
    """Return where a shard lies in its generation's group."""
    return group / component / "c" / "/".join([str(block), *"0" * (1 + len(plan.inner))])


class DirectReader:
    """Reads uncompressed shards on local disk without zarr-python."""

    def __init__(self, group: Location, plan: GenerationPlan):
        self._group, self._shape = group.path, plan.shard_shape
        self._name = "/".join("0" * (1 + len(plan.inner)))

    def _path(self, component: str, block: int) -> str:
        return f"{self._group}/{component}/c/{block}/{self._name}"

    def open(self, component: str, block: int, expected: Shard) -> contextlib.AbstractContextManager[OpenShard]:
        return ShardFile(self._path(component, block), self._shape, expected)

    def will_need(self, component: str, block: int, layers: Sequence[int]) -> None:
        will_need(self._path(component, block), self._shape, layers)


class _ComparingStore(WrapperStore[Any]):
    """Compares the checksum at the end of every chunk that zarr-python fetches with the commit of its block.

    zarr-python itself compares it with the chunk's bytes only, and so takes one chunk of a shard for another.
    """

    def __init__(self, store: Any):
        super().__init__(store)
        self.committed: dict[str, dict[int, int]] = {}  # key of a shard -> end of a chunk -> checksum

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await self._get(key, prototype, byte_range)
        if found is None and key in self.committed:
            raise FileNotFoundError(key)  # zarr-python would read it as fill values
        if found is None or not (byte_range is None or isinstance(byte_range, RangeByteRequest)):
            return found  # the index comes as a suffix, and is compared in `ZarrReader.open`
        start = 0 if byte_range is None else byte_range.start
        for end, committed in self.committed.get(key, {}).items():
            if start <= end - CRC_BYTES and end <= start + len(found):
                stored = int.from_bytes(found[end - CRC_BYTES - start : end - start].to_bytes(), "little")
                if stored != committed:
                    raise ShardError(f"the checksum of the chunk that ends at {end} is not that of the commit")
        return found

    async def _get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        store = self._store
        if not isinstance(store, FsspecStore):
            return await super().get(key, prototype, byte_range)
        return await remote.patiently(store.fs, lambda: store.get(key, prototype, byte_range))


class ZarrReader:
    """Reads shards through zarr-python: any codec, local disk and object storage."""

    def __init__(self, group: Location, plan: GenerationPlan):
        self._group, self._plan = group, plan
        self._store = _ComparingStore(zarr_store(group, read_only=True))
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def _array(self, component: str) -> zarr.Array[Any]:
        if component not in self._arrays:
            self._arrays[component] = zarr.open_array(self._store, path=component, mode="r", zarr_format=3)
        return self._arrays[component]

    @contextlib.contextmanager
    def open(self, component: str, block: int, expected: Shard) -> Iterator[OpenShard]:
        # zarr-python reads a missing or emptied shard as fill values, without a word.
        shard = shard_location(self._group, component, block, self._plan)
        shape = self._plan.shard_shape
        size = shard.size()
        if size != expected.size:
            raise ShardError(f"its size is {size} bytes, and the commit says {expected.size}")
        tail = shard.tail(shape.index_bytes + CRC_BYTES)
        check_tail(tail, shape, expected)
        ends = (int(offset + nbytes) for offset, nbytes in _places(tail, shape))
        key = shard.url.removeprefix(self._group.url).lstrip("/")
        self._store.committed[key] = dict(zip(ends, expected.chunks, strict=True))
        yield _ZarrShard(self._array(component), block, self._plan)

    def will_need(self, component: str, block: int, layers: Sequence[int]) -> None:
        """Nothing: `store.selection` reads ahead in threads where this reader serves."""


class _ZarrShard:
    def __init__(self, array: zarr.Array[Any], block: int, plan: GenerationPlan):
        self._array, self._block, self._plan = array, block, plan

    def read(self, layers: Sequence[int], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        shape = self._plan.shard_shape
        start = self._block * shape.entries
        wanted = shape.entries if out is None else out.shape[1]
        stop = min(start + wanted, self._array.shape[0])
        result = np.empty((len(layers), wanted, *shape.inner), shape.dtype) if out is None else out
        try:
            for first, last in _runs(layers):
                # Slices only: zarr-python expands lists of indices to one of each value's coordinates.
                found = self._array[start:stop, layers[first] : layers[last] + 1]
                result[first : last + 1, : stop - start] = np.moveaxis(np.asarray(found), 1, 0)
        except (ValueError, RuntimeError) as error:  # what zarr and its codecs raise on a checksum mismatch
            raise ShardError(str(error)) from None
        if stop - start < wanted:
            result[:, stop - start :] = np.nan
        return result


def _runs(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last index of every run of layers that follow each other."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[i - 1] + 1:
            yield first, i - 1
            first = i


class Guarded:
    """An open shard whose errors name the shard."""

    def __init__(self, opened: OpenShard, guard: Callable[[], contextlib.AbstractContextManager[None]]):
        self._opened, self._guard = opened, guard

    def read(self, layers: Sequence[int], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        with self._guard():
            return self._opened.read(layers, out)


def check_tail(tail: bytes, shape: ShardShape, expected: Shard) -> None:
    """Compare a shard's index, and the checksum of the chunk that ends before it, with the commit.

    Without compression the indices of all shards are the same: only a chunk's checksum ties a shard to its content.

    Args:
        tail: the last bytes of the shard: the index and the four bytes before it.

    Raises:
        ShardError: if they differ.
    """
    if len(tail) != shape.index_bytes + CRC_BYTES:
        raise ShardError("it is too short for its index")
    if int.from_bytes(tail[-4:], "little") != expected.index:
        raise ShardError("the index is not that of the commit")
    last = int(np.argmax(_places(tail, shape)[:, 0]))
    if int.from_bytes(tail[:CRC_BYTES], "little") != expected.chunks[last]:
        raise ShardError(f"the checksum of layer position {last} is not that of the commit")


def _places(tail: bytes, shape: ShardShape) -> npt.NDArray[np.uint64]:
    """Return offset and size of each layer's chunk, [layer, 2], from a shard's tail."""
    return np.frombuffer(tail, dtype="<u8", offset=CRC_BYTES, count=2 * shape.n_layers).reshape(-1, 2)


def reader_for(group: Location, plan: GenerationPlan) -> Reader:
    """Return the fastest reader that can read a generation."""
    if group.is_local and plan.compression == "none":
        return DirectReader(group, plan)
    return ZarrReader(group, plan)
