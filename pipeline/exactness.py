"""Whether a text depends on what ran beside it: the same texts alone and batched, with and without shared work.

In float32 greedy texts agree but for near ties of two logits. In bfloat16 and float16 the products of a batch of
another size round otherwise, and texts part. How many do is the noise floor: two conditions may differ by that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from pipeline.models import LoadedModel
from pipeline.replay import Job, Output, ReplayEngine
from store.conditions import Condition, Operation
from store.rows import Row
from store.sites import Site
from store.study import ConditionSpec, Decoding

SEED = 0
N_CONDITIONS = 8  # the plain model, and a random direction projected out at one block in each of the others


@dataclass(frozen=True)
class Agreement:
    """How many texts of one way to run are those of all rows at once."""

    way: str
    n_texts: int
    n_equal: int
    first_difference: float | None  # median over texts that differ: the first token that does, counted from 0


def agreements(model: LoadedModel, rows: Sequence[Row], decoding: Decoding) -> Iterator[Agreement]:
    """Yield how each way to run agrees with all rows at once: `rows` under `N_CONDITIONS` conditions, each way once.

    The ways: the same again; a quarter of the rows at a time; one at a time; nothing shared between conditions; and,
    where the engine can, with drafts.

    Raises:
        NonFiniteError: if a text runs into NaN or infinity.
    """
    jobs = [Job(row, condition) for row in rows for condition in _conditions(model)]
    whole = _run(model, jobs, decoding, len(jobs))
    ways: dict[str, dict[str, bool]] = {"the same again": {}, "a quarter at a time": {}, "one at a time": {}}
    ways["nothing shared"] = {"share_prefill": False, "share_decoding": False}
    if decoding.greedy and ReplayEngine(model, decoding).path == "packed":
        ways["with drafts"] = {"share_drafts": True}
    at_once = {"a quarter at a time": max(1, len(jobs) // 4), "one at a time": 1}
    for way, how in ways.items():
        outputs = _run(model, jobs, decoding, at_once.get(way, len(jobs)), **how)
        firsts = [_first_difference(a, b) for a, b in zip(whole, outputs, strict=True)]
        apart = [first for first in firsts if first is not None]
        yield Agreement(way, len(jobs), len(jobs) - len(apart), median(apart) if apart else None)


def _run(model: LoadedModel, jobs: Sequence[Job], decoding: Decoding, rows: int, **how: bool) -> list[Output]:
    engine = ReplayEngine(model, decoding, batch_rows=rows, **how)  # type: ignore[arg-type]
    # A batch is really so small: the engine would fill it up from what waits.
    return [output for start in range(0, len(jobs), rows) for output in engine.run(jobs[start : start + rows])]


def _conditions(model: LoadedModel) -> list[Condition]:
    generator = np.random.default_rng(SEED)
    n_layers, d_model = model.architecture.n_layers, model.architecture.d_model
    layers = np.linspace(0, n_layers - 1, N_CONDITIONS - 1).round().astype(int).tolist()
    programs: list[tuple[Operation, ...]] = [()]
    for layer in layers:
        unit = generator.standard_normal((1, d_model))
        vectors = (unit / np.linalg.norm(unit)).astype(np.float32)
        programs.append((Operation("project_out", Site("resid_post", layer), vectors, "all"),))
    names = [f"trial {number}" for number in range(len(programs))]
    return [Condition(n, n, None, None, (), ConditionSpec(), n, p) for n, p in zip(names, programs, strict=True)]


def _first_difference(a: Output, b: Output) -> int | None:
    """Return the first token at which two texts differ; None if they are the same."""
    if (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason):
        return None
    pairs = enumerate(zip(a.token_ids, b.token_ids, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a.token_ids), len(b.token_ids)))
