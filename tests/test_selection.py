"""Selections: what `ActivationStore.select` finds, says when it does not, and every way of reading what it found."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import bucket as bucket
from s3_server import s3 as s3
from store_worker import D_MODEL, LAYERS, MODEL, capture, expected, make_row, make_rows, make_texts, new_store, request
from token_cells import SINGLE, add_generation, cell, text, values_of

from analysis.means import group_means
from store.activations import ActivationStore
from store.dtypes import NUMPY_DTYPES
from store.errors import MismatchError, MissingDataError, ResidError
from store.generation import Generation
from store.reduce import SLAB, column_sums, group_sums
from store.rows import Row
from store.selection import Selection
from store.sites import ALL_TOKENS, COMPONENTS, Spans

OTHER = "5f" * 32
ROOT = Path(__file__).parent.parent
ROWS = make_rows(12)
SETS = {"bad@train": (5, 1, 3), "bad@test": (2, 0), "good@train": (1, 4, 6)}
ANSWERED = {"bad@train": (8, 7)}  # rows with the responses of the condition "plain"


def keys(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(ROWS[i].key for i in numbers)


def truths(rows: Iterable[Row], layers: Iterable[int], component: str = "resid_post") -> np.ndarray:
    return expected(list(rows), component, list(layers), "prompt_end", "float32")


def records(sets: dict[str, tuple[int, ...]], responses: str | None = None) -> list[dict[str, str | None]]:
    return [
        {"prompt_set": name, "responses": responses, "prompt_id": ROWS[i].prompt_id, "row_key": ROWS[i].key, "text": ""}
        for name, numbers in sets.items()
        for i in numbers
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """One model with two prompt sets of a study; layers 0 to 3 of ten rows, 4 of six of these, 5 of none."""
    store = ActivationStore.open(str(tmp_path_factory.mktemp("store")))
    ref = {"source": "some-lab/tiny-chat"}
    manifest = {"fingerprint": MODEL, "dtype": "float32", "n_layers": LAYERS, "d_model": D_MODEL, "ref": ref}
    model = store.add_model(manifest)
    capture(model, request(ROWS[:10], ("resid_post", "attn_out"), range(4)), block_rows=3)
    capture(model, request(ROWS[:6], layers=[4]), block_rows=4)
    model.memberships.write("demo", "studies/demo.yaml", records(SETS) + records(ANSWERED, "plain"))
    return store


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Two captures of one hub model, in different dtypes."""
    store = ActivationStore.open(str(tmp_path_factory.mktemp("twins")))
    for fingerprint, dtype in ((MODEL, "float32"), (OTHER, "bfloat16")):
        manifest = {"fingerprint": fingerprint, "dtype": dtype, "n_layers": LAYERS, "d_model": D_MODEL}
        model = store.add_model({**manifest, "ref": {"source": "some-lab/tiny-chat"}})
        rows = [make_row(i, fingerprint) for i in range(3)]
        capture(model, request(rows, dtype=dtype))
    return store


# -- select: which rows ------------------------------------------------------------------------------------------


def test_prompt_sets_give_their_rows_in_prompt_order(store: ActivationStore) -> None:
    selection = store.select(prompts="bad@train", layer=2)
    assert selection.row_keys == keys((5, 1, 3))
    rows = [ROWS[i] for i in (5, 1, 3)]
    np.testing.assert_array_equal(selection.to_numpy(), truths(rows, [2])[:, 0])


@pytest.mark.parametrize("make", [list, tuple, iter, lambda names: (name for name in names), dict.fromkeys])
def test_several_prompt_sets_follow_one_another_and_a_shared_row_comes_once(store: ActivationStore, make: Any) -> None:
    selection = store.select(prompts=make(["good@train", "bad@train"]))
    assert selection.row_keys == keys((1, 4, 6, 5, 3))


def test_rows_may_be_given_by_key_in_any_container(store: ActivationStore) -> None:
    wanted = keys((7, 2, 9))
    for each in (list(wanted), wanted, iter(wanted), np.array(wanted)):
        selection = store.select(rows=each, site="attn_out.3")
        np.testing.assert_array_equal(selection.to_numpy(), truths([ROWS[7], ROWS[2], ROWS[9]], [3], "attn_out")[:, 0])
    assert store.select(rows=wanted[0]).row_keys == wanted[:1]


def test_without_rows_a_selection_has_those_captured_at_all_the_layers_asked_for(store: ActivationStore) -> None:
    # Used to happen: a layer that only some rows have made a selection of every captured row fail.
    assert set(store.select().row_keys) == set(keys(range(10)))
    assert store.select().layers == (0, 1, 2, 3)
    assert set(store.select(layer=4).row_keys) == set(keys(range(6)))
    assert set(store.select(layer=[3, 4]).row_keys) == set(keys(range(6)))


def test_generated_responses_are_chosen_by_their_condition(store: ActivationStore) -> None:
    assert store.select(prompts="bad@train", responses="plain").row_keys == keys((8, 7))


# -- select: which sites and layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, np.int64(2), np.uint8(2), np.array(2)])
def test_a_layer_given_as_a_number_has_no_axis(store: ActivationStore, layer: Any) -> None:
    selection = store.select(prompts="bad@test", layer=layer)
    assert (selection.dims, selection.shape, selection.ndim) == (("row", "d_model"), (2, D_MODEL), 2)
    assert selection.layers == (2,)
    np.testing.assert_array_equal(selection.to_numpy(), truths([ROWS[2], ROWS[0]], [2])[:, 0])
    np.testing.assert_array_equal(store.select(prompts="bad@test", site="resid_post.2"), selection)


@pytest.mark.parametrize("layer", [[3, 1], (3, 1), range(3, 0, -2), np.array([3, 1]), iter([3, 1]), [np.int32(3), 1]])
def test_several_layers_come_in_the_order_asked_for(store: ActivationStore, layer: Any) -> None:
    selection = store.select(prompts="bad@test", layer=layer)
    assert (selection.dims, selection.shape) == (("row", "layer", "d_model"), (2, 2, D_MODEL))
    assert selection.layers == (3, 1)
    assert {type(each) for each in selection.layers} == {int}
    np.testing.assert_array_equal(selection.to_numpy(), truths([ROWS[2], ROWS[0]], [3, 1]))


def test_a_list_of_one_layer_has_an_axis(store: ActivationStore) -> None:
    assert store.select(prompts="bad@test", layer=[2]).shape == (2, 1, D_MODEL)


@pytest.mark.parametrize(
    "layer", [True, np.True_, [True, False, True], np.array([True] * 6), "2", "all", 2.0, [1.5], slice(0, 2), [[1, 2]]]
)
def test_what_is_no_layer_is_refused(store: ActivationStore, layer: Any) -> None:
    # Used to happen: True was taken for layer 1, and a numpy integer for something to iterate over.
    with pytest.raises(ValueError, match=r"layer is a number, several .* or None for all"):
        store.select(prompts="bad@test", layer=layer)


def test_layers_that_the_model_does_not_have_are_refused(store: ActivationStore) -> None:
    for layer in (-1, [0, -1], LAYERS, range(LAYERS + 1)):
        with pytest.raises(ValueError, match=rf"there is no layer -?\d: the model has the layers 0 to {LAYERS - 1}"):
            store.select(prompts="bad@test", layer=layer)
    with pytest.raises(ValueError, match="no layers were asked for"):
        store.select(prompts="bad@test", layer=[])
    with pytest.raises(MismatchError, match=r"a layer was asked for twice: \[1, 1\]"):
        store.select(prompts="bad@test", layer=[1, 1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"site": "resid_pst"}, "unknown site 'resid_pst'; did you mean 'resid_post'?"),
        ({"site": "stream"}, "known: resid_pre, resid_post, attn_out, mlp_out"),
        ({"site": "resid_post.x"}, "'resid_post.x' is no site"),
        ({"site": "resid_post.2", "layer": 2}, "names its layer: leave out layer=2"),
        ({"position": "promt_end"}, "did you mean 'prompt_end'?"),
        ({"position": "alltokens"}, "did you mean 'all_tokens'?"),
        ({"position": "token:"}, "known: prompt_end, response_start, response_avg, token:<index>"),
        ({"position": "token:-0"}, "unknown position 'token:-0'"),
        ({"rows": ["a"]}, "give prompts or rows, not both"),
        ({"prompts": None, "study": "demo"}, "study and responses say which prompt sets"),
        ({"prompts": None, "rows": ["a"], "responses": "plain"}, "study and responses say which prompt sets"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(store: ActivationStore, arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        store.select(**{"prompts": "bad@test", **arguments})


# -- select: what is missing, and what would capture it ----------------------------------------------------------


def test_what_is_missing_is_named_with_the_command_of_the_study(store: ActivationStore) -> None:
    asks = "(its `capture` has to ask for components: [{}], positions: [{}], layers: {})"
    command = "resid capture --study studies/demo.yaml "
    for arguments, missing, wanted in (
        ({"site": "mlp_out"}, "3 of 3 rows have no mlp_out at prompt_end (first:", ("mlp_out", "prompt_end", "all")),
        ({"layer": 5}, "3 of 3 rows have no resid_post at prompt_end at all of the layers [5]",
         ("resid_post", "prompt_end", "[5]")),
        ({"layer": [3, 4], "prompts": "good@train"}, "1 of 3 rows have no resid_post at prompt_end at all of the layers"
         f" [3, 4] (first: row {ROWS[6].key[:16]})", ("resid_post", "prompt_end", "[3, 4]")),
        ({"position": "response_avg"}, "3 of 3 rows have no resid_post at response_avg",
         ("resid_post", "response_avg", "all")),
        ({"position": "all_tokens"}, "3 of 3 rows have no resid_post at all_tokens",
         ("resid_post", "all_tokens", "all")),
    ):  # fmt: skip
        with pytest.raises(MissingDataError) as caught:
            store.select(**{"prompts": "bad@train", **arguments})
        assert missing in str(caught.value)
        assert f"\n  remedy: {command}{asks.format(*wanted)}" in str(caught.value)


def test_rows_that_nobody_captured_are_counted_and_the_first_is_named(store: ActivationStore) -> None:
    with pytest.raises(MissingDataError) as caught:
        store.select(rows=keys((3, 11, 10)))
    assert "2 of 3 rows" in str(caught.value)
    assert f"first: row {ROWS[11].key[:16]}" in str(caught.value)
    assert "remedy: resid capture --study <study>" in str(caught.value)
    with pytest.raises(MissingDataError, match="no rows were asked for"):
        store.select(rows=[])
    with pytest.raises(MissingDataError, match="no rows were asked for"):
        store.select(prompts=[])
    with pytest.raises(MismatchError, match=f"row {ROWS[3].key[:16]} was asked for twice"):
        store.select(rows=keys((2, 3, 3)))


def test_where_nothing_is_captured_at_all_that_is_said(store: ActivationStore) -> None:
    # Used to happen: "no rows were asked for", although the caller had asked for all there are.
    with pytest.raises(MissingDataError, match=r"holds no mlp_out at prompt_end\n  remedy: resid capture"):
        store.select(site="mlp_out")
    with pytest.raises(MissingDataError, match=r"holds no resid_post at prompt_end at all of the layers \[5\]"):
        store.select(layer=5)


def test_an_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=f"holds no activations\n  remedy: .* --store {tmp_path}"):
        ActivationStore.open(tmp_path.as_posix()).select(prompts="bad")


def test_unknown_prompt_sets_studies_and_conditions_are_named_with_the_known_ones(store: ActivationStore) -> None:
    for arguments, says in (
        ({"prompts": "bad@tran"}, "no captured study has a prompt set 'bad@tran'; did you mean 'bad@train'?"),
        ({"prompts": "xyz"}, "known: bad@test, bad@train, good@train"),
        ({"prompts": ["bad@train", "god@train"]}, "did you mean 'good@train'?"),
        ({"study": "dem"}, "no study 'dem' has captured this model; did you mean 'demo'?\n  known: demo"),
        ({"responses": "plan"}, "has no rows with responses of 'plan'\n  remedy: choose responses= from 'plain'"),
        ({"prompts": "good@train", "responses": "plain"}, "prompt set 'good@train' has no rows with responses of"),
    ):
        with pytest.raises(MissingDataError, match=re.escape(says)):
            store.select(**{"prompts": "bad@train", **arguments})


def test_a_study_file_with_a_space_is_quoted_in_the_command(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    model.memberships.write("demo", "my studies/demo.yaml", records({"bad": (0,)}))
    with pytest.raises(MissingDataError, match=r"resid capture --study 'my studies/demo.yaml' "):
        ActivationStore.open(str(tmp_path)).select(prompts="bad")


# -- select: which model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["some-lab/tiny-chat", "tiny-chat", MODEL, MODEL[:16], MODEL[:2], None])
def test_a_model_goes_by_its_name_or_the_beginning_of_its_fingerprint(store: ActivationStore, name: Any) -> None:
    assert store.select(model=name, prompts="bad@test").row_keys == keys((2, 0))


@pytest.mark.parametrize("name", ["some-lab", "tiny-chap", "", "e5", "None"])
def test_an_unknown_model_is_refused_and_the_known_ones_are_listed(store: ActivationStore, name: str) -> None:
    with pytest.raises(MissingDataError) as caught:
        store.select(model=name)
    assert f"holds no model {name!r}" in str(caught.value)
    assert f"{MODEL[:16]}  some-lab/tiny-chat, float32" in str(caught.value)
    assert ("did you mean 'tiny-chat'?" in str(caught.value)) == (name == "tiny-chap")


def test_of_several_models_of_one_name_one_is_chosen_by_fingerprint(twins: ActivationStore) -> None:
    for name in (None, "tiny-chat", "5"):
        with pytest.raises(MismatchError) as caught:
            twins.select(model=name)
        assert "holds 2 such models; say which by fingerprint" in str(caught.value)
        for listed in (f"{MODEL[:16]}  some-lab/tiny-chat, float32", f"{OTHER[:16]}  some-lab/tiny-chat, bfloat16"):
            assert listed in str(caught.value)
    assert twins.select(model="5f").row_keys != twins.select(model="5e").row_keys
    assert twins.select(model="5f").stored_dtype == NUMPY_DTYPES["bfloat16"]


# -- what a selection looks like ---------------------------------------------------------------------------------


def test_a_selection_says_what_it_is_and_reads_nothing(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generation, "open_block", None)
    selection = store.select(prompts=["bad@train", "bad@test"])
    assert (len(selection), selection.ndim, selection.dims) == (5, 3, ("row", "layer", "d_model"))
    assert selection.shape == (5, 5, D_MODEL)
    assert selection.layers == (0, 1, 2, 3, 4)
    assert selection.stored_dtype == np.float32
    assert selection.nbytes == 5 * 5 * D_MODEL * 4
    assert "(row: 5, layer: 5, d_model: 16) resid_post.0..4 at prompt_end, stored as float32" in repr(selection)
    assert "resid_post.2 at" in repr(store.select(layer=2))
    assert selection.isel([0]).shape == (1, 5, D_MODEL)
    assert selection.in_stored_order().shape == selection.shape
    with pytest.raises(ResidError, match="only the position all_tokens has tokens"):
        _ = selection.token_rows


def test_captures_of_different_dtypes_are_read_together_as_float32(tmp_path: Path) -> None:
    model = new_store(str(tmp_path), "bfloat16")
    rows = [text(i, 3, 2) for i in range(6)]
    fields: dict[str, Any] = {"components": ("resid_post",), "layers": (0, 1), "positions": ("prompt_end",)}
    add_generation(model, rows[:4], **fields, dtype="bfloat16", block_rows=3)
    add_generation(model, rows[4:], **fields, dtype="float32", block_rows=3)
    selection = model.select([row.key for row in reversed(rows)], "resid_post", "prompt_end")
    assert selection.stored_dtype == np.float32
    assert selection.nbytes == 6 * 2 * D_MODEL * 4
    reference = values_of(rows[::-1], "resid_post", (0, 1), "prompt_end")
    for dtype in ("float32", "stored"):
        found = selection.to_numpy(dtype)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, reference)
    assert selection.isel([3, 4]).stored_dtype == NUMPY_DTYPES["bfloat16"]


@pytest.mark.parametrize("dtype", ["float16", "f4", None, "bfloat16"])
def test_values_come_as_float32_or_as_stored_and_nothing_else(store: ActivationStore, dtype: Any) -> None:
    selection = store.select(prompts="bad@train")
    for read in (selection.to_numpy, selection.to_dask, selection.to_xarray, selection.to_torch):
        with pytest.raises(ValueError, match='dtype is "float32" or "stored"'):
            read(dtype)


# -- choosing rows of a selection --------------------------------------------------------------------------------


def test_rows_are_chosen_by_slice_list_or_mask(store: ActivationStore) -> None:
    selection = store.select(layer=[1, 3])
    values = selection.to_numpy()
    mask = np.arange(10) % 3 == 1
    for chosen in (
        slice(None), slice(2, 7), slice(None, None, -1), slice(-3, None, 2), [4], [9, 0, 3], (9, 0, 3), [-1, -10],
        np.array([2, 8], dtype=np.uint8), mask, mask.tolist(), range(3, 6),
    ):  # fmt: skip
        part = selection.isel(chosen)
        index = chosen if isinstance(chosen, slice) else np.asarray(chosen)
        np.testing.assert_array_equal(part.to_numpy(), values[index])
        assert part.row_keys == tuple(np.array(selection.row_keys)[index])
        again = part.isel(slice(None, None, -1))
        np.testing.assert_array_equal(again.to_numpy(), values[index][::-1])


@pytest.mark.parametrize("chosen", [[], slice(0, 0), [False] * 10, [1, 1], [-1, 9], 3, np.int64(3), [[1, 2]]])
def test_no_row_or_one_twice_cannot_be_chosen(store: ActivationStore, chosen: Any) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        store.select().isel(chosen)


@pytest.mark.parametrize("chosen", [[10], [-11], [True, False], [0.5], [ROWS[0].key]])
def test_rows_that_are_not_there_cannot_be_chosen(store: ActivationStore, chosen: Any) -> None:
    with pytest.raises(IndexError):
        store.select().isel(chosen)


# -- every way of reading ----------------------------------------------------------------------------------------


def check_every_way_of_reading(selection: Selection, reference: np.ndarray) -> None:
    """Compare with a reference [row or token, layer, d_model] of values that every storage dtype holds."""
    shaped = reference if selection.layer_axis else reference[:, 0]
    assert selection.shape == shaped.shape
    for dtype in ("float32", "stored"):
        found = selection.to_numpy(dtype)
        assert found.dtype == selection.dtype_of(dtype)
        np.testing.assert_array_equal(found.astype(np.float32), shaped)
        covered = np.zeros(reference.shape[:2], dtype=int)
        for block in selection.blocks(dtype):
            assert block.values.dtype == selection.dtype_of(dtype)
            columns = [selection.layers.index(layer) for layer in block.layers]
            covered[np.ix_(block.rows, columns)] += 1
            np.testing.assert_array_equal(block.values.astype(np.float32), reference[np.ix_(block.rows, columns)])
        assert (covered == 1).all()
        covered[:] = 0
        for (part, index), values in selection.chunks(dtype=dtype):
            covered[part.into, part.at[index]] += 1
            np.testing.assert_array_equal(values.astype(np.float32), reference[part.into, part.at[index]])
        assert (covered == 1).all()
        given: list[np.ndarray] = []

        def into(part: Any, index: int, dtype: Any = dtype, given: list[np.ndarray] = given) -> np.ndarray:
            # Every second column of a wider array: not contiguous.
            given.append(np.empty((len(part.into), 2 * D_MODEL), selection.dtype_of(dtype))[:, ::2])
            return given[-1]

        for ((part, index), values), mine in zip(selection.chunks(dtype=dtype, into=into), given, strict=False):
            assert values is mine
            np.testing.assert_array_equal(values.astype(np.float32), reference[part.into, part.at[index]])
        np.testing.assert_array_equal(selection.to_dask(dtype).compute().astype(np.float32), shaped)
    for dtype in (None, np.float64, "f4"):
        found = np.asarray(selection, dtype=dtype)
        assert found.dtype == (dtype or np.float32)
        np.testing.assert_array_equal(found, shaped)
    np.testing.assert_array_equal(np.stack([selection, selection])[1], shaped)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(selection, copy=False)
    exact = shaped.astype(np.float64)
    np.testing.assert_allclose(selection.mean(), exact.mean(axis=0), rtol=1e-6, atol=1e-7)


@st.composite
def scattered(draw: st.DrawFn) -> dict[str, Any]:
    """Captures that overlap, in all layouts and dtypes, and what is asked of them."""

    def some(values: Iterable[Any]) -> list[Any]:
        return draw(st.lists(st.sampled_from(list(values)), min_size=1, unique=True))

    model_dtype = draw(st.sampled_from(list(NUMPY_DTYPES)))
    lengths = [(draw(st.integers(2, 5)), draw(st.integers(1, 4))) for _ in range(8)]
    captures = []
    for _ in range(draw(st.integers(1, 4))):
        ragged = draw(st.booleans())
        captures.append(
            {
                "rows": some(range(8)),
                "components": tuple(some(COMPONENTS[:2])),
                "layers": tuple(some(range(4))),
                "positions": (ALL_TOKENS,) if ragged else tuple(some((*SINGLE[:4], "response_avg"))),
                "dtype": draw(st.sampled_from([model_dtype, "float32", "float16"])),
                "block_rows": draw(st.integers(1, 4)),
                "compression": draw(st.sampled_from(["none", "none", "zstd"])),
                "left_out": draw(st.sets(st.integers(0, 9), max_size=1)),
            }
        )
    likely = draw(st.sampled_from(captures))
    rows = draw(st.permutations(likely["rows"])) if draw(st.integers(0, 3)) else some(range(8))
    position = draw(
        st.sampled_from((*SINGLE, ALL_TOKENS) if likely["positions"] == (ALL_TOKENS,) else likely["positions"])
    )
    layers = draw(st.one_of(st.none(), st.permutations(likely["layers"]), st.sampled_from(likely["layers"])))
    return {
        "model_dtype": model_dtype, "texts": [text(i, *length) for i, length in enumerate(lengths)],
        "captures": captures, "rows": rows, "component": draw(st.sampled_from(likely["components"])),
        "position": position, "layers": layers, "local": draw(st.booleans()),
    }  # fmt: skip


@given(scattered())
@settings(deadline=None, max_examples=25)
def test_whatever_is_asked_of_whichever_captures_is_what_a_dictionary_of_cells_holds(
    tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]
) -> None:
    url = str(tmp_path_factory.mktemp("store")) if case["local"] else f"memory://{uuid.uuid4().hex}"
    model, texts, position, component = (
        new_store(url, case["model_dtype"]),
        case["texts"],
        case["position"],
        case["component"],
    )
    there: set[tuple[int, int]] = set()  # row, layer
    for fields in case["captures"]:
        fields = dict(fields)
        numbers, left_out = fields.pop("rows"), fields.pop("left_out")
        generation = add_generation(model, [texts[i] for i in numbers], left_out, **fields)
        single = position not in (ALL_TOKENS, "response_avg")
        if component in fields["components"] and (
            position in fields["positions"] or (generation.plan.ragged and single)
        ):
            committed = [numbers[i] for b in generation.committed() for i in range(*generation.plan.block_range(b))]
            there |= {(i, layer) for i in committed for layer in fields["layers"]}
    rows, asked = [texts[i] for i in case["rows"]], case["layers"]
    wanted = [asked] if isinstance(asked, int) else asked
    if wanted is None:
        wanted = [layer for layer in range(LAYERS) if all((i, layer) in there for i in case["rows"])]
    arguments = {"rows": [row.key for row in rows], "site": component, "position": position, "layer": asked}
    store = ActivationStore.open(url)
    if not wanted or not all((i, layer) in there for i in case["rows"] for layer in wanted):
        with pytest.raises(MissingDataError):
            store.select(**arguments)
    else:
        selection = store.select(**arguments)
        assert selection.layers == tuple(wanted)
        assert selection.row_keys == tuple(row.key for row in rows)
        check_every_way_of_reading(selection, values_of(rows, component, wanted, position))
        ordered = selection.in_stored_order()
        by_key = {row.key: row for row in rows}
        again = [by_key[key] for key in ordered.row_keys]
        assert sorted(ordered.row_keys) == sorted(by_key)
        np.testing.assert_array_equal(
            ordered.to_numpy().reshape(len(ordered), len(wanted), D_MODEL),
            values_of(again, component, wanted, position),
        )
        # Part by part, each one's rows come after those of the part before.
        some = list(range(0, len(rows), 2))[::-1]
        check_every_way_of_reading(
            selection.isel(some), values_of([rows[i] for i in some], component, wanted, position)
        )
    if url.startswith("memory"):
        fsspec.filesystem("memory").rm(url, recursive=True)


def test_in_stored_order_one_block_after_the_other_is_read(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ROWS), block_rows=5)
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    (generation,) = model.generations()
    ordered = selection.in_stored_order()
    assert list(ordered.row_keys) == generation.keys
    assert [part.into.tolist() for part in ordered.parts] == [[*range(5)], [*range(5, 10)], [10, 11]]
    assert all(part.whole == len(part.into) for part in ordered.parts)
    assert not all((np.diff(part.into) == 1).all() for part in selection.parts)


def bit_patterns(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return finite values of every kind: both zeros, subnormals, the largest ones, random ones."""
    kind = NUMPY_DTYPES[dtype]
    bits = np.random.default_rng(seed).integers(0, 1 << (8 * kind.itemsize), size=shape, dtype=np.uint64)
    bits = bits.astype(f"u{kind.itemsize}")
    sign = 1 << (8 * kind.itemsize - 1)
    flat = bits.reshape(-1)
    flat[:6] = [0, sign, 1, sign | 1, 2, sign | 3]  # zeros and subnormals
    values = bits.view(kind)
    largest = np.array(_LARGEST[dtype], kind)
    values[~np.isfinite(values.astype(np.float32))] = -largest
    values.reshape(-1)[6:8] = [largest, -largest]
    return values


_LARGEST = {"float32": 3.4028234663852886e38, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", list(NUMPY_DTYPES))
def test_every_bit_survives_at_every_position_of_every_row(tmp_path: Path, dtype: str, compression: Any) -> None:
    model = new_store(str(tmp_path), dtype)
    positions = ("prompt_end", "response_start", "token:0")
    _, blocks = model.assign([request(ROWS, positions=positions, dtype=dtype)], 5, compression)
    bits: dict[str, np.ndarray] = {}  # row key -> [layer, position, d_model]
    for block in blocks:
        generation = Generation(model.location / block.generation)
        start, stop = generation.plan.block_range(block.block)
        values = bit_patterns(dtype, (stop - start, LAYERS, 3, D_MODEL), seed=block.block)
        assert generation.write_block(block.block, {"resid_post": values})
        bits.update(zip(generation.keys[start:stop], values, strict=True))
    wanted, layers = [ROWS[i] for i in (11, 0, 7, 4, 3)], [5, 0, 2]
    for at, position in enumerate(positions):
        for rows in (ROWS, wanted):
            reference = np.stack([bits[row.key][layers, at] for row in rows])
            selection = model.select([row.key for row in rows], "resid_post", position, layers)
            stored = selection.to_numpy("stored")
            assert stored.dtype == NUMPY_DTYPES[dtype]
            assert stored.tobytes() == reference.tobytes()
            assert selection.to_numpy().tobytes() == reference.astype(np.float32).tobytes()
            assert np.isfinite(selection.to_numpy()).all()
            lazy = selection.to_dask("stored").compute(scheduler="synchronous")
            assert lazy.tobytes() == reference.tobytes()
    assert np.signbit(next(iter(bits.values())).astype(np.float32)).any()


# -- sums and means ----------------------------------------------------------------------------------------------


def massive(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return values like those of SmolLM2's first token: one dimension near 25,000, others near or far below 1."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 2, size=shape)
    values[..., 3] = 25_000 + 50 * rng.standard_normal(shape[:-1])
    return values.astype(NUMPY_DTYPES[dtype])


def filled(url: str, dtype: str, n: int, block_rows: int, compression: Any = "none") -> tuple[Selection, np.ndarray]:
    """Return a selection of n rows with massive activations, in another order than stored, and its values."""
    rows = make_rows(n)
    model = new_store(url, dtype)
    held = dict(zip((row.key for row in rows), massive(dtype, (n, LAYERS, 1, D_MODEL), 1), strict=True))
    _, blocks = model.assign([request(rows, dtype=dtype)], block_rows, compression)
    for block in blocks:
        generation = Generation(model.location / block.generation)
        start, stop = generation.plan.block_range(block.block)
        generation.write_block(
            block.block, {"resid_post": np.stack([held[key] for key in generation.keys[start:stop]])}
        )
    keys = [row.key for row in rows]
    return model.select(keys, "resid_post", "prompt_end"), np.stack([held[key][:, 0] for key in keys])


@pytest.mark.parametrize("dtype", list(NUMPY_DTYPES))
def test_group_means_are_those_of_float64_whatever_the_blocks(tmp_path: Path, dtype: str) -> None:
    # Used to happen: a float16 sum overflowed, and a bfloat16 mean was off by half.
    n = 2 * SLAB + 150
    groups = np.random.default_rng(2).integers(0, 3, n)  # interleaved within every block
    results = []
    for block_rows in (7, 130, n):
        selection, values = filled(str(tmp_path / str(block_rows)), dtype, n, block_rows)
        exact = values.astype(np.float64)
        sums = group_sums(selection, groups, 3)
        for group in range(3):
            chosen = exact[groups == group]
            # In units of what is summed: where values cancel, a relative bound of the sum says nothing.
            bound = 2e-6 * np.abs(chosen).sum(axis=0)
            assert (np.abs(sums[group] - chosen.sum(axis=0)) <= bound).all()
        mean = selection.mean()
        np.testing.assert_allclose(mean[:, 3], exact.mean(axis=0)[:, 3], rtol=2e-7)
        assert (np.abs(mean - exact.mean(axis=0)) <= 2e-6 * np.abs(exact).mean(axis=0)).all()
        means = group_means(selection, groups, 3)
        np.testing.assert_allclose(means.means, sums / np.bincount(groups)[:, None, None], rtol=1e-12)
        assert group_sums(selection, groups, 3).tobytes() == sums.tobytes()
        results.append(sums)
    for sums in results[1:]:
        bound = 4e-6 * np.abs(exact).sum(axis=0)
        assert (np.abs(sums - results[0]) <= bound).all()


def test_float32_is_summed_in_float64() -> None:
    values = massive("float32", (3 * SLAB + 5, D_MODEL), 5)
    np.testing.assert_allclose(column_sums(values), values.astype(np.float64).sum(axis=0), rtol=1e-10, atol=1e-9)
    # 2^24 + 1 is no float32: sums in float32 stay where they are.
    ones = np.ones((SLAB, 1), dtype=np.float32)
    assert column_sums(np.concatenate([np.full((1, 1), 2.0**24, np.float32), ones]))[0] == 2**24 + SLAB


@given(st.integers(1, 3 * SLAB), st.sampled_from(list(NUMPY_DTYPES)), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_column_sums_are_those_of_float64_for_any_number_of_rows(n: int, dtype: str, seed: int) -> None:
    values = massive(dtype, (n, 9), seed)
    exact = values.astype(np.float64)
    assert (np.abs(column_sums(values) - exact.sum(axis=0)) <= 2e-6 * np.abs(exact).sum(axis=0)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_fetched_in_threads_sums_to_the_same_bits_as_what_is_read_directly(tmp_path: Path, dtype: str) -> None:
    local, values = filled(str(tmp_path / "local"), dtype, 100, 9)
    groups = np.arange(100) % 2
    sums, mean = group_sums(local, groups, 2), local.mean()
    remote = f"memory://{uuid.uuid4().hex}"
    for url, compression in ((str(tmp_path / "zstd"), "zstd"), (remote, "none"), (f"{remote}-zstd", "zstd")):
        selection, _ = filled(url, dtype, 100, 9, compression)
        np.testing.assert_array_equal(selection.to_numpy(), values.astype(np.float32))
        assert selection.mean().tobytes() == mean.tobytes()
        assert group_sums(selection, groups, 2).tobytes() == sums.tobytes()
        means = group_means(selection, groups, 2).means
        np.testing.assert_array_equal(means, group_means(local, groups, 2).means)
    for url in (remote, f"{remote}-zstd"):
        fsspec.filesystem("memory").rm(url, recursive=True)


def test_a_mean_of_all_tokens_is_over_tokens(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    rows = make_texts(9)
    capture(model, request(rows, positions=[ALL_TOKENS]), block_rows=2)
    selection = model.select([row.key for row in rows], "resid_post", ALL_TOKENS)
    np.testing.assert_allclose(
        selection.mean(), selection.to_numpy().astype(np.float64).mean(axis=0), rtol=1e-9, atol=1e-9
    )
    by_row = group_sums(selection, selection.token_rows, len(rows))
    values, offsets = selection.to_numpy().astype(np.float64), selection.offsets
    assert offsets is not None
    for i in range(len(rows)):
        np.testing.assert_allclose(by_row[i], values[offsets[i] : offsets[i + 1]].sum(axis=0), rtol=1e-9, atol=1e-9)


# -- memory ------------------------------------------------------------------------------------------------------

READER = """
import sys
import numpy as np
from analysis.means import group_means
from store.activations import ActivationStore

selection = ActivationStore.open(sys.argv[1]).select()
mean = selection.mean()
groups = np.arange(len(selection)) % 2
means = group_means(selection, groups, 2, threads=2).means
np.save(sys.argv[2], np.concatenate([mean[None], means]))
# Not ru_maxrss: that counts what the parent had before exec.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(selection.nbytes, 1024 * int(status["VmHWM"].split()[0]))
"""


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('bucket')}/store" if request.param == "s3" else str(tmp_path / "store")


@pytest.mark.parametrize(("compression", "layers"), [("none", 30), ("zstd", 15)])
def test_a_mean_over_any_size_of_store_needs_less_than_300_megabytes(
    tmp_path: Path, url: str, compression: Any, layers: int
) -> None:
    # Used to happen: 4 GB for compressed blocks, whose layers zarr-python was asked for by lists of indices.
    d_model, n = 1024, 5000 if url.startswith("s3:") else 10_000
    manifest = {"fingerprint": MODEL, "dtype": "bfloat16", "n_layers": layers, "d_model": d_model}
    model = ActivationStore.open(url).add_model(manifest)
    rows = [Row(MODEL, f"prompt-{i}", (i,), Spans(1, 1)) for i in range(n)]
    request_ = request(rows, layers=range(layers), dtype="bfloat16")
    _, blocks = model.assign([request_], block_rows=1000, compression=compression)
    noise = np.random.default_rng(0).integers(0x3C00, 0x4100, size=(1000, layers, 1, d_model), dtype=np.uint16)
    values = noise.view(NUMPY_DTYPES["bfloat16"])  # 0.0078 to 8
    for block in blocks:
        Generation(model.location / block.generation).write_block(block.block, {"resid_post": values})
    done = subprocess.run(
        [sys.executable, "-c", READER, url, str(tmp_path / "means.npy")],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    nbytes, peak = map(int, done.stdout.split())
    print(f"peak memory {peak / 1e6:.0f} MB over {nbytes / 1e6:.0f} MB at {url[:5]}, compression {compression}")
    assert nbytes == n * layers * d_model * 2
    wide = (noise[:, :, 0].astype(np.uint32) << 16).view(np.float32)
    even, odd = (wide[start::2].mean(axis=0, dtype=np.float64) for start in (0, 1))
    for mean, reference in zip(np.load(tmp_path / "means.npy"), ((even + odd) / 2, even, odd), strict=True):
        np.testing.assert_allclose(mean, reference, rtol=2e-6)
    assert peak < 300e6


def test_cells_are_the_same_at_every_name_of_a_token() -> None:
    row = text(0, 3, 2)
    for position, token in (("prompt_end", 2), ("response_start", 3), ("token:-1", 4)):
        np.testing.assert_array_equal(
            cell(row, "resid_post", 1, position), cell(row, "resid_post", 1, f"token:{token}")
        )
