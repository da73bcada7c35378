"""Sink tokens: scopes with and without them, and how each intervention's change is spread over tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from slow_reference import Step, condition, generate, random_rows, steered, tiny
from tiny_models import LAYERS

from pipeline.models import LoadedModel
from pipeline.replay import Job, Output, ReplayEngine
from pipeline.sink_bounds import sink_bounds
from store.rows import Row
from store.sites import Site, Spans
from store.study import Decoding
from store.study_interventions import SINK_TIMES, Region, TokenRange, TokenScope, region_of

SITE = Site("resid_post", 1)
DECODING = Decoding(max_new_tokens=6)


def directions(n: int, seed: int = 0, d: int = 48) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def scopes(bound: float) -> dict[str, list[Step]]:
    """Conditions of every scope, some with two operations at one site."""
    v = directions(4)
    tokens: dict[str, Any] = {
        "all": "all",
        "response": "response",
        "all_but_sink": "all_but_sink",
        "sink": "sink",
        "from": TokenRange.model_validate({"from": 1}),
        "range": TokenRange.model_validate({"from": 1, "to": 3}),
        "first of the response": TokenScope.model_validate({"response": {"from": 1, "to": 3}}),
        "both": TokenScope.model_validate({"prompt": {"from": -2}, "response": {"from": 2}}),
        "prompt without sinks": TokenScope.model_validate({"prompt": "all", "sink": "without"}),
    }
    made = {name: [Step("project_out", SITE, v[:2], scope, bound=bound)] for name, scope in tokens.items()}
    made["two"] = [
        Step("add", SITE, 3 * v[2:3], "prompt", bound=bound),
        Step("project_out", SITE, v[:1], "all_but_sink", bound=bound),
        Step("clamp", Site("resid_post", 0), v[3:], "all", 2.0, bound=bound),
    ]
    made["late"] = [Step("add", Site("resid_post", LAYERS - 1), v[2:3], "all", bound=bound)]
    return made | {"baseline": []}


def shared(n: int) -> list[Row]:
    """Rows that begin alike and go on differently."""
    start = random_rows([(40, 0)], seed=5)[0].token_ids
    rows = []
    for i, row in enumerate(random_rows([(4 + i, 0) for i in range(n)], seed=6)):
        ids = (*start, *row.token_ids)
        rows.append(Row("tiny", f"s{i}", ids, Spans(len(ids), len(ids))))
    return rows


@cache
def median_bound(family: str) -> float:
    """A norm that about half of the tokens exceed, so that every scope by sinks has both kinds."""
    model = tiny(family)
    seen: dict[Site, list[torch.Tensor]] = {}
    row = random_rows([(30, 0)])[0]
    with steered(model.model, [], 30, seen), torch.inference_mode():
        model.model(input_ids=torch.tensor([row.token_ids]))
    return float(seen[SITE][0].norm(dim=-1).median())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"share_drafts": True}),
        ("llama", {"share_prefill": False, "share_decoding": False}),
        ("llama", {"lean": False}),
        ("gpt2", {}),
    ],
)
def test_texts_and_effects_are_those_of_a_slow_reference(
    family: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bound = tiny(family), median_bound(family)
    monkeypatch.setattr("pipeline.replay.sink_bounds", lambda model: {SITE: bound})
    rows = random_rows([(5, 0), (9, 0)], seed=3) + shared(2)
    steps = scopes(bound)
    conditions = {name: condition(name, chosen) for name, chosen in steps.items()}
    jobs = [Job(row, conditions[name]) for row in rows for name in conditions]
    engine = ReplayEngine(model, DECODING, batch_rows=7, **options)
    outputs = engine.run(jobs)
    plain = ReplayEngine(model, DECODING, batch_rows=7, **options, record_effects=False).run(jobs)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain], "recording changes no text"
    for job, output in zip(jobs, outputs, strict=True):
        compare(model, job, output, steps[job.condition.name], list(engine.stop_ids))


def compare(model: LoadedModel, job: Job, output: Output, steps: list[Step], stop: list[int]) -> None:
    """Compare text and effects with those of plain hooks, one text alone."""
    ids, length = job.row.token_ids, job.row.spans.prompt_length
    text, _ = generate(model.model, ids, steps, DECODING.max_new_tokens, stop)
    assert output.token_ids == [token for token in text if token not in stop], job.condition.name
    read = (*ids, *(text[:-1]))  # the last token is never read
    changes: dict[int, list[tuple[int, float, float]]] = {}
    with steered(model.model, steps, length, changes=changes), torch.inference_mode():
        model.model(input_ids=torch.tensor([read]), use_cache=False)
    assert len(output.effects) == len(steps)
    for i, effect in enumerate(output.effects):
        expected = changes.get(i, [])
        assert effect.n_tokens == len(expected), (job.condition.name, i)
        if not expected:
            assert effect.change == 0
            assert effect.token == -1
            continue
        moved = [change for _, change, _ in expected]
        relative = [(change / size) ** 0.5 for _, change, size in expected]
        assert effect.change == pytest.approx(sum(moved), rel=1e-3)
        assert effect.largest == pytest.approx(max(moved), rel=1e-3)
        assert moved[[at for at, _, _ in expected].index(effect.token)] == pytest.approx(max(moved), rel=1e-3)
        assert effect.max_relative == pytest.approx(max(relative), rel=1e-3)
        assert effect.mean_relative == pytest.approx(sum(relative) / len(relative), rel=1e-3)


def test_a_model_without_sinks_is_treated_alike_with_and_without_them() -> None:
    model = tiny("llama")
    v = directions(2)
    rows = random_rows([(5, 0), (9, 0), (30, 0)], seed=8)
    names = {name: condition(name, [Step("project_out", SITE, v, name)]) for name in ("all", "all_but_sink")}  # type: ignore[arg-type]
    engine = ReplayEngine(model, DECODING)
    outputs = engine.run([Job(row, names[name]) for name in names for row in rows])
    assert [o.token_ids for o in outputs[:3]] == [o.token_ids for o in outputs[3:]]
    assert [o.effects for o in outputs[:3]] == [o.effects for o in outputs[3:]]


def test_the_first_token_of_smollm2_is_its_only_sink(smollm2: LoadedModel) -> None:
    # Used to happen: nothing said that a projection at all tokens acts through a constant token 0, whose norm at block
    # 15 is 166 times that of others.
    model = smollm2
    assert model.receipt is not None
    sinks = model.receipt.sinks
    assert {sink.token for sink in sinks} == {0}
    assert all(15 in sink.layers and sink.norm > 20_000 and sink.times_median > 50 for sink in sinks)
    bounds = sink_bounds(model)
    site = Site("resid_post", 15)
    assert 1_000 < bounds[site] < 10_000
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?"}], add_generation_prompt=True, return_dict=False
    )
    rows = [Row("m", "p", tuple(ids), Spans(len(ids), len(ids)))]
    v = directions(1, d=576)
    names = {name: condition(name, [Step("project_out", site, v, name)]) for name in ("all", "all_but_sink", "sink")}  # type: ignore[arg-type]
    outputs = ReplayEngine(model, DECODING).run([Job(rows[0], names[name]) for name in names])
    every, rest, only = (output.effects[0] for output in outputs)
    assert every.token == 0
    assert every.largest / every.change > 0.5
    assert rest.token != 0
    assert (only.token, only.n_tokens, only.largest) == (0, 1, only.change)
    assert rest.n_tokens == len(ids) - 1 + len(outputs[1].token_ids) - 1


@pytest.mark.parametrize(
    ("tokens", "same"),
    [
        ({"prompt": "all", "response": "all"}, "all"),
        ({"prompt": "all"}, "prompt"),
        ({"response": {"from": 0}}, "response"),
        ({"sink": "without"}, "all_but_sink"),
        ({"prompt": {"from": 1, "to": 3}}, {"from": 1, "to": 3}),
        ({"prompt": {"from": 1}, "response": "all"}, {"from": 1}),
    ],
)
def test_spellings_of_one_scope_are_one_region(tokens: dict[str, Any], same: Any) -> None:
    other = same if isinstance(same, str) else TokenRange.model_validate(same)
    assert region_of(TokenScope.model_validate(tokens)) == region_of(other)


def test_scopes_of_before_keep_what_stood_for_them_in_keys() -> None:
    def identity(tokens: Any) -> object:
        return region_of(tokens).identity

    assert [identity(name) for name in ("all", "prompt", "response")] == ["all", "prompt", "response"]
    assert identity(TokenRange.model_validate({"from": 0, "to": 4})) == {"first": 0, "end": 4}
    # Used to end with the prompt; that is now spelt under `prompt`, and has the key of then.
    assert identity(TokenScope.model_validate({"prompt": {"from": 1}})) == {"first": 1, "end": None}
    assert identity(TokenRange.model_validate({"from": 1})) == {"prompt": (1, None), "response": (0, None)}
    assert f"{SINK_TIMES:g} x" in str(identity("all_but_sink"))


def test_a_range_of_the_response_follows_a_prompt_that_ends_in_front_of_it() -> None:
    assert Region((0, None), (0, 3)).spans(5) == ((0, 8),)
    assert Region((0, None), (1, 3)).spans(5) == ((0, 5), (6, 8))
    assert Region((-2, None), (0, None)).spans(5) == ((3, None),)
