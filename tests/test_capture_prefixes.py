"""Rows that begin alike are what they are alone, though their common start is run once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from capture_reference import LEAN, POSITIONS, deviations, paths, plan_of, plan_of_all_tokens, real_rows, unbatched
from hypothesis import given
from hypothesis import strategies as st
from slow_reference import random_rows, tiny
from tiny_models import LAYERS, VOCAB

from pipeline import capture
from pipeline.capture import BATCH_BOUND, CaptureEngine
from pipeline.chat import prompt_row
from pipeline.models import LoadedModel
from pipeline.prefix_proof import rotary_limit, shares_prefixes
from pipeline.prefix_tree import Segment, prefix_tree
from store.prompts import Message, Prompt
from store.rows import Row
from store.sites import COMPONENTS, Site, Spans

BUDGETS = (1, 37, 10_000)


def rows_alike(seed: int = 0) -> list[Row]:
    """Two system parts of 11 and 6 tokens, four prompts, answers in groups; one prompt is the start of another, one
    answer the start of another, and one row is there twice with other spans."""
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(6, VOCAB - 4, n).tolist())

    systems = [tokens(11), tokens(6)]
    prompts = [systems[0] + tokens(5), systems[0] + tokens(2), systems[1] + tokens(7), tokens(9)]
    prompts.append(prompts[0] + tokens(3))
    rows = []
    for index, prompt in enumerate(prompts):
        common = tokens(2)
        for n in range(1 + index % 3 * 2):
            answer = common + tokens(1 + (5 * n) % 7)
            rows.append(Row("tiny", f"p{index}", prompt + answer, Spans(len(prompt), len(prompt + answer))))
            if n == 1:
                rows.append(Row("tiny", f"p{index}", prompt + answer, Spans(len(prompt) - 1, len(prompt + answer))))
                rows.append(Row("tiny", f"p{index}", prompt + common, Spans(len(prompt), len(prompt + common))))
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Segment]]:
    """The segments of every forward pass of every engine, in order."""
    found: list[list[Segment]] = []
    forward = CaptureEngine._forward

    def noted(self: Any, segments: list[Segment], *args: Any) -> Any:
        found.append(segments)
        return forward(self, segments, *args)

    monkeypatch.setattr(CaptureEngine, "_forward", noted)
    return found


def computed(passes: Sequence[Sequence[Segment]]) -> int:
    return sum(len(segment.tokens) for segments in passes for segment in segments)


def test_only_the_llama_layout_in_float32_without_hooks_takes_packed_passes(family: str) -> None:
    model = tiny(family)
    assert (CaptureEngine(model)._lean is not None) is (family in LEAN)
    assert CaptureEngine(model, packed=False)._lean is None
    assert CaptureEngine(tiny(family, torch.bfloat16))._lean is None
    engine = CaptureEngine(model)
    called: list[int] = []
    handle = model.architecture.mlp[0].register_forward_hook(lambda *_: called.append(1))
    try:
        engine.run(random_rows([(3, 1)]), plan_of(model))
    finally:
        handle.remove()
    assert called, "hooks of others are called"


def test_rows_that_begin_alike_are_what_they_are_alone(
    family: str, monkeypatch: pytest.MonkeyPatch, passes: list[list[Segment]]
) -> None:
    monkeypatch.setattr(capture, "PASS_TOKENS", 1)  # every common start that saves a token
    model, rows = tiny(family), rows_alike()
    plan = plan_of(model)
    worst = {}
    for budget, packed in product(BUDGETS, paths(family)):
        passes.clear()
        values = CaptureEngine(model, budget, packed=packed).run(rows, plan)
        worst[budget, packed] = max(deviations(values, rows, plan, model))
        assert max(segment.start for segments in passes for segment in segments) > 11, "prompts share a start"
        assert computed(passes) < 0.6 * sum(row.spans.response_end for row in rows)
    print(f"{family}: largest relative deviation by token budget, packed or not: {worst}")
    assert max(worst.values()) < BATCH_BOUND


def test_all_tokens_of_rows_that_begin_alike_are_those_of_the_rows_alone(
    family: str, monkeypatch: pytest.MonkeyPatch, passes: list[list[Segment]]
) -> None:
    monkeypatch.setattr(capture, "PASS_TOKENS", 1)
    model, rows = tiny(family), rows_alike(1)
    plan = plan_of_all_tokens(model, rows)
    alone = [unbatched(model, row) for row in rows]
    worst = {}
    for budget, packed in product(BUDGETS, paths(family)):
        passes.clear()
        values = CaptureEngine(model, budget, packed=packed).run(rows, plan)
        assert computed(passes) < 0.6 * sum(row.spans.response_end for row in rows)
        worst[budget, packed] = 0.0
        for component in COMPONENTS:
            for layer in plan.layers:
                expected = torch.cat([sites[Site(component, layer)] for sites in alone])
                got = torch.from_numpy(values[component][:, layer])
                difference = (got - expected).abs().amax(1) / expected.abs().amax(1)
                worst[budget, packed] = max(worst[budget, packed], float(difference.max()))
    print(f"{family}: largest relative deviation by token budget, packed or not: {worst}")
    assert max(worst.values()) < BATCH_BOUND


def test_fewer_layers_of_rows_that_begin_alike_are_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "PASS_TOKENS", 1)
    model, rows = tiny(family), rows_alike()
    for packed in paths(family):
        everything = CaptureEngine(model, 60, packed=packed).run(rows, plan_of(model))
        for last in range(LAYERS):
            some = CaptureEngine(model, 60, packed=packed).run(rows, plan_of(model, layers=(last,)))
            for component in COMPONENTS:
                np.testing.assert_array_equal(some[component][:, 0], everything[component][:, last])


def test_sharing_can_be_switched_off(passes: list[list[Segment]]) -> None:
    model, rows = tiny("llama"), rows_alike()
    off = CaptureEngine(model, 100, share_prefixes=False).run(rows, plan_of(model))
    assert computed(passes) == sum(row.spans.response_end for row in rows)
    on = CaptureEngine(model, 100).run(rows, plan_of(model))
    for component in COMPONENTS:
        scale = np.abs(off[component]).max(axis=-1, keepdims=True)
        assert (np.abs(on[component] - off[component]) <= BATCH_BOUND * scale).all()


def test_the_prompt_of_many_responses_is_run_once(passes: list[list[Segment]]) -> None:
    model = tiny("qwen2")
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(6, 100, 40).tolist()) for _ in range(5)]
    answers = [tuple(rng.integers(6, 100, 3 + n).tolist()) for n in range(8)]
    rows = [Row("tiny", "p", p + a, Spans(len(p), len(p) + len(a))) for p in prompts for a in answers]
    CaptureEngine(model).run(rows, plan_of(model, positions=("response_avg",)))
    assert computed(passes) == 5 * (40 + sum(map(len, answers)))


def test_tokens_behind_the_last_one_that_is_wanted_are_not_run(passes: list[list[Segment]]) -> None:
    model, rows = tiny("llama"), random_rows([(4, 30), (6, 20)])
    values = CaptureEngine(model).run(rows, plan_of(model, positions=("prompt_end", "token:2")))
    assert computed(passes) == 10
    assert max(deviations(values, rows, plan_of(model, positions=("prompt_end", "token:2")), model)) < BATCH_BOUND


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_that_is_not_finite_stays_alone_behind_a_common_start(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(capture, "PASS_TOKENS", 1)
    rows = rows_alike()
    model = tiny("llama")
    counts = {t: [i for i, row in enumerate(rows) if t in row.token_ids] for row in rows for t in row.token_ids}
    bad, (victim,) = next((t, at) for t, at in counts.items() if len(at) == 1)
    plan = plan_of(model, positions=("token:-1", "response_avg"))
    expected = CaptureEngine(model, 500, packed=packed).run(rows, plan)["resid_post"]
    embedding = model.model.get_input_embeddings().weight
    before = embedding[bad].clone()
    try:
        embedding.data[bad] = float("nan")
        values = CaptureEngine(model, 500, packed=packed).run(rows, plan)["resid_post"]
    finally:
        embedding.data[bad] = before
    assert np.isnan(values[victim]).all(axis=-1).any()
    others = [i for i in range(len(rows)) if i != victim]
    np.testing.assert_allclose(values[others], expected[others], rtol=1e-3, atol=1e-4)


def test_a_model_that_cannot_share_is_run_whole(
    monkeypatch: pytest.MonkeyPatch, passes: list[list[Segment]], caplog: pytest.LogCaptureFixture
) -> None:
    reference = tiny("llama")
    forward = reference.architecture.base.forward

    def position_blind(*args: Any, **kwargs: Any) -> Any:
        # As a model that counts positions itself, from the tokens that it is given.
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return forward(*args, **kwargs)

    model = dataclasses.replace(reference, model=type("Other", (), {})())
    model.model.get_input_embeddings = reference.model.get_input_embeddings
    monkeypatch.setattr(reference.architecture.base, "forward", position_blind)
    rows = [Row("tiny", "p", (*range(10, 50), t), Spans(41, 41)) for t in range(60, 70)]
    plan = plan_of(reference, positions=("token:-1",))
    assert not shares_prefixes(model)
    values = CaptureEngine(model).run(rows, plan)
    assert "cannot share common starts" in caplog.text
    assert computed(passes) == 410
    assert max(deviations(values, rows, plan, reference)) < BATCH_BOUND


def test_rows_whose_angles_depend_on_their_length_are_run_whole_and_apart(passes: list[list[Segment]]) -> None:
    # Phi-3's longrope takes other frequencies for the whole row once it is longer than the first training length, so a
    # short row beside a long one, or a start run by itself, would get angles that it does not have alone.
    from tiny_models import COMMON
    from transformers import AutoModelForCausalLM, Phi3Config

    from pipeline.architecture import find_architecture

    factors = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
    config = Phi3Config(
        **{**COMMON, "original_max_position_embeddings": 32, "max_position_embeddings": 256},
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 32},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    loaded = dataclasses.replace(tiny("phi3"), model=model, architecture=find_architecture(model))
    assert rotary_limit(loaded.architecture) == 32
    rng = np.random.default_rng(0)
    start = tuple(rng.integers(6, 100, 24).tolist())
    rows = []
    for n in (3, 20, 5, 20, 30, 4, 20):
        rest = tuple(rng.integers(6, 100, n).tolist())
        rows.append(Row("tiny", "p", start + rest, Spans(24, 24 + n)))
    plan = plan_of(loaded)
    values = CaptureEngine(loaded).run(rows, plan)
    assert max(deviations(values, rows, plan, loaded)) < BATCH_BOUND
    assert any(segment.start == 24 for segments in passes for segment in segments)


def test_prefixes_and_responses_of_a_real_model_are_exact(smollm2: LoadedModel, passes: list[list[Segment]]) -> None:
    rows = []
    for row, text in zip(real_rows(smollm2, 4), ("Say no.", "How do I cook?", "Hello", "Name a colour."), strict=True):
        rows.append(row)
        for answer in ("Yes, of course.", "Yes, but only on Sundays, when it rains.", "No."):
            prompt = Prompt((Message("user", text),), answer)
            rows.append(prompt_row(prompt, smollm2.tokenizer, smollm2.ref, smollm2.fingerprint, with_response=True))
    plan = plan_of(smollm2, layers=tuple(range(0, smollm2.architecture.n_layers, 4)))
    worst = {}
    for budget, packed in product((1, 200, 4096), (False, True)):
        passes.clear()
        values = CaptureEngine(smollm2, budget, packed=packed).run(rows, plan)
        worst[budget, packed] = max(deviations(values, rows, plan, smollm2))
        assert computed(passes) < 0.7 * sum(row.spans.response_end for row in rows)
    print(f"SmolLM2: largest relative deviation by token budget, packed or not: {worst}")
    assert max(worst.values()) < BATCH_BOUND / 2


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=14)


@given(SEQUENCES, st.integers(0, 6), st.data())
def test_the_tree_holds_every_row_once_and_shares_no_more_than_it_may(
    sequences: list[tuple[int, ...]], price: int, data: st.DataObject
) -> None:
    shareable = [data.draw(st.integers(0, len(sequence))) for sequence in sequences]
    paths: dict[int, list[Segment]] = {row: [] for row in range(len(sequences))}

    def walk(segments: list[Segment], parent: Segment | None) -> int:
        tokens = 0
        for segment in segments:
            assert segment.parent is parent
            assert segment.start == (parent.stop if parent else 0)
            assert segment.tokens
            for row in segment.rows:
                paths[row].append(segment)
                if len(segment.rows) > 1:
                    assert segment.stop <= shareable[row]
            tokens += len(segment.tokens) + walk(segment.children, segment)
            tokens += price * bool(segment.children)
        return tokens

    total = walk(prefix_tree(sequences, shareable, price), None)
    for row, path in paths.items():
        assert tuple(token for segment in path for token in segment.tokens) == sequences[row]
    assert total <= sum(len(sequence) for sequence in sequences)


def test_a_start_is_shared_only_where_that_is_less_work() -> None:
    starts = [(1, 2, 3), (1, 2, 4)]
    sequences = [start + tuple(range(10, 30)) + (40 + i,) for start in starts for i in range(4)]
    whole = [len(sequence) for sequence in sequences]
    roots = prefix_tree(sequences, whole, 10)
    assert [len(root.tokens) for root in roots] == [23, 23], "two tokens in common are not worth a pass"
    assert all(len(root.children) == 4 for root in roots)
    (root,) = prefix_tree(sequences, whole, 1)
    assert root.tokens == (1, 2)
    assert [len(child.tokens) for child in root.children] == [21, 21]


def test_rows_that_nest_by_the_hundred_do_not_recurse_without_end() -> None:
    sequences = [tuple(range(n)) for n in range(1, 1500)]
    roots = prefix_tree(sequences, [len(sequence) for sequence in sequences], 0)
    assert sum(len(segment.rows) for segment in roots) >= len(roots)


def test_positions_are_read_in_whichever_segment_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "PASS_TOKENS", 1)
    model, rows = tiny("gemma3"), rows_alike(3)
    positions = (*POSITIONS, "token:0", "token:8")
    plan = plan_of(model, positions=positions)
    assert max(deviations(CaptureEngine(model, 50).run(rows, plan), rows, plan, model)) < BATCH_BOUND
