"""The vLLM engine against the built-in one, on real weights: `make test-vllm`. Skipped where vLLM is not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMOLLM2

from store.conditions import Condition, MonitorPlan, Operation
from store.errors import ModelError, NonFiniteError
from store.model_ref import ModelRef
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import COMPONENTS, Site, Spans
from store.study import ConditionSpec, Decoding
from store.study_interventions import TokenRange

# vLLM's own code warns of what this project does not use; these run in an environment of their own.
pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.filterwarnings("default"),
]

PROMPTS = Path(__file__).parent.parent / "prompts"
N_PROMPTS, N_TOKENS = 12, 24
NEAR_TIE = 1e-4  # of two logits, relative to the largest absolute one
Texts = list[list[int]]


@pytest.fixture(scope="module")
def rows(smollm2: Any) -> list[Row]:
    from pipeline.chat import prompt_row

    files = [(PROMPTS / f"{name}.jsonl").read_text().splitlines() for name in ("harmful", "harmless")]
    lines = [line for pair in zip(*files, strict=False) for line in pair][:N_PROMPTS]
    prompts = [Prompt((Message("user", json.loads(line)["prompt"]),)) for line in lines]
    return [prompt_row(prompt, smollm2.tokenizer, smollm2.ref, smollm2.fingerprint) for prompt in prompts]


@pytest.fixture(scope="module")
def conditions(smollm2: Any, rows: list[Row]) -> list[Condition]:
    """Every kind of operation, scope and site, with directions between two kinds of prompts."""
    from pipeline.capture import CaptureEngine
    from store.conditions import orthonormal_basis
    from store.generation import GenerationPlan

    n = smollm2.architecture.n_layers
    plan = GenerationPlan(
        model=smollm2.fingerprint,
        d_model=smollm2.architecture.d_model,
        components=COMPONENTS,
        layers=tuple(range(n)),
        positions=("prompt_end",),
        dtype="float32",
        n_rows=len(rows),
        block_rows=len(rows),
    )
    captured = CaptureEngine(smollm2).run(rows, plan)
    v = {
        c: (lambda x: x[::2].mean(0) - x[1::2].mean(0))(values[:, :, 0].astype(np.float64))
        for c, values in captured.items()
    }
    random = np.random.default_rng(0).standard_normal(v["resid_post"].shape)
    random *= np.linalg.norm(v["resid_post"], axis=1, keepdims=True) / np.linalg.norm(random, axis=1, keepdims=True)

    def add(layer: int, vector: Any, tokens: Any = "all", component: Any = "resid_post") -> Operation:
        return Operation("add", Site(component, layer), vector[None].astype(np.float32), tokens)

    def remove(layer: int, *vectors: Any, component: Any = "resid_post") -> Operation:
        basis = orthonormal_basis([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)
        return Operation("project_out", Site(component, layer), basis, "all")

    def clamp(layer: int, vector: Any, value: float) -> Operation:
        unit = (vector / np.linalg.norm(vector))[None].astype(np.float32)
        return Operation("clamp", Site("resid_post", layer), unit, "all", value)

    early, middle, late = n // 4, n // 2, 4 * n // 5
    post = v["resid_post"]
    stated: dict[str, list[Operation]] = {
        "baseline": [],
        "add early": [add(early, post[early])],
        "add middle": [add(middle, -post[middle])],
        "add late": [add(late, post[late])],
        "window": [remove(layer, post[layer]) for layer in range(middle, n)],
        "subspace": [remove(middle, post[middle], random[middle])],
        "random": [add(early, random[early]), remove(late, random[late])],
        "clamp": [clamp(middle, post[middle], 2 * float(np.linalg.norm(post[middle])))],
        "response only": [add(middle, post[middle], "response")],
        "prompt only": [add(middle, post[middle], "prompt")],
        "range": [add(early, 2 * post[early], TokenRange.model_validate({"from": 2, "to": -3}))],
        "resid_pre": [add(middle, v["resid_pre"][middle], component="resid_pre")],
        "attn_out": [remove(layer, v["attn_out"][layer], component="attn_out") for layer in range(early, late)],
        "mlp_out": [add(early, 4 * v["mlp_out"][early], component="mlp_out")],
        "last block": [add(n - 1, 0.5 * post[n - 1])],
    }
    return [
        Condition(name, name, None, None, (), ConditionSpec(), name, tuple(operations))
        for name, operations in stated.items()
    ]


def watched(conditions: Sequence[Condition]) -> MonitorPlan:
    vectors = {condition.name: condition.operations[0].vectors for condition in conditions if condition.operations}
    unit = np.concatenate([vectors["add early"], vectors["add late"]])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sites = (
        Site("resid_pre", 0),
        Site("resid_post", 7),
        Site("attn_out", 15),
        Site("mlp_out", 20),
        Site("resid_post", 29),
    )
    return MonitorPlan(("a", "b"), ("ka", "kb"), dict.fromkeys(sites, unit))


@pytest.fixture(scope="module")
def engine(conditions: list[Condition]) -> Any:
    """One engine for all tests, which change what it decodes: vLLM starts once in a process."""
    from pipeline.vllm_engine import VllmEngine

    # Prompts are read in pieces, and memory runs out: rows are dropped and computed again.
    options = {"max_num_batched_tokens": 64, "kv_cache_memory_bytes": 3 << 24, "block_size": 32, "max_model_len": 128}
    return VllmEngine(ModelRef(source=SMOLLM2), Decoding(max_new_tokens=N_TOKENS), None, 48, **options)


@pytest.fixture(scope="module")
def jobs(rows: list[Row], conditions: list[Condition]) -> Any:
    from pipeline.replay import Job

    return [Job(row, condition) for row in rows for condition in conditions]


@pytest.fixture(scope="module")
def both(smollm2: Any, engine: Any, jobs: Any, conditions: list[Condition]) -> Any:
    """Return the outputs of both engines for all jobs, with monitors, and what vLLM's passes were like."""
    from pipeline.replay import ReplayEngine

    reference = ReplayEngine(smollm2, Decoding(max_new_tokens=N_TOKENS), watched(conditions), 48)
    engine.monitor = watched(conditions)
    try:
        return engine.run(jobs), reference.run(jobs), engine.record
    finally:
        engine.monitor = None


def gap(model: Any, job: Any, first: Sequence[int], token: int) -> float:
    """Return how far `token` is below the reference's best after `first`, relative to the largest logit."""
    import torch
    from slow_reference import Step, teacher_forced

    steps = [Step(o.kind, o.site, torch.from_numpy(o.vectors), o.tokens, o.value) for o in job.condition.operations]
    logits, _ = teacher_forced(model.model, [*job.prompt, *first], steps, len(job.prompt))
    return float((logits[-1].max() - logits[-1][token]) / logits[-1].abs().max())


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Yield (text, first token that differs) of texts that differ."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if (a.token_ids, a.finish_reason) != (b.token_ids, b.finish_reason):
            pairs = zip(a.token_ids, b.token_ids, strict=False)
            yield number, next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.token_ids), len(b.token_ids)))


def test_texts_are_the_built_in_engines_but_for_near_ties(
    smollm2: Any, jobs: Any, both: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs, record = both
    first = sum(a.token_ids[:1] == b.token_ids[:1] for a, b in zip(ours, theirs, strict=True))
    apart, gaps = 0, []
    for number, at in differences(ours, theirs):
        apart += 1
        other = [*ours[number].token_ids, smollm2.tokenizer.eos_token_id][at]
        gaps.append(gap(smollm2, jobs[number], theirs[number].token_ids[:at], other))
    with capsys.disabled():
        print(
            f"\nvLLM against the built-in engine: {first} of {len(jobs)} first tokens, {len(jobs) - apart} of "
            f"{len(jobs)} texts of {N_TOKENS} tokens the same; gaps {sorted(gaps)}; {record.passes} passes, "
            f"{record.chunks} pieces of prompts, {record.resumed} of rows computed again"
        )
    assert record.chunks > 0
    assert record.resumed > 0
    assert first >= 0.99 * len(jobs)
    assert all(found < NEAR_TIE for found in gaps)
    texts = {
        condition: [o.token_ids for j, o in zip(jobs, ours, strict=True) if j.condition.name == condition]
        for condition in {job.condition.name for job in jobs}
    }
    assert all(value != texts["baseline"] for name, value in texts.items() if name != "baseline")


def test_monitored_values_are_the_built_in_engines(both: Any) -> None:
    ours, theirs, _ = both
    apart = {number: at for number, at in differences(ours, theirs)}
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same = apart.get(number, len(b.monitored))
        assert number in apart or len(a.monitored) == len(b.monitored)
        x, y = np.stack(a.monitored[:same]), np.stack(b.monitored[:same])  # [pass, site, direction]
        size = np.abs(y).max(axis=(0, 2), keepdims=True)
        assert np.abs(x - y).max() <= 1e-3 * np.abs(y).max()
        assert (np.abs(x - y) <= 1e-3 * size).all()


def test_rows_beside_strongly_steered_ones_keep_their_text(engine: Any, rows: list[Row], conditions: Any) -> None:
    from pipeline.replay import Job

    by = {condition.name: condition for condition in conditions}
    operations = tuple(
        Operation(o.kind, o.site, 50 * o.vectors, o.tokens)
        for o in (*by["add early"].operations, *by["mlp_out"].operations)
    )
    strong = Condition("strong", "strong", None, None, (), ConditionSpec(), "strong", operations)
    alone = engine.run([Job(row, by["baseline"]) for row in rows])
    beside = engine.run([Job(row, condition) for row in rows for condition in (strong, by["baseline"])])
    steered, plain = beside[::2], beside[1::2]
    assert [o.token_ids for o in plain] == [o.token_ids for o in alone]
    assert all(a.token_ids != b.token_ids for a, b in zip(steered, plain, strict=True))


def test_sampled_texts_are_the_built_in_engines(smollm2: Any, engine: Any, rows: list[Row], conditions: Any) -> None:
    from pipeline.replay import Job, ReplayEngine

    decoding = Decoding(max_new_tokens=12, temperature=0.8, top_p=0.9)
    jobs = [Job(row, condition, seed) for row in rows[:4] for condition in conditions[:3] for seed in (0, 1)]
    theirs = ReplayEngine(smollm2, decoding, batch_rows=24).run(jobs)
    before, engine.decoding = engine.decoding, decoding
    try:
        ours = engine.run(jobs)
    finally:
        engine.decoding = before
    apart = list(differences(ours, theirs))
    assert len(apart) <= 1, apart  # a uniform number may fall between two cumulative sums that differ in the last bits


def test_stop_strings_and_the_length_end_texts_as_in_the_built_in_engine(
    smollm2: Any, engine: Any, rows: list[Row], conditions: Any
) -> None:
    from pipeline.replay import Job, ReplayEngine

    decoding = Decoding(max_new_tokens=16, stop=[" the", "."])
    jobs = [Job(row, conditions[0]) for row in rows[:6]]
    reference = ReplayEngine(smollm2, decoding)
    theirs = reference.run(jobs)
    before, engine.decoding = engine.decoding, decoding
    try:
        ours = engine.run(jobs)
    finally:
        engine.decoding = before
    assert [(o.token_ids, o.finish_reason, o.ended_by) for o in ours] == [
        (o.token_ids, o.finish_reason, o.ended_by) for o in theirs
    ]
    assert [engine.text(o) for o in ours] == [reference.text(o) for o in theirs]
    assert {o.finish_reason for o in ours} >= {"stop"}


def test_a_text_that_is_not_finite_names_its_condition_and_the_engine_goes_on(
    engine: Any, rows: list[Row], conditions: Any
) -> None:
    from pipeline.replay import Job

    vector = np.full((1, 576), 3e38, np.float32)
    twice = tuple(Operation("add", Site("resid_post", layer), vector, "all") for layer in (3, 4))
    bad = Condition("bad", "bad", None, None, (), ConditionSpec(), "bad", twice)
    with pytest.raises(NonFiniteError, match=r"1 texts ran into NaN or infinity under bad"):
        engine.run([Job(rows[0], bad), Job(rows[0], conditions[0])])
    assert engine.run([Job(rows[0], conditions[0])])[0].token_ids
    beyond = (Operation("add", Site("resid_post", 30), vector, "all"),)
    job = Job(rows[0], Condition("b", "b", None, None, (), ConditionSpec(), "b", beyond))
    with pytest.raises(ModelError, match=r"there is no site resid_post.30"):
        engine.run([job])
    assert engine.run([Job(rows[0], conditions[0])])[0].token_ids  # no hook was left
    long = replace(rows[0], token_ids=(5,) * 120, spans=Spans(120, 120))
    with pytest.raises(ModelError, match=r"need 144 tokens; vLLM has room for 128\n  remedy"):
        engine.run([Job(long, conditions[0])])


def test_the_sites_of_vllms_model_are_tested(engine: Any) -> None:
    assert engine.laws.passed
    assert engine.laws.next_block == 0
    assert engine.stop_ids == frozenset({2})


def test_a_worker_generates_with_vllm_and_says_so(
    smollm2: Any, engine: Any, rows: list[Row], conditions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import vllm_engine
    from pipeline.workers import ReplayBlock, ReplayItem, ReplayWorker
    from store.location import Location
    from store.results import ResultStore

    monkeypatch.setattr(vllm_engine, "_started", lambda *args: engine._llm)
    worker = ReplayWorker(
        str(tmp_path),
        ModelRef(source=SMOLLM2),
        smollm2.fingerprint,
        {condition.key: condition for condition in conditions},
        Decoding(max_new_tokens=6),
        watched(conditions),
        8,
        "study",
        "how",
        {"versions": {"resid": "0", "transformers": "0", "torch": "0"}},
        engine="vllm",
    )
    items = tuple(ReplayItem(row, "add late", 0, f"key {i}") for i, row in enumerate(rows[:2]))
    assert worker.run(ReplayBlock("b", items))["tokens"] == 12
    results = ResultStore(Location.of(str(tmp_path)))
    assert results.read("generations").num_rows == 2
    assert results.read("monitored").num_rows == 2 * 6 * 5 * 2
    receipt = json.loads((tmp_path / "receipts" / smollm2.fingerprint[:16] / "self_test_vllm.json").read_text())
    assert receipt["engine"].startswith("vLLM ")
    assert receipt["sum_of_parts"] < receipt["bound"]
