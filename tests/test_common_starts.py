"""What prompts begin with is read once under each condition, and no text shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reference import Step, condition, tiny
from tiny_models import LAYERS, VOCAB
from torch import Tensor

from pipeline import common_starts, scheduler
from pipeline.common_starts import start_key
from pipeline.interventions import acts_on_prompts, spans_of
from pipeline.kv_slots import KVSlots
from pipeline.lean_llama import LeanLlama
from pipeline.models import LoadedModel
from pipeline.replay import Job, Output, ReplayEngine
from pipeline.runners import Entrant
from store.conditions import MonitorPlan
from store.errors import NonFiniteError
from store.rows import Row, Spans
from store.sites import Site
from store.study import Decoding
from store.study_interventions import TokenRange

STOP = frozenset(range(3, VOCAB, 9))


def post(layer: int) -> Site:
    return Site("resid_post", layer)


def ranged(begin: int | None, end: int | None = None) -> TokenRange:
    return TokenRange.model_validate({"from": begin, "to": end})


def programs() -> dict[str, list[Step]]:
    v = 3.0 * torch.randn(3, 48, generator=torch.Generator().manual_seed(7))
    last = LAYERS - 1
    return {
        "baseline": [],
        "add": [Step("add", post(0), v[:1])],
        "late": [Step("add", post(last), v[1:2])],
        "prompt": [Step("add", post(1), v[1:2], "prompt")],
        "response": [Step("add", post(1), v[2:], "response")],
        "inside": [Step("add", post(0), v[:1], ranged(1, 3))],
        "across": [Step("add", post(1), v[:1], ranged(-5))],
        "two": [Step("clamp", post(0), v[:1], ranged(0, -6), value=5.0), Step("project_out", post(1), v[1:])],
    }


def rows_with_starts() -> list[Row]:
    """Rows of three starts, one of which begins with another, and a row of its own; lengths are mixed."""
    rng = np.random.default_rng(11)
    short, other = rng.integers(6, VOCAB - 4, 7), rng.integers(6, VOCAB - 4, 9)
    long = np.concatenate([short, rng.integers(6, VOCAB - 4, 6)])
    found = []
    for number, start in enumerate([short, long, other, long, other, short, other, long, []]):
        tokens = [
            *map(int, start),
            *rng.integers(6, VOCAB - 4, 2 + 5 * (number % 3) // 2 + (not len(start)) * 9).tolist(),
        ]
        found.append(Row("tiny", f"p{number}", tuple(tokens), Spans(len(tokens), len(tokens))))
    return found


def jobs_of(rows: Sequence[Row], chosen: dict[str, list[Step]]) -> list[Job]:
    return [Job(row, condition(name, steps)) for row in rows for name, steps in chosen.items()]


def engine(model: LoadedModel, **kwargs: Any) -> ReplayEngine:
    found = ReplayEngine(model, kwargs.pop("decoding", Decoding(max_new_tokens=8)), lean=True, **kwargs)
    found.stop_ids = STOP
    return found


def texts(outputs: Sequence[Output]) -> list[tuple[list[int], str]]:
    return [(output.token_ids, output.finish_reason) for output in outputs]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple), min_size=1, max_size=8))
def test_a_common_start_is_that_of_another_prompt_and_leaves_the_last_token(prompts: list[tuple[int, ...]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common_starts, "PRICE", 0)
        found = common_starts.common_starts(prompts)
    assert set(found) == set(prompts)
    for prompt, length in found.items():
        assert 0 <= length < len(prompt)
        others = [other for other in found if other != prompt]
        assert length == 0 or any(other[:length] == prompt[:length] for other in others)
        # Nothing that two prompts begin with is left to be read twice.
        best = max((min(_agree(prompt, other), len(other) - 1) for other in others), default=0)
        assert length == min(best, len(prompt) - 1)


def _agree(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_what_is_not_worth_a_pass_of_its_own_is_not_shared() -> None:
    prompts = [(1, 2, 3, number, 5) for number in range(10)]
    assert set(common_starts.common_starts(prompts).values()) == {3 if common_starts.PRICE < 9 * 3 else 0}
    assert set(common_starts.common_starts(prompts[:5]).values()) == {0}


def test_starts_have_one_key_only_if_the_same_is_done_to_the_same_tokens() -> None:
    start, chosen = (9, 8, 7, 6), programs()
    entrants = [
        Entrant((*start, *rest), tuple(step.operation() for step in steps), len(start))
        for steps in chosen.values()
        for rest in ((1, 2, 3), (2, 2, 2), (3, 4, 1, 1), (3, 4, 5, 6, 7, 8, 9))
    ]
    done = []
    for entrant in entrants:
        acting = [o for o in entrant.operations if acts_on_prompts(o)]
        spans = [(o.digest, *span) for o in acting for span in spans_of(o, len(entrant.prompt))]
        clipped = [(digest, a, min(4, 4 if b is None else b)) for digest, a, b in spans]
        done.append([(digest, a, b) for digest, a, b in clipped if a < b])
    keys = [start_key(entrant) for entrant in entrants]
    for i, a in enumerate(keys):
        for j, b in enumerate(keys):
            assert (a == b) == (done[i] == done[j])
    assert start_key(Entrant((1, 2), (), 0)) is None


@pytest.mark.parametrize("batch_rows", [9, 24, 200])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_shared_starts_change_no_text_and_run_fewer_tokens(
    family: str, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_starts, "PRICE", 1)
    monkeypatch.setattr(scheduler, "ENTER_SHARE", 0.0)
    model, jobs = tiny(family), jobs_of(rows_with_starts(), programs())
    units = np.eye(2, 48, dtype=np.float32)
    monitor = MonitorPlan(("a", "b"), ("a", "b"), {site: units for site in (post(0), post(LAYERS - 1))})
    block, copy = LeanLlama.block, KVSlots.copy
    counts, copies = [0, 0], list[int]()
    found = []
    for shared in (True, False):

        def counted(self: Any, layer: int, h: Tensor, *args: Any, shared: bool = shared) -> Tensor:
            counts[shared] += len(h)
            return block(self, layer, h, *args)

        def copied(self: Any, sources: Tensor, targets: Tensor) -> None:
            copies.append(len(sources))
            copy(self, sources, targets)

        chosen = engine(model, monitor=monitor, batch_rows=batch_rows, share_starts=shared)
        with monkeypatch.context() as patch:
            patch.setattr(LeanLlama, "block", counted)
            patch.setattr(KVSlots, "copy", copied)
            found.append(chosen.run(jobs))
    assert texts(found[0]) == texts(found[1])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(np.stack(a.monitored), np.stack(b.monitored), rtol=1e-3, atol=1e-2)
    assert sum(copies) > 0
    if batch_rows > len(jobs):  # in a small batch few rows are running whose starts could be copied
        assert counts[True] < 0.9 * counts[False]


def test_slots_serve_the_next_run_and_not_after_a_failure() -> None:
    model, rows = tiny("llama"), rows_with_starts()
    jobs = jobs_of(rows, programs())
    chosen = engine(model, batch_rows=40)
    expected = texts(chosen.run(jobs))
    slots = chosen._slots
    assert slots is not None
    few = jobs[5:30]
    assert texts(chosen.run(few)) == expected[5:30]
    assert texts(chosen.run(jobs)) == expected
    assert chosen._slots is slots
    too_much = [Step("add", post(layer), torch.full((1, 48), 3e38)) for layer in (0, 1)]
    with pytest.raises(NonFiniteError):
        chosen.run(jobs_of(rows, {"too much": too_much}))
    assert chosen._slots is None
    assert texts(chosen.run(jobs)) == expected
