"""Directions: the arithmetic against slow references, and what their values and keys may depend on."""

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

from analysis.directions import (
    MeansTask,
    cosine,
    derive,
    derived_key,
    difference_of_means,
    orthogonalise,
    random_directions,
)
from analysis.means import group_means, matched_halves, random_halves
from store.activations import ModelStore
from store.directions import Direction, directions_from_table
from store.errors import MismatchError, MissingDataError, ResidError, UndefinedError
from store.generation import Generation
from store.rows import Row
from store.study import Difference, Orthogonalised, Random

ROWS = make_rows(23)
POSITIVE, NEGATIVE = ROWS[:9], ROWS[9:]


def task(
    store: Path, positive: Sequence[Row] = POSITIVE, negative: Sequence[Row] = NEGATIVE, **changes: Any
) -> MeansTask:
    fields: dict[str, Any] = {
        "name": "d",
        "store": str(store),
        "model": MODEL,
        "component": "resid_post",
        "position": "prompt_end",
        "positive": tuple(row.key for row in positive),
        "negative": tuple(row.key for row in negative),
    }
    return MeansTask(**{**fields, **changes})


def slow_mean(rows: Sequence[Row], layer: int, dtype: Any = np.float32) -> np.ndarray:
    total = [0.0] * D_MODEL
    for row in rows:
        for i, value in enumerate(truth(row, "resid_post", layer, "prompt_end").astype(dtype)):
            total[i] += float(value)
    return np.array([value / len(rows) for value in total])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_difference_of_means_is_positive_minus_negative(tmp_path: Path, dtype: Any) -> None:
    from store.dtypes import NUMPY_DTYPES

    capture(new_store(str(tmp_path), dtype), request(ROWS, dtype=dtype), block_rows=5)
    direction = difference_of_means(task(tmp_path))
    assert direction.layers == tuple(range(LAYERS))
    assert (direction.n_positive, direction.n_negative) == (9, 14)
    for layer in range(LAYERS):
        stored = NUMPY_DTYPES[dtype]
        reference = slow_mean(POSITIVE, layer, stored) - slow_mean(NEGATIVE, layer, stored)
        np.testing.assert_allclose(direction.vectors[layer], reference, rtol=2e-7, atol=1e-9)
        assert direction.norms[layer] == pytest.approx(np.linalg.norm(reference))  # the raw norm is kept
    swapped = difference_of_means(task(tmp_path, NEGATIVE, POSITIVE))
    np.testing.assert_allclose(swapped.vectors, -direction.vectors, rtol=1e-6)


def test_split_half_cosine_is_that_of_two_disjoint_halves(tmp_path: Path) -> None:
    capture(new_store(str(tmp_path)), request(ROWS))
    direction = difference_of_means(task(tmp_path))
    halves = []
    for rows in (POSITIVE, NEGATIVE):
        rows = sorted(rows, key=lambda row: row.key)
        dealt = random_halves([row.key for row in rows], 0)
        halves.append([[row for row, h in zip(rows, dealt, strict=True) if h == half] for half in (0, 1)])
    (pos_a, pos_b), (neg_a, neg_b) = halves
    assert abs(len(pos_a) - len(pos_b)) <= 1
    assert {row.key for row in (*pos_a, *pos_b)} == {row.key for row in POSITIVE}
    assert direction.split_half_cosine is not None
    for layer in range(LAYERS):
        a = slow_mean(pos_a, layer) - slow_mean(neg_a, layer)
        b = slow_mean(pos_b, layer) - slow_mean(neg_b, layer)
        reference = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert direction.split_half_cosine[layer] == pytest.approx(reference, abs=1e-9)


def test_split_halves_need_four_rows_on_each_side(tmp_path: Path) -> None:
    capture(new_store(str(tmp_path)), request(ROWS))
    few = difference_of_means(task(tmp_path, ROWS[:3], ROWS[3:20]))
    assert few.split_half_cosine is None
    reference = np.stack([slow_mean(ROWS[:3], layer) - slow_mean(ROWS[3:20], layer) for layer in range(LAYERS)])
    np.testing.assert_allclose(few.vectors, reference, rtol=2e-7, atol=1e-9)
    assert difference_of_means(task(tmp_path, ROWS[:4], ROWS[4:8])).split_half_cosine is not None


def test_rows_matched_across_the_sides_are_dealt_together() -> None:
    """Dealt apart, a trait's questions did not cancel within a half, and the split-half cosine came out negative."""
    positive, negative = [f"p{i}" for i in range(12)], [f"n{i}" for i in range(12)]
    questions = {key: f"question {int(key[1:]) // 2}" for key in (*positive, *negative)}
    halves = dict(zip((*positive, *negative), matched_halves([*positive, *negative], 12, questions, 0), strict=True))
    for question in set(questions.values()):
        assert len({int(halves[key]) for key, asked in questions.items() if asked == question}) == 1
    assert sum(halves[key] for key in positive) == sum(halves[key] for key in negative) == 6

    rng = np.random.default_rng(0)
    vectors = 10 * rng.standard_normal((6, 32))  # what the questions add, far above the trait
    trait = rng.standard_normal(32)
    values = {key: vectors[int(key[1:]) // 2] + (trait if key[0] == "p" else 0) for key in questions}

    def split_half_cosine(dealt: dict[str, Any]) -> float:
        first, second = (
            np.mean([values[k] for k in positive if dealt[k] == half], axis=0)
            - np.mean([values[k] for k in negative if dealt[k] == half], axis=0)
            for half in (0, 1)
        )
        return cosine(first, second)

    apart = dict(zip((*positive, *negative), matched_halves([*positive, *negative], 12, {}, 0), strict=True))
    assert split_half_cosine(halves) == pytest.approx(1.0)
    assert split_half_cosine(apart) < 0


@given(
    st.lists(st.text(alphabet="0123456789abcdef", min_size=4), min_size=1, max_size=40, unique=True), st.integers(0, 9)
)
def test_halves_are_even_and_independent_of_order(keys: list[str], seed: int) -> None:
    halves = dict(zip(keys, random_halves(keys, seed).tolist(), strict=True))
    assert abs(sum(halves.values()) * 2 - len(keys)) <= 1
    again = keys[::-1]
    assert dict(zip(again, random_halves(again, seed).tolist(), strict=True)) == halves


def test_the_order_of_rows_does_not_matter_to_the_last_bit(tmp_path: Path) -> None:
    capture(new_store(str(tmp_path)), request(ROWS), block_rows=4)
    one = difference_of_means(task(tmp_path))
    other = difference_of_means(task(tmp_path, POSITIVE[::-1], NEGATIVE[::-1]))
    assert other.vectors.tobytes() == one.vectors.tobytes()
    assert other.split_half_cosine == one.split_half_cosine
    assert other.key == one.key


def test_neither_block_size_nor_generation_matters(tmp_path: Path) -> None:
    def scattered(model: ModelStore) -> None:
        capture(model, request(ROWS[5:12], layers=[0, 3]), block_rows=3)
        capture(model, request(ROWS[:7], layers=[1, 3, 5]), block_rows=1)
        capture(model, request(ROWS))

    stores = {
        "one block": lambda model: capture(model, request(ROWS), block_rows=50),
        "small blocks": lambda model: capture(model, request(ROWS), block_rows=2),
        "many generations": scattered,
    }
    found = []
    for name, fill in stores.items():
        fill(new_store(str(tmp_path / name)))
        found.append(difference_of_means(task(tmp_path / name)))
    for direction in found[1:]:
        assert direction.key == found[0].key
        np.testing.assert_allclose(direction.vectors, found[0].vectors, rtol=2e-7, atol=1e-9)
        np.testing.assert_allclose(direction.split_half_cosine, found[0].split_half_cosine, rtol=0, atol=1e-12)


def test_means_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ROWS), block_rows=2)
    selection = model.select([row.key for row in ROWS], "resid_post", "prompt_end")
    groups = np.arange(len(ROWS)) % 3
    results = [group_means(selection, groups, 3, threads=threads) for threads in (1, 2, 5)]
    assert len({result.means.tobytes() for result in results}) == 1
    assert results[0].counts.tolist() == [8, 8, 7]
    with pytest.raises(ResidError, match="no rows"):
        group_means(selection, groups, 4)


def test_float16_activations_do_not_overflow_in_the_sum(tmp_path: Path) -> None:
    model = new_store(str(tmp_path), "float16")
    rows = make_rows(12)
    (block,) = model.create(model.work([request(rows, dtype="float16")]))
    generation = Generation(model.location / block.generation)
    values = np.full((12, LAYERS, 1, D_MODEL), 60_000, dtype=np.float16)
    side = np.array([generation.index[row.key] for row in rows[:6]])
    values[side] = -60_000
    generation.write_block(0, {"resid_post": values})
    direction = difference_of_means(task(tmp_path, rows[:6], rows[6:]))
    assert (direction.vectors == -2 * np.float32(np.float16(60_000))).all()


def test_faults_are_errors(tmp_path: Path) -> None:
    model = new_store(str(tmp_path))
    capture(model, request(ROWS[:20]))
    with pytest.raises(MismatchError, match="positive and negative at once"):
        difference_of_means(task(tmp_path, ROWS[:5], ROWS[4:9]))
    with pytest.raises(MissingDataError, match="3 of 23 rows"):
        difference_of_means(task(tmp_path))
    with pytest.raises(MissingDataError, match="response_avg"):
        difference_of_means(task(tmp_path, ROWS[:5], ROWS[5:9], position="response_avg"))
    with pytest.raises(MissingDataError, match="holds nothing"):
        difference_of_means(task(tmp_path, ROWS[:5], ROWS[5:9], model="0" * 64))
    with pytest.raises(ResidError, match="no rows"):
        difference_of_means(task(tmp_path, ROWS[:5], []))


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_layer_at_which_a_direction_is_zero_costs_that_layer_only(tmp_path: Path, noise: float) -> None:
    model = new_store(str(tmp_path))
    (block,) = model.create(model.work([request(ROWS)], block_rows=len(ROWS)))
    generation = Generation(model.location / block.generation)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((len(ROWS), LAYERS, 1, D_MODEL))
    values[:, 4] = values[0, 4] * (1 + noise * rng.standard_normal((len(ROWS), 1, D_MODEL)))
    generation.write_block(0, {"resid_post": values})
    found = difference_of_means(task(tmp_path))  # used to raise, and to cost all directions of the study
    assert found.layers == tuple(layer for layer in range(LAYERS) if layer != 4)
    assert list(found.undefined) == [4]
    with pytest.raises(UndefinedError, match=r"'d' is zero, up to rounding, at resid_post\.4 .*\n  remedy: "):
        found.at(4)
    (read,) = directions_from_table(found.to_table("s")).values()
    assert (read.undefined, read.layers) == (found.undefined, found.layers)
    one = difference_of_means(task(tmp_path, layers=(3,)))
    np.testing.assert_array_equal(found.at(3), one.at(3))
    with pytest.raises(UndefinedError, match=r"'d' is zero, up to rounding, at resid_post\.4"):
        difference_of_means(task(tmp_path, layers=(4,)))


def test_a_derived_direction_lacks_the_layers_that_its_parents_lack_and_says_why() -> None:
    parent = replace(
        PARENTS["a"],
        layers=PARENTS["a"].layers[1:],
        vectors=PARENTS["a"].vectors[1:],
        provenance={"undefined": {str(PARENTS["a"].layers[0]): "direction 'a' is zero there"}},
    )
    derived = derive("d", Difference(method="difference", minuend="a", subtrahend="b"), {**PARENTS, "a": parent})
    assert derived.layers == parent.layers
    assert derived.undefined == {PARENTS["a"].layers[0]: "direction 'a' is zero there"}


def test_a_derived_direction_that_is_zero_at_one_layer_exists_at_the_others() -> None:
    vectors = PARENTS["a"].vectors.copy()
    vectors[1] = 2 * PARENTS["b"].vectors[1]
    found = orthogonal("b", parents={**PARENTS, "a": replace(PARENTS["a"], vectors=vectors)})
    gone = PARENTS["a"].layers[1]
    assert found.layers == tuple(layer for layer in PARENTS["a"].layers if layer != gone)
    assert "nothing is left of it" in found.undefined[gone]
    np.testing.assert_array_equal(found.at(found.layers[0]), orthogonal("b").at(found.layers[0]))


def test_the_key_is_that_of_the_inputs() -> None:
    base = task(Path("somewhere"))
    same = [
        replace(base, positive=base.positive[::-1]),
        replace(base, negative=base.negative[::-1]),
        replace(base, name="another", store="elsewhere"),
    ]
    assert {item.key for item in same} == {base.key}
    others = [
        replace(base, positive=base.positive[1:]),
        replace(base, positive=base.negative, negative=base.positive),
        replace(base, positive=(*base.positive, base.negative[0]), negative=base.negative[1:]),
        replace(base, model="0" * 64),
        replace(base, position="response_avg"),
        replace(base, component="mlp_out"),
        replace(base, layers=(0, 1)),
    ]
    assert len({base.key, *(item.key for item in others)}) == 1 + len(others)


# -- derived directions ------------------------------------------------------------------------------------------


def made(name: str, seed: int, layers: Sequence[int] = range(4), d_model: int = 12, **changes: Any) -> Direction:
    vectors = np.random.default_rng(seed).standard_normal((len(layers), d_model)) * (1 + seed)
    fields: dict[str, Any] = {"component": "resid_post", "position": "prompt_end", "model": MODEL, **changes}
    return Direction(
        name=name, key=name, method="difference_of_means", layers=tuple(layers), vectors=vectors.astype("f4"), **fields
    )


PARENTS = {name: made(name, seed) for seed, name in enumerate("abcde")}


def test_a_difference_is_minuend_minus_subtrahend_on_common_layers() -> None:
    parents = {"a": made("a", 0, range(4)), "b": made("b", 1, [3, 1, 7])}
    difference = derive("d", Difference(method="difference", minuend="a", subtrahend="b"), parents)
    assert difference.layers == (1, 3)
    for layer in (1, 3):
        np.testing.assert_allclose(difference.at(layer), parents["a"].at(layer) - parents["b"].at(layer), rtol=1e-6)
    assert difference.provenance is not None
    assert difference.provenance["parents"] == {"a": "a", "b": "b"}


def orthogonal(*others: str, parents: dict[str, Direction] = PARENTS) -> Direction:
    spec = Orthogonalised(method="orthogonalised", direction="a", orthogonal_to=list(others))
    return derive("o", spec, {name: parents[name] for name in ("a", *others)})


@pytest.mark.parametrize("others", [("b",), ("b", "c"), ("e", "b", "d", "c")])
def test_an_orthogonalised_direction_has_no_component_along_any_of_the_others(others: tuple[str, ...]) -> None:
    direction = orthogonal(*others)
    for layer in direction.layers:
        for other in others:
            assert abs(direction.unit(layer) @ PARENTS[other].unit(layer)) < 1e-6
        # What was removed lies in their span, so nothing else was.
        removed = PARENTS["a"].at(layer) - direction.at(layer)
        basis = np.stack([PARENTS[other].unit(layer) for other in others])
        coordinates = np.linalg.lstsq(basis.T, removed, rcond=None)[0]
        np.testing.assert_allclose(coordinates @ basis, removed, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1.0), st.integers(2, 5))
@settings(deadline=None)
def test_orthogonalising_works_for_nearly_parallel_lists(seed: int, spread: float, n: int) -> None:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(64)
    others = [common + spread * rng.standard_normal(64) for _ in range(n)]
    units = [other / np.linalg.norm(other) for other in others]
    rest = orthogonalise(rng.standard_normal(64), units).astype(np.float32).astype(np.float64)
    assert max(abs(rest @ unit) / np.linalg.norm(rest) for unit in units) < 1e-6


def test_the_order_of_the_list_does_not_matter() -> None:
    one, other = orthogonal("b", "c", "d"), orthogonal("d", "b", "c")
    assert one.vectors.tobytes() == other.vectors.tobytes()
    assert one.key == other.key


def test_naming_a_direction_twice_removes_it_once() -> None:
    twice = dict(PARENTS, f=replace(PARENTS["b"], name="f", vectors=PARENTS["b"].vectors * 3))
    np.testing.assert_allclose(
        orthogonal("b", "f", parents=twice).vectors, orthogonal("b").vectors, rtol=1e-5, atol=1e-6
    )


def test_a_direction_inside_the_span_is_an_error() -> None:
    inside = {
        **PARENTS,
        "a": replace(PARENTS["a"], vectors=(PARENTS["b"].vectors - 2 * PARENTS["c"].vectors).astype(np.float32)),
    }
    with pytest.raises(ResidError, match="nothing is left"):
        orthogonal("b", "c", parents=inside)
    with pytest.raises(ResidError, match="is zero, up to rounding, at"):
        derive("d", Difference(method="difference", minuend="a", subtrahend="a"), PARENTS)


def test_parents_must_fit_together() -> None:
    spec = Difference(method="difference", minuend="a", subtrahend="b")
    for change in ({"component": "mlp_out"}, {"model": "0" * 64}, {"layers": (9, 10, 11, 12)}):
        with pytest.raises(MismatchError):
            derive("d", spec, {"a": PARENTS["a"], "b": replace(PARENTS["b"], **change)})


def random(seed: int, match: Direction) -> Direction:
    return derive("r", Random(method="random", seed=seed, match_norm="m"), {"m": match})


def test_random_directions_are_seeded_and_have_the_norms_of_another() -> None:
    match = made("m", 3, range(20), 576)
    direction = random(7, match)
    np.testing.assert_allclose(direction.norms, match.norms, rtol=1e-6)
    assert random(7, match).vectors.tobytes() == direction.vectors.tobytes()
    assert random(7, match).key == direction.key
    other = random(8, match)
    assert other.key != direction.key
    # Independent draws in 576 dimensions have cosines of about 1 / 24.
    cosines = [cosine(direction.vectors[i], other.vectors[i]) for i in range(20)]
    cosines += [cosine(direction.vectors[i], direction.vectors[j]) for i in range(20) for j in range(i)]
    assert 0 < max(map(abs, cosines)) < 0.25
    assert np.std(cosines) == pytest.approx(1 / 24, rel=0.3)


def test_a_shared_draw_is_one_unit_vector_at_all_layers() -> None:
    match = made("m", 3)
    before, per_layer, shared = (
        Random.model_validate({"method": "random", "seed": 3, "match_norm": "m", **draw})
        for draw in ({}, {"draw": "layer"}, {"draw": "shared"})
    )
    direction = derive("r", shared, {"m": match})
    for layer in match.layers:
        np.testing.assert_allclose(direction.unit(layer), direction.unit(0), atol=1e-6)
    np.testing.assert_allclose(direction.norms, match.norms, rtol=1e-6)
    assert derived_key(per_layer, {"m": match}) == derived_key(before, {"m": match}) != direction.key


def test_a_random_direction_at_a_layer_does_not_depend_on_which_other_layers_there_are() -> None:
    np.testing.assert_array_equal(random_directions([4, 2], 10, 1), random_directions(range(5), 10, 1)[[4, 2]])


def test_derived_keys_depend_on_rule_and_parents_only() -> None:
    spec = Difference(method="difference", minuend="a", subtrahend="b")
    key = derived_key(spec, PARENTS)
    renamed = Difference(method="difference", minuend="x", subtrahend="y")
    assert derived_key(renamed, {"x": PARENTS["a"], "y": PARENTS["b"]}) == key
    swapped = Difference(method="difference", minuend="b", subtrahend="a")
    assert derived_key(swapped, PARENTS) != key
    for change in (
        {"vectors": PARENTS["b"].vectors + np.float32(1e-3)},
        {"layers": (1, 2, 3, 4)},
        {"position": "token:0"},
    ):
        assert derived_key(spec, {**PARENTS, "b": replace(PARENTS["b"], **change)}) != key


def test_the_cosine_with_zero_is_an_error() -> None:
    assert cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])) == -1.0
    with pytest.raises(ResidError, match="zero vector"):
        cosine(np.zeros(3), np.ones(3))
