"""Peak memory of both engines, the cost of a row from 1,000 to 20,000 rows, and what a second worker brings.

    python benchmarks/scale.py memory          # the real model, in a process of its own for each engine
    python benchmarks/scale.py rows            # a tiny model with random weights, whole blocks into a store
    python benchmarks/scale.py workers         # the real model, one Ray worker and two in turn, one thread each

Memory is VmHWM of the process, beside that of one that only loads the model. The bar is 1.3 x (weights + keys and
values + one block), on top of what the interpreter and its libraries hold before the model is loaded. Rates of workers
are those from the first completed block of every worker on, when all have loaded the model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import paths  # noqa: F401

MB = 1e6
BLOCK_ROWS = 16


def high_water() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


def measure(path: str, prompts: int) -> None:
    """Load the model, run one engine (or nothing), and print what it took."""
    import torch
    from common import SMOLLM2, plan_of, prepare

    from pipeline.capture import CaptureEngine
    from pipeline.replay import Job, ReplayEngine
    from store.study import Decoding

    libraries = high_water()
    model, rows = prepare(SimpleNamespace(model=SMOLLM2, threads=1, prompts=prompts))
    loaded = high_water()
    config = model.model.config
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters()) / MB
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 / MB  # keys and values
    held = block = 0.0
    if path == "replay":
        from replay import conditions_of

        conditions = conditions_of(model, rows[:16])
        engine = ReplayEngine(model, Decoding(max_new_tokens=24), batch_rows=64)
        engine.run([Job(row, condition) for row in rows[: max(1, prompts // 4)] for condition in conditions])
        length = max(len(row.token_ids) for row in rows) + 24
        held, block = 64 * length * token, 64 * config.vocab_size * 4 / MB  # of a step: logits
    elif path != "load":
        plan = plan_of(model, rows)
        values = CaptureEngine(model, packed=path == "packed").run(rows, plan)
        block = sum(array.nbytes for array in values.values()) / MB
    peak = high_water()
    bar = weights + held + block
    print(f"{path}: libraries {libraries:.0f} MB, with the model {loaded:.0f} MB, at the end {peak:.0f} MB; "
          f"weights {weights:.0f} MB, keys and values {held:.0f} MB, block {block:.1f} MB: "
          f"{(peak - libraries) / bar:.2f} x their sum, {torch.get_num_threads()} thread")  # fmt: skip


def workers(prompts: int, repeats: int) -> None:
    """Capture the same rows with one Ray worker and with two, in turn, into stores of their own."""
    from common import SMOLLM2, prepare

    from pipeline.cluster import Cluster
    from pipeline.workers import CaptureWorker
    from store.activations import ActivationStore, CaptureRequest
    from store.location import Location
    from store.ray_settings import RaySettings

    model, rows = prepare(SimpleNamespace(model=SMOLLM2, threads=1, prompts=prompts))
    layers = tuple(range(model.architecture.n_layers))
    manifest = {
        "fingerprint": model.fingerprint,
        "dtype": "float32",
        "n_layers": len(layers),
        "d_model": model.architecture.d_model,
        "family": "llama",
    }
    ref, fingerprint = model.ref, model.fingerprint
    rates: dict[int, list[float]] = {1: [], 2: []}
    with Cluster(RaySettings(address="local")):
        for _ in range(repeats):
            for count, found in rates.items():
                with (
                    tempfile.TemporaryDirectory() as folder,
                    Cluster(RaySettings(address="local", workers=count, cpus_per_worker=1)) as cluster,
                ):
                    store = ActivationStore.open(Location.of(folder)).add_model(manifest)
                    request = CaptureRequest(tuple(rows), ("resid_post",), layers, ("prompt_end",), "float32")
                    _, blocks = store.assign([request], BLOCK_ROWS, "none")
                    done: list[tuple[float, int]] = []
                    report = cluster.run_blocks(
                        CaptureWorker,
                        {
                            "store": folder,
                            "ref": ref,
                            "fingerprint": fingerprint,
                            "token_budget": 512,
                            "provenance": {"study": "scale"},
                        },
                        blocks,
                        on_done=lambda block, result, done=done: done.append((time.perf_counter(), result["rows"])),
                    )
                assert report.done == len(blocks)
                # From then on every worker has the model; the last blocks of two workers need not end together.
                start, end = done[2 * count - 1][0], done[-1][0]
                found.append(sum(n for _, n in done[2 * count :]) / (end - start))
    one, two = (statistics.median(found) for found in rates.values())
    print(f"{len(rows)} rows in blocks of {BLOCK_ROWS}: one worker {one:.1f} rows/s, two {two:.1f}: {two / one:.2f} x, "
          f"medians of {repeats}")  # fmt: skip


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


def flat_replay(counts: list[int]) -> None:
    """Generate ever more texts of a tiny model in one run of the engine, and print the cost of each."""
    from slow_reference import Step, condition, random_rows, tiny
    from torch import ones

    from pipeline.replay import Job, ReplayEngine
    from store.sites import Site
    from store.study import Decoding

    model = tiny("llama")
    conditions = [condition("baseline", []), condition("add", [Step("add", Site("resid_post", 1), ones(1, 48))])]
    engine = ReplayEngine(model, Decoding(max_new_tokens=4), batch_rows=64)
    engine.stop_ids = frozenset()
    rates = {}
    for count in counts:
        rows = random_rows([(20 + 7 * n % 41, 0) for n in range(count // 2)], seed=count, model=model.fingerprint)
        jobs = [Job(row, condition) for row in rows for condition in conditions]
        cpu = time.process_time()
        engine.run(jobs)
        rates[count] = (time.process_time() - cpu) / count
        print(f"{count} texts of 4 tokens: {1e6 * rates[count]:.0f} us CPU each, peak memory {high_water():.0f} MB")
    print(f"CPU time a text, {counts[-1]} texts against {counts[0]}: {rates[counts[-1]] / rates[counts[0]]:.2f} x")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=("memory", "rows", "workers", "one"))
    options.add_argument("--path", default="packed")
    options.add_argument("--prompts", type=int, help="default 64; 416 for workers")
    options.add_argument("--repeats", type=int, default=5, help="of workers (default 5)")
    args = options.parse_args()
    if args.what == "one":
        measure(args.path, args.prompts or 64)
    elif args.what == "workers":
        workers(args.prompts or 416, args.repeats)
    elif args.what == "rows":
        flat([1000, 5000, 20000])
        flat_replay([1000, 5000, 20000])
    else:
        for path in ("load", "modules", "packed", "replay"):
            command = [sys.executable, __file__, "one", "--path", path, "--prompts", str(args.prompts or 64)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
