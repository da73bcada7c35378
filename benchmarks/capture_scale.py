"""Peak memory of a capture, and whether its cost per row stays the same from 1,000 to 20,000 rows.

    python benchmarks/capture_scale.py memory          # the real model, in a process of its own for each engine
    python benchmarks/capture_scale.py rows            # a tiny model with random weights, whole blocks into a store

Memory is VmHWM of the process, beside that of one that only loads the model, and is compared with 1.3 x weights + keys
and values of the passes that others stand behind + one block.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

MB = 1e6


def high_water() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


def measure(path: str, prompts: int) -> None:
    """Load the model, capture with one engine (or nothing), and print what it took."""
    from common import SMOLLM2, prepare

    from pipeline.capture import CaptureEngine
    from store.generation import GenerationPlan

    model, rows = prepare(SimpleNamespace(model=SMOLLM2, threads=1, prompts=prompts))
    loaded = high_water()
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters()) / MB
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
    block = 0.0
    if path != "load":
        values = CaptureEngine(model, packed=path == "packed").run(rows, plan)
        block = sum(array.nbytes for array in values.values()) / MB
    peak = high_water()
    over = (peak - loaded) / weights
    print(f"{path}: weights {weights:.0f} MB, peak after loading {loaded:.0f} MB, at the end {peak:.0f} MB "
          f"(+{peak - loaded:.0f} MB, {over:.2f} x weights), block {block:.1f} MB")  # fmt: skip


def flat(counts: list[int]) -> None:
    """Capture ever more rows of a tiny model into a store, as a worker does it, and print the cost of each row."""
    sys.path += [str(Path(__file__).parent.parent / "tests")]
    from slow_reference import random_rows, tiny

    from pipeline import workers
    from pipeline.cluster_ledger import Ledger, run_inline
    from store.activations import ActivationStore, CaptureRequest
    from store.location import Location

    model = tiny("llama")
    workers._load = lambda ref, fingerprint: model  # type: ignore[assignment]
    manifest = {"fingerprint": model.fingerprint, "dtype": "float32", "n_layers": 3, "d_model": 48, "family": "llama"}
    rates = {}
    for count in counts:
        rows = random_rows([(20 + 7 * n % 41, 0) for n in range(count)], seed=count, model=model.fingerprint)
        with tempfile.TemporaryDirectory() as folder:
            store = ActivationStore.open(Location.of(folder)).add_model(manifest)
            request = CaptureRequest(tuple(rows), ("resid_post",), (0, 1, 2), ("prompt_end",), "float32")
            _, blocks = store.assign([request], 500, "none")
            worker = workers.CaptureWorker(folder, model.ref, model.fingerprint, 2048, {"study": "scale"})
            started, cpu = time.perf_counter(), time.process_time()
            report = run_inline(Ledger(blocks, 1, None), lambda w=worker: w, {}, 1)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        assert report.done == len(blocks)
        rates[count] = cpu / count
        each = f"{1e6 * wall / count:.0f} us a row, {1e6 * cpu / count:.0f} us CPU"
        print(f"{count} rows in {len(blocks)} blocks: {each}, peak memory {high_water():.0f} MB")
    print(f"CPU time a row, {counts[-1]} rows against {counts[0]}: {rates[counts[-1]] / rates[counts[0]]:.2f} x")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=("memory", "rows", "one"))
    options.add_argument("--path", default="packed")
    options.add_argument("--prompts", type=int, default=64)
    args = options.parse_args()
    if args.what == "one":
        measure(args.path, args.prompts)
    elif args.what == "rows":
        flat([1000, 5000, 20000])
    else:
        for path in ("load", "modules", "packed"):
            command = [sys.executable, __file__, "one", "--path", path, "--prompts", str(args.prompts)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
