"""The activation store beside np.memmap and what else activations are kept in, in one run, on one core.

    python benchmarks/store.py              # 4 GiB of real activations, tiled with noise; needs 30 GB of disk

R is the speed of a method as a part of the memmap's, which keeps the same values layer by layer in one file and checks
nothing. resid reads back what it wrote with every checksum compared. "Cold": the files' pages were dropped before.
Means convert bfloat16 to float32 and sum 256 rows at a time, over the memmap with the very same code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# This script is named like the package that it measures.
sys.path[0] = str(Path(__file__).parents[1])
sys.path.append(str(Path(__file__).parent))

LAYERS_READ = (5, 14, 26)
MIB, GIB = 1 << 20, 1 << 30
POOL = 6  # blocks of different values; the store repeats them
BARS = {
    "write": 0.60,
    "write, through zarr-python": 0.40,
    "one layer, warm": 0.60,
    "one layer, cold": 0.60,
    "all layers, warm": 0.80,
    "mean of a layer": 0.60,
    "mean of a layer, Dask": 0.25,
}


def real_activations(prompts: int) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Return SmolLM2's resid_post at the last prompt token, [row, layer, d_model], and what it was made with."""
    import torch
    from common import parser, prepare

    from pipeline.capture import CaptureEngine
    from store.generation import GenerationPlan

    args = parser(None, prompts=prompts, repeats=1).parse_args([])
    model, rows = prepare(args)
    torch.set_num_threads(1)
    plan = GenerationPlan(
        model=model.fingerprint,
        d_model=model.architecture.d_model,
        components=("resid_post",),
        layers=tuple(range(model.architecture.n_layers)),
        positions=("prompt_end",),
        dtype="float32",
        n_rows=len(rows),
        block_rows=len(rows),
    )
    return CaptureEngine(model).run(rows, plan)["resid_post"][:, :, 0], [row.key for row in rows]


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


# -- reading ---------------------------------------------------------------------------------------------------------


class Readers:
    """One object a format: layer(l) returns [row, d_model] in memory, row(i) [layer, d_model]."""

    def __init__(self, case: Case):
        from store.sites import Spans  # noqa: F401  (registers bfloat16 through the store)

        self.case = case
        self.keys = case.generation.keys
        self.all = self.selection(None)
        # Finding the rows is timed apart: a lazy array, once made, is read many times, as a memmap is.
        self.layers = {layer: self.selection([layer]) for layer in (7, *LAYERS_READ)}

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


def drop(folder: Path) -> None:
    """Drop the pages of all files below a folder from the system's cache."""
    for file in [folder] if folder.is_file() else folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_rss() -> float:
    """Return this process's largest resident memory so far, MiB (not getrusage: that counts its parent's, too)."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_memory(what: str, folder: Path) -> None:
    """Print the peak memory of one process that reads, or writes, in MiB. Runs in a process of its own."""
    from store.activations import ActivationStore

    store = ActivationStore.open(str(folder / "store")).models()[0]
    generation = store.generations()[0]
    if what == "mean":
        store.select(generation.keys, "resid_post", "prompt_end").in_stored_order().mean()
        print(peak_rss())
        return
    plan = generation.plan
    values = np.full((plan.block_rows, len(plan.layers), 1, plan.d_model), 1.5, plan.shard_shape.dtype)
    before = peak_rss()  # with one shard's values
    generation.uncommit(0)
    assert generation.write_block(0, {"resid_post": values})
    print(1 + (peak_rss() - before) * MIB / plan.shard_shape.shard_bytes)


def in_a_process(what: str, folder: Path) -> float:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the activations (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each reading (default 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--measure", choices=["mean", "write"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_memory(args.measure, args.folder)
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="resid-benchmark-") as folder:
        run(Path(folder), int(args.gib * GIB), args.repeats)


def run(folder: Path, size: int, repeats: int) -> None:
    real, _ = real_activations(96)
    case = Case(folder, real, size)
    print(
        f"{case.bytes / GIB:.2f} GiB: {case.n_rows:,} rows x {case.n_layers} layers x {case.d_model}, bfloat16, "
        f"{case.plan.n_blocks} shards of {case.plan.shard_shape.shard_bytes / MIB:.0f} MiB; one core; "
        f"medians of {repeats} (writing: of 3; peers' writing: once)"
    )
    rates: dict[str, dict[str, float]] = {}
    writers = {
        "memmap": write_memmap,
        "resid": write_resid,
        "zarr-python": write_zarr,
        "tensorstore": write_tensorstore,
        "safetensors": write_safetensors,
        "Parquet": write_parquet,
    }
    rates["write"], rates["write, through zarr-python"] = write_all(case, writers)
    started = time.perf_counter()
    readers, methods = Readers(case), list(writers)
    finding = (time.perf_counter() - started) / (2 + len(LAYERS_READ))
    files = {"memmap": "memmap", "safetensors": "safetensors", "Parquet": "parquet"}

    def median(
        action: Callable[[str, int], object], names: list[str], work: float, cold: bool = False
    ) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            layer = LAYERS_READ[repeat % len(LAYERS_READ)]
            for name in names:
                place = folder / files.get(name, "store")
                if cold:
                    drop(place)
                else:
                    action(name, layer)
                seconds[name].append(timed(lambda: action(name, layer)))  # noqa: B023
        return {name: work / statistics.median(found) for name, found in seconds.items()}

    a_layer = case.bytes / case.n_layers
    check(readers, methods)
    rates["one layer, warm"] = median(readers.layer, methods, a_layer)
    rates["one layer, cold"] = median(readers.layer, methods, a_layer, cold=True)
    rates["mean of a layer"] = median(readers.mean, ["memmap", "resid"], a_layer)
    dask = median(
        lambda name, layer: readers.mean("dask" if name == "resid" else name, layer), ["memmap", "resid"], a_layer
    )
    rates["mean of a layer, Dask"] = dask
    rates["all layers, warm"] = median(lambda name, _: readers.everything(name), methods, case.bytes)
    rates["one row, all layers"] = median(
        lambda name, layer: readers.row(name, 997 * layer % case.n_rows), ["memmap", "resid"], case.bytes / case.n_rows
    )
    print_table(rates, methods)
    print(f"\nfinding the {case.n_rows:,} rows by key: {finding:.2f} s")
    mean, write = in_a_process("mean", folder), in_a_process("write", folder)
    print(f"peak memory of a process that takes the mean of all layers: {mean:.0f} MiB (bar: 300)")
    print(f"peak memory of writing a block, its values included: {write:.2f} shards (bar: 2.5)")


def write_all(case: Case, writers: dict[str, Callable[[Case], None]]) -> tuple[dict[str, float], dict[str, float]]:
    """Write by every method; those that a bar compares three times, in turn. What is read later stays."""
    seconds: dict[str, list[float]] = {}
    for repeat in range(3):
        for name, write in (*writers.items(), ("general", write_resid_zarr)):
            if repeat and name not in ("memmap", "resid", "general"):
                continue
            if name == "resid":
                for block in range(case.plan.n_blocks):
                    case.generation.uncommit(block)
            os.sync()
            seconds.setdefault(name, []).append(timed(lambda: write(case)))  # noqa: B023
    rates = {name: case.bytes / statistics.median(found) for name, found in seconds.items()}
    return rates, {"memmap": rates["memmap"], "resid": rates.pop("general")}


def check(readers: Readers, methods: list[str]) -> None:
    """Compare what the methods read: speed of wrong numbers is of no interest."""
    truth = readers.layer("memmap", 7).view(np.uint16)
    for method in methods:
        found = readers.layer(method, 7)
        if method == "safetensors":
            import torch

            found = found.view(torch.int16).numpy()
        assert np.array_equal(np.asarray(found).view(np.uint16).reshape(truth.shape), truth), method
    exact = readers.mean("memmap", 7)
    for method in ("resid", "dask"):
        assert np.allclose(readers.mean(method, 7), exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max()), method


def print_table(rates: dict[str, dict[str, float]], methods: list[str]) -> None:
    print("\n| | memmap, GB/s | " + " | ".join(f"{name}, R" for name in methods[1:]) + " | bar |")
    print("| --- |" + " --: |" * (len(methods) + 1))
    for what, found in rates.items():
        base = found["memmap"]
        cells = [f"{found[name] / base:.2f}" if name in found else "" for name in methods[1:]]
        print(f"| {what} | {base / 1e9:.2f} | " + " | ".join(cells) + f" | {BARS.get(what, '')} |")
    missed = [what for what, bar in BARS.items() if rates[what]["resid"] < bar * rates[what]["memmap"]]
    print("\n" + (f"bars missed: {', '.join(missed)}" if missed else "all bars reached"))


if __name__ == "__main__":
    main()
