"""Our files as every other Zarr library reads them: zarr-python without resid, tensorstore, xarray and Dask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tensorstore as ts
import xarray as xr
from store_worker import D_MODEL, LAYERS, make_rows, new_store, request
from test_bridges import DTYPES, LAYOUTS, ROOT, filled, reference

from store.dtypes import NUMPY_DTYPES
from store.generation import Generation
from store.sites import ALL_TOKENS


def written(folder: Path, dtype: str, compression: Any) -> tuple[Generation, np.ndarray]:
    """Return a capture of three positions, its last block partial, and its bits [row, layer, position, d_model]."""
    model = new_store(str(folder), dtype)
    positions = ("prompt_end", "response_avg", "token:0")
    rows = make_rows(11)
    _, blocks = model.assign([request(rows, positions=positions, dtype=dtype)], 4, compression)
    (generation,) = model.generations()
    kind = NUMPY_DTYPES[dtype]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((11, LAYERS, 3, D_MODEL)) * 10.0 ** rng.integers(-40, 4, (11, LAYERS, 3, D_MODEL))
    values = values.astype(kind)
    values[0, 0, 0, :4] = np.array([-0.0, 0.0, np.finfo(np.float32).tiny / 2, -1e-45], np.float32).astype(kind)
    for block in blocks:
        start, stop = generation.plan.block_range(block.block)
        assert generation.write_block(block.block, {"resid_post": values[start:stop]})
    return generation, values


@pytest.mark.parametrize("compression", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorstore_opens_our_files_as_they_are(tmp_path: Path, dtype: str, compression: Any) -> None:
    generation, values = written(tmp_path, dtype, compression)
    path = str(generation.location.path / "resid_post")
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, open=True, read=True).result()
    assert array.dtype.name == dtype
    assert array.domain.labels == ("row", "layer", "position", "d_model")
    assert array.shape == values.shape
    assert array.read().result().tobytes() == values.tobytes()
    assert array[5, 3, 1].read().result().tobytes() == values[5, 3, 1].tobytes()


@pytest.mark.parametrize("compression", LAYOUTS)
def test_tensorstore_opens_a_capture_of_all_tokens(tmp_path: Path, compression: Any) -> None:
    model = filled(tmp_path, "bfloat16", compression, ALL_TOKENS)
    generation = next(each for each in model.generations() if 0 in each.plan.layers)
    opened = {}
    for name in ("resid_post", "offsets"):
        store = {"driver": "file", "path": str(generation.location.path / name)}
        opened[name] = ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result().read().result()
    for row, (start, stop) in zip(generation.rows, opened["offsets"], strict=True):
        found = opened["resid_post"][start:stop].astype(np.float32)
        np.testing.assert_array_equal(found, reference([row], range(4), ALL_TOKENS))


@pytest.mark.parametrize("compression", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_xarray_and_dask_open_our_groups_bit_for_bit(tmp_path: Path, dtype: str, compression: Any) -> None:
    generation, values = written(tmp_path, dtype, compression)
    dataset = xr.open_zarr(generation.location.path, consolidated=False, chunks={})
    variable = dataset["resid_post"]
    assert (variable.dtype, variable.dims) == (values.dtype, ("row", "layer", "position", "d_model"))
    assert variable.compute().values.tobytes() == values.tobytes()
    key = generation.keys[6]
    assert variable.sel(row=key, layer=2, position="token:0").values.tobytes() == values[6, 2, 2].tobytes()
    lazy = da.from_zarr(str(generation.location.path), component="resid_post")
    assert lazy.dtype == values.dtype
    assert lazy.compute(scheduler="synchronous").tobytes() == values.tobytes()
    mean = lazy.mean(axis=0, dtype="f4").compute(scheduler="synchronous")
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-2)


STOCK = """
import sys
import numpy as np
if sys.argv[2] == "bfloat16":
    import store.dtypes  # the one thing that stock zarr-python lacks
import zarr
assert [name for name in sys.modules if name.startswith("store.")] == (
    ["store.dtypes"] if sys.argv[2] == "bfloat16" else []
)
group = zarr.open_group(sys.argv[1], mode="r")
sys.stdout.buffer.write(group["resid_post"][:].tobytes())
"""


@pytest.mark.parametrize("compression", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_zarr_reads_our_files_without_resid(tmp_path: Path, dtype: str, compression: Any) -> None:
    generation, values = written(tmp_path, dtype, compression)
    command = [sys.executable, "-W", "error", "-c", STOCK, str(generation.location.path), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    assert done.stdout == values.tobytes()


@pytest.mark.parametrize("compression", LAYOUTS)
def test_a_flipped_byte_is_noticed_by_other_libraries_too(tmp_path: Path, compression: Any) -> None:
    generation, _ = written(tmp_path, "bfloat16", compression)
    path = generation.shard("resid_post", 1).path
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    store = {"driver": "file", "path": str(generation.location.path / "resid_post")}
    array = ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
    with pytest.raises(ValueError, match="Digest mismatch"):
        array.read().result()
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)crc|checksum"):
        xr.open_zarr(generation.location.path, consolidated=False)["resid_post"].load()
