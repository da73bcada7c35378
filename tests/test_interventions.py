"""Interventions act on exactly the named rows, tokens and sites: every row of a batch, and never padding."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reference import Step, blocks, condition, random_rows, tiny
from tiny_models import LAYERS
from torch import Tensor

from pipeline.batching import pad
from pipeline.hooks import on_sites
from pipeline.interventions import BatchProgram
from pipeline.models import LoadedModel
from store.conditions import Condition, MonitorPlan
from store.sites import COMPONENTS, Site
from store.study_interventions import TokenRange

CPU = torch.device("cpu")
SITE = Site("resid_post", 1)
D = 48


def directions(n: int, seed: int = 0, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def add(v: Tensor, coefficient: float = 1.0, site: Site = SITE, **scope: Any) -> Step:
    return Step("add", site, coefficient * v[:1], **scope)


def project_out(v: Tensor, site: Site = SITE, **scope: Any) -> Step:
    return Step("project_out", site, v, **scope)


def apply(conditions: list[Condition], h: Tensor, mask: Tensor, *, decoding: bool = False, site: Site = SITE) -> Tensor:
    """Run a program's function of one site on h [row, token, d_model]; h itself must stay as it is."""
    program, before = BatchProgram([c.operations for c in conditions], CPU), h.clone()
    program.begin(mask, decoding=decoding)
    function = program.hooks().get(site)
    out = function(h) if function is not None else None
    assert torch.equal(bits(h), bits(before))
    return h if out is None else out


def stream(rows: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 77) -> Tensor:
    return (5 * torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(seed))).to(dtype)


def bits(h: Tensor) -> Tensor:
    return h.contiguous().view(torch.int32 if h.dtype == torch.float32 else torch.int16)


def component(h: Tensor, v: Tensor) -> Tensor:
    """Largest part of h along any vector in the span of v, relative to h: [...]."""
    basis = torch.linalg.qr(v.double().T)[0]
    relative: Tensor = (h.double() @ basis).norm(dim=-1) / h.double().norm(dim=-1)
    return relative


# -- the arithmetic, on random tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_project_out_removes_the_component_along_the_direction(rank: int) -> None:
    v, h = directions(rank), stream(4, 6)
    out = apply([condition("c", [project_out(v)])] * 4, h, torch.ones(4, 6))
    assert component(out, v).max() < 1e-5
    assert component(h, v).max() > 0.1
    other = h - out
    assert ((other.double() * out.double()).sum(-1).abs() / h.norm(dim=-1) ** 2).max() < 1e-5, "nothing else is removed"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_project_out_in_16_bits_leaves_what_rounding_leaves(dtype: torch.dtype, bound: float) -> None:
    v, h = directions(1), stream(4, 6, dtype)
    out = apply([condition("c", [project_out(v)])] * 4, h, torch.ones(4, 6))
    assert out.dtype == dtype
    assert component(out, v).max() < bound


def test_a_stream_along_the_direction_vanishes() -> None:
    v = directions(1)
    h = (25_000 * v).expand(2, 3, D).contiguous()
    out = apply([condition("c", [project_out(v)])] * 2, h, torch.ones(2, 3))
    assert out.norm(dim=-1).max() / h.norm(dim=-1).max() < 1e-6


def test_a_large_element_does_not_spoil_a_projection() -> None:
    # Real residual streams have single elements of 10^4 where others are near 1.
    v, h = directions(1), stream(4, 6)
    h[..., 7] = 25_000.0
    assert component(apply([condition("c", [project_out(v)])] * 4, h, torch.ones(4, 6)), v).max() < 1e-5


def test_a_subspace_is_projected_out_whole_also_if_its_directions_are_not_orthogonal() -> None:
    # Used to happen: directions were projected out one after the other, which leaves part of the first behind.
    base = directions(2)
    v = torch.stack([base[0], base[0] + 0.3 * base[1]])
    h = stream(2, 5)
    basis = torch.linalg.qr(v.double().T)[0]
    expected = h.double() - (h.double() @ basis) @ basis.T
    out = apply([condition("c", [project_out(v)])] * 2, h, torch.ones(2, 5))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    one_by_one = apply([condition("c", [project_out(v[:1]), project_out(v[1:])])] * 2, h, torch.ones(2, 5))
    assert component(one_by_one, v).max() > 0.05


@pytest.mark.parametrize("coefficient", [2.5, -0.5, 1e-3])
def test_add_moves_by_coefficient_times_the_vector(coefficient: float) -> None:
    v, h = directions(1), stream(3, 4)
    out = apply([condition("c", [add(v, coefficient)])] * 3, h, torch.ones(3, 4))
    assert torch.equal(out, h + coefficient * v[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_coefficient_of_zero_is_the_identity_bit_for_bit(dtype: torch.dtype) -> None:
    # Used to happen: -0.0 + 0.0 turned into 0.0.
    h = stream(2, 3, dtype)
    h[0, 0, :5] = -0.0
    out = apply([condition("c", [add(directions(1), 0.0)])] * 2, h, torch.ones(2, 3))
    assert torch.equal(bits(out), bits(h))


def test_interventions_at_one_site_are_applied_in_the_order_of_the_condition() -> None:
    v, h = directions(1), stream(2, 4)
    removed_last = condition("a", [add(v, 3.0), project_out(v)])
    added_last = condition("b", [project_out(v), add(v, 3.0)])
    out = apply([removed_last, added_last], h, torch.ones(2, 4))
    assert component(out[0], v).max() < 1e-5
    along = out[1] @ v[0] / v[0].norm()
    torch.testing.assert_close(along, torch.full((4,), 3.0 * float(v.norm())), rtol=1e-5, atol=1e-4)


def test_padding_keeps_its_bits_also_where_it_is_not_finite() -> None:
    # Used to happen: the mask was kept but never used, and padding was steered.
    h, mask = stream(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    h[0, 0] = float("nan")
    out = apply([condition("c", [add(directions(1)), project_out(directions(2, 1))])] * 2, h, mask)
    assert torch.equal(bits(out[0, :2]), bits(h[0, :2]))
    assert (out != h)[mask.bool()].any(-1).all()
    assert out[mask.bool()].isfinite().all()


@pytest.mark.parametrize(("tokens", "in_prefill", "in_decode"), [("all", 1, 1), ("prompt", 1, 0), ("response", 0, 1)])
def test_a_token_scope_is_kept_in_prefill_and_in_decoding(
    tokens: Literal["all", "prompt", "response"], in_prefill: int, in_decode: int
) -> None:
    h = stream(2, 4)
    conditions = [condition("c", [add(directions(1), tokens=tokens)]), condition("baseline")]
    for decoding, expected in ((False, in_prefill), (True, in_decode)):
        out = apply(conditions, h, torch.ones(2, 4), decoding=decoding)
        assert bool((out[0] != h[0]).any(-1).all()) == bool(expected)
        assert torch.equal(bits(out[0]), bits(h[0])) != bool(expected)
        assert torch.equal(bits(out[1]), bits(h[1]))


def test_rows_of_unsteered_conditions_have_no_operations_at_all() -> None:
    zero = condition("zero", [add(directions(1), 0.0)])
    program = BatchProgram([(), zero.operations], CPU)
    program.begin(torch.ones(2, 3), decoding=False)
    assert not program.hooks()


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows, the forward pass has 3"):
        BatchProgram([()] * 2, CPU).begin(torch.ones(3, 1), decoding=True)


steps = st.builds(
    lambda kind, rank, seed, tokens, site, size: Step(
        kind, Site("resid_post", site), size * directions(1 if kind == "add" else rank, seed, 8), tokens
    ),
    st.sampled_from(["add", "project_out"]),
    st.integers(1, 3),
    st.integers(0, 5),
    st.sampled_from(["all", "prompt", "response"]),
    st.integers(0, 1),
    st.sampled_from([0.0, 0.5, -2.0]).filter(bool) | st.just(1.0),
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.lists(steps, max_size=4), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
def test_a_batch_is_changed_as_a_loop_over_rows_and_tokens_would(
    data: st.DataObject, programs: list[list[Step]], decoding: bool, seed: int
) -> None:
    n_tokens = 1 if decoding else data.draw(st.integers(1, 5))
    h = torch.randn(len(programs), n_tokens, 8, generator=torch.Generator().manual_seed(seed))
    real = [1 if decoding else data.draw(st.integers(1, n_tokens)) for _ in programs]
    mask = torch.tensor([[int(token >= n_tokens - n) for token in range(n_tokens)] for n in real])
    conditions = [condition(f"c{row}", row_steps) for row, row_steps in enumerate(programs)]
    scope = {"all", "response" if decoding else "prompt"}
    for site in (Site("resid_post", 0), Site("resid_post", 1)):
        out = apply(conditions, h, mask, decoding=decoding, site=site)
        for row, row_steps in enumerate(programs):
            here = [step for step in row_steps if step.site == site and step.tokens in scope]
            for token in range(n_tokens):
                if not mask[row, token] or not here:
                    assert torch.equal(bits(out[row, token]), bits(h[row, token]))
                    continue
                expected = h[row, token]
                for step in here:
                    expected = step.apply(expected)
                torch.testing.assert_close(out[row, token], expected, rtol=0, atol=1e-5)


def test_a_row_is_changed_by_its_own_condition_whatever_its_batch_mates() -> None:
    programs = [
        [add(directions(1), 2.0)],
        [],
        [project_out(directions(2, 1)), add(directions(1, 2))],
        [add(directions(1, 3)), project_out(directions(1, 4)), project_out(directions(3, 5))],
        [project_out(directions(1, 6), tokens="response"), add(directions(1, 7))],
    ]
    h, mask = stream(5, 4), torch.ones(5, 4)
    conditions = [condition(f"c{i}", item) for i, item in enumerate(programs)]
    together = apply(conditions, h, mask)
    for row in range(5):
        alone = apply([conditions[row]], h[row : row + 1], mask[:1])[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


# -- what the program checks of itself -----------------------------------------------------------------------------


def test_an_operation_that_does_not_reach_the_stream_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Used to happen elsewhere: a write in place was a silent no-op, and every text was the baseline's.
    monkeypatch.setattr(Tensor, "index_copy_", lambda self, *args: self)
    with pytest.raises(AssertionError, match=r"resid_post.1: what add computed did not reach the stream"):
        apply([condition("c", [add(directions(1))])], stream(1, 3), torch.ones(1, 3))


def test_an_operation_that_spills_over_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "index_copy_", lambda self, dim, rows, values: self.copy_(values[:1].expand_as(self)))
    with pytest.raises(AssertionError, match=r"changed tokens of other rows"):
        apply([condition("c", [add(directions(1))]), condition("baseline")], stream(2, 1), torch.ones(2, 1))


def test_clamp_sets_the_projection_of_each_row_and_leaves_the_rest() -> None:
    v, h = directions(1), stream(3, 4)
    unit = v[0].double() / v[0].double().norm()
    values = (5.0, -2.0, 0.0)
    out = apply([condition(str(c), [Step("clamp", SITE, v, value=c)]) for c in values], h, torch.ones(3, 4))
    for row, value in enumerate(values):
        torch.testing.assert_close(out[row].double() @ unit, torch.full((4,), value).double(), rtol=0, atol=1e-4)
    rest = h.double() - (h.double() @ unit)[..., None] * unit
    torch.testing.assert_close(out.double() - (out.double() @ unit)[..., None] * unit, rest, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [({"from": 0, "to": 2}, [0, 1]), ({"from": -2}, [3, 4]), ({"from": 1, "to": -1}, [1, 2, 3]), ({"to": -4}, [0])],
)
def test_a_range_counts_from_the_start_or_the_end_of_the_prompt(tokens: dict[str, int], expected: list[int]) -> None:
    h = stream(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    steps = [add(directions(1), tokens=TokenRange.model_validate(tokens))]
    out = apply([condition("c", steps), condition("baseline")], h, mask)
    assert (out[0] != h[0]).any(-1).nonzero().flatten().tolist() == [2 + token for token in expected]
    assert torch.equal(bits(out[1]), bits(h[1]))
    decoded = apply([condition("c", steps)], h[:1, :1], mask[:1, -1:], decoding=True)
    # Used to happen: a range without an end ended with the prompt.
    assert torch.equal(bits(decoded), bits(h[:1, :1])) == ("to" in tokens)


# -- in models -----------------------------------------------------------------------------------------------------


def run(model: LoadedModel, conditions: list[Condition], site: Site, side: str = "left") -> tuple[Tensor, ...]:
    """Return what ``site`` holds before and after the program, [row, token, d_model], and the mask."""
    rows = random_rows([(5, 0), (9, 0), (3, 0), (7, 0)])[: len(conditions)]
    batch = pad([row.token_ids for row in rows], side=side, pad_id=0, device=CPU)
    program = BatchProgram([c.operations for c in conditions], CPU)
    program.begin(batch.attention_mask, decoding=False)
    found: dict[str, Tensor] = {}
    with (
        torch.inference_mode(),
        on_sites(model.architecture, {site: lambda h: found.update(before=h.clone())}),
        on_sites(model.architecture, program.hooks()),
        on_sites(model.architecture, {site: lambda h: found.update(after=h.clone())}),
    ):
        model.architecture.base(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    return found["before"], found["after"], batch.attention_mask.bool()


@pytest.mark.parametrize("at", COMPONENTS)
def test_interventions_reach_every_real_token_of_exactly_their_rows_at_every_site(family: str, at: Any) -> None:
    model = tiny(family)
    v = directions(2)
    for layer in range(LAYERS):
        site = Site(at, layer)
        conditions = [
            condition("removed", [project_out(v, site)]),
            condition("baseline"),
            condition("added", [add(v, 1.5, site)]),
            condition("elsewhere", [add(v, 2.0, site, tokens="response")]),
        ]
        before, after, mask = run(model, conditions, site)
        assert component(after[0][mask[0]], v).max() < 1e-5
        moved = after[2][mask[2]] - before[2][mask[2]]
        size = before[2][mask[2]].abs().max() + 1.5 * v[0].abs().max()
        assert (moved - 1.5 * v[0]).abs().max() / size < 1e-6
        for row in (1, 3):
            assert torch.equal(bits(after[row]), bits(before[row]))
        assert torch.equal(bits(after[~mask]), bits(before[~mask]))


def test_every_row_of_a_batch_is_steered_where_output_0_steers_only_the_first(family: str) -> None:
    # Used to happen: output[0].add_(v) in a block's forward hook; blocks return a tensor, so that is batch row 0 alone.
    model = tiny(family)
    v = directions(1)
    before, after, mask = run(model, [condition("c", [add(v, 2.0)])] * 4, SITE)
    changed = (before != after).any(-1)
    assert torch.equal(changed, mask)

    def published(module: Any, args: Any, output: Any) -> None:
        output[0].add_(2.0 * v[0])

    seen: dict[str, Tensor] = {}
    handle = blocks(model.model)[SITE.layer].register_forward_hook(published)
    try:
        with torch.inference_mode(), on_sites(model.architecture, {SITE: lambda h: seen.update(h=h.clone())}):
            model.model(input_ids=torch.full((3, 4), 9))
    finally:
        handle.remove()
    assert not torch.equal(seen["h"][0], seen["h"][1])
    assert torch.equal(seen["h"][1], seen["h"][2])


def test_what_is_monitored_is_the_last_token_after_the_interventions_of_its_site() -> None:
    model, v = tiny("llama"), directions(3)
    units = (v / v.norm(dim=1, keepdim=True)).numpy().astype(np.float32)
    sites = (Site("resid_post", 0), SITE, Site("mlp_out", 2))
    plan = MonitorPlan(("a", "b", "c"), ("ka", "kb", "kc"), {site: units for site in sites})
    rows = random_rows([(5, 0), (9, 0), (3, 0)])
    conditions = [condition("baseline"), condition("out", [project_out(v[:1])]), condition("in", [add(v, 2.0)])]
    batch = pad([row.token_ids for row in rows], side="left", pad_id=0, device=CPU)
    program, seen = BatchProgram([c.operations for c in conditions], CPU, plan), dict[Site, Tensor]()
    assert BatchProgram([c.operations for c in conditions], CPU).monitored() is None
    program.begin(batch.attention_mask, decoding=False)

    def keep(site: Site) -> Any:
        return lambda h: seen.update({site: h[:, -1].clone()})

    with (
        torch.inference_mode(),
        on_sites(model.architecture, program.hooks()),
        on_sites(model.architecture, {site: keep(site) for site in sites}),
    ):
        model.architecture.base(batch.input_ids, batch.attention_mask, batch.position_ids, use_cache=False)
    monitored = program.monitored()
    assert monitored is not None
    assert monitored.shape == (3, 3, 3)
    for index, site in enumerate(sites):
        expected = seen[site].double() @ torch.from_numpy(units).double().T
        torch.testing.assert_close(monitored[:, index].double(), expected, rtol=1e-4, atol=1e-4)
    assert abs(float(monitored[1, 1, 0])) < 1e-4
    assert abs(float(monitored[1, 0, 0])) > 0.01
