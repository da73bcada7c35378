"""Selections as arrays of Dask, xarray and torch."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from store_worker import D_MODEL, LAYERS, MODEL, capture, make_rows, new_store, request
from token_cells import add_generation, text, values_of

from store.activations import ActivationStore, ModelStore
from store.dtypes import NUMPY_DTYPES
from store.errors import DamageError, ResidError
from store.generation import Generation
from store.rows import Row
from store.selection import Selection
from store.sites import ALL_TOKENS

ROOT = Path(__file__).parent.parent
DTYPES = list(NUMPY_DTYPES)
LAYOUTS = ["none", "zstd"]
TEXTS = [text(i, 2 + i % 3, 1 + (i * 5) % 4) for i in range(11)]
LAYERS_HELD = range(LAYERS)


def reference(rows: Sequence[Row], layers: Any = LAYERS_HELD, position: str = "prompt_end") -> np.ndarray:
    return values_of(rows, "resid_post", layers, position)


def filled(folder: Path, dtype: Any = "float32", compression: Any = "none", position: str = "prompt_end") -> ModelStore:
    """Return a store of the texts, layers in two captures that cut the rows into different blocks."""
    model = new_store(str(folder), dtype)
    for layers, block_rows in (((0, 1, 2, 3), 4), ((4, 5), 3)):
        fields: dict[str, Any] = {"components": ("resid_post",), "layers": layers, "positions": (position,)}
        add_generation(model, TEXTS, **fields, dtype=dtype, block_rows=block_rows, compression=compression)
    return model


def pick(model: ModelStore, rows: Sequence[Row], position: str = "prompt_end", layers: Any = None) -> Selection:
    return model.select([row.key for row in rows], "resid_post", position, layers)


SCATTERED = [TEXTS[i] for i in (9, 0, 4, 3, 10, 7)]


# -- Dask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["prompt_end", ALL_TOKENS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dask_array_holds_the_values_of_the_selection(tmp_path: Path, dtype: Any, position: str) -> None:
    model = filled(tmp_path, dtype, position=position)
    for rows, layers in ((TEXTS, None), (SCATTERED, [5, 0, 3]), (SCATTERED[:1], [4])):
        selection = pick(model, rows, position, layers)
        exact = reference(rows, selection.layers, position)
        for chosen in ("float32", "stored"):
            lazy = selection.to_dask(chosen)
            assert (lazy.shape, lazy.dtype) == (selection.shape, selection.dtype_of(chosen))
            found = lazy.compute()
            assert found.dtype == lazy.dtype
            np.testing.assert_array_equal(found.astype(np.float32), exact)
        # float32, although 16 bits are stored: means of those overflow, or lose half of their digits.
        mean = selection.to_dask().mean(axis=0, dtype="f4").compute(scheduler="threads", num_workers=2)
        np.testing.assert_allclose(mean, exact.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)
        some = selection.to_dask()[1:4, 0, ::2].compute() if len(rows) > 1 else selection.to_dask()[:, 0, ::2].compute()
        np.testing.assert_array_equal(some, exact[1:4, 0, ::2] if len(rows) > 1 else exact[:, 0, ::2])


def test_one_layer_is_a_dask_array_without_layer_axis(tmp_path: Path) -> None:
    filled(tmp_path)
    selection = ActivationStore.open(str(tmp_path)).select(rows=[row.key for row in SCATTERED], layer=4)
    assert selection.to_dask().shape == (6, D_MODEL)
    np.testing.assert_array_equal(selection.to_dask().compute(), reference(SCATTERED, [4])[:, 0])


def opened_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that grows by (block, layer position) whenever a chunk is read."""
    reads: list[tuple[int, int]] = []
    open_block = Generation.open_block

    class Watched:
        def __init__(self, opened: Any, block: int):
            self.opened, self.block = opened, block

        def read(self, layers: Sequence[int], out: Any = None) -> Any:
            reads.extend((self.block, layer) for layer in layers)
            return self.opened.read(layers, out)

    @contextlib.contextmanager
    def watched(self: Generation, component: str, block: int) -> Any:
        with open_block(self, component, block) as opened:
            yield Watched(opened, block)

    monkeypatch.setattr(Generation, "open_block", watched)
    return reads


def test_building_a_dask_array_reads_nothing_and_computing_reads_only_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(make_rows(12)), block_rows=4)
    (generation,) = model.generations()
    reads = opened_by(monkeypatch)
    selection = model.select(generation.keys, "resid_post", "prompt_end")
    lazy, labelled = selection.to_dask(), selection.to_xarray()
    assert lazy.chunks == ((4, 4, 4), (1,) * LAYERS, (D_MODEL,))
    assert reads == []
    lazy[4:8, 3].compute()
    assert reads == [(1, 3)]
    reads.clear()
    labelled.sel(row=generation.keys[9], layer=5).compute()
    assert reads == [(2, 5)]
    reads.clear()
    lazy.mean(axis=0).compute()
    assert sorted(reads) == [(block, layer) for block in range(3) for layer in range(LAYERS)]


def test_in_stored_order_a_dask_array_has_no_step_that_reorders(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(make_rows(12)), block_rows=4)
    selection = model.select([row.key for row in make_rows(12)], "resid_post", "prompt_end", [2])

    def takes(array: da.Array) -> bool:
        return any("getitem" in name or "take" in name or "shuffle" in name for name in map(str, array.dask.layers))

    assert takes(selection.to_dask())
    ordered = selection.in_stored_order()
    assert not takes(ordered.to_dask())
    np.testing.assert_array_equal(ordered.to_dask().compute(), ordered.to_numpy())


def test_arrays_over_different_stores_are_different_arrays(tmp_path: Path) -> None:
    # Used to happen: the same rows in two stores had one name, and Dask took the values of one for those of the other.
    rows = make_rows(5)
    lazy, exact = [], []
    for name, noise in (("a", 1.0), ("b", 2.0)):
        model = new_store(str(tmp_path / name))
        (block,) = model.create(model.work([request(rows, layers=[0])]))
        values = np.full((5, 1, 1, D_MODEL), noise, np.float32)
        Generation(model.location / block.generation).write_block(0, {"resid_post": values})
        selection = model.select([row.key for row in rows], "resid_post", "prompt_end")
        lazy += [selection.to_dask(), selection.isel(slice(None, None, -1)).to_dask(), selection.to_dask("stored")]
        exact += [noise] * 3
    assert len({array.name for array in lazy}) >= 4
    found = dask.compute(*lazy, lazy[0] - lazy[3])
    for array, value in zip(found, [*exact, -1.0], strict=True):
        assert (array == value).all()
    again = new_store(str(tmp_path / "a")).select([row.key for row in rows], "resid_post", "prompt_end")
    assert again.to_dask().name == lazy[0].name


def test_a_dask_array_survives_pickling(tmp_path: Path) -> None:
    model = filled(tmp_path, "bfloat16")
    lazy = pick(model, SCATTERED, layers=[4, 1]).to_dask("stored")
    again = pickle.loads(pickle.dumps(lazy))
    np.testing.assert_array_equal(again.compute().astype(np.float32), reference(SCATTERED, [4, 1]))


def test_damage_is_found_where_the_dask_array_is_computed(tmp_path: Path) -> None:
    model = filled(tmp_path)
    generation = next(each for each in model.generations() if 0 in each.plan.layers)
    path = generation.shard("resid_post", 0).path
    data = bytearray(path.read_bytes())
    data[10] ^= 1  # in the first chunk
    path.write_bytes(data)
    lazy = pick(model, TEXTS).to_dask()
    with pytest.raises(DamageError, match="layer position 0"):
        lazy.mean().compute()
    np.testing.assert_array_equal(lazy[:, 1].compute(), reference(TEXTS, [1])[:, 0])


# -- xarray ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_xarray_has_rows_by_key_and_layers_by_number(tmp_path: Path, dtype: Any) -> None:
    model = filled(tmp_path, dtype)
    array = pick(model, SCATTERED, layers=[5, 0, 3]).to_xarray()
    assert (array.name, array.dims, array.dtype) == ("resid_post", ("row", "layer", "d_model"), np.float32)
    assert array["row"].values.tolist() == [row.key for row in SCATTERED]
    assert array["layer"].values.tolist() == [5, 0, 3]
    assert isinstance(array.data, da.Array)
    exact = reference(SCATTERED, [5, 0, 3])
    np.testing.assert_array_equal(array.values, exact)
    np.testing.assert_array_equal(array.sel(row=SCATTERED[2].key).values, exact[2])
    np.testing.assert_array_equal(array.sel(layer=3).values, exact[:, 2])
    np.testing.assert_array_equal(array.sel(row=SCATTERED[4].key, layer=0).values, exact[4, 1])
    np.testing.assert_array_equal(array.sel(row=[SCATTERED[1].key, SCATTERED[0].key]).values, exact[[1, 0]])
    np.testing.assert_allclose(array.mean("row").values, exact.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert array.attrs == {
        "component": "resid_post",
        "position": "prompt_end",
        "model": MODEL,
        "captures": sorted(generation.id for generation in model.generations()),
        "stored_dtype": dtype,
    }
    stored = pick(model, SCATTERED).to_xarray("stored")
    assert stored.dtype == NUMPY_DTYPES[dtype]
    np.testing.assert_array_equal(stored.values.astype(np.float32), reference(SCATTERED))


def test_one_layer_is_a_coordinate_without_axis(tmp_path: Path) -> None:
    filled(tmp_path)
    array = ActivationStore.open(str(tmp_path)).select(site="resid_post.4").to_xarray()
    assert array.dims == ("row", "d_model")
    assert array["layer"].item() == 4


def test_an_xarray_of_all_tokens_gives_a_rows_tokens_by_its_key(tmp_path: Path) -> None:
    model = filled(tmp_path, position=ALL_TOKENS)
    array = pick(model, SCATTERED, ALL_TOKENS, [4, 1]).to_xarray()
    assert array.dims == ("token", "layer", "d_model")
    lengths = [row.spans.response_end for row in SCATTERED]
    assert array["row"].values.tolist() == [row.key for row in SCATTERED for _ in range(row.spans.response_end)]
    assert array["token_index"].values.tolist() == [token for length in lengths for token in range(length)]
    for row in SCATTERED:
        np.testing.assert_array_equal(array.sel(row=row.key).values, reference([row], [4, 1], ALL_TOKENS))
    first = array[array["token_index"] == 0]
    np.testing.assert_array_equal(first.sel(layer=1).values, reference(SCATTERED, [1], "token:0")[:, 0])


# -- torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["prompt_end", ALL_TOKENS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_has_the_bits_that_are_stored(tmp_path: Path, dtype: Any, position: str) -> None:
    model = filled(tmp_path, dtype, position=position)
    for layers in (None, [5, 0]):
        selection = pick(model, SCATTERED, position, layers)
        exact = torch.from_numpy(reference(SCATTERED, selection.layers, position))
        found = selection.to_torch()
        assert (found.dtype, tuple(found.shape)) == (torch.float32, selection.shape)
        assert torch.equal(found, exact)
        stored = selection.to_torch("stored")
        assert stored.dtype == getattr(torch, dtype)
        assert torch.equal(stored, exact.to(stored.dtype))
        found += 1  # the tensor is the caller's own
        assert torch.equal(selection.to_torch(), exact)


def test_bfloat16_reaches_torch_bit_for_bit(tmp_path: Path) -> None:
    model = new_store(str(tmp_path), "bfloat16")
    (block,) = model.create(model.work([request(make_rows(3), layers=[0], dtype="bfloat16")]))
    bits = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F7F, 0xFF7F, 0x3F80] * 6, np.uint16)
    values = bits.view(NUMPY_DTYPES["bfloat16"]).reshape(3, 1, 1, D_MODEL)
    generation = Generation(model.location / block.generation)
    generation.write_block(0, {"resid_post": values})
    found = model.select(generation.keys, "resid_post", "prompt_end").to_torch("stored")
    assert found.view(torch.int16).numpy().tobytes() == bits.tobytes()


# -- without the library -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "method", "package"),
    [
        ("dask", "to_dask", "dask[array]"),
        ("dask.array", "to_dask", "dask[array]"),
        ("xarray", "to_xarray", "xarray"),
        ("dask.array", "to_xarray", "dask[array]"),
        ("torch", "to_torch", "torch"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, method: str, package: str
) -> None:
    selection = pick(filled(tmp_path), SCATTERED)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResidError) as caught:
        getattr(selection, method)()
    assert f"this needs {package}, which is not installed" in str(caught.value)
    assert f"remedy: pip install '{package}'" in str(caught.value)
    np.testing.assert_array_equal(selection.to_numpy(), reference(SCATTERED))


def test_reading_needs_neither_torch_nor_dask_nor_xarray(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    code = (
        "import sys\n"
        "for name in ('torch', 'dask', 'xarray', 'ray', 'transformers'): sys.modules[name] = None\n"
        "from store.activations import ActivationStore\n"
        "selection = ActivationStore.open(sys.argv[1]).select()\n"
        "print(selection.to_numpy().shape, selection.mean().shape)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"({len(TEXTS)}, {LAYERS}, {D_MODEL}) ({LAYERS}, {D_MODEL})"
