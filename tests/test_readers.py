"""The two readers return the same bytes, and the two writers write them, whatever is captured and selected."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_worker import MODEL, capture, make_rows, make_texts, request

from store.activations import ActivationStore, CaptureRequest, ModelStore
from store.dtypes import NUMPY_DTYPES, to_float32
from store.layout import decode_shard, encode_shard
from store.readers import DirectReader, ZarrReader, reader_for
from store.rows import Row
from store.shards import describe, shard_bytes
from store.sites import ALL_TOKENS

READERS = (DirectReader, ZarrReader)
NAMED = ("prompt_end", "token:0", "token:-1", "token:1")
relaxed = settings(deadline=None, max_examples=30)


@dataclass(frozen=True)
class Example:
    """What is captured, and what is selected of it."""

    rows: tuple[Row, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    dtype: str
    d_model: int
    block_rows: int
    seed: int
    chosen: tuple[Row, ...]
    at_layers: tuple[int, ...]
    at: str

    @property
    def asked(self) -> CaptureRequest:
        return request(self.rows, ("mlp_out",), self.layers, self.positions, self.dtype)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    ragged = draw(st.booleans())
    rows = (make_texts if ragged else make_rows)(draw(st.integers(1, 9)))
    layers = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True))
    # In any order, as a selection's rows and layers may be.
    positions = (ALL_TOKENS,) if ragged else draw(st.lists(st.sampled_from(NAMED), min_size=1, max_size=3, unique=True))
    return Example(
        rows=rows,
        layers=tuple(sorted(layers)),
        positions=tuple(positions),
        dtype=draw(st.sampled_from(sorted(NUMPY_DTYPES))),
        d_model=draw(st.integers(1, 9)),
        block_rows=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**32)),
        chosen=tuple(draw(st.lists(st.sampled_from(rows), min_size=1, unique=True))),
        at_layers=tuple(draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))),
        # All tokens hold every position that is one of them.
        at=draw(st.sampled_from([ALL_TOKENS, *NAMED] if ragged else positions)),
    )


def finite_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Return values of any finite bit pattern."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    bits = np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    exponent = np.array(np.inf, dtype).view(unsigned)  # all of its bits: NaN or infinity
    bits[bits & exponent == exponent] ^= exponent
    return bits.view(dtype)


def written(example: Example, folder: str) -> tuple[ModelStore, dict[str, np.ndarray]]:
    """Write a store; return it, and row key -> [token, layer, d_model] or [layer, position, d_model]."""
    manifest = {"fingerprint": MODEL, "dtype": "float32", "n_layers": 41, "d_model": example.d_model}
    model = ActivationStore.open(folder).add_model(manifest)
    model.create(model.work([example.asked], example.block_rows))
    (generation,) = model.generations()
    plan = generation.plan
    held: dict[str, np.ndarray] = {}
    for block in range(plan.n_blocks):
        start, stop = plan.block_range(block)
        lengths = [row.spans.response_end if plan.ragged else 1 for row in generation.rows[start:stop]]
        shape = (sum(lengths), len(plan.layers), *plan.inner)
        values = finite_bits(shape, NUMPY_DTYPES[example.dtype], example.seed + block)
        assert generation.write_block(block, {"mlp_out": values})
        ends = np.cumsum(lengths)
        for key, length, end in zip(generation.keys[start:stop], lengths, ends, strict=True):
            held[key] = values[end - length : end] if plan.ragged else values[end - 1]
        # Both ways of writing give the file that is there.
        data = generation.shard("mlp_out", block).path.read_bytes()
        assert data == encode_shard(values, plan)
        assert data == shard_bytes(values, plan.shard_shape)[0]
        assert describe(data, plan.shard_shape) == generation.commit_record(block).shards["mlp_out"]
        decoded = decode_shard(data, plan)
        assert decoded[: len(values)].tobytes() == values.tobytes()
    return model, held


def wanted(example: Example, held: dict[str, np.ndarray]) -> np.ndarray:
    """Return what the selection is, cell by cell: [row or token, layer, d_model]."""
    entries = []
    for row in example.chosen:
        layers = [example.layers.index(layer) for layer in example.at_layers]
        values = held[row.key]
        if example.positions != (ALL_TOKENS,):
            entries.append(values[layers, example.positions.index(example.at)])
            continue
        start, stop = row.spans.token_range(example.at)
        entries += [values[token, layers] for token in range(start, stop)]
    return np.stack(entries)


@relaxed
@given(examples())
def test_both_readers_return_the_same_bytes_for_every_selection_and_both_writers_write_them(example: Example) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, held = written(example, folder)
        truth = wanted(example, held)
        keys = [row.key for row in example.chosen]
        for kind in READERS:
            selection = model.select(keys, "mlp_out", example.at, example.at_layers)
            for part in selection.parts:
                part.generation.reader = kind(part.generation.location, part.generation.plan)
            stored = selection.to_numpy("stored")
            assert stored.shape == truth.shape
            assert stored.dtype == truth.dtype
            assert stored.tobytes() == truth.tobytes()
            assert selection.to_numpy().tobytes() == to_float32(truth).tobytes()
            for block in selection.blocks("stored"):
                layers = [example.at_layers.index(layer) for layer in block.layers]
                assert block.values.tobytes() == truth[block.rows][:, layers].tobytes()


@relaxed
@given(examples())
def test_both_readers_return_the_same_bytes_of_whole_and_partly_wanted_shards(example: Example) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, _ = written(example, folder)
        (generation,) = model.generations()
        plan = generation.plan
        layers = [example.layers.index(layer) for layer in example.at_layers]
        for block in range(plan.n_blocks):
            start, stop = plan.block_range(block)
            entries = stop - start
            if plan.ragged:
                entries = int(generation.row_table.response_end[start:stop].sum())
            for count in {entries, 1, plan.shard_shape.entries}:
                found = []
                for kind in READERS:
                    expected = generation.commit_record(block).shards["mlp_out"]
                    out = np.empty((len(layers), count, *plan.inner), NUMPY_DTYPES[plan.dtype])
                    with kind(generation.location, plan).open("mlp_out", block, expected) as opened:
                        assert opened.read(layers, out) is out
                        whole = opened.read(layers)
                    assert whole[:, :count].tobytes() == out.tobytes()
                    found.append(whole)
                assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize("dtype", sorted(NUMPY_DTYPES))
@pytest.mark.parametrize("position", ["prompt_end", ALL_TOKENS])
def test_compression_changes_no_number(tmp_path: Path, dtype: str, position: str) -> None:
    rows = (make_texts if position == ALL_TOKENS else make_rows)(11)
    asked = request(rows, ("mlp_out",), positions=[position], dtype=dtype)
    read = {}
    for compression in ("none", "zstd"):
        manifest = {"fingerprint": MODEL, "dtype": "float32", "n_layers": 6, "d_model": 16}
        model = ActivationStore.open(str(tmp_path / compression)).add_model(manifest)
        capture(model, asked, block_rows=4, compression=compression)
        selection = model.select([row.key for row in rows[::-1]], "mlp_out", position)
        read[compression] = selection.to_numpy("stored")
        kind = type(selection.parts[0].generation.reader)
        assert kind is (DirectReader if compression == "none" else ZarrReader)
        (generation,) = model.generations()
        assert type(reader_for(generation.location, generation.plan)) is kind
    assert read["none"].tobytes() == read["zstd"].tobytes()
