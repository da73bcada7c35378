"""Principal components and the assistant axis against slow references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_worker import D_MODEL, LAYERS, MODEL, capture, make_rows, new_store, request, truth

from analysis import layerwise
from analysis.assistant_axis import AxisTask, assistant_axis
from analysis.components import ComponentsTask, components_of_directions, principal_components, without_duplicates
from analysis.directions import MeansTask, derive, derived_key, difference_of_means
from store.conditions import orthonormal_basis
from store.directions import Direction, directions_from_table
from store.errors import MismatchError, ResidError, UndefinedError
from store.rows import Row
from store.study_directions import PrincipalDirections

ROWS = make_rows(60)
POSITIVE, NEGATIVE = ROWS[:33], ROWS[33:]  # more positive rows than dimensions
FEW = ROWS[:10]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    capture(new_store(str(folder)), request(ROWS), block_rows=7)
    return folder


def matrix(rows: Sequence[Row], layer: int) -> np.ndarray:
    return np.array([truth(row, "resid_post", layer, "prompt_end").astype(float) for row in rows])


def task(store: Path, positive: Sequence[Row] = POSITIVE, k: int = 3, **changes: Any) -> ComponentsTask:
    fields: dict[str, Any] = {
        "name": "c.1",
        "wanted": tuple((i, f"c.{i}") for i in range(1, k + 1)),
        "store": str(store),
        "model": MODEL,
        "component": "resid_post",
        "position": "prompt_end",
        "positive": tuple(row.key for row in positive),
        "negative": tuple(row.key for row in NEGATIVE),
        "contrast": "to_mean",
        "centred": False,
        "layers": tuple(range(LAYERS)),
    }
    return ComponentsTask(**{**fields, **changes})


def power_iteration(contrasts: np.ndarray, k: int) -> np.ndarray:
    """The slow reference: one component after the other, by repeated multiplication, the earlier ones taken out."""
    found: list[np.ndarray] = []
    for _ in range(k):
        vector = np.random.default_rng(0).standard_normal(contrasts.shape[1])
        for _ in range(20_000):
            for other in found:
                vector = vector - (vector @ other) * other
            vector = contrasts.T @ (contrasts @ vector)
            vector = vector / np.sqrt(vector @ vector)
        found.append(vector)
    return np.array(found)


@pytest.mark.parametrize("positive", [POSITIVE, FEW], ids=["more rows than dimensions", "fewer"])
@pytest.mark.parametrize("centred", [False, True])
def test_components_of_a_contrast_are_those_of_power_iteration(
    store: Path, positive: Sequence[Row], centred: bool
) -> None:
    found = principal_components(task(store, positive, centred=centred, layers=(0, 4)))
    for i, layer in enumerate((0, 4)):
        contrasts = matrix(positive, layer) - matrix(NEGATIVE, layer).mean(axis=0)
        mean = contrasts.mean(axis=0)
        used = contrasts - mean if centred else contrasts
        reference = power_iteration(used, 3)
        for j, vector in enumerate(reference):
            direction = found[f"c.{j + 1}"]
            np.testing.assert_allclose(direction.vectors[i], vector * np.sign(vector @ mean), atol=2e-5)
            assert direction.provenance is not None
            share = np.sum((used @ vector) ** 2) / np.sum(used**2)
            assert direction.provenance["share"][i] == pytest.approx(share, rel=1e-6)
    assert {(d.n_positive, d.n_negative) for d in found.values()} == {(len(positive), len(NEGATIVE))}


def test_components_are_orthonormal_and_survive_the_table(store: Path) -> None:
    found = principal_components(task(store, k=5))
    for layer in range(LAYERS):
        units = np.stack([direction.at(layer) for direction in found.values()])
        np.testing.assert_allclose(units @ units.T, np.eye(5), atol=1e-6)
    for direction in found.values():
        assert directions_from_table(direction.to_table("s"))[direction.name].digest == direction.digest
        assert direction.split_half_cosine is not None
        assert all(-1 <= value <= 1 for value in direction.split_half_cosine)
        assert all(0 <= value <= 1 for value in direction.provenance["split_half_overlap"])


def test_of_a_strong_contrast_the_first_component_is_the_difference_of_means_and_stable(tmp_path: Path) -> None:
    from store.generation import Generation

    model = new_store(str(tmp_path))
    (block,) = model.create(model.work([request(ROWS)], block_rows=len(ROWS)))
    generation = Generation(model.location / block.generation)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((len(ROWS), LAYERS, 1, D_MODEL)).astype(np.float32)
    for row in POSITIVE:
        values[generation.index[row.key], :, :, 3] += 30
    generation.write_block(0, {"resid_post": values})
    found = principal_components(task(tmp_path, k=1))["c.1"]
    base = task(tmp_path)
    means = MeansTask("m", base.store, MODEL, base.component, base.position, base.positive, base.negative)
    reference = difference_of_means(means)
    for layer in range(LAYERS):
        assert found.unit(layer) @ reference.unit(layer) > 0.999
    assert found.split_half_cosine is not None
    assert min(found.split_half_cosine) > 0.99


def test_paired_contrasts_are_the_differences_of_rows_with_one_text(store: Path) -> None:
    positive, negative = ROWS[:12], ROWS[12:24]
    texts = {row.key: f"question {i // 2}" for side in (positive, negative) for i, row in enumerate(side)}
    found = principal_components(
        task(
            store,
            positive,
            k=2,
            negative=tuple(row.key for row in negative),
            contrast="paired",
            matched=tuple(texts.items()),
        )
    )
    for layer in range(LAYERS):
        one, other = matrix(positive, layer), matrix(negative, layer)
        contrasts = np.array([(one[2 * i] + one[2 * i + 1] - other[2 * i] - other[2 * i + 1]) / 2 for i in range(6)])
        for j, vector in enumerate(power_iteration(contrasts, 2)):
            sign = np.sign(vector @ contrasts.mean(axis=0))
            np.testing.assert_allclose(found[f"c.{j + 1}"].vectors[layer], sign * vector, atol=2e-5)
    with pytest.raises(MismatchError, match="nothing is paired"):
        principal_components(task(store, contrast="paired"))


def test_a_component_does_not_depend_on_the_order_of_rows_nor_on_how_many_are_asked_for(store: Path) -> None:
    base = task(store)
    found = principal_components(base)
    other = principal_components(replace(base, positive=base.positive[::-1], negative=base.negative[::-1]))
    fewer = principal_components(task(store, k=2))
    for name in ("c.1", "c.2"):
        assert found[name].vectors.tobytes() == other[name].vectors.tobytes() == fewer[name].vectors.tobytes()
        assert found[name].key == other[name].key == fewer[name].key
    others = [
        replace(base, contrast="paired"),
        replace(base, centred=True),
        replace(base, position="response_avg"),
        replace(base, positive=base.positive[1:]),
    ]
    assert len({base.keys["c.1"], base.keys["c.2"], *(item.keys["c.1"] for item in others)}) == 6


def test_too_few_components_and_shared_rows_are_errors(store: Path) -> None:
    found = principal_components(task(store, ROWS[:2]))
    assert sorted(found) == ["c.1", "c.2"]  # used to raise, because there is no third
    with pytest.raises(UndefinedError, match=r"'c.3' has 2 principal components at resid_post\.\d, and 3"):
        principal_components(replace(task(store, ROWS[:2]), wanted=((3, "c.3"),)))
    with pytest.raises(MismatchError, match="positive and negative at once"):
        principal_components(task(store, ROWS[:40]))


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 9))
@settings(deadline=None, max_examples=30)
def test_both_ways_to_a_spectrum_agree(seed: int, n: int, d: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((n, d))
    chunks = np.array_split(rows, 3)
    values, vectors = layerwise.spectrum([c for c in chunks if len(c)], n, d)
    np.testing.assert_allclose((vectors.T * values) @ vectors, rows.T @ rows / n, atol=1e-10)
    assert (np.diff(values) <= 1e-12).all()
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), atol=1e-10)


# -- components of directions --------------------------------------------------------------------------------------


def made(name: str, vectors: np.ndarray, **changes: Any) -> Direction:
    fields: dict[str, Any] = {"component": "resid_post", "position": "prompt_end", "model": MODEL, **changes}
    layers = tuple(range(len(vectors)))
    return Direction(name=name, key=name, method="x", layers=layers, vectors=vectors.astype("f4"), **fields)


def test_principal_directions_are_those_of_scikit_learn_with_signs_fixed() -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    parents = {f"t{i}": made(f"t{i}", rng.standard_normal((2, 20)) + 1) for i in range(9)}
    for index in (1, 2, 3):
        spec = PrincipalDirections(method="principal_directions", directions=list(parents), index=index)
        found = derive("pc", spec, parents)
        for layer in (0, 1):
            stack = np.stack([parent.at(layer) for parent in parents.values()])
            pca = PCA(3).fit(stack)
            vector = pca.components_[index - 1]
            sign = np.sign(vector @ stack.mean(axis=0))
            np.testing.assert_allclose(found.at(layer), sign * vector, atol=1e-6)
            assert found.provenance is not None
            assert found.provenance["share"][layer] == pytest.approx(pca.explained_variance_ratio_[index - 1])
        assert found.key == derived_key(spec, parents)
        assert derived_key(spec.model_copy(update={"index": 4}), parents) != found.key


def test_of_near_duplicates_the_first_is_kept_and_chains_are_one_cluster() -> None:
    angles = np.deg2rad([0, 80, 10, 20, 90, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1, 2, 3, 4, 5, 6]]).T
    kept, keeper = without_duplicates(vectors, float(np.cos(np.deg2rad(10))))
    assert kept == [0, 1, 5]  # 0-10-20 are a chain, 80-90 another; the opposite of the first is no duplicate
    assert keeper == [0, 1, 0, 0, 1, 5]
    assert without_duplicates(vectors, None)[0] == list(range(6))
    with pytest.raises(ResidError, match="3 directions have 2 principal components, not 3"):
        components_of_directions(np.eye(3), True, 3, "here")


# -- the assistant axis --------------------------------------------------------------------------------------------


def axis_task(store: Path, roles: dict[str, Sequence[Row]], **changes: Any) -> AxisTask:
    fields: dict[str, Any] = {
        "name": "axis",
        "store": str(store),
        "model": MODEL,
        "component": "resid_post",
        "position": "prompt_end",
        "default": (("a", tuple(row.key for row in ROWS[:6])), ("b", tuple(row.key for row in ROWS[6:16]))),
        "roles": tuple((name, tuple(row.key for row in rows)) for name, rows in roles.items()),
        "equal_default": False,
        "equal_roles": True,
        "layers": tuple(range(LAYERS)),
    }
    return AxisTask(**{**fields, **changes})


ROLES = {"pirate": ROWS[16:22], "poet": ROWS[22:26], "king": ROWS[26:50]}


@pytest.mark.parametrize("equal_default", [False, True])
@pytest.mark.parametrize("equal_roles", [False, True])
def test_the_axis_is_default_minus_the_mean_of_role_means(store: Path, equal_default: bool, equal_roles: bool) -> None:
    task = axis_task(store, ROLES, equal_default=equal_default, equal_roles=equal_roles)
    found = assistant_axis(task)["axis"]
    for layer in range(LAYERS):
        sides = []
        for groups, equal in (([ROWS[:6], ROWS[6:16]], equal_default), (list(ROLES.values()), equal_roles)):
            means = [matrix(rows, layer).mean(axis=0) for rows in groups]
            pooled = np.concatenate([matrix(rows, layer) for rows in groups]).mean(axis=0)
            sides.append(sum(means) / len(means) if equal else pooled)
        np.testing.assert_allclose(found.at(layer), sides[0] - sides[1], rtol=1e-6, atol=1e-7)
    assert (found.n_positive, found.n_negative) == (16, 34)
    assert found.split_half_cosine is not None


def test_neither_names_nor_order_of_roles_count_and_shared_rows_are_an_error(store: Path) -> None:
    base = axis_task(store, ROLES)
    turned = axis_task(store, {f"x{name}": rows[::-1] for name, rows in reversed(ROLES.items())})
    assert turned.keys == base.keys
    assert assistant_axis(turned)["axis"].vectors.tobytes() == assistant_axis(base)["axis"].vectors.tobytes()
    assert replace(base, equal_roles=False).keys != base.keys
    with pytest.raises(MismatchError, match="1 rows are in two roles"):
        assistant_axis(axis_task(store, {**ROLES, "twice": [ROWS[16]]}))
    with pytest.raises(ResidError, match="'none' has no rows"):
        assistant_axis(axis_task(store, {**ROLES, "none": []}))


# -- subspaces -----------------------------------------------------------------------------------------------------


def test_directions_projected_out_one_after_the_other_leave_some_behind_and_their_subspace_does_not() -> None:
    """The published source removed non-orthogonal directions in turn."""
    rng = np.random.default_rng(0)
    h, a = rng.standard_normal(30), rng.standard_normal(30)
    b = a + 0.5 * rng.standard_normal(30)
    units = [v / np.linalg.norm(v) for v in (a, b)]
    in_turn = h
    for unit in units:
        in_turn = in_turn - (in_turn @ unit) * unit
    assert abs(in_turn @ units[0]) > 0.01
    basis = orthonormal_basis(units)
    assert np.abs((h - (h @ basis.T) @ basis) @ np.stack(units).T).max() < 1e-12
