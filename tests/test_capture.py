"""A captured value is what an unbatched forward pass gives, whatever the batch, its order, its padding or its size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from capture_reference import (
    POSITIONS,
    at_position,
    deviations,
    paths,
    plan_of,
    plan_of_all_tokens,
    real_rows,
    unbatched,
)
from hypothesis import given
from hypothesis import strategies as st
from slow_reference import blocks, random_rows, tiny
from tiny_models import LAYERS, tiny_model
from torch import Tensor

from pipeline.architecture import find_architecture
from pipeline.batching import by_token_budget, pad, ran_out_of_memory
from pipeline.capture import BATCH_BOUND, CaptureEngine
from pipeline.lean_llama import LeanLlama
from pipeline.models import LoadedModel
from store.rows import Row
from store.sites import COMPONENTS, Site

LENGTHS = ((5, 3), (9, 1), (4, 7), (12, 2), (3, 5), (7, 4))  # prompt, response


def test_a_captured_row_equals_an_unbatched_forward_pass_in_any_batch(family: str) -> None:
    model, rows = tiny(family), random_rows(LENGTHS)
    plan = plan_of(model)
    for packed, (budget, order) in itertools.product(paths(family), ((1, 1), (30, 1), (10_000, 1), (10_000, -1))):
        chosen = rows[::order]
        values = CaptureEngine(model, budget, packed=packed).run(chosen, plan)
        assert max(deviations(values, chosen, plan, model)) < BATCH_BOUND


def test_neighbouring_sites_agree_and_the_last_one_is_before_the_final_norm(family: str) -> None:
    # Used to happen: a vector from hidden_states[L], the input of block L, was taken for the output of layers[L], and
    # hidden_states[n], which is after the final norm, for the last block's residual stream.
    model, rows = tiny(family), random_rows(LENGTHS[:2])
    plan = plan_of(model, components=("resid_pre", "resid_post"), positions=("prompt_end", "token:0"))
    values = CaptureEngine(model).run(rows, plan)
    np.testing.assert_array_equal(values["resid_pre"][:, 1:], values["resid_post"][:, :-1])
    for layer in range(LAYERS):
        assert not np.allclose(values["resid_pre"][:, layer], values["resid_post"][:, layer], rtol=0.01)
    ids = torch.tensor([rows[0].token_ids])
    normed = model.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, 0].numpy()
    assert not np.allclose(values["resid_post"][0, -1, 1], normed, rtol=0.01)


def check_all_tokens(model: LoadedModel, rows: Sequence[Row], budgets: Sequence[int], packed: bool) -> float:
    """Compare every token at every site with unbatched passes; return the largest relative deviation of a vector."""
    plan = plan_of_all_tokens(model, rows)
    alone = [unbatched(model, row) for row in rows]
    worst = 0.0
    for budget in budgets:
        values = CaptureEngine(model, budget, packed=packed).run(rows, plan)
        averages = CaptureEngine(model, budget, packed=packed).run(rows, plan_of(model, positions=("response_avg",)))
        for component in plan.components:
            found = values[component]
            assert found.shape == (sum(row.spans.response_end for row in rows), len(plan.layers), plan.d_model)
            end = 0
            for index, row in enumerate(rows):
                start, end = end, end + row.spans.response_end
                for at, layer in enumerate(plan.layers):
                    expected = alone[index][Site(component, layer)]
                    got = torch.from_numpy(found[start:end, at])
                    difference = (got - expected).abs().amax(1) / expected.abs().amax(1)
                    # The mean of the tokens that are stored is the average that the slow reference computes.
                    mean = found[start + row.spans.prompt_length : end, at].mean(axis=0, dtype=np.float32)
                    average = at_position(expected, row, "response_avg").numpy()
                    scale = np.abs(average).max()
                    np.testing.assert_allclose(mean, average, rtol=0, atol=BATCH_BOUND * scale)
                    np.testing.assert_allclose(
                        averages[component][index, at, 0], mean, rtol=0, atol=BATCH_BOUND * scale
                    )
                    worst = max(worst, float(difference.max()))
    return worst


def test_all_tokens_are_those_of_an_unbatched_forward_pass(family: str) -> None:
    for packed in paths(family):
        assert check_all_tokens(tiny(family), random_rows(LENGTHS), (1, 30, 10_000), packed) < BATCH_BOUND


def test_all_tokens_of_a_real_model_are_those_of_an_unbatched_forward_pass(smollm2: LoadedModel) -> None:
    for packed in (False, True):
        worst = check_all_tokens(smollm2, real_rows(smollm2, 6), (1, 4096), packed)
        print(f"largest relative deviation of a token{' (packed)' * packed}: {worst:.1e}")
        assert worst < BATCH_BOUND


def test_a_position_has_the_bits_of_its_token_among_all_tokens(family: str) -> None:
    # The same batches: what is gathered differs, what is computed does not.
    model, rows = tiny(family), random_rows(LENGTHS)
    positions = ("prompt_end", "response_start", "token:3", "token:-1")
    for packed in paths(family):
        named = CaptureEngine(model, 40, packed=packed).run(rows, plan_of(model, positions=positions))
        tokens = CaptureEngine(model, 40, packed=packed).run(rows, plan_of_all_tokens(model, rows))
        check_bits(named, tokens, rows, positions)


def check_bits(named: dict[str, Any], tokens: dict[str, Any], rows: Sequence[Row], positions: Sequence[str]) -> None:
    first = np.cumsum([0, *(row.spans.response_end for row in rows)])
    for component in COMPONENTS:
        for index, row in enumerate(rows):
            for p, position in enumerate(positions):
                token = first[index] + row.spans.token_range(position)[0]
                np.testing.assert_array_equal(tokens[component][token], named[component][index, :, p])


def test_all_tokens_come_in_the_order_of_the_rows_whatever_the_batches() -> None:
    model, rows = tiny("llama"), random_rows([(9, 3), (2, 0), (5, 5), (1, 0), (12, 1), (2, 2)])
    plan = plan_of_all_tokens(model, rows, components=("resid_pre",), layers=(0,))
    embeddings = model.model.get_input_embeddings()(torch.tensor([t for row in rows for t in row.token_ids]))
    for budget in (1, 14, 10_000):
        found = CaptureEngine(model, budget).run(rows, plan)["resid_pre"]
        np.testing.assert_array_equal(found[:, 0], embeddings.numpy())


def test_out_of_memory_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("qwen2"), random_rows([(5, 3), (9, 1), (4, 7), (12, 2), (3, 5), (7, 4)] * 2, seed=2)
    plan = plan_of_all_tokens(model, rows)
    whole = CaptureEngine(model, 1).run(rows, plan)
    tried = limit_tokens(monkeypatch, model, 40)
    values = CaptureEngine(model, 10_000, packed=False).run(rows, plan)
    assert any(a * b > 40 for a, b in tried)
    for component in COMPONENTS:
        scale = np.abs(whole[component]).max(axis=-1, keepdims=True)
        assert (np.abs(values[component] - whole[component]) <= BATCH_BOUND * scale).all()


def test_the_batch_bound_holds_on_a_real_model_with_a_margin(smollm2: LoadedModel) -> None:
    rows = real_rows(smollm2, 10)
    plan = plan_of(smollm2)
    alone = [unbatched(smollm2, row) for row in rows]
    worst = {}
    for budget, packed in itertools.product((1, 150, 4096), (False, True)):
        values = CaptureEngine(smollm2, budget, packed=packed).run(rows, plan)
        found = [
            float((torch.from_numpy(values[c][i, layer, p]).double() - expected).abs().max() / expected.abs().max())
            for i, row in enumerate(rows)
            for c in COMPONENTS
            for layer in plan.layers
            for p, position in enumerate(POSITIONS)
            for expected in [at_position(alone[i][Site(c, layer)], row, position).double()]
        ]
        worst[budget, packed] = max(found)
    print(f"largest relative deviation by token budget, packed or not: {worst}")
    assert max(worst.values()) < BATCH_BOUND / 2


def test_padding_sides_and_batch_mates_do_not_move_the_position_that_is_read(smollm2: LoadedModel) -> None:
    # Used to happen: attention_mask.sum() - 1 as an index into left-padded rows read a mid-prompt token of every row
    # but the longest.
    rows = real_rows(smollm2, 4)
    batch = pad([row.token_ids for row in rows], side="left", pad_id=2, device="cpu")
    with torch.inference_mode():
        states = smollm2.model.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    plan = plan_of(smollm2, components=("resid_pre",), layers=(15,), positions=("token:-1",))
    ours = torch.from_numpy(CaptureEngine(smollm2).run(rows, plan)["resid_pre"][:, 0, 0])
    published = states.hidden_states[15][torch.arange(len(rows)), batch.attention_mask.sum(1) - 1]
    correct = torch.stack([unbatched(smollm2, row)[Site("resid_pre", 15)][-1] for row in rows])
    torch.testing.assert_close(ours, correct, rtol=1e-4, atol=1e-3)
    shorter = [i for i, row in enumerate(rows) if len(row.token_ids) < max(len(r.token_ids) for r in rows)]
    assert shorter
    assert (torch.cosine_similarity(published, correct)[shorter] < 0.95).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_response_averages_of_16_bit_models_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    # Used to happen: a float16 sum over a long response overflowed, and a bfloat16 one stopped growing.
    model = tiny("llama", dtype)
    weight = model.model.get_input_embeddings().weight
    before = weight.clone()
    try:
        weight.data.mul_(4000).abs_()  # values near 1000 of one sign: 100 of them add up to beyond float16's 65504
        row = random_rows([(2, 150), (2, 40)], seed=1)
        each = tuple(f"token:{index}" for index in range(2, 152))
        tokens = CaptureEngine(model).run(row[:1], plan_of(model, components=("resid_pre",), positions=each))
        average = CaptureEngine(model).run(row, plan_of(model, components=("resid_pre",), positions=("response_avg",)))
    finally:
        weight.data.copy_(before)
    expected = tokens["resid_pre"][0].astype(np.float64).mean(1)
    got = average["resid_pre"][0, :, 0].astype(np.float64)
    assert expected.max() * 150 > 65504
    half_ulp = torch.finfo(dtype).eps / 2
    # 16-bit batches of another shape differ by a few units themselves behind layer 0, where nothing is computed.
    np.testing.assert_allclose(got[0], expected[0], rtol=1.01 * half_ulp)
    np.testing.assert_allclose(got, expected, rtol=0, atol=20 * half_ulp * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_give_their_own_dtype(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    values = CaptureEngine(model).run(random_rows(LENGTHS), plan_of(model))["resid_post"]
    assert str(values.dtype) == str(dtype).removeprefix("torch.")
    assert np.isfinite(values.astype(np.float32)).all()


def test_fewer_layers_give_the_same_bits_and_later_blocks_do_not_run(family: str) -> None:
    model, rows = tiny(family), random_rows(LENGTHS)
    calls: list[str] = []
    watched = {f"block {index}": block for index, block in enumerate(blocks(model.model))}
    watched["final norm"] = model.architecture.final_norm
    watched["head"] = model.model.get_output_embeddings()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, module in watched.items()
    ]
    try:
        # Models with hooks on them are run through their own modules: the packed path would not call them.
        everything = CaptureEngine(model).run(rows, plan_of(model))
        assert calls == ["block 0", "block 1", "block 2"]
        calls.clear()
        some = CaptureEngine(model).run(rows, plan_of(model, layers=(0, 1)))
        assert calls == ["block 0", "block 1"]
        CaptureEngine(model).run(rows, plan_of(model, layers=(0,), components=("resid_pre",)))
        assert calls[2:] == ["block 0"]
    finally:
        for handle in handles:
            handle.remove()
    for component in COMPONENTS:
        np.testing.assert_array_equal(some[component], everything[component][:, :2])


def exhausted_device() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def limit_tokens(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, limit: int, fail: Callable[[], Any] = exhausted_device
) -> list[tuple[int, ...]]:
    """Let forward passes of more than `limit` padded tokens run out of memory; return the list of shapes tried."""
    tried: list[tuple[int, ...]] = []
    base: Any = model.architecture.base
    forward = base.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        shape = tuple(kwargs["input_ids"].shape)
        tried.append(shape)
        if shape[0] * shape[1] > limit:
            fail()
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", limited)
    return tried


def test_out_of_memory_halves_the_token_budget_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("qwen2"), random_rows([(5, 3), (9, 1), (4, 7), (12, 2), (3, 5), (7, 4)] * 3, seed=2)
    plan = plan_of(model)
    engine = CaptureEngine(model, 10_000, packed=False)
    tried = limit_tokens(monkeypatch, model, 60)
    values = engine.run(rows, plan)
    failed = [a * b for a, b in tried if a * b > 60]
    assert failed[0] > 2 * 60
    assert all(after <= before / 2 for before, after in itertools.pairwise(failed))
    assert engine.budget.tokens == failed[-1] // 2
    assert sum(shape[0] for shape in tried if shape[0] * shape[1] <= 60) == len(rows)
    assert max(deviations(values, rows, plan, model)) < BATCH_BOUND
    tried.clear()
    engine.run(rows, plan)
    assert all(a * b <= 60 for a, b in tried), "the lower budget stays"


def test_a_single_row_that_does_not_fit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("qwen2"), random_rows([(5, 3), (30, 1), (4, 7)])
    limit_tokens(monkeypatch, model, 20)
    with pytest.raises(torch.OutOfMemoryError):
        CaptureEngine(model, packed=False).run(rows, plan_of(model))


def test_a_row_that_is_not_finite_does_not_touch_its_batch_mates() -> None:
    rows = random_rows(LENGTHS)
    model = tiny_model("llama")
    bad = next(t for t in rows[2].token_ids if all(t not in r.token_ids for i, r in enumerate(rows) if i != 2))
    reference = tiny("llama")
    broken = dataclasses.replace(reference, model=model, architecture=find_architecture(model))
    model.get_input_embeddings().weight.data[bad] = float("nan")
    plan = plan_of(reference)
    for packed in (False, True):
        runs = (CaptureEngine(m, packed=packed).run(rows, plan) for m in (broken, reference))
        values, expected = (found["resid_post"] for found in runs)
        assert np.isnan(values[2]).any()
        others = [0, 1, 3, 4, 5]
        np.testing.assert_allclose(values[others], expected[others], rtol=1e-3, atol=1e-4)


def test_tokens_after_the_response_are_not_part_of_the_row() -> None:
    model, (row,) = tiny("llama"), random_rows([(4, 3)])
    longer = Row(row.model, row.prompt_id, (*row.token_ids, 7, 8), row.spans)
    plan = plan_of(model)
    a, b = (CaptureEngine(model).run([r], plan)["resid_post"] for r in (row, longer))
    np.testing.assert_array_equal(a, b)


def test_a_failed_allocation_of_the_cpu_is_out_of_memory_and_other_errors_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Used to happen: torch gives the CPU's allocator no error class of its own, so a capture ended instead of halving.
    def exhausted() -> Any:
        return torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(RuntimeError) as found:
        exhausted()
    assert ran_out_of_memory(found.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    for other in (RuntimeError("shared memory file was truncated"), ValueError("DefaultCPUAllocator: memory")):
        assert not ran_out_of_memory(other)
    model, rows = tiny("qwen2"), random_rows(LENGTHS * 2, seed=2)
    tried = limit_tokens(monkeypatch, model, 40, exhausted)
    values = CaptureEngine(model, 10_000, packed=False).run(rows, plan_of(model))
    assert any(a * b > 40 for a, b in tried)
    assert max(deviations(values, rows, plan_of(model), model)) < BATCH_BOUND
    with pytest.raises(torch.OutOfMemoryError, match="a row of 41 tokens does not fit"):
        CaptureEngine(model, packed=False).run(random_rows([(40, 1)]), plan_of(model))

    def broken() -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    limit_tokens(monkeypatch, model, 40, broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        CaptureEngine(model, 10_000, packed=False).run(rows, plan_of(model))


def test_out_of_memory_halves_packed_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("qwen2"), random_rows(LENGTHS * 3, seed=2)
    embed, tried = LeanLlama.embed, []

    def limited(self: LeanLlama, ids: Tensor) -> Tensor:
        tried.append(len(ids))
        if len(ids) > 40:
            torch.empty(1 << 60, dtype=torch.uint8)
        return embed(self, ids)

    monkeypatch.setattr(LeanLlama, "embed", limited)
    engine = CaptureEngine(model, 10_000)
    values = engine.run(rows, plan_of(model))
    assert max(tried) == sum(row.spans.response_end for row in rows)
    assert engine.budget.tokens <= 40
    assert max(deviations(values, rows, plan_of(model), model)) < BATCH_BOUND


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300))
def test_batches_hold_every_row_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    batches = by_token_budget(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6), st.sampled_from("lr"))
def test_padding_keeps_tokens_and_counts_positions_from_the_first_real_one(rows: list[list[int]], side: str) -> None:
    batch = pad(rows, side={"l": "left", "r": "right"}[side], pad_id=0, device="cpu")
    for index, row in enumerate(rows):
        real = batch.attention_mask[index].bool()
        assert batch.input_ids[index][real].tolist() == row
        assert batch.position_ids[index][real].tolist() == list(range(len(row)))
        assert (batch.input_ids[index][~real] == 0).all()
        assert batch.input_ids[index, batch.starts[index]] == row[0]
        assert batch.lengths[index] == len(row)
