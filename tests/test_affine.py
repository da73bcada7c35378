"""Affine projections: to a mean, in part, and clamps on one side."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conditions import DIRECTIONS, N_LAYERS, replay

from pipeline.interventions import Program, Segment
from store.conditions import Condition, Operation, interventions_text, orthonormal_basis, resolve_conditions
from store.errors import MissingDataError
from store.sites import Site
from store.study_interventions import ProjectOut, RowsStatistic

SITE = Site("resid_post", 1)
CPU = torch.device("cpu")
D = 24


def basis(rank: int, seed: int) -> npt.NDArray[np.float32]:
    draws = np.random.default_rng(seed).normal(size=(rank, D))
    return orthonormal_basis([v / np.linalg.norm(v) for v in draws]).astype(np.float32)


def stream(seed: int, n: int = 7) -> torch.Tensor:
    return 5 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def acted(h: torch.Tensor, *operations: Operation) -> torch.Tensor:
    return Program([Segment(operations, len(h), 0, len(h))], CPU)(SITE, h.clone())


ranks, seeds, fractions = st.integers(1, 3), st.integers(0, 10_000), st.floats(0, 1, width=32)


@settings(deadline=None, max_examples=50)
@given(ranks, seeds, fractions, st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3))
def test_a_projection_to_a_mean_goes_that_fraction_of_the_way(rank: int, seed: int, f: float, to: list[float]) -> None:
    v, h = basis(rank, seed), stream(seed)
    out = acted(h, Operation("project_out", SITE, v, "all", to=tuple(to[:rank]), fraction=f))
    before, after = h.double().numpy() @ v.T.astype(float), out.double().numpy() @ v.T.astype(float)
    target = np.array(to[:rank])
    np.testing.assert_allclose(after, before - f * (before - target), atol=1e-4)
    rest = h.double().numpy() - before @ v
    np.testing.assert_allclose(out.double().numpy() - after @ v, rest, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(ranks, seeds)
def test_fraction_1_is_a_plain_projection_and_0_the_identity(rank: int, seed: int) -> None:
    v, h = basis(rank, seed), stream(seed)
    plain = acted(h, Operation("project_out", SITE, v, "all"))
    assert torch.equal(acted(h, Operation("project_out", SITE, v, "all", to=(0.0,) * rank)), plain)
    assert torch.equal(acted(h, Operation("project_out", SITE, v, "all", fraction=0.0)), h)


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(-10, 10, width=32), st.sampled_from(["at_most", "at_least"]))
def test_a_clamp_on_one_side_leaves_the_other_as_it_is(seed: int, value: float, side: Any) -> None:
    v, h = basis(1, seed), stream(seed, 20)
    out = acted(h, Operation("clamp", SITE, v, "all", value, side=side))
    along = (h * torch.from_numpy(v)).sum(-1)
    inside = along <= value if side == "at_most" else along >= value
    assert torch.equal(out[inside], h[inside])
    both = acted(h, Operation("clamp", SITE, v, "all", value))
    assert torch.equal(out[~inside], both[~inside])


def test_operations_of_one_batch_do_not_touch_each_other() -> None:
    # Plain and affine operations share a table where they act at one site in one pass.
    v, h = basis(1, 3), stream(3, 12)
    operations = [
        Operation("project_out", SITE, v, "all"),
        Operation("project_out", SITE, v, "all", to=(4.0,)),
        Operation("clamp", SITE, v, "all", 2.0),
        Operation("clamp", SITE, v, "all", 2.0, side="at_most"),
    ]
    together = Program([Segment([o], 3, 3 * i, 3) for i, o in enumerate(operations)], CPU)(SITE, h.clone())
    for i, operation in enumerate(operations):
        rows = slice(3 * i, 3 * i + 3)
        assert torch.equal(together[rows], acted(h[rows], operation))


def resolved(item: dict[str, Any], mean: float = 3.0) -> Condition:
    def summarise(what: RowsStatistic, site: Site, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        assert vectors.shape[0] == 1
        return np.array([mean + site.layer])

    (condition,), waiting = resolve_conditions(replay(c=[item]), DIRECTIONS, N_LAYERS, "m", summarise=summarise)
    assert not waiting
    return condition


def test_what_is_taken_from_rows_is_in_the_key_at_each_layer() -> None:
    item = {"project_out": ["a"], "layers": [1, 2], "to": {"mean": ["harmless"]}}
    condition = resolved(item)
    assert [operation.to for operation in condition.operations] == [(4.0,), (5.0,)]
    assert resolved(item, 3.5).key != condition.key
    clamp = {"clamp": "a", "layers": [1], "projection": {"percentile": 95.0, "of": ["harmless"]}, "side": "at_most"}
    assert resolved(clamp).operations[0].value == 4.0
    assert len({resolved({**clamp, "side": side}).key for side in ("both", "at_most", "at_least")}) == 3


def test_keys_and_texts_of_plain_interventions_are_those_of_before() -> None:
    item = {"project_out": ["a"], "layers": [1]}
    assert resolved({**item, "fraction": 1.0}).key == resolved(item).key != resolved({**item, "fraction": 0.5}).key
    text = interventions_text(resolved(item).spec)
    assert not {"to", "fraction", "side"} & set(json.loads(text)[0])


def test_a_missing_capture_makes_its_condition_wait_with_the_reason() -> None:
    def summarise(what: RowsStatistic, site: Site, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        raise MissingDataError(f"nothing is captured at {site}\n  remedy: capture it")

    items = {"x": [{"project_out": ["a"], "layers": [1], "to": {"mean": ["harmless"]}}], "y": []}
    reasons: dict[str, str] = {}
    made, waiting = resolve_conditions(replay(**items), DIRECTIONS, N_LAYERS, "m", summarise=summarise, reasons=reasons)
    assert ([one.name for one in made], waiting) == (["y"], ["x"])
    assert reasons == {"x": "nothing is captured at resid_post.1"}


@pytest.mark.parametrize("to", [{}, {"mean": "a", "percentile": 5.0}, {"percentile": 5.0}, {"mean": "a", "of": "b"}])
def test_rows_are_summed_up_in_one_way(to: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a mean or by a percentile"):
        ProjectOut.model_validate({"project_out": "a", "layers": [1], "to": to})
