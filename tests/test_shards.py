"""Shards: the bytes are zarr-python's, the numbers are those written, and no changed byte is read as a number."""

from __future__ import annotations

import io
import itertools
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from store import shard_files, shards
from store.dtypes import NUMPY_DTYPES
from store.shard_files import ShardFile, will_need
from store.shards import Shard, ShardError, ShardShape, describe, shard_bytes, write_shard

DTYPES = sorted(NUMPY_DTYPES)
TINY = ShardShape(2, 3, (2, 1), NUMPY_DTYPES["float16"])

# How long an example takes on a busy machine says nothing about the code.
relaxed = settings(deadline=None, max_examples=60)


def random_bits(shape: Sequence[int], dtype: np.dtype[Any], seed: int) -> np.ndarray:
    """Return values of any bit pattern: every kind of NaN, infinities, subnormals, both zeros."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    bits = np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    special = np.array([np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf], dtype).view(unsigned)
    # A signalling NaN, the smallest subnormal and its negative.
    special = np.append(special, np.array([special[4] + 1, 1, special[3] + 1], unsigned))
    where = np.random.default_rng(seed).permutation(bits.size)[: len(special)]
    bits.reshape(-1)[where] = special[: len(where)]
    return bits.view(dtype)


def bits_of(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def make(shape: ShardShape, seed: int = 0, entries: int | None = None) -> tuple[bytes, Shard, np.ndarray]:
    """Return a shard, its description and its values [layer, entry, *inner] with the NaN of a short last block."""
    count = shape.entries if entries is None else entries
    values = random_bits((count, shape.n_layers, *shape.inner), shape.dtype, seed)
    data, shard = shard_bytes(values, shape)
    whole = np.full((shape.entries, *values.shape[1:]), np.nan, shape.dtype)
    whole[:count] = values
    return data, shard, np.moveaxis(whole, 1, 0)


def zarr_array(store: Any, shape: ShardShape, compressors: Any = None, **config: Any) -> zarr.Array[Any]:
    whole = (shape.entries, shape.n_layers, *shape.inner)
    return zarr.create_array(
        store,
        name="shard",
        shape=whole,
        chunks=(shape.entries, 1, *shape.inner),
        shards=whole,
        dtype=shape.dtype,
        compressors=compressors or [Crc32cCodec()],
        fill_value=float("nan"),
        config={"write_empty_chunks": True, **config},
    )


def chunk_key(shape: ShardShape) -> str:
    return "/".join(["shard/c", *["0"] * (2 + len(shape.inner))])


def zarr_bytes(values: np.ndarray, shape: ShardShape, compressors: Any = None, **config: Any) -> bytes:
    """Return the shard that zarr-python writes."""
    memory = MemoryStore()
    zarr_array(memory, shape, compressors, **config)[: len(values)] = values
    buffer = sync(memory.get(chunk_key(shape), prototype=default_buffer_prototype()))
    assert buffer is not None
    return bytes(buffer.to_bytes())


def zarr_read(data: bytes, shape: ShardShape) -> np.ndarray:
    """Return what zarr-python reads from a file of these bytes, [layer, entry, *inner]."""
    with tempfile.TemporaryDirectory() as folder:
        array = zarr_array(LocalStore(folder), shape)
        path = Path(folder, chunk_key(shape))
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return np.moveaxis(np.asarray(array[:]), 1, 0)


@contextmanager
def on_disk(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard")
        path.write_bytes(data)
        yield path


def read(path: Path, shape: ShardShape, expected: Shard, layers: Sequence[int] | None = None) -> np.ndarray:
    with ShardFile(path, shape, expected) as shard:
        return shard.read(range(shape.n_layers) if layers is None else layers)


def in_order(data: bytes, shape: ShardShape, order: Sequence[int], gap: bytes = b"") -> bytes:
    """Return the same shard with its chunks in another order, and optionally bytes after the first of them."""
    size = shape.chunk_bytes + 4
    chunks, offsets, stop = [], {}, 0
    for layer in order:
        offsets[layer] = stop
        chunks.append(data[layer * size : (layer + 1) * size] + (b"" if chunks else gap))
        stop += len(chunks[-1])
    index = b"".join(struct.pack("<QQ", offsets[layer], size) for layer in range(shape.n_layers))
    return b"".join([*chunks, index, crc32c.crc32c(index).to_bytes(4, "little")])


@contextmanager
def steps(write: int, read: int, buffers: int = 1024) -> Iterator[None]:
    """Write and read in steps of so many bytes, so that small shards take many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "WRITE_BYTES", write)
        patch.setattr(shard_files, "READ_BYTES", read)
        patch.setattr(shard_files, "MOST_BUFFERS", buffers)
        yield


shapes = st.builds(
    ShardShape,
    entries=st.integers(1, 9),
    n_layers=st.integers(1, 6),
    inner=st.one_of(st.tuples(st.integers(1, 3), st.integers(1, 5)), st.tuples(st.integers(1, 7))),
    dtype=st.sampled_from([NUMPY_DTYPES[name] for name in DTYPES]),
)
seeds = st.integers(0, 2**32 - 1)
any_steps = st.tuples(
    st.sampled_from([1, 16, 100, 512 << 10]), st.sampled_from([1, 12, 100, 2 << 20]), st.integers(1, 5)
)


@relaxed
@given(shapes, seeds, st.data())
def test_the_bytes_are_those_that_zarr_writes(shape: ShardShape, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, shape.entries))
    values = random_bits((count, shape.n_layers, *shape.inner), shape.dtype, seed)
    with steps(*data.draw(any_steps)):
        written, shard = shard_bytes(values, shape)
        stream = io.BytesIO()
        assert write_shard(stream, values, shape) == shard
    assert written == stream.getvalue() == zarr_bytes(values, shape)
    assert shard == describe(written, shape)
    assert shard.size == len(written) == shape.shard_bytes
    size = shape.chunk_bytes + 4
    assert shard.chunks == tuple(
        crc32c.crc32c(written[layer * size : layer * size + shape.chunk_bytes]) for layer in range(shape.n_layers)
    )


@relaxed
@given(shapes, seeds, st.data())
def test_memory_order_of_the_values_does_not_matter(shape: ShardShape, seed: int, data: st.DataObject) -> None:
    plain = random_bits((shape.entries, shape.n_layers, *shape.inner), shape.dtype, seed)
    axes = data.draw(st.permutations(range(plain.ndim)))
    steps_of_axes = data.draw(st.tuples(*[st.sampled_from([1, -1, 2, -3])] * plain.ndim))
    # The same values in memory of permuted axes, reversed or with gaps between them.
    room = np.zeros([plain.shape[axis] * abs(steps_of_axes[axis]) for axis in axes], plain.dtype)
    view = room.transpose(np.argsort(axes))[tuple(slice(None, None, step) for step in steps_of_axes)]
    view[...] = plain
    view.flags.writeable = False
    with steps(*data.draw(any_steps)):
        assert shard_bytes(view, shape) == shard_bytes(plain, shape)
        assert shard_bytes(np.asfortranarray(plain), shape) == shard_bytes(plain, shape)


@relaxed
@given(shapes, seeds, st.data())
def test_what_is_read_is_what_was_written_and_what_zarr_reads(
    shape: ShardShape, seed: int, data: st.DataObject
) -> None:
    written, shard, whole = make(shape, seed, data.draw(st.integers(0, shape.entries)))
    layers = data.draw(st.lists(st.integers(0, shape.n_layers - 1), max_size=8))  # any order, also twice
    with on_disk(written) as path, steps(*data.draw(any_steps)), ShardFile(path, shape, shard) as file:
        got = file.read(layers)
        file.verify()
    assert got.dtype == shape.dtype
    assert got.flags.c_contiguous
    assert np.array_equal(bits_of(got), bits_of(whole[layers]))
    assert np.array_equal(bits_of(got), bits_of(zarr_read(written, shape)[layers]))


@relaxed
@given(shapes, seeds, st.data())
def test_a_buffer_takes_the_first_entries_and_the_rest_is_checked(
    shape: ShardShape, seed: int, data: st.DataObject
) -> None:
    written, shard, whole = make(shape, seed)
    layers = data.draw(st.lists(st.integers(0, shape.n_layers - 1), min_size=1, max_size=4))
    kept = data.draw(st.integers(0, shape.entries))
    before = data.draw(st.integers(0, 2))
    # A range of entries of an array of many shards.
    room = np.zeros((len(layers), before + kept + 1, *shape.inner), shape.dtype)
    out = room[:, before : before + kept]
    with on_disk(written) as path, steps(*data.draw(any_steps)):
        with ShardFile(path, shape, shard) as file:
            assert file.read(layers, out) is out
        assert np.array_equal(bits_of(out), bits_of(whole[layers][:, :kept]))
        assert not bits_of(room[:, :before]).any()
        assert not bits_of(room[:, before + kept :]).any()
        if kept < shape.entries:
            changed = bytearray(written)
            changed[layers[0] * (shape.chunk_bytes + 4) + shape.chunk_bytes - 1] ^= 1
            path.write_bytes(changed)
            with ShardFile(path, shape, shard) as file, pytest.raises(ShardError, match=f"position {layers[0]}:"):
                file.read(layers, out)


@relaxed
@given(shapes, seeds, st.data())
def test_chunks_may_lie_in_any_order(shape: ShardShape, seed: int, data: st.DataObject) -> None:
    written, shard, whole = make(shape, seed)
    other = in_order(written, shape, data.draw(st.permutations(range(shape.n_layers))))
    assert np.array_equal(bits_of(zarr_read(other, shape)), bits_of(whole))
    described = describe(other, shape)
    assert (described.size, described.chunks) == (shard.size, shard.chunks)
    layers = data.draw(st.lists(st.integers(0, shape.n_layers - 1), max_size=8))
    with on_disk(other) as path, steps(*data.draw(any_steps)), ShardFile(path, shape, described) as file:
        assert np.array_equal(bits_of(file.read(layers)), bits_of(whole[layers]))
        file.verify()


@pytest.mark.parametrize("name", DTYPES)
def test_shards_of_many_steps_hold_as_they_are(name: str, tmp_path: Path) -> None:
    dtype = NUMPY_DTYPES[name]
    shape = ShardShape((5 << 20) // (3 * 64 * dtype.itemsize) + 1, 3, (3, 64), dtype)  # no step divides a chunk
    assert shape.chunk_bytes % shard_files.READ_BYTES
    assert shape.chunk_bytes > 2 * shard_files.READ_BYTES
    written, shard, whole = make(shape, entries=shape.entries - 7)
    assert written == zarr_bytes(np.moveaxis(whole, 0, 1), shape)
    (tmp_path / "shard").write_bytes(written)
    assert np.array_equal(bits_of(read(tmp_path / "shard", shape, shard)), bits_of(whole))
    assert np.array_equal(bits_of(read(tmp_path / "shard", shape, shard, [2, 0])), bits_of(whole[[2, 0]]))


@pytest.mark.parametrize("name", DTYPES)
def test_a_flipped_bit_is_never_read_as_numbers(name: str, tmp_path: Path) -> None:
    shape = ShardShape(2, 2, (1, 2), NUMPY_DTYPES[name])
    written, shard, whole = make(shape)
    path = tmp_path / "shard"
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ShardError):
            describe(bytes(changed), shape)
        path.write_bytes(changed)
        with pytest.raises(ShardError):
            read(path, shape, shard)
        path.write_bytes(written)
        with ShardFile(path, shape, shard) as file:
            with path.open("rb+") as stream:  # the same file, changed while it is open
                stream.write(changed)
            with pytest.raises(ShardError):
                file.verify()
            # A layer whose bytes are as they were can still be read.
            layer = bit // 8 // (shape.chunk_bytes + 4)
            for other in set(range(shape.n_layers)) - {layer}:
                assert np.array_equal(bits_of(file.read([other])), bits_of(whole[[other]]))


def test_a_shard_of_another_length_is_refused(tmp_path: Path) -> None:
    written, shard, _ = make(TINY)
    path = tmp_path / "shard"
    others = [written[:length] for length in range(len(written))]
    others += [written + bytes(extra) for extra in range(1, 40)] + [written + written]
    for other in others:
        path.write_bytes(other)
        with pytest.raises(ShardError, match=r"^size: "):
            ShardFile(path, TINY, shard)
        with pytest.raises(ShardError):
            describe(other, TINY)
        path.write_bytes(written)
        with ShardFile(path, TINY, shard) as file:
            os.truncate(path, len(other))
            if len(other) < len(written) - TINY.index_bytes:
                with pytest.raises(ShardError, match=r"^size: "):
                    file.read(range(TINY.n_layers))
            with pytest.raises(ShardError, match=r"^size: "):
                file.verify()


def test_exchanged_shards_are_found_by_any_read(tmp_path: Path) -> None:
    (mine, shard, _), (other, _, _) = make(TINY, seed=1), make(TINY, seed=2)
    path = tmp_path / "shard"
    path.write_bytes(other)
    describe(other, TINY)  # every checksum in it is right
    for layer in range(TINY.n_layers):
        with pytest.raises(ShardError, match=f"chunk of layer position {layer}: .*committed {shard.chunks[layer]:08x}"):
            read(path, TINY, shard, [layer])
    with ShardFile(path, TINY, shard) as file, pytest.raises(ShardError):
        file.verify()
    # The same of two chunks of one shard, and of chunks that lie in another order than the commit says.
    size = TINY.chunk_bytes + 4
    path.write_bytes(mine[size : 2 * size] + mine[:size] + mine[2 * size :])
    for layer in (0, 1):
        with pytest.raises(ShardError, match=f"position {layer}:"):
            read(path, TINY, shard, [layer])
    path.write_bytes(in_order(mine, TINY, [1, 0, 2]))
    with pytest.raises(ShardError, match=r"^index checksum"):
        ShardFile(path, TINY, shard)


def test_a_commit_of_another_shard_is_refused(tmp_path: Path) -> None:
    written, shard, _ = make(TINY)
    (tmp_path / "shard").write_bytes(written)
    for wrong in (
        replace(shard, size=shard.size + 1),
        replace(shard, index=shard.index ^ 1),
        replace(shard, chunks=shard.chunks[:2]),
        replace(shard, chunks=(*shard.chunks, 0)),
    ):
        with pytest.raises(ShardError, match=r"^size: |^index checksum: "):
            ShardFile(tmp_path / "shard", TINY, wrong)
    for other in (replace(TINY, entries=3), replace(TINY, n_layers=2), replace(TINY, dtype=NUMPY_DTYPES["float32"])):
        with pytest.raises(ShardError, match=r"^size: "):
            ShardFile(tmp_path / "shard", other, shard)


def test_bytes_without_a_checksum_are_refused(tmp_path: Path) -> None:
    written, shard, _ = make(TINY)
    with pytest.raises(ShardError, match=r"^index: "):
        describe(in_order(written, TINY, [0, 1, 2], b"gap"), TINY)
    size = TINY.chunk_bytes + 4
    places = [(0, size), (size, size), (2 * size, size)]
    wrong = [(0, size), (2**64 - 1, 2**64 - 1), (2 * size + 1, size), (2 * size, 2**64 - 1), (0, 0)]
    indexes = [[*places[:at], place, *places[at + 1 :]] for at, place in itertools.product(range(3), wrong)]
    indexes += [[(0, size), (size, few), (size + few, 2 * size - few)] for few in range(4)]  # too few for a checksum
    for changed in indexes:
        if changed != places:
            index = b"".join(struct.pack("<QQ", *place) for place in changed)
            other = written[: 3 * size] + index + crc32c.crc32c(index).to_bytes(4, "little")
            with pytest.raises(ShardError, match=r"^index: "):
                describe(other, TINY)
            (tmp_path / "shard").write_bytes(other)
            with pytest.raises(ShardError, match=r"^index: "):
                ShardFile(tmp_path / "shard", TINY, Shard(len(other), crc32c.crc32c(index), shard.chunks))


def test_more_layers_than_one_call_takes_are_read(tmp_path: Path) -> None:
    shape = ShardShape(1, 1500, (2,), NUMPY_DTYPES["float32"])
    written, shard, whole = make(shape)
    (tmp_path / "shard").write_bytes(written)
    assert np.array_equal(bits_of(read(tmp_path / "shard", shape, shard)), bits_of(whole))


def test_compressed_chunks_are_described_and_not_read_directly(tmp_path: Path) -> None:
    shape = ShardShape(8, 3, (2, 16), NUMPY_DTYPES["float32"])
    values = np.arange(8 * 3 * 32, dtype=np.float32).reshape(8, 3, 2, 16)
    written = zarr_bytes(values, shape, [ZstdCodec(level=1), Crc32cCodec()])
    shard = describe(written, shape)
    assert shard.size == len(written) < shape.shard_bytes
    places = np.frombuffer(written[-shape.index_bytes : -4], "<u8").reshape(-1, 2)
    stored = [int.from_bytes(written[start + size - 4 : start + size], "little") for start, size in places.tolist()]
    assert shard.chunks == tuple(stored)
    for at in range(len(written)):
        with pytest.raises(ShardError):
            describe(written[:at] + bytes([written[at] ^ 64]) + written[at + 1 :], shape)
    (tmp_path / "shard").write_bytes(written)
    with pytest.raises(ShardError):
        ShardFile(tmp_path / "shard", shape, shard)


def test_a_chunk_that_zarr_left_out_is_missed() -> None:
    values = np.zeros((2, 3, 2, 1), np.float16)
    values[:, 1] = np.nan
    with pytest.raises(ShardError, match=r"^index: "):
        describe(zarr_bytes(values, TINY, write_empty_chunks=False), TINY)


def test_a_missing_shard_is_a_missing_file(tmp_path: Path) -> None:
    _, shard, _ = make(TINY)
    with pytest.raises(FileNotFoundError):
        ShardFile(tmp_path / "shard", TINY, shard)
    will_need(tmp_path / "shard", TINY, [0, 2])


def test_advice_changes_nothing_and_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, shard, whole = make(TINY)
    (tmp_path / "shard").write_bytes(written)
    will_need(tmp_path / "shard", TINY, [2, 0])
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    will_need(tmp_path / "shard", TINY, [2, 0])
    assert np.array_equal(bits_of(read(tmp_path / "shard", TINY, shard)), bits_of(whole))


@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_reads_that_return_less_are_continued(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        rest, fewer = at_once, []
        for buffer in buffers:
            fewer.append(buffer[:rest])
            rest -= len(fewer[-1])
        return os.preadv(file, fewer, offset)

    written, shard, whole = make(TINY)
    (tmp_path / "shard").write_bytes(written)
    for preadv in (short, shard_files._preadv_by_pread):
        monkeypatch.setattr(shard_files, "_preadv", preadv)
        assert np.array_equal(bits_of(read(tmp_path / "shard", TINY, shard)), bits_of(whole))


def test_a_stream_that_takes_less_gets_the_rest() -> None:
    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:5])

    class Full(io.RawIOBase):
        def write(self, data: Any) -> None:
            return None

    written, shard, whole = make(TINY)
    slow = Slow()
    assert write_shard(slow, np.moveaxis(whole, 0, 1), TINY) == shard
    assert slow.getvalue() == written
    with pytest.raises(OSError, match="no more bytes"):
        write_shard(Full(), np.moveaxis(whole, 0, 1), TINY)  # type: ignore[arg-type]


def test_threads_share_an_open_shard(tmp_path: Path) -> None:
    shape = ShardShape(300, 8, (2, 64), NUMPY_DTYPES["bfloat16"])
    written, shard, whole = make(shape)
    (tmp_path / "shard").write_bytes(written)
    with ShardFile(tmp_path / "shard", shape, shard) as file, ThreadPoolExecutor(4) as pool:
        wanted = [[i % 8, (3 * i + 1) % 8] for i in range(64)]
        for layers, got in zip(wanted, pool.map(file.read, wanted), strict=True):
            assert np.array_equal(bits_of(got), bits_of(whole[layers]))


def test_memory_stays_below_one_chunk(tmp_path: Path) -> None:
    shape = ShardShape(1200, 6, (3, 288), NUMPY_DTYPES["float32"])
    values = random_bits((shape.entries - 5, shape.n_layers, *shape.inner), shape.dtype, 0)
    out = np.empty((2, *shape.chunk_shape), shape.dtype)
    with (tmp_path / "shard").open("xb") as stream:
        tracemalloc.start()
        try:
            for order in (values, np.asfortranarray(values), values[::-1]):
                stream.seek(0)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                shard = write_shard(stream, order, shape)
                assert tracemalloc.get_traced_memory()[1] - before < shape.chunk_bytes
            stream.flush()
            with ShardFile(tmp_path / "shard", shape, shard) as file:
                for use in (lambda: file.read([4, 1], out), lambda: file.read([4, 1], out[:, :7]), file.verify):
                    tracemalloc.reset_peak()
                    before = tracemalloc.get_traced_memory()[0]
                    use()
                    assert tracemalloc.get_traced_memory()[1] - before < shape.chunk_bytes
        finally:
            tracemalloc.stop()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    written, shard, whole = make(TINY)
    values = np.moveaxis(whole, 0, 1)
    for wrong in (
        values.astype(np.float32),
        values.astype(">f2"),
        values[:, :2],
        values[:, :, :1],
        values[..., 0],
        np.concatenate([values, values]),
    ):
        with pytest.raises(ValueError, match="values are"):
            shard_bytes(wrong, TINY)
    (tmp_path / "shard").write_bytes(written)
    with ShardFile(tmp_path / "shard", TINY, shard) as file:
        for layers in ([3], [-1], [0, 7]):
            with pytest.raises(IndexError):
                file.read(layers)
        good = np.empty((3, *TINY.chunk_shape), TINY.dtype)
        bad = [good.astype(np.float32), good[:2], good[..., 0], good[:, :, :1], np.concatenate([good, good], 1)]
        for out in [*bad, good[:, ::-1], np.asfortranarray(good)]:
            with pytest.raises(ValueError, match=r"out is|contiguous"):
                file.read([0, 1, 2], out)
        assert file.read([]).shape == (0, *TINY.chunk_shape)
    for sizes in ((0, 1, (1,)), (1, 0, (1,)), (1, 1, (0,)), (1, 1, (1, -1))):
        with pytest.raises(ValueError, match="positive"):
            ShardShape(*sizes, TINY.dtype)
    for dtype in (np.float64, ">f4", np.int16):
        with pytest.raises(ValueError, match="is none of"):
            ShardShape(1, 1, (1,), np.dtype(dtype))
