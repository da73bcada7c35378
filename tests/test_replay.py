"""A text depends on its prompt, condition, decoding and seed: batched and one-by-one output agree token for token."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_reference import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reference import Step, condition, gap, generate, random_rows, teacher_forced, tiny
from tiny_models import LAYERS, VOCAB, tiny_model
from torch import Tensor
from transformers import GenerationConfig

from pipeline import lean_llama, scheduler
from pipeline.capture import CaptureEngine
from pipeline.chat import prompt_row
from pipeline.lean_llama import LeanLlama, why_not
from pipeline.lean_runner import LeanRunner
from pipeline.models import LoadedModel
from pipeline.padded_runner import PaddedRunner
from pipeline.replay import Job, Output, ReplayEngine, next_tokens, noise_of, stop_token_ids
from pipeline.runners import Entrant, Passed
from pipeline.scheduler import Scheduler, Waiting, without
from store.conditions import MonitorPlan
from store.errors import ModelError, NonFiniteError
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import COMPONENTS, Site
from store.study import Decoding
from store.study_interventions import TokenRange

# Batches of another shape round differently. Where greedy decoding takes another token than the reference, the
# reference's logits of the two must be this close, relative to its largest absolute logit.
NEAR_TIE = 1e-4
PROMPTS = Path(__file__).parent.parent / "prompts"
LENGTHS = ((5, 0), (9, 0), (3, 0), (7, 0))
STOP = frozenset(range(3, VOCAB, 9))  # so many end tokens that rows of random models end at different steps

Programs = dict[str, list[Step]]


def post(layer: int) -> Site:
    return Site("resid_post", layer)


def tiny_programs() -> Programs:
    v = 3.0 * torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    slanted = torch.stack([v[0], v[0] + 0.3 * v[1]])
    return {
        "baseline": [],
        "add early": [Step("add", post(0), v[:1])],
        "add late": [Step("add", post(LAYERS - 1), v[1:2])],
        "window": [Step("project_out", post(layer), v[layer : layer + 1]) for layer in range(LAYERS)],
        "subspace": [Step("project_out", post(1), slanted)],
        "response": [Step("add", post(1), v[2:], "response")],
        "prompt, then removed": [Step("add", post(0), 2 * v[:1], "prompt"), Step("project_out", post(0), v[1:])],
    }


def jobs_of(rows: Sequence[Row], programs: Programs, seed: int = 0) -> list[Job]:
    return [Job(row, condition(name, steps), seed) for row in rows for name, steps in programs.items()]


def engine(model: LoadedModel, max_new_tokens: int = 8, stop: frozenset[int] = STOP, **kwargs: Any) -> ReplayEngine:
    decoding = kwargs.pop("decoding", Decoding(max_new_tokens=max_new_tokens))
    found = ReplayEngine(model, decoding, **kwargs)
    found.stop_ids = stop
    return found


def texts(outputs: Sequence[Output]) -> list[tuple[list[int], str]]:
    return [(output.token_ids, output.finish_reason) for output in outputs]


def near_ties(job: Job, output: Output, reference: tuple[list[int], list[Tensor]], stop: frozenset[int]) -> int:
    """Compare with generated (ids, logits): 0 if equal, 1 if they part at two logits that are as good as equal."""
    ids, logits = reference
    ended = ids[-1] in stop
    expected = ids[:-1] if ended else ids
    if (output.token_ids, output.finish_reason) == (expected, "stop" if ended else "length"):
        return 0
    ours = output.token_ids
    at = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), len(ours))
    candidates = [ours[at]] if at < len(ours) else list(stop)
    assert min(gap(logits[at], token) for token in candidates) < NEAR_TIE, f"{job.condition.name}, token {at}"
    return 1


# -- one-by-one and batched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [True, False])
def test_a_mixed_batch_generates_what_transformers_generates_one_by_one(family: str, lean: bool) -> None:
    # Used to happen: position_ids handed to generate froze the rotary positions, and batched output differed.
    model, rows, programs = tiny(family), random_rows(LENGTHS), tiny_programs()
    jobs = jobs_of(rows, programs)
    if lean and why_not(model) is not None:
        with pytest.raises(ModelError, match="does not serve this model"):
            engine(model, lean=True)
        return
    outputs = engine(model, batch_rows=20, lean=lean).run(jobs)
    ties = 0
    for job, output in zip(jobs, outputs, strict=True):
        reference = generate(model.model, job.row.token_ids, programs[job.condition.name], 8, sorted(STOP))
        ties += near_ties(job, output, reference, STOP)
    print(f"{family}: {ties} near ties in {len(jobs)}")
    assert ties <= 1
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert len({len(output.token_ids) for output in outputs}) >= 3
    baseline = [o.token_ids for job, o in zip(jobs, outputs, strict=True) if job.condition.name == "baseline"]
    for name in programs:
        chosen = [o.token_ids for job, o in zip(jobs, outputs, strict=True) if job.condition.name == name]
        assert (chosen == baseline) == (name == "baseline"), f"{name} changes nothing"


EVERYWHERE = ("llama", "qwen2", "mistral", "gpt2", "qwen3_moe", "gemma3")


def scoped_programs(components: Sequence[Any]) -> Programs:
    """Every kind of operation at every site, several at one site, and every scope of tokens."""
    v = 3.0 * torch.randn(4, 48, generator=torch.Generator().manual_seed(6))
    programs: Programs = {"baseline": []}
    for i, component in enumerate(components):
        site = Site(component, i % LAYERS)
        last = Site(component, LAYERS - 1)
        first, end = TokenRange.model_validate({"from": 0, "to": 3}), TokenRange.model_validate({"from": -2})
        programs[f"{component} add first"] = [Step("add", site, 2 * v[:1], first)]
        programs[f"{component} clamp"] = [Step("clamp", last, v[1:2], value=9.0)]
        programs[f"{component} clamp the response"] = [Step("clamp", site, v[1:2], "response", value=-9.0)]
        programs[f"{component} project end"] = [Step("project_out", site, v[:2], end)]
        programs[f"{component} in order"] = [
            Step("add", site, v[2:3]),
            Step("clamp", site, v[3:], TokenRange.model_validate({"from": 1, "to": -1}), value=4.0),
            Step("project_out", site, v[:3]),
            Step("add", site, v[:1], "prompt"),
        ]
    return programs


@pytest.mark.parametrize("lean", [None, False])
@pytest.mark.parametrize("family", EVERYWHERE)
def test_every_operation_scope_and_site_in_one_batch_equals_one_by_one(family: str, lean: bool | None) -> None:
    model, rows = tiny(family), random_rows([(5, 0), (9, 0)], seed=8)
    if lean is None and why_not(model) is not None:
        return  # the same as lean=False
    # The slow reference knows no post-norms.
    components = ("resid_pre", "resid_post") if family == "gemma3" else COMPONENTS
    programs = scoped_programs(components)
    jobs = jobs_of(rows, programs)
    ties, outputs = 0, engine(model, 6, lean=lean, batch_rows=12).run(jobs)
    for job, output in zip(jobs, outputs, strict=True):
        reference = generate(model.model, job.row.token_ids, programs[job.condition.name], 6, sorted(STOP))
        ties += near_ties(job, output, reference, STOP)
    print(f"{family}: {ties} near ties in {len(jobs)}")
    assert ties <= 1
    baseline = texts(outputs[:: len(programs)])
    differ = sum(texts(outputs[i :: len(programs)]) != baseline for i in range(1, len(programs)))
    assert differ >= 0.5 * (len(programs) - 1)


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=8), Decoding(max_new_tokens=8, temperature=0.3)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_what_conditions_share_changes_no_text_and_runs_fewer_tokens(
    family: str, decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    jobs = jobs_of(random_rows(LENGTHS), {**tiny_programs(), **scoped_programs(COMPONENTS)})
    units = np.eye(2, 48, dtype=np.float32)
    monitor = MonitorPlan(("a", "b"), ("a", "b"), {site: units for site in (post(0), post(2), Site("attn_out", 1))})
    block, tokens = LeanLlama.block, dict[str, list[int]]()
    found: dict[str, list[Output]] = {}
    ways = {"all": (True, True), "prefill": (True, False), "nothing": (False, False)}
    for name, (prefill, decode) in ways.items():
        tokens[name] = [0] * LAYERS

        def counted(self: Any, layer: int, h: Tensor, *args: Any, name: str = name) -> Tensor:
            tokens[name][layer] += len(h)
            return block(self, layer, h, *args)

        # Not while the engine is made: it tries the packed path on rows of its own.
        chosen = engine(
            model, decoding=decoding, monitor=monitor, share_prefill=prefill, share_decoding=decode, batch_rows=30
        )
        with monkeypatch.context() as patch:
            patch.setattr(LeanLlama, "block", counted)
            found[name] = chosen.run(jobs)
    for less, more in (("all", "prefill"), ("prefill", "nothing")):
        assert texts(found[less]) == texts(found[more])
        saved = [b - a for a, b in zip(tokens[less], tokens[more], strict=True)]
        assert saved == sorted(saved, reverse=True), "conditions part from block to block"
        assert saved[0] > 0
    for shared, alone in zip(found["all"], found["nothing"], strict=True):
        np.testing.assert_allclose(np.stack(shared.monitored), np.stack(alone.monitored), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("lean", [True, False])
def test_a_baseline_row_beside_strongly_steered_rows_keeps_its_bits(lean: bool) -> None:
    model, rows, n = tiny("llama"), random_rows([(6, 0)] * 6), 6
    strong = [Step("add", Site(c, layer), torch.full((1, 48), 1e3)) for c in COMPONENTS for layer in range(LAYERS)]
    units = np.eye(3, 48, dtype=np.float32)
    monitor = MonitorPlan(("a", "b", "c"), ("a", "b", "c"), {Site("resid_post", LAYERS - 1): units})
    seen = []
    for others in ([], strong):
        jobs = [Job(row, condition(f"{i % 2}", others if i % 2 else [])) for i, row in enumerate(rows)]
        # With nothing shared both batches have the same shapes throughout.
        alone = {"share_prefill": False, "share_decoding": False}
        chosen = engine(model, n, frozenset(), monitor=monitor, lean=lean, batch_rows=6, **alone)
        seen.append(chosen.run(jobs))
    for bare, beside in zip(seen[0][::2], seen[1][::2], strict=True):
        assert bare.token_ids == beside.token_ids
        assert np.stack(bare.monitored).tobytes() == np.stack(beside.monitored).tobytes()
    assert texts(seen[0][1::2]) != texts(seen[1][1::2])


def test_a_range_that_a_prompt_lacks_is_refused_before_anything_runs() -> None:
    steps = [Step("add", post(0), torch.ones(1, 48), TokenRange.model_validate({"from": 0, "to": 6}))]
    with pytest.raises(
        ValueError, match=r"condition 'far': tokens from 0 to 6 are not in a prompt of 5 .* \(prompt p0"
    ):
        engine(tiny("llama")).run(jobs_of(random_rows(LENGTHS), {"far": steps}))


def real_programs(model: LoadedModel, rows: Sequence[Row]) -> Programs:
    """Interventions with directions of real activations: the second half of the rows minus the first."""
    n = len(rows)
    plan = plan_of(
        model, components=("resid_post",), positions=("prompt_end",), dtype="float32", n_rows=n, block_rows=n
    )
    values = torch.from_numpy(CaptureEngine(model).run(rows, plan)["resid_post"][:, :, 0])  # [row, layer, d_model]
    half = len(rows) // 2
    v = values[half:].mean(0) - values[:half].mean(0)
    u = values[::2].mean(0) - values[1::2].mean(0)
    random = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    random = random / random.norm(dim=1, keepdim=True) * v.norm(dim=1, keepdim=True)
    return {
        "baseline": [],
        "add early": [Step("add", post(8), 2.0 * v[8:9])],
        "add late": [Step("add", post(24), -2.0 * v[24:25])],
        "window": [Step("project_out", post(layer), v[layer : layer + 1]) for layer in range(14, 28)],
        "subspace": [Step("project_out", post(20), torch.stack([v[20], v[20] + 0.5 * u[20]]))],
        "random": [Step("add", post(16), random[16:17]), Step("project_out", post(22), random[22:23])],
        "response": [Step("add", post(12), 2.0 * v[12:13], "response")],
    }


def real_rows(model: LoadedModel, n: int) -> list[Row]:
    rows = []
    for name in ("harmful", "harmless"):
        for index, line in enumerate((PROMPTS / f"{name}.jsonl").read_text().splitlines()[: n // 2]):
            system = (Message("system", "Be brief."),) if index % 2 else ()
            prompt = Prompt((*system, Message("user", json.loads(line)["prompt"])))
            rows.append(prompt_row(prompt, model.tokenizer, model.ref, model.fingerprint))
    return rows


def test_a_mixed_batch_of_real_prompts_generates_what_each_generates_alone(smollm2: LoadedModel) -> None:
    rows, n_tokens = real_rows(smollm2, 8), 24
    programs = real_programs(smollm2, rows)
    jobs = jobs_of(rows, programs)
    chosen = ReplayEngine(smollm2, Decoding(max_new_tokens=n_tokens), batch_rows=len(jobs))
    outputs = chosen.run(jobs)
    stop, forced_ties, generated_ties, n_generated = sorted(chosen.stop_ids), 0, 0, 0
    for index, (job, output) in enumerate(zip(jobs, outputs, strict=True)):
        steps, prompt = programs[job.condition.name], job.row.token_ids
        # Every token of every text: one pass over the whole text, unbatched and without a cache.
        logits, _ = teacher_forced(smollm2.model, (*prompt, *output.token_ids), steps, len(prompt))
        for token, row in zip(output.token_ids, logits, strict=False):
            if row.argmax() != token:
                assert gap(row, token) < NEAR_TIE
                forced_ties += 1
        if output.finish_reason == "stop":
            assert int(logits[-1].argmax()) in stop
        else:
            assert len(output.token_ids) == n_tokens
        # transformers' own generate, for each condition with another prompt.
        if index // len(programs) == index % len(programs):
            reference = generate(smollm2.model, prompt, steps, n_tokens, stop)
            generated_ties += near_ties(job, output, reference, chosen.stop_ids)
            n_generated += 1
    total = sum(len(output.token_ids) for output in outputs)
    print(f"near ties: {forced_ties} of {total} tokens teacher-forced, {generated_ties} of {n_generated} generated")
    assert forced_ties <= 2
    assert generated_ties <= 1
    by_name = {name: outputs[i :: len(programs)] for i, name in enumerate(programs)}
    for name in ("add early", "add late", "window", "response"):
        assert texts(by_name[name]) != texts(by_name["baseline"]), f"{name} changes nothing"


def test_real_texts_are_the_same_however_rows_run(smollm2: LoadedModel) -> None:
    rows, n_tokens = real_rows(smollm2, 6), 20
    programs = real_programs(smollm2, rows)
    jobs = jobs_of(rows, programs)
    ways: dict[str, dict[str, Any]] = {
        "all at once": {"batch_rows": len(jobs)},
        "leaving and entering": {"batch_rows": 9},
        "decoding shared too": {"share_decoding": True, "batch_rows": len(jobs)},
        "nothing shared": {"share_prefill": False, "share_decoding": False, "batch_rows": len(jobs)},
        "packed weights": {"pack": True, "batch_rows": 20},
        "transformers' modules": {"lean": False, "batch_rows": 20},
    }
    found = {
        name: ReplayEngine(smollm2, Decoding(max_new_tokens=n_tokens), **how).run(jobs) for name, how in ways.items()
    }
    stop = sorted(stop_token_ids(smollm2))
    counts = dict.fromkeys(ways, 0)
    for index, job in enumerate(jobs):
        reference = found["transformers' modules"][index]
        prompt = job.row.token_ids
        for name in ways:
            output = found[name][index]
            if texts([output]) == texts([reference]):
                continue
            # They may part only at two tokens that are as good as equal in one unbatched pass over what they share.
            pairs = zip([*output.token_ids, stop[0]], [*reference.token_ids, stop[0]], strict=False)
            same = next(i for i, (a, b) in enumerate(pairs) if a != b)
            steps = programs[job.condition.name]
            shared = (*prompt, *reference.token_ids[:same])
            logits, _ = teacher_forced(smollm2.model, shared, steps, len(prompt))
            for token in [*output.token_ids, stop[0]][same], [*reference.token_ids, stop[0]][same]:
                assert gap(logits[-1], token) < NEAR_TIE, f"{name}, {job.condition.name}, token {same}"
            counts[name] += 1
    total = sum(len(output.token_ids) for output in found["all at once"])
    print(f"near ties among {len(jobs)} texts, {total} tokens: {counts}")
    assert max(counts.values()) <= 1


def test_a_packed_path_that_does_not_agree_with_the_model_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    chosen = engine(model)
    assert chosen.path == "packed"
    expected = texts(chosen.run(jobs))
    monkeypatch.setattr(lean_llama, "_rotated", lambda x, cos, sin: x)
    chosen = engine(model)
    assert "did not agree" in chosen.path
    assert texts(chosen.run(jobs)) == expected
    with pytest.raises(ModelError, match="did not agree"):
        engine(model, lean=True)
    assert "Gemma2ForCausalLM is not one of" in engine(tiny("gemma2")).path


def test_batch_size_and_order_do_not_change_texts() -> None:
    model, jobs = tiny("qwen3"), jobs_of(random_rows(LENGTHS), tiny_programs())
    expected = texts(engine(model, batch_rows=1).run(jobs))
    for batch_rows in (3, 8, 64):
        assert texts(engine(model, batch_rows=batch_rows).run(jobs)) == expected
    order = np.random.default_rng(0).permutation(len(jobs))
    assert texts(engine(model, batch_rows=8).run([jobs[i] for i in order])) == [expected[i] for i in order]


@pytest.mark.parametrize("batch_rows", [4, 9])
def test_rows_that_leave_and_enter_do_not_change_the_others(
    family: str, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, jobs = tiny(family), jobs_of(random_rows([(6, 0), (11, 0), (4, 0), (8, 0)], seed=3), tiny_programs())
    together = texts(engine(model, 14, batch_rows=len(jobs)).run(jobs))
    monkeypatch.setattr(scheduler, "ENTER_SHARE", 0.0)
    sizes: list[int] = []
    for kind in (LeanRunner, PaddedRunner):
        keep, enter = kind.keep, kind.enter

        def kept(self: Any, order: Sequence[int], keep: Any = keep) -> None:
            sizes.append(len(order))
            keep(self, order)

        def entered(self: Any, entrants: Sequence[Any], enter: Any = enter) -> Any:
            sizes.append(-len(entrants))
            return enter(self, entrants)

        monkeypatch.setattr(kind, "keep", kept)
        monkeypatch.setattr(kind, "enter", entered)
    assert texts(engine(model, 14, batch_rows=batch_rows).run(jobs)) == together
    entries = [i for i, size in enumerate(sizes) if size < 0]
    assert len(entries) >= 4
    assert any(0 < sizes[i - 1] < batch_rows for i in entries[1:]), "rows entered while others ran"


def test_the_last_rows_fill_the_holes_of_those_that_leave() -> None:
    assert without([False, True, False, False, True]) == [0, 3, 2]
    assert without([True, True]) == []
    assert without([False, True]) == [0]
    assert without([True, False, False]) == [2, 1]


def test_rows_of_a_prompt_enter_together_and_as_soon_as_there_is_room() -> None:
    class Recorder:
        open = True

        def __init__(self) -> None:
            self.entered: list[list[int]] = []
            self.running: list[int] = []

        def enter(self, entrants: Sequence[Entrant]) -> Passed:
            self.entered.append([entrant.prompt[0] for entrant in entrants])
            self.running += [entrant.prompt[1] for entrant in entrants]
            return Passed(torch.zeros(len(entrants), 1), None)

        def step(self, tokens: Tensor) -> Passed:
            assert tokens.tolist() == self.running, "each row gets its own token"
            return Passed(torch.zeros(len(tokens), 1), None)

        def keep(self, order: Sequence[int]) -> None:
            self.running = [self.running[i] for i in order]

    lengths = dict(enumerate(np.random.default_rng(0).integers(1, 9, 60).tolist()))
    left = dict(lengths)

    def choose(passed: Passed, rows: Sequence[int]) -> tuple[Tensor, list[bool]]:
        assert len(passed.logits) == len(rows) <= 8
        for row in rows:
            left[row] -= 1
        return torch.tensor(list(rows)), [left[row] == 0 for row in rows]

    waiting = [Waiting(row, Entrant((row // 3, row), ()), row // 3) for row in lengths]
    runner, chosen = Recorder(), Scheduler(waiting, 8)
    chosen.run(runner, choose)
    assert chosen.done
    assert set(left.values()) == {0}
    assert runner.entered[0] == [0, 0, 0, 1, 1, 1]
    assert all(entered.count(group) == 3 for entered in runner.entered for group in entered)
    assert [group for entered in runner.entered for group in entered] == [row // 3 for row in lengths]


def test_positions_count_the_real_tokens_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = tiny("mistral"), jobs_of(random_rows(LENGTHS), tiny_programs())
    base: Any = model.architecture.base
    forward, passes = base.forward, 0

    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        positions, mask = kwargs["position_ids"], kwargs["attention_mask"]
        new = positions.shape[1]
        real = mask[:, -new:].bool()
        assert torch.equal(positions[real], (mask.cumsum(1) - 1)[:, -new:][real])
        passes += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", checked)
    engine(model, lean=False).run(jobs)
    assert passes >= 8


# -- when a text ends ----------------------------------------------------------------------------------------------


def test_a_text_ends_before_its_first_stop_token_or_after_max_new_tokens() -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    free = engine(model, 10, frozenset()).run(jobs)
    assert {output.finish_reason for output in free} == {"length"}
    assert {len(output.token_ids) for output in free} == {10}
    stopped = engine(model, 10).run(jobs)
    for whole, cut in zip(free, stopped, strict=True):
        end = next((i for i, token in enumerate(whole.token_ids) if token in STOP), None)
        assert cut.token_ids == whole.token_ids[:end]
        assert cut.finish_reason == ("length" if end is None else "stop")
    shorter = engine(model, 4, frozenset()).run(jobs)
    assert [output.token_ids for output in shorter] == [output.token_ids[:4] for output in free]


def test_a_text_may_be_empty() -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), {"baseline": []})
    outputs = engine(model, 5, frozenset(range(VOCAB))).run(jobs)
    assert texts(outputs) == [([], "stop")] * len(jobs)


def test_stop_tokens_are_those_of_the_generation_config_and_of_the_tokenizer() -> None:
    model = tiny("llama")
    changed = tiny_model("llama")
    for configured, expected in (([7, 9], {7, 9, 2}), (7, {7, 2}), (None, {2})):
        changed.generation_config = GenerationConfig(eos_token_id=configured)
        assert stop_token_ids(dataclasses.replace(model, model=changed)) == expected


def test_a_text_ends_in_front_of_its_first_stop_string() -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    free = engine(model, 10, frozenset())
    whole = free.run(jobs)
    plain = [free.text(output) for output in whole]
    assert plain == [free.decode(output.token_ids) for output in whole]
    stops = list(dict.fromkeys([plain[0][3:5], plain[4][5], plain[-1][1]]))
    chosen = engine(model, stop=frozenset(), decoding=Decoding(max_new_tokens=10, stop=stops))
    cut = chosen.run(jobs)
    for text, before, after in zip(plain, whole, cut, strict=True):
        ends = [text.index(stop) for stop in stops if stop in text]
        assert chosen.text(after) == (text[: min(ends)] if ends else text)
        assert after.finish_reason == ("stop" if ends else "length")
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        assert not ends or len(chosen.decode(after.token_ids[:-1])) < min(ends) + 2
    assert {output.finish_reason for output in cut} == {"stop", "length"} or all(o.ended_by for o in cut)
    assert {output.ended_by for output in cut} >= set(stops[:1])


def test_only_the_prompt_of_a_row_with_a_given_response_is_replayed() -> None:
    model, (row,) = tiny("llama"), random_rows([(6, 4)])
    bare = Row(row.model, row.prompt_id, row.token_ids[:6], dataclasses.replace(row.spans, response_end=6))
    jobs = [Job(r, condition("baseline")) for r in (row, bare)]
    first, second = texts(engine(model).run(jobs))
    assert first == second


# -- sampling ------------------------------------------------------------------------------------------------------

SAMPLED = Decoding(max_new_tokens=8, temperature=1.2, top_p=0.9)


def test_a_sampled_text_depends_on_its_row_and_seed_and_not_on_its_batch() -> None:
    model, rows, programs = tiny("llama"), random_rows(LENGTHS), tiny_programs()
    jobs = [*jobs_of(rows, programs, seed=1), *jobs_of(rows, programs, seed=2)]
    expected = texts(engine(model, decoding=SAMPLED, batch_rows=1).run(jobs))
    for batch_rows in (5, 64):
        assert texts(engine(model, decoding=SAMPLED, batch_rows=batch_rows).run(jobs)) == expected
    order = np.random.default_rng(0).permutation(len(jobs))
    assert texts(engine(model, decoding=SAMPLED).run([jobs[i] for i in order])) == [expected[i] for i in order]
    half = len(jobs) // 2
    different = sum(a != b for a, b in zip(expected[:half], expected[half:], strict=True))
    assert different > 0.8 * half


def test_conditions_of_a_row_share_their_random_numbers() -> None:
    v = torch.ones(1, 48)
    programs = {"baseline": [], "nothing": [Step("add", post(1), 0.0 * v)], "much": [Step("add", post(1), 30.0 * v)]}
    rows = random_rows(LENGTHS)
    jobs = jobs_of(rows, programs, seed=5)
    outputs = texts(engine(tiny("llama"), decoding=SAMPLED).run(jobs))
    assert outputs[0::3] == outputs[1::3]
    assert outputs[0::3] != outputs[2::3]


def test_a_longer_sampled_text_begins_with_the_shorter_one() -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    short, long = (
        engine(model, stop=frozenset(), decoding=SAMPLED.model_copy(update={"max_new_tokens": n})).run(jobs)
        for n in (4, 9)
    )
    assert [output.token_ids[:4] for output in long] == [output.token_ids for output in short]


def nucleus(logits: Any, decoding: Decoding) -> tuple[list[int], list[float]]:
    """Tokens by falling probability until they reach top_p, and their cumulative renormalised probabilities."""
    scaled = np.asarray(logits, dtype=np.float64) / decoding.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    tokens: list[int] = []
    masses: list[float] = []
    for token in np.argsort(-p, kind="stable").tolist():
        if sum(masses) >= decoding.top_p:
            break
        tokens.append(token)
        masses.append(float(p[token]))
    return tokens, (np.cumsum(masses) / sum(masses)).tolist()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.floats(0.2, 3.0),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_a_sampled_token_inverts_the_cumulative_distribution_of_the_nucleus(
    tenths: list[int], temperature: float, top_p: float, u: float
) -> None:
    logits = [value / 10 for value in tenths]
    decoding = Decoding(temperature=temperature, top_p=top_p)
    token = int(next_tokens(torch.tensor([logits]), decoding, torch.tensor([u], dtype=torch.float64))[0])
    # Within float32 rounding of the boundaries of u and of top_p either neighbour is right.
    allowed = set()
    for nudge_p in (-1e-6, 0.0, 1e-6):
        nudged = decoding.model_copy(update={"top_p": top_p + nudge_p})
        tokens, cumulative = nucleus(logits, nudged)
        for nudge_u in (-1e-6, 0.0, 1e-6):
            at = int(np.searchsorted(cumulative, u + nudge_u, side="right"))
            chosen = tokens[min(max(at, 0), len(tokens) - 1)]
            allowed |= (
                {t for t in range(len(logits)) if abs(logits[t] - logits[chosen]) < 1e-9} if nudge_u else {chosen}
            )
    assert token in allowed


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_tokens_are_as_frequent_as_their_probability(top_p: float) -> None:
    generator, n = torch.Generator().manual_seed(0), 20_000
    logits = 2 * torch.randn(30, generator=generator)
    decoding = Decoding(temperature=1.5, top_p=top_p)
    # Evenly spaced numbers: each frequency is its probability to within one step on either side.
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    chosen = next_tokens(logits.expand(n, -1), decoding, uniform)
    frequency = torch.bincount(chosen, minlength=30).double() / n
    tokens, cumulative = nucleus(logits.numpy(), decoding)
    expected = torch.zeros(30, dtype=torch.float64)
    expected[tokens] = torch.tensor(np.diff([0.0, *cumulative]))
    assert (frequency - expected).abs().max() <= 1.1 / n
    assert top_p == 1.0 or (expected == 0).any()


def test_a_tiny_temperature_or_nucleus_is_greedy() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    greedy = next_tokens(logits, Decoding(), None)
    assert torch.equal(greedy, logits.argmax(1))
    assert torch.equal(next_tokens(logits, Decoding(temperature=1.0, top_p=1e-9), uniform), greedy)
    assert torch.equal(next_tokens(logits, Decoding(temperature=1e-4), uniform), greedy)


def test_sampled_tokens_are_those_of_the_logits_of_an_unbatched_pass() -> None:
    model, rows, programs = tiny("gemma3"), random_rows(LENGTHS), tiny_programs()
    chosen = engine(model, stop=frozenset(), decoding=SAMPLED)
    jobs = jobs_of(rows, programs, seed=3)
    for job, output in zip(jobs, chosen.run(jobs), strict=True):
        prompt = job.row.token_ids
        logits, _ = teacher_forced(model.model, (*prompt, *output.token_ids), programs[job.condition.name], len(prompt))
        uniform = torch.from_numpy(noise_of(job, chosen.decoding))
        again = next_tokens(logits[:-1], SAMPLED, uniform)
        assert again.tolist() == output.token_ids


# -- what is recorded while generating -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=8), SAMPLED])
def test_monitored_projections_equal_a_recomputation_on_the_final_text(family: str, decoding: Decoding) -> None:
    model, rows, programs = tiny(family), random_rows(LENGTHS), tiny_programs()
    v = torch.randn(2, 48, generator=torch.Generator().manual_seed(9))
    units = (v / v.norm(dim=1, keepdim=True)).numpy()
    monitor = MonitorPlan(("a", "b"), ("ka", "kb"), {post(layer): units for layer in (1, 2)})
    jobs = jobs_of(rows, programs, seed=4)
    outputs = engine(model, decoding=decoding, monitor=monitor, batch_rows=9).run(jobs)
    assert texts(outputs) == texts(engine(model, decoding=decoding, batch_rows=9).run(jobs))
    for job, output in zip(jobs, outputs, strict=True):
        prompt = job.row.token_ids
        _, seen = teacher_forced(model.model, (*prompt, *output.token_ids), programs[job.condition.name], len(prompt))
        # One pass for the prompt, and one for each response token that was read; the last token may not have been.
        n_read = len(output.token_ids) + (1 if output.finish_reason == "stop" else 0)
        got = np.stack(output.monitored)
        assert got.shape == (n_read, 2, 2)
        for index, layer in enumerate((1, 2)):
            h = seen[post(layer)][len(prompt) - 1 : len(prompt) - 1 + n_read]
            np.testing.assert_allclose(got[:, index], h.numpy() @ units.T, atol=1e-4 * float(h.abs().max()))


# -- when something runs out ---------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_rows_that_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    expected = texts(engine(model, batch_rows=28, lean=False).run(jobs))
    forward, tried = model.model.forward, list[tuple[int, int]]()

    def limited(*args: Any, **kwargs: Any) -> Any:
        rows, held = kwargs["attention_mask"].shape
        tried.append((rows, held))
        if rows * held > 80:  # also in the middle of decoding: the cache grows
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    chosen = engine(model, batch_rows=28, lean=False)
    assert texts(chosen.run(jobs)) == expected
    assert chosen.batch_rows == 3
    assert {rows for rows, held in tried if rows * held > 80} >= {28, 14, 7}
    assert any(rows * held > 80 and held > 9 for rows, held in tried), "in the middle of decoding"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: no memory")])
def test_the_packed_path_halves_its_rows_too(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())
    expected = texts(engine(model, batch_rows=28, lean=True).run(jobs))
    block, tried = LeanLlama.block, list[int]()

    def limited(self: Any, layer: int, h: Tensor, *args: Any) -> Tensor:
        tried.append(len(h))
        if len(h) > 30:
            raise error
        return block(self, layer, h, *args)

    monkeypatch.setattr(LeanLlama, "block", limited)
    chosen = engine(model, batch_rows=28, lean=True)
    assert texts(chosen.run(jobs)) == expected
    assert chosen.batch_rows < 14
    assert max(tried) > 30


def test_a_single_row_that_does_not_fit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = tiny("llama"), jobs_of(random_rows(LENGTHS), tiny_programs())

    def never(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model.model, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        engine(model, lean=False).run(jobs)


def test_a_text_that_runs_into_nan_raises_and_names_its_condition() -> None:
    # Used to happen: argmax over NaN gave a token, and the text looked like any other.
    v = torch.full((1, 48), 3e38)
    programs = {"baseline": [], "too much": [Step("add", post(0), v), Step("add", post(1), v)]}
    with pytest.raises(NonFiniteError, match=r"under too much \(prompt p\d"):
        engine(tiny("llama")).run(jobs_of(random_rows(LENGTHS), programs))


def test_generated_tokens_are_decoded_without_special_tokens() -> None:
    model = tiny("llama")
    assert engine(model).decode([*model.tokenizer("Hi you", add_special_tokens=False)["input_ids"], 2]) == "Hi you"
