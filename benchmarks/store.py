"""The activation store beside np.memmap and what else activations are kept in, in one run, on one core.

    python benchmarks/store.py              # 4 GiB of real activations, tiled with noise; needs 30 GB of disk

R is the speed of a method as a part of the memmap's, which keeps the same values layer by layer in one file and checks
nothing. resid reads back what it wrote with every checksum compared. "Cold": the files' pages were dropped before.
Means convert bfloat16 to float32 and sum 256 rows at a time, over the memmap with the very same code.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paths  # noqa: F401
from store_formats import WRITERS, Case, Readers, real_activations, write_resid_zarr

LAYERS_READ = (5, 14, 26)
MIB, GIB = 1 << 20, 1 << 30
BARS = {
    "write": 0.60,
    "write, through zarr-python": 0.40,
    "one layer, warm": 0.60,
    "one layer, cold": 0.60,
    "all layers, warm": 0.80,
    "mean of a layer": 0.60,
    "mean of a layer, Dask": 0.25,
}


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
    real = real_activations(96)
    case = Case(folder, real, size)
    print(
        f"{case.bytes / GIB:.2f} GiB: {case.n_rows:,} rows x {case.n_layers} layers x {case.d_model}, bfloat16, "
        f"{case.plan.n_blocks} shards of {case.plan.shard_shape.shard_bytes / MIB:.0f} MiB; one core; "
        f"medians of {repeats} (writing: of 3; peers' writing: once)"
    )
    rates: dict[str, dict[str, float]] = {}
    rates["write"], rates["write, through zarr-python"] = write_all(case)
    started = time.perf_counter()
    readers, methods = Readers(case, (7, *LAYERS_READ)), list(WRITERS)
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


def write_all(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Write by every method; those that a bar compares three times, in turn. What is read later stays."""
    seconds: dict[str, list[float]] = {}
    for repeat in range(3):
        for name, write in (*WRITERS.items(), ("general", write_resid_zarr)):
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
