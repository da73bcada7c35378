"""The activation store: what is written is found by row key, bit for bit, by resid and by every Zarr library."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dask.array as da
import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_worker import (
    D_MODEL,
    LAYERS,
    MODEL,
    activations,
    capture,
    make_row,
    make_rows,
    new_store,
    request,
    truth,
    write,
)

from store.activations import ActivationStore, ModelStore
from store.dtypes import NUMPY_DTYPES
from store.errors import DamageError, MismatchError, MissingDataError, NonFiniteError
from store.generation import Generation
from store.layout import GenerationPlan, default_block_rows, encode_shard
from store.rows import Row, row_table_from_bytes, rows_from_bytes, rows_to_bytes
from store.sites import Spans

DTYPES = ("float32", "float16", "bfloat16")
POSITIONS = ("prompt_end", "response_start", "token:0")
Cell = tuple[str, str, int, str]  # row key, component, layer, position


def expected(rows: Iterable[Row], position: str, layers: Iterable[int], component: str = "resid_post") -> np.ndarray:
    return np.stack([np.stack([truth(row, component, layer, position) for layer in layers]) for row in rows])


def held(model: ModelStore) -> list[Cell]:
    """Return every committed cell, as often as it is stored."""
    cells: list[Cell] = []
    for generation in model.generations():
        plan = generation.plan
        for block in generation.committed():
            start, stop = generation.plan.block_range(block)
            cells += [
                (key, component, layer, position)
                for key in generation.keys[start:stop]
                for component in plan.components
                for layer in plan.layers
                for position in plan.positions
            ]
    return cells


# -- layout and other libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_xarray_and_dask_read_a_generation_bit_for_bit(tmp_path: Path, dtype: Any) -> None:
    model = new_store(str(tmp_path), dtype)
    positions = ("prompt_end", "response_avg")
    components = ("resid_post", "mlp_out")
    capture(model, request(make_rows(11), components, range(LAYERS), positions, dtype), block_rows=4)
    (generation,) = model.generations()

    dataset = xr.open_zarr(generation.location.path, consolidated=False)
    assert set(dataset.data_vars) == set(components)
    assert dataset["row"].values.tolist() == generation.keys
    assert dataset["layer"].values.tolist() == list(range(LAYERS))
    assert dataset["position"].values.tolist() == list(positions)
    assert dataset.attrs["resid"]["model"] == MODEL
    values = activations(generation.rows, generation.plan)
    for component in components:
        variable = dataset[component]
        assert variable.dims == ("row", "layer", "position", "d_model")
        assert variable.dtype == NUMPY_DTYPES[dtype]
        stored = values[component].astype(NUMPY_DTYPES[dtype])
        assert variable.values.tobytes() == stored.tobytes()
        lazy = da.from_zarr(str(generation.location.path / component))
        assert lazy.compute(scheduler="threads", num_workers=2).tobytes() == stored.tobytes()
        mean = lazy.astype(np.float32).mean(axis=0).compute()
        np.testing.assert_allclose(mean, stored.astype(np.float64).mean(axis=0), atol=1e-6)
    row = make_row(3).key
    one = dataset["mlp_out"].sel(row=row, layer=2, position="response_avg").values
    assert one.tobytes() == truth(make_row(3), "mlp_out", 2, "response_avg").astype(NUMPY_DTYPES[dtype]).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_generation_is_byte_for_byte_what_zarr_python_writes(tmp_path: Path, dtype: Any) -> None:
    model = new_store(str(tmp_path / "store"), dtype)
    capture(model, request(make_rows(10), dtype=dtype), block_rows=4)  # the last block is partial
    (generation,) = model.generations()
    plain = zarr.create_array(
        zarr.storage.LocalStore(tmp_path / "plain"),
        name="resid_post",
        shape=(10, LAYERS, 1, D_MODEL),
        chunks=(4, 1, 1, D_MODEL),
        shards=(4, LAYERS, 1, D_MODEL),
        dtype=NUMPY_DTYPES[dtype],
        compressors=[zarr.codecs.Crc32cCodec()],
        fill_value=float("nan"),
        dimension_names=["row", "layer", "position", "d_model"],
        config={"write_empty_chunks": True},
    )
    plain[:] = activations(generation.rows, generation.plan)["resid_post"].astype(NUMPY_DTYPES[dtype])
    ours, theirs = generation.location.path / "resid_post", tmp_path / "plain" / "resid_post"
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file())
    assert len(files) == 1 + 3
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_encode_shard_fills_a_partial_block_with_nan() -> None:
    values = np.ones((2, 3, 1, 4), dtype=np.float32)
    plan = GenerationPlan(
        model=MODEL,
        d_model=4,
        components=("resid_post",),
        layers=(0, 1, 2),
        positions=("prompt_end",),
        dtype="float32",
        n_rows=2,
        block_rows=5,
    )
    shard = np.frombuffer(encode_shard(values, plan)[: 3 * (5 * 4 * 4 + 4)], dtype=np.uint8).reshape(3, -1)
    first_layer = shard[0, :-4].copy().view(np.float32).reshape(5, 4)
    assert (first_layer[:2] == 1).all()
    assert np.isnan(first_layer[2:]).all()


def test_a_generation_folder_holds_nothing_but_zarr(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(make_rows(3)))
    (generation,) = model.generations()
    names = {path.name for path in generation.location.path.iterdir()}
    assert names == {"zarr.json", "row", "layer", "position", "resid_post"}


def test_blocks_are_about_four_mebibytes_but_small_captures_have_several() -> None:
    assert default_block_rows(100_000, 1, 4096, "bfloat16") == 512
    assert default_block_rows(100_000, 3, 576, "float32") == 606
    assert default_block_rows(400, 1, 576, "float32") == 50
    assert default_block_rows(5, 1, 576, "float32") == 16
    assert default_block_rows(5, 1, 4 << 20, "float32") == 1


def test_rows_survive_parquet() -> None:
    rows = [
        make_row(1),
        Row(MODEL, "p", (1, 2), Spans(2, 2)),
        Row(MODEL, "q", (1, 2, 3), Spans(2, 3), "generated", "some-generation"),
    ]
    data = rows_to_bytes(rows)
    assert rows_from_bytes(data) == rows
    assert row_table_from_bytes(data).keys == [row.key for row in rows]


def test_a_row_is_its_model_tokens_and_spans() -> None:
    row = make_row(1)
    same = Row(MODEL, "another prompt", row.token_ids, row.spans, "given")
    assert same.key == row.key
    others = [
        make_row(2),
        Row("0" * 64, "p", row.token_ids, row.spans),
        Row(MODEL, "p", row.token_ids, Spans(4, 5)),
        Row(MODEL, "p", row.token_ids, Spans(3, 4)),
    ]
    assert len({row.key, *(other.key for other in others)}) == 5


# -- selecting ---------------------------------------------------------------------------------------------------


def test_rows_are_found_by_key_and_never_by_order(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(9)
    capture(model, request(reversed(rows)), block_rows=2)
    order = [rows[i] for i in (5, 0, 8, 3)]
    selection = model.select([row.key for row in order], "resid_post", "prompt_end", [4, 1])
    np.testing.assert_array_equal(selection.to_numpy(), expected(order, "prompt_end", [4, 1]))
    assert selection.row_keys == tuple(row.key for row in order)
    assert selection.layers == (4, 1)
    assert selection.to_numpy().dtype == np.float32


def test_without_layers_a_selection_has_those_that_every_row_has(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(4)
    capture(model, request(rows[:2], layers=[0, 1, 2]))
    capture(model, request(rows[2:], layers=[1, 2, 3]))
    selection = model.select([row.key for row in rows], "resid_post", "prompt_end")
    assert selection.layers == (1, 2)
    np.testing.assert_array_equal(selection.to_numpy(), expected(rows, "prompt_end", [1, 2]))


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(3)
    capture(model, request(rows[:2], layers=[0, 1]))
    keys = [row.key for row in rows]
    for arguments in (
        (keys, "resid_post", "prompt_end"),
        (keys[:2], "resid_post", "prompt_end", [0, 2]),
        (keys[:2], "mlp_out", "prompt_end"),
        (keys[:2], "resid_post", "response_avg"),
        ([], "resid_post", "prompt_end"),
    ):
        with pytest.raises(MissingDataError):
            model.select(*arguments)
    for twice in (([keys[0], keys[0]], "resid_post", "prompt_end"), (keys[:1], "resid_post", "prompt_end", [0, 0])):
        with pytest.raises(MismatchError, match="twice"):
            model.select(*twice)


@st.composite
def scattered_captures(draw: st.DrawFn) -> tuple[list[Any], list[int], str, list[int] | None]:
    """Return generations (rows, layers, positions, block_rows, blocks committed) and a selection."""

    def some(values: Iterable[Any]) -> list[Any]:
        return draw(st.lists(st.sampled_from(list(values)), min_size=1, unique=True))

    generations = []
    for _ in range(draw(st.integers(1, 4))):
        rows, block_rows = some(range(7)), draw(st.integers(1, 3))
        n_blocks = -(-len(rows) // block_rows)
        left_out = draw(st.sets(st.integers(0, n_blocks - 1), max_size=1)) if draw(st.integers(0, 3)) == 0 else set()
        generations.append((rows, some(range(LAYERS)), some(POSITIONS), block_rows, set(range(n_blocks)) - left_out))
    # Mostly something that can be answered.
    likely = draw(st.sampled_from(generations))
    rows = draw(st.permutations(likely[0] if draw(st.booleans()) else some(range(7))))
    layers = draw(st.one_of(st.none(), st.permutations(likely[1]), st.just(some(range(LAYERS)))))
    return generations, list(rows), draw(st.sampled_from(likely[2])), layers


@given(scattered_captures())
@settings(deadline=None, max_examples=30)
def test_select_equals_a_dictionary_of_all_committed_cells(case: Any) -> None:
    generations, wanted, position, layers = case
    url = f"memory://{uuid.uuid4().hex}"
    model = new_store(url)
    cells: dict[tuple[str, int, str], np.ndarray] = {}
    for numbers, its_layers, positions, block_rows, blocks in generations:
        rows = [make_row(i) for i in numbers]
        plan = GenerationPlan(
            model=MODEL,
            d_model=D_MODEL,
            components=("resid_post",),
            layers=tuple(its_layers),
            positions=tuple(positions),
            dtype="float32",
            n_rows=len(rows),
            block_rows=block_rows,
        )
        generation = Generation.create(model.location, plan, rows)
        for block in blocks:
            start, stop = generation.plan.block_range(block)
            generation.write_block(block, activations(rows[start:stop], plan))
        cells.update(
            ((rows[i].key, layer, p), truth(rows[i], "resid_post", layer, p))
            for i in range(len(rows))
            if i // block_rows in generation.committed()
            for layer in its_layers
            for p in positions
        )
    keys = [make_row(i).key for i in wanted]
    if layers is None:
        layers = [layer for layer in range(LAYERS) if all((key, layer, position) in cells for key in keys)]
        asked = None
    else:
        asked = layers
    if layers and all((key, layer, position) in cells for key in keys for layer in layers):
        selection = model.select(keys, "resid_post", position, asked)
        reference = np.stack([np.stack([cells[key, layer, position] for layer in layers]) for key in keys])
        np.testing.assert_array_equal(selection.to_numpy(), reference)
        pairs = [(int(row), int(layer)) for part in selection.parts for row in part.into for layer in part.at]
        assert len(pairs) == len(set(pairs)) == len(keys) * len(layers)
    else:
        with pytest.raises(MissingDataError):
            model.select(keys, "resid_post", position, asked)
    fsspec.filesystem("memory").rm(url, recursive=True)


# -- compression -------------------------------------------------------------------------------------------------


def smooth(rows: int, layers: int, dtype: str) -> np.ndarray:
    """Return values of like magnitude within a dimension, as activations are, [row, layer, 1, d_model]."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal(D_MODEL))
    return (scale * (1 + 0.1 * rng.standard_normal((rows, layers, 1, D_MODEL)))).astype(NUMPY_DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_blocks_hold_the_same_bits_in_fewer_bytes(tmp_path: Path, dtype: Any) -> None:
    rows, sizes, read = make_rows(600), {}, {}
    for compression in ("none", "zstd"):
        model = new_store(str(tmp_path / compression), dtype)
        _, blocks = model.assign([request(rows, dtype=dtype)], 250, compression)
        (generation,) = model.generations()
        assert generation.plan.compression == compression
        values = smooth(600, LAYERS, dtype)
        for block in blocks:
            start, stop = generation.plan.block_range(block.block)
            generation.write_block(block.block, {"resid_post": values[start:stop]})
        shards = [generation.shard("resid_post", block) for block in range(3)]
        sizes[compression] = sum(shard.size() for shard in shards)
        read[compression] = model.select(generation.keys, "resid_post", "prompt_end").to_numpy("stored")
        assert read[compression].tobytes() == values[:, :, 0].tobytes()
        assert model.verify() == []
    assert sizes["zstd"] < 0.8 * sizes["none"], f"{dtype}: {sizes}"


def test_a_killed_compressed_capture_goes_on_with_its_own_blocks(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    asked = request(make_rows(7))
    _, blocks = model.assign([asked], 2, "zstd")
    assert write(model, blocks[1])
    # What the study asks for now is for new captures: what exists keeps its layout.
    again, pending = model.assign([asked], 3, "none")
    assert again.new == ()
    assert set(pending) == set(blocks) - {blocks[1]}
    for block in pending:
        assert write(model, block)
    assert [generation.plan.compression for generation in model.generations()] == ["zstd"]
    selection = model.select([row.key for row in asked.rows], "resid_post", "prompt_end")
    np.testing.assert_array_equal(selection.to_numpy(), expected(asked.rows, "prompt_end", range(LAYERS)))
    assert model.work([asked], compression="none").rows_to_capture == 0


def test_a_shard_that_a_killed_writer_left_is_adopted_also_if_compressed(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    blocks = capture(model, request(make_rows(4)), block_rows=2, compression="zstd")
    (generation,) = model.generations()
    (generation.records / "commits" / "1.json").remove()
    before = generation.shard("resid_post", 1).path.stat()
    assert write(model, blocks[1])
    after = generation.shard("resid_post", 1).path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert model.verify() == []


def test_a_flipped_bit_of_a_compressed_shard_is_found_and_never_read(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(6)
    capture(model, request(rows), block_rows=3, compression="zstd")
    (generation,) = model.generations()
    path = generation.shard("resid_post", 1).path
    good = path.read_bytes()
    selection = model.select([row.key for row in rows], "resid_post", "prompt_end")
    for at in range(0, len(good), 97):
        data = bytearray(good)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        (damaged,) = model.verify()
        assert f"{generation.id} block 1" in damaged
        with pytest.raises(DamageError):
            selection.to_numpy()
    assert len(model.verify(repair=True)) == 1
    assert [block.block for block in capture(model, request(rows))] == [1]
    assert path.read_bytes() == good
    np.testing.assert_array_equal(selection.to_numpy(), expected(rows, "prompt_end", range(LAYERS)))


# -- what a capture still has to do ------------------------------------------------------------------------------


def test_a_second_request_for_the_same_rows_has_no_work(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    first = request(make_rows(5), ("resid_post", "attn_out"), range(LAYERS), POSITIONS)
    capture(model, first)
    work = model.work([first, request(reversed(make_rows(5)), positions=["token:0"])])
    assert (work.new, work.pending, work.rows_to_capture, work.bytes_to_write) == ((), (), 0, 0)
    assert (work.cached_rows, work.requested_rows) == (5, 5)


def test_extra_rows_components_layers_and_positions_add_just_these(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(6)
    capture(model, request(rows[:4], layers=[1, 2]))
    for asked, added in (
        (request(rows, layers=[1, 2]), (2, ("resid_post",), (1, 2), ("prompt_end",))),
        (request(rows, ("resid_post", "mlp_out"), [1, 2]), (6, ("mlp_out",), (1, 2), ("prompt_end",))),
        (request(rows, layers=range(5)), (6, ("resid_post",), (0, 3, 4), ("prompt_end",))),
        (
            request(rows, layers=[1], positions=["prompt_end", "token:0"]),
            (6, ("resid_post",), (1,), ("token:0",)),
        ),
    ):
        work = model.work([asked])
        ((plan, new_rows),) = work.new
        assert (len(new_rows), plan.components, plan.layers, plan.positions) == added
        assert work.bytes_to_write == len(new_rows) * len(plan.layers) * D_MODEL * 4
        capture(model, asked)
        assert not model.create(model.work([asked]))
    assert len(held(model)) == len(set(held(model)))


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sets(st.integers(0, 4), min_size=1),
                st.sets(st.sampled_from(["resid_post", "mlp_out"]), min_size=1),
                st.sets(st.integers(0, 3), min_size=1),
                st.sets(st.sampled_from(POSITIONS), min_size=1),
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(deadline=None, max_examples=15)
def test_any_sequence_of_requests_stores_every_wanted_cell_exactly_once(batches: Any) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    model = new_store(url)
    wanted: set[Cell] = set()
    for batch in batches:
        requests = [request(map(make_row, sorted(rows)), sorted(c), sorted(la), sorted(p)) for rows, c, la, p in batch]
        capture(model, *requests)
        wanted |= {
            (make_row(i).key, component, layer, position)
            for rows, components, layers, positions in batch
            for i in rows
            for component in components
            for layer in layers
            for position in positions
        }
        assert sorted(held(model)) == sorted(wanted)
        assert model.work(requests).rows_to_capture == 0
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_a_killed_capture_goes_on_with_its_own_blocks(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    asked = request(make_rows(7))
    blocks = model.create(model.work([asked], block_rows=2))
    assert write(model, blocks[1])
    work = model.work([asked], block_rows=3)  # the block size of what exists stays
    assert work.new == ()
    assert set(work.pending) == set(blocks) - {blocks[1]}
    assert work.cached_rows == 2
    assert work.bytes_to_write == 5 * LAYERS * D_MODEL * 4
    with pytest.raises(MissingDataError, match="5 of 7 rows have no resid_post at prompt_end"):
        model.select([row.key for row in asked.rows], "resid_post", "prompt_end")
    # A request for some of its rows needs just their blocks.
    part = request([model.generations()[0].rows[6]])
    assert [block.block for block in model.work([part]).pending] == [3]


def test_committed_cells_count_before_blocks_that_wait(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(4)
    capture(model, request(rows))
    ((plan, ordered),) = new_store(str(tmp_path / "other")).work([request(rows)]).new
    for d in range(4):  # generations in any order of names that hold the same, uncommitted
        Generation.create(model.location, plan.model_copy(update={"block_rows": 1 + d}), ordered)
    assert model.create(model.work([request(rows)])) == ()


def test_of_two_requests_for_one_row_each_cell_is_captured_once(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_rows(4)
    blocks = capture(model, request(rows[:3]), request(rows[1:], positions=["prompt_end", "token:0"]))
    cells = held(model)
    assert len(cells) == len(set(cells)) == (4 + 3) * LAYERS
    assert len({block.id for block in blocks}) == len(blocks)


def test_what_is_stored_with_loss_serves_only_requests_for_it(tmp_path: Path) -> None:
    model = new_store(str(tmp_path), "float32")
    rows = make_rows(3)
    capture(model, request(rows, dtype="float16"))
    assert not model.work([request(rows, dtype="float16")]).new
    ((plan, _),) = model.work([request(rows, dtype="float32")]).new
    assert plan.dtype == "float32"
    ((plan, _),) = model.work([request(rows, dtype="bfloat16")]).new
    assert plan.dtype == "bfloat16"
    capture(model, request(rows, dtype="float32"))
    # Lossless values serve every request, and every selection.
    for dtype in DTYPES:
        assert not model.work([request(rows, dtype=dtype)]).new
    keys = [row.key for row in rows]
    values = model.select(keys, "resid_post", "prompt_end").to_numpy()
    np.testing.assert_array_equal(values, expected(rows, "prompt_end", range(LAYERS)))


def test_the_compute_dtype_is_lossless(tmp_path: Path) -> None:
    model = new_store(str(tmp_path), "bfloat16")
    rows = make_rows(3)
    capture(model, request(rows, dtype="bfloat16"))
    assert not model.work([request(rows, dtype="float32")]).new
    assert not model.work([request(rows, dtype="float16")]).new


def test_lossy_and_lossless_requests_for_one_row_store_it_once(tmp_path: Path) -> None:
    model = new_store(str(tmp_path), "float32")
    rows = make_rows(3)
    work = model.work([request(rows, dtype="float16"), request(rows[:2], dtype="float32")])
    assert [(plan.dtype, len(new)) for plan, new in work.new] == [("float32", 2), ("float16", 1)]


def test_rows_of_another_model_do_not_enter(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    with pytest.raises(MismatchError, match="is of model"):
        model.create(model.work([request([make_row(0, model="0" * 64)])]))
    assert model.generations() == []


def test_a_generation_needs_every_position_of_every_row(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    bare = Row(MODEL, "p", (1, 2, 3), Spans(3, 3))
    with pytest.raises(ValueError, match="needs a response"):
        model.create(model.work([request([bare], positions=["response_avg"])]))
    with pytest.raises(ValueError, match="outside a row"):
        model.create(model.work([request([bare], positions=["token:3"])]))
    assert model.generations() == []


# -- refusing bad values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_row_is_named_and_its_block_is_not_committed(tmp_path: Path, dtype: Any, bad: float) -> None:
    model = new_store(str(tmp_path), dtype)
    blocks = model.create(model.work([request(make_rows(6), dtype=dtype)], block_rows=3))
    generation = Generation(model.location / blocks[1].generation)
    values = activations(generation.rows[3:], generation.plan)
    values["resid_post"] = values["resid_post"].astype(NUMPY_DTYPES[dtype])
    values["resid_post"][1, 2, 0, 5] = bad
    row = generation.rows[4]
    with pytest.raises(NonFiniteError) as caught:
        generation.write_block(1, values)
    assert row.key[:16] in str(caught.value)
    assert row.prompt_id in str(caught.value)
    assert "resid_post.2" in str(caught.value)
    assert generation.committed() == set()
    assert not generation.shard("resid_post", 1).exists()


def test_float16_overflow_is_an_error_and_nothing_is_committed(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    (block,) = model.create(model.work([request(make_rows(2), ("resid_post", "mlp_out"), dtype="float16")]))
    generation = Generation(model.location / block.generation)
    values = activations(generation.rows, generation.plan)
    values["mlp_out"][1, 2, 0, 5] = 70_000
    with pytest.raises(OverflowError, match="70000 does not fit float16"):
        generation.write_block(0, values)
    assert generation.committed() == set()
    assert not generation.shard("resid_post", 0).exists()


def test_a_block_of_the_wrong_shape_or_component_is_refused(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    (block,) = model.create(model.work([request(make_rows(2))]))
    generation = Generation(model.location / block.generation)
    good = activations(generation.rows, generation.plan)["resid_post"]
    for values in ({"resid_post": good[:1]}, {"mlp_out": good}, {}, {"resid_post": good, "mlp_out": good}):
        with pytest.raises(ValueError, match="block 0"):
            generation.write_block(0, values)
    assert generation.committed() == set()


# -- places ------------------------------------------------------------------------------------------------------


def test_a_store_in_memory_works_like_one_on_disk(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/deep/store"
    rows = make_rows(7)
    for place in (url, str(tmp_path)):
        model = new_store(place)
        blocks = capture(model, request(rows), block_rows=3)
        assert [block.n_rows for block in blocks] == [3, 3, 1]
        assert not write(model, blocks[0])
        reopened = ActivationStore.open(place).model(MODEL)
        selection = reopened.select([row.key for row in rows], "resid_post", "prompt_end")
        np.testing.assert_array_equal(selection.to_numpy(), expected(rows, "prompt_end", range(LAYERS)))
        assert reopened.verify() == []
        assert reopened.work([request(rows)]).cached_rows == 7
    memory = fsspec.filesystem("memory")
    for name in ("zarr.json", "resid_post/zarr.json", "resid_post/c/1/0/0/0", "row/c/0"):
        (generation,) = model.generations()
        path = generation.location.path / name
        assert memory.cat(f"{url}/{path.relative_to(tmp_path)}") == path.read_bytes()


def test_an_empty_store_holds_no_model(tmp_path: Path) -> None:
    store = ActivationStore.open(str(tmp_path / "nothing"))
    assert store.models() == []
    with pytest.raises(MissingDataError, match="resid capture"):
        store.model(MODEL)
    manifest = {"fingerprint": MODEL, "dtype": "float32", "d_model": D_MODEL}
    assert store.preview(manifest).work([request(make_rows(2))]).rows_to_capture == 2
    assert not (tmp_path / "nothing").exists()


def test_the_first_manifest_of_a_model_stays(tmp_path: Path) -> None:
    first = new_store(str(tmp_path)).manifest
    again = ActivationStore.open(str(tmp_path)).add_model({**first, "note": "later"})
    assert again.manifest == first
    assert [model.fingerprint for model in ActivationStore.open(str(tmp_path)).models()] == [MODEL]


def test_creating_a_generation_again_changes_nothing(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    ((plan, rows),) = model.work([request(make_rows(4))]).new
    generation = Generation.create(model.location, plan, rows)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert Generation.create(model.location, plan, rows).id == generation.id
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert json.loads((generation.records.path / "generation.json").read_bytes())["format_version"] == 2
