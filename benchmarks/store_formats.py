"""The formats that `benchmarks/store.py` compares: the same rows, written and read by each of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

POOL = 6  # blocks of different values; the store repeats them


def real_activations(prompts: int) -> npt.NDArray[np.float32]:
    """Return SmolLM2's resid_post at the last prompt token, [row, layer, d_model]."""
    import torch
    from common import parser, plan_of, prepare

    from pipeline.capture import CaptureEngine

    args = parser(None, prompts=prompts, repeats=1).parse_args([])
    model, rows = prepare(args)
    torch.set_num_threads(1)
    return CaptureEngine(model).run(rows, plan_of(model, rows))["resid_post"][:, :, 0]


def tiled(real: npt.NDArray[np.float32], rows: int, seed: int) -> npt.NDArray[Any]:
    """Return `rows` rows of real activations, each a little different, in bfloat16: [row, layer, position, d_model]."""
    import ml_dtypes

    rng = np.random.default_rng(seed)
    chosen = real[rng.integers(len(real), size=rows)]
    chosen *= 1 + 0.02 * rng.standard_normal(chosen.shape, dtype=np.float32)
    return chosen.astype(ml_dtypes.bfloat16)[:, :, None]


class Case:
    """The same rows in every format, in one folder."""

    def __init__(self, folder: Path, real: npt.NDArray[np.float32], size: int):
        from store.activations import ActivationStore, CaptureRequest
        from store.generation import Generation
        from store.rows import Row
        from store.sites import Spans

        self.folder = folder
        _, self.n_layers, self.d_model = real.shape
        self.n_rows = -(-size // (self.n_layers * self.d_model * 2))
        model = "0b" * 32
        manifest = {"fingerprint": model, "dtype": "bfloat16", "n_layers": self.n_layers, "d_model": self.d_model}
        self.store = ActivationStore.open(str(folder / "store")).add_model(manifest)
        rows = tuple(Row(model, f"{i}", (i,), Spans(1, 1)) for i in range(self.n_rows))
        request = CaptureRequest(rows, ("resid_post",), tuple(range(self.n_layers)), ("prompt_end",), "bfloat16")
        _, blocks = self.store.assign([request])
        self.generation = Generation(self.store.location / blocks[0].generation)
        self.plan = self.generation.plan
        self.pool = [tiled(real, self.plan.block_rows, seed) for seed in range(POOL)]
        self.bytes = self.n_rows * self.n_layers * self.d_model * 2

    def blocks(self) -> Iterator[tuple[int, int, int, npt.NDArray[Any]]]:
        """Yield block, first row, last row + 1, values."""
        for block in range(self.plan.n_blocks):
            start, stop = self.plan.block_range(block)
            yield block, start, stop, self.pool[block % POOL][: stop - start]

    def path(self, name: str) -> Path:
        return self.folder / name


# -- writing ---------------------------------------------------------------------------------------------------------


def write_memmap(case: Case) -> None:
    shape = (case.n_layers, case.n_rows, case.d_model)
    mapped = np.memmap(case.path("memmap"), dtype=np.uint16, mode="w+", shape=shape)
    for _, start, stop, values in case.blocks():
        mapped[:, start:stop] = values[:, :, 0].view(np.uint16).transpose(1, 0, 2)
    mapped.flush()
    sync(case.path("memmap"))


def write_resid(case: Case) -> None:
    for block, _, _, values in case.blocks():
        assert case.generation.write_block(block, {"resid_post": values})


def write_resid_zarr(case: Case) -> None:
    """What resid does where its direct writer does not serve: bytes from zarr-python, put in place whole."""
    from store.layout import encode_shard
    from store.location import Location
    from store.shards import describe
    from store.writing import require_finite

    for block, _, _, values in case.blocks():
        require_finite("resid_post", values, case.plan, str)
        data = encode_shard(values, case.plan)
        Location.of(case.path("general") / str(block)).create(data)
        describe(data, case.plan.shard_shape)
        del data  # as when `put_shard` returns: the next shard reuses its memory
    shutil.rmtree(case.path("general"))


def write_zarr(case: Case) -> None:
    import zarr

    array = zarr.create_array(
        zarr.storage.LocalStore(case.path("zarr")),
        name="resid_post",
        shape=(case.n_rows, case.n_layers, 1, case.d_model),
        chunks=(case.plan.block_rows, 1, 1, case.d_model),
        shards=(case.plan.block_rows, case.n_layers, 1, case.d_model),
        dtype=case.plan.shard_shape.dtype,
    )
    for _, start, stop, values in case.blocks():
        array[start:stop] = values
    for file in case.path("zarr").rglob("*"):
        if file.is_file():
            sync(file)
    shutil.rmtree(case.path("zarr"))


def write_tensorstore(case: Case) -> None:
    import tensorstore as ts

    metadata = json.loads((case.generation.location.path / "resid_post" / "zarr.json").read_text())
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(case.path("ts"))}, "metadata": metadata}
    array = ts.open(spec, create=True).result()
    for _, start, stop, values in case.blocks():
        array[start:stop].write(values).result()
    shutil.rmtree(case.path("ts"))


def write_safetensors(case: Case) -> None:
    from safetensors.numpy import save_file

    whole = np.empty((case.n_layers, case.n_rows, case.d_model), dtype=case.plan.shard_shape.dtype)
    for _, start, stop, values in case.blocks():
        whole[:, start:stop] = values[:, :, 0].transpose(1, 0, 2)
    save_file({f"layer_{layer}": whole[layer] for layer in range(case.n_layers)}, case.path("safetensors"))
    sync(case.path("safetensors"))


def write_parquet(case: Case) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.uint16(), case.d_model)  # Parquet has no bfloat16
    schema = pa.schema([pa.field(f"layer_{layer}", kind) for layer in range(case.n_layers)])
    with pq.ParquetWriter(case.path("parquet"), schema, compression="none", use_dictionary=False) as writer:
        for _, _, _, values in case.blocks():
            columns = [
                pa.FixedSizeListArray.from_arrays(
                    pa.array(np.ascontiguousarray(layer).view(np.uint16).ravel()), type=kind
                )
                for layer in values[:, :, 0].transpose(1, 0, 2)
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(values))
    sync(case.path("parquet"))


def sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


WRITERS: dict[str, Callable[[Case], None]] = {
    "memmap": write_memmap,
    "resid": write_resid,
    "zarr-python": write_zarr,
    "tensorstore": write_tensorstore,
    "safetensors": write_safetensors,
    "Parquet": write_parquet,
}


# -- reading ---------------------------------------------------------------------------------------------------------


class Readers:
    """One object a format: layer(l) returns [row, d_model] in memory, row(i) [layer, d_model]."""

    def __init__(self, case: Case, layers: Sequence[int]):
        from store.sites import Spans  # noqa: F401  (registers bfloat16 through the store)

        self.case = case
        self.keys = case.generation.keys
        self.all = self.selection(None)
        # Finding the rows is timed apart: a lazy array, once made, is read many times, as a memmap is.
        self.layers = {layer: self.selection([layer]) for layer in layers}

    def selection(self, layers: list[int] | None) -> Any:
        return self.case.store.select(self.keys, "resid_post", "prompt_end", layers)

    def mapped(self) -> Any:
        shape = (self.case.n_layers, self.case.n_rows, self.case.d_model)
        return np.memmap(self.case.path("memmap"), dtype=np.uint16, mode="r", shape=shape)

    def layer(self, method: str, layer: int) -> Any:
        case = self.case
        group = case.generation.location.path
        if method == "memmap":
            return np.array(self.mapped()[layer])
        if method == "resid":
            return self.layers[layer].to_numpy("stored")
        if method == "zarr-python":
            import zarr

            return zarr.open_array(str(group / "resid_post"), mode="r")[:, layer, 0]
        if method == "tensorstore":
            import tensorstore as ts

            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(group / "resid_post")}}
            return ts.open(spec, open=True).result()[:, layer, 0].read().result()
        if method == "safetensors":
            from safetensors import safe_open

            with safe_open(case.path("safetensors"), framework="pt") as file:
                return file.get_tensor(f"layer_{layer}").clone()
        import pyarrow.parquet as pq

        table = pq.read_table(case.path("parquet"), columns=[f"layer_{layer}"], use_threads=False)
        flat = table.column(0).combine_chunks().values
        return flat.to_numpy().reshape(-1, case.d_model)

    def everything(self, method: str) -> None:
        """Read all layers into memory, a block of rows at a time (or a layer, where that is how it is kept)."""
        case = self.case
        if method == "memmap":
            mapped = self.mapped()
            for _, start, stop, _ in case.blocks():
                np.array(mapped[:, start:stop])
        elif method == "resid":
            for _ in self.all.blocks("stored"):
                pass
        else:
            for layer in range(case.n_layers):
                self.layer(method, layer)

    def row(self, method: str, row: int) -> Any:
        if method == "memmap":
            return np.array(self.mapped()[:, row])
        return self.case.store.select([self.keys[row]], "resid_post", "prompt_end").to_numpy("stored")

    def mean(self, method: str, layer: int) -> Any:
        from store.reduce import column_sums

        case = self.case
        if method == "memmap":
            mapped = self.mapped().view(case.plan.shard_shape.dtype)
            total = sum(column_sums(mapped[layer, start:stop]) for _, start, stop, _ in case.blocks())
            return total / case.n_rows
        selection = self.layers[layer]
        if method == "resid":
            return selection.mean()[0]
        import dask

        with dask.config.set(scheduler="threads", num_workers=1):
            return selection.to_dask()[:, 0].mean(axis=0, dtype="f4").compute()
