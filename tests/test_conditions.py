"""Conditions: sweeps expand, layers become absolute, directions become vectors, keys tell what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from store.conditions import (
    decoding_key,
    directions_used,
    generation_key,
    orthonormal_basis,
    resolve_conditions,
    resolve_monitor,
)
from store.directions import Direction
from store.errors import MismatchError, StudyError
from store.fingerprint import fingerprint
from store.sites import Site
from store.study import ConditionSpec, Decoding, Monitor, Replay
from store.study_expand import expand_conditions
from store.study_interventions import TokenRange

N_LAYERS, D = 6, 4


def direction(
    name: str, scale: float = 1.0, layers: tuple[int, ...] = tuple(range(N_LAYERS)), **more: Any
) -> Direction:
    vectors = scale * np.random.default_rng(len(name)).standard_normal((N_LAYERS, D)).astype(np.float32)
    fields = {"model": "m", "method": "difference_of_means", "component": "resid_post", "position": "prompt_end"}
    return Direction(name=name, key=name, layers=layers, vectors=vectors[list(layers)], **{**fields, **more})


DIRECTIONS = {item.name: item for item in (direction("a"), direction("bb", 5.0))}


def replay(**conditions: Any) -> Replay:
    specs = {name: {"interventions": items} for name, items in conditions.items()}
    return Replay.model_validate({"prompts": ["p"], "conditions": specs})


def resolved(*items: dict[str, Any], directions: dict[str, Direction] = DIRECTIONS) -> Any:
    conditions, waiting = resolve_conditions(replay(c=list(items)), directions, N_LAYERS, "m")
    assert waiting == []
    return conditions[0]


def test_a_clamp_holds_the_unit_vector_and_the_projection_and_has_a_key_of_its_own() -> None:
    item: dict[str, Any] = {"clamp": "bb", "projection": -2.5, "layers": [2], "tokens": {"from": -3}}
    (operation,) = resolved(item).operations
    assert (operation.kind, operation.value, str(operation.site)) == ("clamp", -2.5, "resid_post.2")
    np.testing.assert_allclose(operation.vectors[0], DIRECTIONS["bb"].unit(2), rtol=1e-6)
    assert operation.tokens.span(8) == (5, 8)
    others: list[dict[str, Any]] = [
        {**item, "projection": 2.5},
        {**item, "tokens": "prompt"},
        {**item, "tokens": {"from": -3, "to": -1}},
        {"project_out": "bb", "layers": [2]},
    ]
    assert len({resolved(one).key for one in (item, *others)}) == 5


@pytest.mark.parametrize(("first", "end", "expected"), [(0, 4, (0, 4)), (-3, None, (6, 9)), (1, -1, (1, 8))])
def test_a_range_of_tokens_lies_in_every_prompt_that_is_long_enough(
    first: int, end: int | None, expected: tuple[int, int]
) -> None:
    tokens = TokenRange.model_validate({"from": first, "to": end})
    assert tokens.span(9) == expected
    with pytest.raises(ValueError, match="not in a prompt of 2 tokens"):
        tokens.span(2)


def test_texts_from_before_stop_strings_keep_their_key() -> None:
    expected = fingerprint({"decoding": {"max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0}, "monitor": None})
    assert decoding_key(Decoding(max_new_tokens=9), None) == expected
    assert decoding_key(Decoding(max_new_tokens=9, stop=["x"]), None) != expected


def test_texts_of_another_engine_have_a_key_of_their_own_and_those_of_the_built_in_one_keep_theirs() -> None:
    decoding = Decoding(max_new_tokens=9)
    assert decoding_key(decoding, None, "resid") == decoding_key(decoding, None)
    assert decoding_key(decoding, None, "vllm") != decoding_key(decoding, None)


def test_a_sweep_becomes_one_condition_per_coefficient_with_distinct_names() -> None:
    values = [1, 2.5, -1.0, 0, 0.1234567, 0.1234568, 1e-7]
    sweep = [{"project_out": "a", "layers": 1}, {"add": "bb", "layers": [2], "coefficient": values}]
    expanded = expand_conditions(replay(base=[], x=sweep))
    assert [(item.base, item.coefficient) for item in expanded] == [("base", None), *(("x", value) for value in values)]
    names = [item.name for item in expanded]
    assert names[:4] == ["base", "x[coefficient=1]", "x[coefficient=2.5]", "x[coefficient=-1]"]
    assert len(set(names)) == len(names)
    for item in expanded[1:]:
        assert item.spec.interventions[1].coefficient == item.coefficient  # type: ignore[union-attr]
        assert item.spec.interventions[0].project_out == ["a"]  # type: ignore[union-attr]


def test_directions_used_include_those_whose_norm_is_matched() -> None:
    items = [{"add": "a", "layers": 1, "norm": {"match": "bb"}}, {"project_out": ["c", "d"], "layers": 1}]
    assert directions_used(ConditionSpec.model_validate({"interventions": items})) == {"a", "bb", "c", "d"}


def test_norm_rules_scale_the_added_vector() -> None:
    a, b = DIRECTIONS["a"].at(2), DIRECTIONS["bb"].at(2)
    for norm, expected in (
        ("natural", 3 * a),
        ("unit", 3 * a / np.linalg.norm(a)),
        ({"match": "bb"}, 3 * a / np.linalg.norm(a) * np.linalg.norm(b)),
    ):
        (operation,) = resolved({"add": "a", "layers": [2], "coefficient": 3, "norm": norm}).operations
        assert (operation.kind, operation.site, operation.vectors.dtype) == ("add", Site("resid_post", 2), np.float32)
        np.testing.assert_allclose(operation.vectors, expected[None], rtol=1e-6)


def test_each_layer_uses_its_own_vector_unless_one_is_named() -> None:
    own = resolved({"add": "a", "layers": {"from": 1, "to": -2}, "component": "mlp_out", "tokens": "response"})
    assert [str(operation.site) for operation in own.operations] == [f"mlp_out.{layer}" for layer in (1, 2, 3, 4)]
    assert {operation.tokens for operation in own.operations} == {"response"}
    for operation in own.operations:
        np.testing.assert_allclose(operation.vectors[0], DIRECTIONS["a"].at(operation.site.layer), rtol=1e-6)
    same = resolved({"add": "a", "layers": [1, 2], "from_layer": -1})
    for operation in same.operations:
        np.testing.assert_allclose(operation.vectors[0], DIRECTIONS["a"].at(5), rtol=1e-6)


def test_a_subspace_is_projected_out_with_an_orthonormal_basis() -> None:
    (operation,) = resolved({"project_out": ["a", "bb"], "layers": [3]}).operations
    np.testing.assert_allclose(operation.vectors @ operation.vectors.T, np.eye(2), atol=1e-6)
    for name in ("a", "bb"):
        unit = DIRECTIONS[name].unit(3)
        np.testing.assert_allclose(operation.vectors.T @ (operation.vectors @ unit), unit, atol=1e-6)


def test_dependent_directions_are_refused_with_the_line(tmp_path: Path) -> None:
    copy = direction("a", scale=-2.0)
    study = tmp_path / "s.yaml"
    study.write_text("replay:\n  conditions:\n    x.y:\n      interventions: []\n")
    spec = replay(**{"x.y": [{"project_out": ["a", "copy"], "layers": [1]}]})
    with pytest.raises(StudyError, match="the directions a, copy are linearly dependent at layer 1") as caught:
        resolve_conditions(spec, {"a": DIRECTIONS["a"], "copy": copy}, N_LAYERS, "m", study)
    assert (caught.value.file, caught.value.key) == (f"{study}:4", "replay.conditions.x.y.interventions")


def test_conditions_wait_for_directions_and_for_their_layers() -> None:
    spec = replay(base=[], x=[{"add": "none", "layers": 1}], y=[{"add": "few", "layers": [0, 1]}])
    conditions, waiting = resolve_conditions(spec, {"few": direction("few", layers=(0,))}, N_LAYERS, "m")
    assert [condition.name for condition in conditions] == ["base"]
    assert waiting == ["x", "y"]


def test_a_direction_of_another_model_is_refused() -> None:
    with pytest.raises(MismatchError, match="'a' belongs to another model"):
        resolve_conditions(replay(x=[{"add": "a", "layers": 1}]), DIRECTIONS, N_LAYERS, "other")


def test_a_key_tells_what_a_condition_does_however_it_is_spelt() -> None:
    add = {"add": "a", "layers": [5], "coefficient": 2}
    same = [add, {**add, "layers": -1}, {**add, "layers": [1.0]}, {**add, "coefficient": 2.0, "norm": "natural"}]
    assert len({resolved(item).key for item in same}) == 1
    other = [
        {**add, "layers": [4]},
        {**add, "coefficient": 3},
        {**add, "norm": "unit"},
        {**add, "norm": {"match": "bb"}},
        {**add, "tokens": "prompt"},
        {**add, "component": "mlp_out"},
        {**add, "from_layer": 0},
        {"project_out": "a", "layers": [5]},
        {**add, "add": "bb"},
    ]
    assert len({resolved(item).key for item in [add, *other]}) == len(other) + 1
    first, second = {"project_out": "a", "layers": [1]}, {"add": "a", "layers": [1]}
    assert resolved(first, second).key != resolved(second, first).key
    renamed = {"a": direction("bb")}
    assert resolved(add, directions=renamed).key != resolved(add).key


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 5), st.just(8)), elements=st.floats(-1, 1).map(lambda x: round(x, 3))
    )
)
def test_a_basis_is_orthonormal_and_spans_the_same(vectors: npt.NDArray[np.float64]) -> None:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = (vectors / np.where(norms == 0, 1, norms))[norms[:, 0] > 0]
    if not len(units):
        return
    basis = orthonormal_basis(list(units))
    singular = np.linalg.svd(units, compute_uv=False)
    assert len(basis) == (singular > 1e-6 * singular[0]).sum()
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
    np.testing.assert_allclose(units @ basis.T @ basis, units, atol=1e-5)


def test_one_vector_keeps_its_sign() -> None:
    vector = np.array([0.0, -2.0, 0.0])
    np.testing.assert_array_equal(orthonormal_basis([vector]), [[0.0, -1.0, 0.0]])


def test_a_monitor_reads_unit_vectors_at_its_sites_or_waits() -> None:
    plan = resolve_monitor(Monitor(directions=["a", "bb"], layers=[0, -1]), DIRECTIONS, N_LAYERS)
    assert plan is not None
    assert [str(site) for site in plan.units] == ["resid_post.0", "resid_post.5"]
    for units in plan.units.values():
        np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-6)
    assert plan.key != resolve_monitor(Monitor(directions=["bb", "a"], layers=[0, -1]), DIRECTIONS, N_LAYERS).key  # type: ignore[union-attr]
    assert resolve_monitor(None, DIRECTIONS, N_LAYERS) is None
    assert resolve_monitor(Monitor(directions=["c"]), DIRECTIONS, N_LAYERS) is None
    assert resolve_monitor(Monitor(directions=["few"]), {"few": direction("few", layers=(0,))}, N_LAYERS) is None


def test_a_generation_key_leaves_nothing_out() -> None:
    plan = resolve_monitor(Monitor(directions=["a"]), DIRECTIONS, N_LAYERS)
    how = [decoding_key(Decoding(max_new_tokens=n), monitor) for n in (1, 2) for monitor in (None, plan)]
    how.append(decoding_key(Decoding(max_new_tokens=1, temperature=1.0), None))
    how.append(decoding_key(Decoding(max_new_tokens=1, temperature=1.0, top_p=0.5), None))
    keys = {generation_key(m, r, c, d, s) for m in "mn" for r in "rs" for c in "cd" for d in how for s in (0, 1)}
    assert len(keys) == 2 * 2 * 2 * len(how) * 2
