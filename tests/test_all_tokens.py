"""Captures of all tokens: rows of unequal length in one array, and the positions that they hold without asking."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from store_worker import D_MODEL, LAYERS, MODEL, new_store, request
from token_cells import SINGLE, add_generation, block_values, capture, text, values_of, write

from analysis.means import group_means
from store.activations import ActivationStore, ModelStore
from store.dtypes import NUMPY_DTYPES
from store.errors import DamageError, MissingDataError, NonFiniteError
from store.generation import Generation
from store.layout import TARGET_CHUNK_BYTES, GenerationPlan, ragged_blocks, token_offsets
from store.rows import Row
from store.selection import Selection
from store.sites import ALL_TOKENS

DTYPES = list(NUMPY_DTYPES)
# Prompt and response tokens: lengths of 3 to 9, and three rows without a response.
ROWS = tuple(
    text(i, *lengths)
    for i, lengths in enumerate(
        [(2, 3), (4, 1), (1, 2), (5, 4), (3, 0), (2, 2), (3, 3), (4, 0), (1, 6), (2, 1), (6, 3), (3, 0)]
    )
)
ANSWERED = tuple(row for row in ROWS if row.spans.has_response)
EVERYTHING = request(ROWS, positions=[ALL_TOKENS])


def keys(rows: Any) -> list[str]:
    return [row.key for row in rows]


def pick(model: ModelStore, rows: Any, position: str = ALL_TOKENS, layers: Any = None) -> Selection:
    return model.select(keys(rows), "resid_post", position, layers)


# -- what comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_of_every_row_comes_back_in_the_order_asked_for(
    tmp_path: Path, dtype: Any, compression: Any
) -> None:
    model = new_store(str(tmp_path), dtype)
    asked = request(ROWS, positions=[ALL_TOKENS], dtype=dtype)
    assert len(capture(model, asked, block_rows=5, compression=compression)) == 3
    wanted = [ROWS[i] for i in (7, 3, 0, 10, 8)]
    selection = pick(model, wanted, layers=[4, 1])
    assert selection.dims == ("token", "layer", "d_model")
    lengths = [row.spans.response_end for row in wanted]
    assert (len(selection), selection.shape) == (sum(lengths), (sum(lengths), 2, D_MODEL))
    assert selection.row_keys == tuple(keys(wanted))
    assert selection.offsets is not None
    assert selection.offsets.tolist() == [0, *np.cumsum(lengths)]
    assert selection.token_rows.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert selection.stored_dtype == NUMPY_DTYPES[dtype]
    reference = values_of(wanted, "resid_post", [4, 1], ALL_TOKENS)
    np.testing.assert_array_equal(selection.to_numpy(), reference)
    stored = selection.to_numpy("stored")
    assert stored.dtype == NUMPY_DTYPES[dtype]
    np.testing.assert_array_equal(stored.astype(np.float32), reference)
    one = ActivationStore.open(str(tmp_path)).select(rows=keys(wanted), position=ALL_TOKENS, layer=1)
    assert one.dims == ("token", "d_model")
    np.testing.assert_array_equal(one.to_numpy(), reference[:, 1])


def test_rows_of_a_selection_of_all_tokens_are_chosen_whole(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, EVERYTHING, block_rows=4)
    selection = pick(model, ROWS, layers=[2])
    for chosen in ([5], [11, 0, 3], slice(None, None, -2), [row.spans.response_end > 5 for row in ROWS]):
        part = selection.isel(chosen)
        rows = [ROWS[i] for i in np.arange(len(ROWS))[chosen]]
        assert part.row_keys == tuple(keys(rows))
        np.testing.assert_array_equal(part.to_numpy(), values_of(rows, "resid_post", [2], ALL_TOKENS))
    ordered = selection.in_stored_order()
    (generation,) = model.generations()
    assert list(ordered.row_keys) == generation.keys
    assert all(part.whole is not None for part in ordered.parts)
    np.testing.assert_array_equal(ordered.to_numpy(), values_of(generation.rows, "resid_post", [2], ALL_TOKENS))


def test_all_tokens_in_memory_are_those_on_disk(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    for place in (url, str(tmp_path)):
        model = new_store(place)
        capture(model, EVERYTHING, block_rows=4)
        np.testing.assert_array_equal(pick(model, ROWS).to_numpy(), values_of(ROWS, "resid_post", range(6), ALL_TOKENS))
        assert model.verify() == []
    fsspec.filesystem("memory").rm(url, recursive=True)


# -- positions that need no capture of their own -----------------------------------------------------------------


def test_a_position_that_is_one_token_is_read_from_all_tokens_and_equals_its_own_capture(tmp_path: Path) -> None:
    direct, ragged = new_store(str(tmp_path / "direct")), new_store(str(tmp_path / "ragged"))
    capture(ragged, request(ANSWERED, positions=[ALL_TOKENS]), block_rows=4)
    assert capture(direct, request(ANSWERED, positions=SINGLE), block_rows=4)
    for position in SINGLE:
        work = ragged.work([request(ANSWERED, positions=[position])])
        assert (work.new, work.pending, work.cached_rows) == ((), (), len(ANSWERED))
        found, expected = (pick(model, ANSWERED[::-1], position) for model in (ragged, direct))
        assert found.dims == expected.dims == ("row", "layer", "d_model")
        assert found.to_numpy("stored").tobytes() == expected.to_numpy("stored").tobytes()
        np.testing.assert_array_equal(found.mean(), expected.mean())
    work = ragged.work([request(ANSWERED, positions=SINGLE)])
    assert (work.new, work.pending) == ((), ())


def test_an_average_is_not_read_from_all_tokens(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ANSWERED, positions=[ALL_TOKENS]))
    ((plan, rows),) = model.work([request(ANSWERED, positions=["response_avg"])]).new
    assert (plan.positions, len(rows)) == (("response_avg",), len(ANSWERED))
    with pytest.raises(MissingDataError, match=r"have no resid_post at response_avg .*\n  remedy: resid capture"):
        pick(model, ANSWERED, "response_avg")


def test_a_row_too_short_for_a_position_is_named_with_its_length(tmp_path: Path) -> None:
    # Used to happen: the remedy was a capture, which can only fail for such a row.
    model = new_store(str(tmp_path))
    capture(model, EVERYTHING, block_rows=3)
    for position, rows, short in (
        ("token:5", ROWS, ROWS[0]),
        ("token:-6", ROWS[3:5], ROWS[4]),
        ("response_start", ROWS[3:8], ROWS[4]),
    ):
        with pytest.raises(MissingDataError) as caught:
            pick(model, rows, position)
        spans = short.spans
        response = spans.response_end - spans.prompt_length
        assert f"are too short to have {position} (first: row {short.key[:16]}" in str(caught.value)
        assert f"{spans.prompt_length} of prompt, {response} of response)" in str(caught.value)
        assert "remedy: choose a position that every row has" in str(caught.value)
    long = [row for row in ROWS if row.spans.response_end > 5]
    np.testing.assert_array_equal(
        pick(model, long, "token:5").to_numpy(), values_of(long, "resid_post", range(6), "token:5")
    )
    # Without rows named, a selection has those that have the token.
    found = ActivationStore.open(str(tmp_path)).select(position="token:5")
    assert set(found.row_keys) == set(keys(long))


def test_a_position_that_is_asked_for_later_adds_just_that(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ANSWERED, layers=[0, 1], positions=[ALL_TOKENS]))
    for asked, added in (
        (request(ANSWERED, layers=[0, 1], positions=["prompt_end", "response_avg"]), [((0, 1), ("response_avg",))]),
        (request(ANSWERED, layers=[0, 1, 2], positions=["token:0"]), [((2,), ("token:0",))]),
        (request(ANSWERED, layers=[1, 2], positions=["token:0", ALL_TOKENS]), [((2,), (ALL_TOKENS,))]),
        (request(ANSWERED, layers=[2, 3], positions=["token:1", ALL_TOKENS, "response_avg"]),
         [((3,), (ALL_TOKENS,)), ((2, 3), ("response_avg",))]),
        (request(ANSWERED, layers=[0, 1, 2, 3], positions=[*SINGLE, ALL_TOKENS, "response_avg"]), []),
    ):  # fmt: skip
        work = model.work([asked])
        assert sorted((plan.layers, plan.positions) for plan, _ in work.new) == sorted(added)
        assert all(set(rows) == set(ANSWERED) for _, rows in work.new)
        capture(model, asked)
        assert model.work([asked]).rows_to_capture == 0
    for position in (*SINGLE, ALL_TOKENS, "response_avg"):
        np.testing.assert_array_equal(
            pick(model, ANSWERED, position, range(4)).to_numpy(),
            values_of(ANSWERED, "resid_post", range(4), position),
        )


def test_all_tokens_that_are_asked_for_later_add_all_tokens(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ROWS, positions=["prompt_end"]))
    ((plan, rows),) = model.work([EVERYTHING]).new
    assert (plan.positions, set(rows)) == ((ALL_TOKENS,), set(ROWS))
    capture(model, EVERYTHING)
    # The capture of just that position serves it: nothing else is read.
    assert {part.generation.plan.positions for part in pick(model, ROWS, "prompt_end").parts} == {("prompt_end",)}
    assert {part.generation.plan.positions for part in pick(model, ROWS, "token:0").parts} == {(ALL_TOKENS,)}


def test_some_rows_of_a_position_may_come_from_all_tokens_and_others_from_their_own_capture(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ROWS[:5], positions=[ALL_TOKENS]), block_rows=2)
    capture(model, request(ROWS, positions=["token:1"]), block_rows=3)
    assert sum(len(generation.keys) for generation in model.generations()) == len(ROWS)
    np.testing.assert_array_equal(
        pick(model, ROWS, "token:1").to_numpy(), values_of(ROWS, "resid_post", range(6), "token:1")
    )


def test_a_killed_capture_of_all_tokens_goes_on_with_its_own_blocks(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    _, blocks = model.assign([EVERYTHING], block_rows=4)
    (generation,) = model.generations()
    start, stop = generation.plan.block_range(1)
    assert [block.n_rows for block in blocks][:2] == [start, stop - start]
    assert len(blocks) > 2
    assert write(model, blocks[1])
    work = model.work([EVERYTHING], block_rows=2)
    assert (work.new, set(work.pending), work.cached_rows) == ((), {blocks[0], *blocks[2:]}, stop - start)
    waiting = [*generation.rows[:start], *generation.rows[stop:]]
    assert work.bytes_to_write == sum(row.spans.response_end for row in waiting) * LAYERS * D_MODEL * 4
    # A position that all tokens will hold waits for them, too.
    assert model.work([request(ROWS, positions=["prompt_end"])]).new == ()
    with pytest.raises(MissingDataError, match=rf"{len(waiting)} of 12 rows have no resid_post at all_tokens"):
        pick(model, ROWS)
    done = generation.rows[start:stop]
    np.testing.assert_array_equal(pick(model, done).to_numpy(), values_of(done, "resid_post", range(6), ALL_TOKENS))


# -- layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_and_xarray_find_each_rows_tokens_by_the_offsets(tmp_path: Path, dtype: Any, compression: Any) -> None:
    model = new_store(str(tmp_path), dtype)
    asked = request(ROWS, ("resid_post", "mlp_out"), positions=[ALL_TOKENS], dtype=dtype)
    capture(model, asked, block_rows=5, compression=compression)
    (generation,) = model.generations()
    dataset = xr.open_zarr(generation.location.path, consolidated=False)
    assert dataset["offsets"].dims == ("row", "bound")
    assert dataset["row"].values.tolist() == generation.keys
    group = zarr.open_group(generation.location.path, mode="r")
    plan = generation.plan
    for component in ("resid_post", "mlp_out"):
        variable = dataset[component]
        assert variable.dims == ("token", "layer", "d_model")
        assert variable.shape == (plan.n_blocks * plan.block_tokens, LAYERS, D_MODEL)
        assert variable.dtype == NUMPY_DTYPES[dtype]
        whole, belongs = group[component][:], np.zeros(len(variable), dtype=bool)
        assert variable.values.tobytes() == whole.tobytes()
        for row, (start, stop) in zip(generation.rows, dataset["offsets"].values, strict=True):
            assert stop - start == row.spans.response_end
            assert not belongs[start:stop].any()
            belongs[start:stop] = True
            reference = values_of([row], component, range(LAYERS), ALL_TOKENS)
            np.testing.assert_array_equal(whole[start:stop].astype(np.float32), reference)
        # What is nobody's is NaN, never a number.
        assert np.isnan(whole[~belongs].astype(np.float32)).all()
        assert (~belongs).any()


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sampled_from([64, 1 << 14, 1 << 17]),
)
@example([100_000], None, 1 << 14)
@example([1, 1, 1, 100_000, 1, 1], None, 1 << 14)
@example([7] * 60, None, 1 << 17)
@example([7] * 60, 1, 64)
@settings(deadline=None, max_examples=150)
def test_every_row_is_whole_in_exactly_one_block_that_begins_at_a_shard(
    lengths: list[int], block_rows: int | None, d_model: int
) -> None:
    fields = ragged_blocks(lengths, block_rows, d_model, "float32")
    plan = GenerationPlan(
        model=MODEL, d_model=d_model, components=("resid_post",), layers=(0,), positions=(ALL_TOKENS,),
        dtype="float32", n_rows=len(lengths), **fields,
    )  # fmt: skip
    assert plan.ragged
    ranges = [plan.block_range(block) for block in range(plan.n_blocks)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(len(lengths)))
    rows = np.arange(len(lengths))
    assert plan.blocks_of(rows).tolist() == [block for block, (a, b) in enumerate(ranges) for _ in range(a, b)]
    assert plan.blocks_of(np.array([-1]))[0] == -1
    offsets = token_offsets(plan, np.array(lengths))
    for block, (start, stop) in enumerate(ranges):
        tokens = sum(lengths[start:stop])
        assert tokens <= plan.block_tokens
        assert stop - start <= plan.block_rows
        ends = block * plan.block_tokens + np.cumsum(lengths[start:stop])
        np.testing.assert_array_equal(offsets[start:stop, 1], ends)
        np.testing.assert_array_equal(offsets[start:stop, 0], [block * plan.block_tokens, *ends[:-1]])
    assert plan.block_tokens == max(sum(lengths[a:b]) for a, b in ranges)
    # Used to happen: blocks of as many rows, of which the long ones made every shard as long as themselves.
    padding = plan.n_blocks * plan.block_tokens - sum(lengths)
    assert padding <= (plan.n_blocks - 1) * max(lengths) + plan.block_tokens
    if block_rows is not None:
        assert plan.block_tokens <= max(block_rows * sum(lengths) / len(lengths) + 1, *lengths, 1)
    # Chunks of about 4 MiB, unless one row alone is larger.
    assert plan.block_tokens <= max(TARGET_CHUNK_BYTES // (4 * d_model), *lengths, 1)


def test_rows_of_mixed_lengths_are_not_padded_to_the_longest_block(tmp_path: Path) -> None:
    rows = [text(i, 2 + (i % 20 == 0) * 38, 1) for i in range(60)]  # 3 tokens, and every twentieth row 41
    model = new_store(str(tmp_path))
    asked = request(rows, positions=[ALL_TOKENS])
    capture(model, asked, block_rows=10)
    (generation,) = model.generations()
    plan = generation.plan
    tokens = sum(row.spans.response_end for row in rows)
    assert plan.block_tokens == 48  # about ten rows of mean length
    assert plan.n_blocks * plan.block_tokens <= 1.2 * tokens  # used to be 3 times as many
    found = model.select([row.key for row in rows], "resid_post", ALL_TOKENS).to_numpy()
    np.testing.assert_array_equal(found, values_of(rows, "resid_post", range(LAYERS), ALL_TOKENS))


def test_blocks_of_all_tokens_are_about_four_mebibytes_but_small_captures_have_several() -> None:
    assert ragged_blocks([100] * 10_000, None, 4096, "bfloat16")["block_tokens"] == 500
    assert len(ragged_blocks([30] * 400, None, 576, "float32")["block_starts"]) == 8
    assert len(ragged_blocks([30] * 10, None, 576, "float32")["block_starts"]) == 1
    assert ragged_blocks([5, 5, 3000], None, 4096, "bfloat16") == {
        "block_rows": 2, "block_tokens": 3000, "block_starts": (0, 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"positions": (ALL_TOKENS, "prompt_end")}, "stands alone"),
        ({"block_tokens": 0}, "belong to all_tokens"),
        ({"block_starts": ()}, "belong to all_tokens"),
        ({"positions": ("prompt_end",)}, "belong to all_tokens"),
        ({"block_starts": (1, 2)}, "must begin at row 0 and grow"),
        ({"block_starts": (0, 2, 2)}, "must begin at row 0 and grow"),
        ({"block_starts": (0, 3, 2)}, "must begin at row 0 and grow"),
        ({"block_starts": (0, 4)}, "below n_rows"),
    ],
)
def test_a_plan_of_all_tokens_says_where_its_blocks_begin(changes: Any, says: str) -> None:
    good = {
        "model": MODEL, "d_model": 4, "components": ("resid_post",), "layers": (0,), "positions": (ALL_TOKENS,),
        "dtype": "float32", "n_rows": 4, "block_rows": 2, "block_tokens": 9, "block_starts": (0, 2),
    }  # fmt: skip
    assert GenerationPlan(**good).n_blocks == 2
    with pytest.raises(ValidationError, match=says):
        GenerationPlan(**{**good, **changes})


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_rows_of_any_lengths_in_blocks_of_any_size_come_back(data: st.DataObject) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    model = new_store(url, data.draw(st.sampled_from(DTYPES)))
    spans = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9))
    rows = [text(i, *each) for i, each in enumerate(spans)]
    add_generation(
        model, rows, components=("resid_post",), layers=(2, 0), positions=(ALL_TOKENS,),
        dtype=model.manifest["dtype"], block_rows=data.draw(st.one_of(st.none(), st.integers(1, 4))),
    )  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(rows), min_size=1, unique=True))
    selection = pick(model, chosen)
    assert selection.layers == (0, 2)
    reference = values_of(chosen, "resid_post", (0, 2), ALL_TOKENS)
    np.testing.assert_array_equal(selection.to_numpy(), reference)
    for block in selection.blocks():
        np.testing.assert_array_equal(
            block.values, reference[block.rows][:, [selection.layers.index(i) for i in block.layers]]
        )
    position = data.draw(st.sampled_from(("prompt_end", "token:0", "token:-1")))
    np.testing.assert_array_equal(
        pick(model, chosen, position).to_numpy(), values_of(chosen, "resid_post", (0, 2), position)
    )
    fsspec.filesystem("memory").rm(url, recursive=True)


# -- what may not leak, and what may not enter -------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_padding_of_a_shard_is_never_read_as_a_token(tmp_path: Path, dtype: Any, compression: Any) -> None:
    model = new_store(str(tmp_path), dtype)
    capture(model, request(ROWS, positions=[ALL_TOKENS], dtype=dtype), block_rows=5, compression=compression)
    (generation,) = model.generations()
    plan = generation.plan
    tokens = [sum(row.spans.response_end for row in generation.rows[slice(*plan.block_range(b))]) for b in range(3)]
    assert min(tokens) < plan.block_tokens, "this test needs padding"
    for rows in (ROWS, generation.rows, generation.rows[4:6]):
        selection = pick(model, rows)
        reference = values_of(rows, "resid_post", range(LAYERS), ALL_TOKENS).astype(np.float64)
        assert sum(len(part.within) for part in selection.parts) == len(reference)
        for values in (
            selection.to_numpy(), selection.to_numpy("stored").astype(np.float32), selection.to_dask().compute(),
            *(block.values for block in selection.blocks()), *(values for _, values in selection.chunks()),
        ):  # fmt: skip
            assert np.isfinite(values).all()
        np.testing.assert_allclose(selection.mean(), reference.mean(axis=0), rtol=1e-5, atol=1e-6)
        means = group_means(selection, selection.token_rows, len(rows)).means
        assert np.isfinite(means).all()
        for position in ("token:0", "token:-1"):
            assert np.isfinite(pick(model, rows, position).mean()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_is_refused_and_its_row_named(tmp_path: Path, dtype: Any) -> None:
    model = new_store(str(tmp_path), dtype)
    _, blocks = model.assign([request(ROWS, positions=[ALL_TOKENS], dtype=dtype)], block_rows=4)
    generation = Generation(model.location / blocks[1].generation)
    rows = generation.rows[slice(*generation.plan.block_range(1))]
    assert len(rows) > 1
    for bad in range(len(rows)):
        ends = np.cumsum([row.spans.response_end for row in rows])
        for entry in (ends[bad] - rows[bad].spans.response_end, ends[bad] - 1):  # its first and last token
            values = block_values(rows, generation.plan)["resid_post"].astype(NUMPY_DTYPES[dtype])
            values[entry, 3, 5] = np.nan
            with pytest.raises(NonFiniteError) as caught:
                generation.write_block(1, {"resid_post": values})
            assert "1 row(s) hold NaN or infinity" in str(caught.value)
            assert f"first row {rows[bad].key[:16]} (prompt {rows[bad].prompt_id}) at resid_post.3" in str(caught.value)
    values[:] = np.inf
    with pytest.raises(
        NonFiniteError, match=rf"{len(rows)} row\(s\) hold NaN or infinity, first row {rows[0].key[:16]}"
    ):
        generation.write_block(1, {"resid_post": values})
    assert generation.committed() == set()


def test_a_block_of_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    model.assign([EVERYTHING], block_rows=4)
    (generation,) = model.generations()
    rows = generation.rows[slice(*generation.plan.block_range(0))]
    values = block_values(rows, generation.plan)["resid_post"]
    for wrong in (values[:-1], np.concatenate([values, values[:1]]), values[:, None]):
        with pytest.raises(ValueError, match="block 0 of resid_post has the shape"):
            generation.write_block(0, {"resid_post": wrong})
    assert generation.committed() == set()


def test_a_flipped_bit_in_a_token_is_never_read_as_a_number(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, EVERYTHING, block_rows=4)
    (generation,) = model.generations()
    path = generation.shard("resid_post", 1).path
    data = bytearray(path.read_bytes())
    data[3 * (generation.plan.shard_shape.chunk_bytes + 4) + 70] ^= 4  # in the chunk of layer 3
    path.write_bytes(data)
    row = generation.rows[generation.plan.block_range(1)[0]]
    for position, read in ((ALL_TOKENS, "to_numpy"), ("token:-1", "to_numpy"), (ALL_TOKENS, "mean")):
        with pytest.raises(DamageError, match="layer position 3"):
            getattr(pick(model, [row], position), read)()
    np.testing.assert_array_equal(
        pick(model, [row], layers=[2]).to_numpy(), values_of([row], "resid_post", [2], ALL_TOKENS)
    )
    assert len(model.verify(repair=True)) == 1
    assert [block.block for block in capture(model, EVERYTHING)] == [1]
    np.testing.assert_array_equal(pick(model, ROWS).to_numpy(), values_of(ROWS, "resid_post", range(6), ALL_TOKENS))


def test_tokens_after_the_response_are_not_stored(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    row = ROWS[0]
    longer = Row(MODEL, "longer", (*row.token_ids, 5, 6), row.spans)
    capture(model, request([longer], positions=[ALL_TOKENS]))
    assert pick(model, [longer]).shape == (row.spans.response_end, LAYERS, D_MODEL)
