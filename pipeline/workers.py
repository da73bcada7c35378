"""What runs on a worker: a loaded model that captures blocks, or replays them, and commits what it made."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from pipeline.capture import CaptureEngine
from pipeline.gguf_files import cache_folder
from pipeline.models import LoadedModel, load, model_fingerprint
from pipeline.replay import Job, Output, ReplayEngine
from store.activations import ActivationStore, BlockRef
from store.conditions import Condition, MonitorPlan
from store.errors import MismatchError
from store.generation import Generation
from store.location import Location
from store.model_ref import ModelRef
from store.results import ResultStore
from store.rows import Row
from store.schemas import TABLES
from store.study import Decoding
from store.study_types import EngineName

if TYPE_CHECKING:
    from pipeline.vllm_engine import VllmEngine


def _load(ref: ModelRef, fingerprint: str) -> LoadedModel:
    """Load the model that the driver described.

    Raises:
        MismatchError: if its files are others on this machine.
    """
    _set_threads()
    model = load(ref)
    _check_files(ref, model.fingerprint, fingerprint)
    return model


def _set_threads() -> None:
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdecimal():
        torch.set_num_threads(int(threads))


def _check_files(ref: ModelRef, found: str, fingerprint: str) -> None:
    if found != fingerprint:
        raise MismatchError(
            f"{ref.source} has fingerprint {found[:16]} on this worker, and {fingerprint[:16]} where the "
            "study was started\n  remedy: pin `revision`, or give every node the same files"
        )


def release_engine(engine: EngineName) -> None:
    """Free what workers of an engine keep in this process, where they ran in it, for the stages that follow."""
    if engine == "vllm" and "pipeline.vllm_engine" in sys.modules:
        from pipeline.vllm_engine import release

        release()


class CaptureWorker:
    """Captures blocks of one model's rows into the store."""

    def __init__(
        self, store: str, ref: ModelRef, fingerprint: str, token_budget: int | None, provenance: Mapping[str, Any]
    ):
        self.store = ActivationStore.open(Location.of(store)).model(fingerprint)
        self.model = _load(ref, fingerprint)
        self.engine = CaptureEngine(self.model, token_budget, remember=cache_folder())
        self.provenance = dict(provenance)
        self._generations: dict[str, Generation] = {}  # their row tables are read once
        write_receipt(self.store.location, self.model)

    def run(self, block: BlockRef) -> dict[str, Any]:
        """Capture and commit one block.

        Raises:
            NonFiniteError: if a row's activations are not finite; nothing is committed.
        """
        return self.compute(block)()

    def compute(self, block: BlockRef) -> Callable[[], dict[str, Any]]:
        """Capture one block; return what commits it, on whatever thread, and raises what `run` does.

        The block stays claimed until that was called.
        """
        started = time.monotonic()
        generation = self._generations.setdefault(block.generation, Generation(self.store.location / block.generation))
        start, stop = generation.plan.block_range(block.block)
        with contextlib.ExitStack() as stack:
            wanted = stack.enter_context(generation.claim(block.block))
            # Another capture may have made it in the meantime.
            values = self.engine.run(generation.rows[start:stop], generation.plan) if wanted else None
            claimed = stack.pop_all()

        def commit() -> dict[str, Any]:
            written = False
            with claimed:
                if values is not None:
                    provenance = {
                        **self.provenance,
                        "device": str(self.model.device),
                        "threads": torch.get_num_threads(),
                    }
                    written = generation.write_block(block.block, values, provenance)
            return {"rows": stop - start, "written": written, "seconds": time.monotonic() - started}

        return commit


def write_receipt(folder: Location, model: LoadedModel) -> None:
    """Keep the site self-test's receipt beside the data; one per distinct receipt content is enough, so first wins."""
    if model.receipt is not None:
        (folder / "self_test.json").create(json.dumps(model.receipt.model_dump(mode="json"), indent=1).encode())


@dataclass(frozen=True)
class ReplayItem:
    """One text to generate: its row, the name of its condition, and its identity."""

    row: Row
    condition: str  # condition key
    seed: int
    key: str  # generation key


@dataclass(frozen=True)
class ReplayBlock:
    """Items that are generated and committed together."""

    id: str
    items: tuple[ReplayItem, ...]


class ReplayWorker:
    """Generates blocks of text under interventions and writes them to the results."""

    def __init__(
        self,
        results: str,
        ref: ModelRef,
        fingerprint: str,
        conditions: Mapping[str, Condition],
        decoding: Decoding,
        monitor: MonitorPlan | None,
        batch_rows: int,
        study: str,
        decoding_key: str,
        provenance: Mapping[str, Any],
        engine: EngineName = "resid",
    ):
        """Load the model into the engine that the study names.

        Raises:
            ModelError: if that engine is not installed, or does not serve the model.
            MismatchError: if the model's files are others on this machine.
        """
        self.results = ResultStore(Location.of(results))
        self.fingerprint = fingerprint
        receipts = self.results.location / "receipts" / fingerprint[:16]
        self.engine: ReplayEngine | VllmEngine
        if engine == "vllm":
            from pipeline.vllm_engine import VllmEngine, check_model, vllm_version

            provenance = {**provenance, "engine": f"vllm {vllm_version()}"}
            check_model(ref)
            _check_files(ref, model_fingerprint(ref), fingerprint)
            _set_threads()
            self.engine = VllmEngine(ref, decoding, monitor, batch_rows)
            laws = json.dumps({**dataclasses.asdict(self.engine.laws), "engine": self.engine.path}, indent=1)
            (receipts / "self_test_vllm.json").create(laws.encode())
        else:
            model = _load(ref, fingerprint)
            self.engine = ReplayEngine(model, decoding, monitor, batch_rows)
            write_receipt(receipts, model)
        self.conditions, self.monitor = dict(conditions), monitor
        self.study, self.decoding_key, self.provenance = study, decoding_key, dict(provenance)

    def run(self, block: ReplayBlock) -> dict[str, Any]:
        """Generate and commit one block; the generations are committed last, which makes the block done."""
        started = time.monotonic()
        jobs = [Job(item.row, self.conditions[item.condition], item.seed) for item in block.items]
        outputs = self.engine.run(jobs)
        if self.monitor is not None:
            monitored = self._monitored(block, outputs)
            self.results.write_block("monitored", block.id, monitored, provenance=self.provenance)
        if (effects := self._effects(block, outputs)).num_rows:
            self.results.write_block("intervention_effects", block.id, effects, provenance=self.provenance)
        written = self.results.write_block(
            "generations", block.id, self._generations(block, outputs), provenance=self.provenance
        )
        tokens = sum(len(output.token_ids) for output in outputs)
        return {"rows": len(outputs), "tokens": tokens, "written": written, "seconds": time.monotonic() - started}

    def _generations(self, block: ReplayBlock, outputs: list[Output]) -> pa.Table:
        versions = self.provenance["versions"]
        created = datetime.now(UTC)
        records = [
            {
                "generation_key": item.key,
                "study": self.study,
                "model": self.fingerprint,
                "row_key": item.row.key,
                "prompt_id": item.row.prompt_id,
                "condition_key": item.condition,
                "decoding_key": self.decoding_key,
                "seed": item.seed,
                "text": self.engine.text(output),
                "token_ids": output.token_ids,
                "n_tokens": len(output.token_ids),
                "finish_reason": output.finish_reason,
                "code_version": versions["resid"],
                "transformers_version": versions["transformers"],
                "torch_version": versions["torch"],
                "created": created,
            }
            for item, output in zip(block.items, outputs, strict=True)
        ]
        return pa.Table.from_pylist(records, schema=TABLES["generations"])

    def _effects(self, block: ReplayBlock, outputs: list[Output]) -> pa.Table:
        records = []
        for item, output in zip(block.items, outputs, strict=True):
            operations = self.conditions[item.condition].operations
            for effect in output.effects:
                operation, changed = operations[effect.operation], effect.change > 0
                records.append(
                    {
                        "generation_key": item.key,
                        "intervention": effect.operation,
                        "kind": operation.kind,
                        "component": operation.site.component,
                        "layer": operation.site.layer,
                        "n_tokens": effect.n_tokens,
                        "change": effect.change,
                        "largest_share": effect.largest / effect.change if changed else None,
                        "largest_token": effect.token if changed else None,
                        "max_relative": effect.max_relative,
                        "mean_relative": effect.mean_relative,
                    }
                )
        return pa.Table.from_pylist(records, schema=TABLES["intervention_effects"])

    def _monitored(self, block: ReplayBlock, outputs: list[Output]) -> pa.Table:
        assert self.monitor is not None
        names, keys = self.monitor.names, self.monitor.keys
        columns: dict[str, list[Any]] = {name: [] for name in TABLES["monitored"].names}
        for item, output in zip(block.items, outputs, strict=True):
            for token, values in enumerate(output.monitored):  # values [site, direction]
                for s, site in enumerate(self.monitor.units):
                    for d, name in enumerate(names):
                        columns["generation_key"].append(item.key)
                        columns["direction"].append(name)
                        columns["direction_key"].append(keys[d])
                        columns["component"].append(site.component)
                        columns["layer"].append(site.layer)
                        columns["token_index"].append(token)
                        columns["projection"].append(float(values[s, d]))
        return pa.table(columns, schema=TABLES["monitored"])
