"""The token budget goes to where passes are fastest, is remembered, and out of memory lowers it for good."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from capture_reference import deviations, plan_of
from hypothesis import given
from hypothesis import strategies as st
from slow_reference import random_rows, tiny

from pipeline.capture import BATCH_BOUND, CaptureEngine
from pipeline.token_budget import CPU_TOKENS, LEAST, MOST, TokenBudget, budget_file

CPU = torch.device("cpu")


def search(rate: Callable[[int], float], budget: TokenBudget, passes: int = 100) -> list[int]:
    """Run full passes at the rate of their budget, tokens per second, until the search ends; return their budgets."""
    used = []
    while budget.searching and len(used) < passes:
        tokens = budget.tokens
        used.append(tokens)
        budget.passed(tokens, tokens, tokens, tokens / rate(tokens))
    return used


@given(st.sampled_from([128, 256, 512, 1024, 2048, 4096]))
def test_the_search_ends_at_the_fastest_budget(best: int) -> None:
    budget = TokenBudget(CPU)
    used = search(lambda tokens: 1000 / (1 + abs(tokens.bit_length() - best.bit_length())), budget)
    assert budget.tokens == best
    assert not budget.searching
    assert len(used) <= 20
    assert set(used) <= {128, 256, 512, 1024, 2048, 4096}


def test_a_little_faster_is_not_worth_a_larger_pass() -> None:
    budget = TokenBudget(CPU)
    search(lambda tokens: 1000 + tokens / 100, budget)
    assert budget.tokens == CPU_TOKENS


def test_one_slow_pass_decides_nothing() -> None:
    budget, slow = TokenBudget(CPU), iter([0.1, 1, 1, 1, 1, 0.1] + [1] * 100)
    search(lambda tokens: next(slow) * (2000 if tokens == 1024 else 1000), budget)
    assert budget.tokens == 1024


def test_passes_that_do_not_fill_the_budget_say_nothing() -> None:
    budget = TokenBudget(CPU)
    for _ in range(50):
        budget.passed(budget.tokens, budget.tokens // 2, 1, 1.0)
    assert budget.searching
    assert budget.tokens == CPU_TOKENS


def test_a_result_is_remembered_and_a_damaged_one_is_no_hindrance(tmp_path: Path) -> None:
    model = tiny("llama")
    file = budget_file(tmp_path, model, "modules")
    first = TokenBudget(CPU, file=file)
    search(lambda tokens: 4000 - tokens, first)
    assert first.tokens == LEAST["cpu"]
    assert json.loads(file.read_text())["tokens"] == first.tokens
    again = TokenBudget(CPU, file=file)
    assert not again.searching
    assert again.tokens == first.tokens
    assert TokenBudget(CPU, fixed=77, file=file).tokens == 77
    for damage in ("", "{}", '{"tokens": -3}', '{"tokens": "many"}', "[1]", "null"):
        file.write_text(damage)
        assert TokenBudget(CPU, file=file).searching
    blocked = tmp_path / "file"
    blocked.write_text("")
    search(lambda tokens: 1000, TokenBudget(CPU, file=blocked / "below" / "x.json"))
    assert not list(tmp_path.rglob("*.partial"))


def test_models_paths_and_threads_have_budgets_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        budget_file(tmp_path, tiny(family), path) for family in ("llama", "gpt2") for path in ("modules", "packed")
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    files.add(budget_file(tmp_path, tiny("llama"), "modules"))
    assert len(files) == 5


def test_out_of_memory_lowers_the_budget_for_good(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    budget = TokenBudget(CPU, file=file)
    search(lambda tokens: float(tokens), budget)
    assert budget.tokens == MOST["cpu"]
    budget.failed(3000)
    assert budget.tokens == 1500
    assert TokenBudget(CPU, file=file).tokens == 1500
    while budget.tokens > 1:
        budget.failed(budget.tokens)
    budget.failed(1)
    assert budget.tokens == 1


def test_rows_are_what_they_are_alone_while_the_budget_moves(tmp_path: Path) -> None:
    model, rows = tiny("mistral"), random_rows([(20, 5)] * 300)
    plan = plan_of(model)
    engine = CaptureEngine(model, remember=tmp_path)
    values = engine.run(rows, plan)
    assert engine.budget._rates
    assert max(deviations(values, rows, plan, model)) < BATCH_BOUND
    for _ in range(9):
        engine.run(rows, plan)
    assert not engine.budget.searching
    assert CaptureEngine(model, remember=tmp_path).budget.tokens == engine.budget.tokens
