"""Energy-matched random directions: as strong in the rows as what they are a control of, and random otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.directions import random_directions
from analysis.energy import TOLERANCE, EnergyRows, energy_matched, isotropic_energy, matched_direction
from store.activations import ActivationStore, CaptureRequest
from store.directions import Direction
from store.errors import MissingDataError, ResidError
from store.generation import Generation
from store.rows import Row
from store.sites import Spans

Array = npt.NDArray[np.float64]
MODEL = "e" * 64
LAYERS, D = (0, 2, 3), 24


def rows_like_activations(n: int, d: int, seed: int) -> Array:
    """Rows with a mean, a few strong axes and a long tail of weak ones."""
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal(d) + rng.standard_normal((n, d)) * np.geomspace(20, 0.1, d)


def energy(h: Array, u: Array) -> float:
    return sum(float(row @ u) ** 2 for row in h) / len(h)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(3, 60), seed=st.integers(0, 1000), share=st.floats(0.02, 0.9))
def test_a_matched_direction_is_orthogonal_a_unit_and_as_strong_in_the_rows(n: int, seed: int, share: float) -> None:
    h = rows_like_activations(n, D, seed)
    unit, draw = random_directions((0, 1), D, seed)
    rest = h - np.outer(h @ unit, unit)
    wanted = share * float(np.linalg.eigvalsh(rest.T @ rest / n)[-1])
    found = matched_direction(h, unit, wanted, draw)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-12)
    assert abs(found @ unit) < 1e-12
    assert energy(h, found) == pytest.approx(wanted, rel=2 * TOLERANCE)


def test_the_isotropic_draw_itself_is_what_matches_its_own_energy() -> None:
    h = rows_like_activations(200, D, 1)
    unit, draw = random_directions((0, 1), D, 1)
    start = draw - (draw @ unit) * unit
    start /= np.linalg.norm(start)
    found = matched_direction(h, unit, energy(h, start), draw)
    np.testing.assert_allclose(found, start, atol=1e-4)


def test_draws_of_several_seeds_differ() -> None:
    h = rows_like_activations(200, D, 2)
    unit = random_directions((0,), D, 99)[0]
    found = [matched_direction(h, unit, 4 * isotropic_energy(h), random_directions((0,), D, s)[0]) for s in range(6)]
    cosines = np.abs(np.array(found) @ np.array(found).T)[np.triu_indices(6, 1)]
    assert cosines.max() < 0.98


def test_a_draw_of_the_direction_itself_is_refused() -> None:
    unit = random_directions((0,), D, 1)[0]
    with pytest.raises(ValueError, match="another seed"):
        matched_direction(rows_like_activations(9, D, 0), unit, 1.0, unit)


def test_an_energy_that_no_orthogonal_direction_has_is_refused() -> None:
    h = np.zeros((5, D))
    h[:, 0] = 100.0
    h[:, 1] = np.arange(5)
    unit = np.eye(D)[0]
    with pytest.raises(ValueError, match=r"its energy is 10000, and directions orthogonal to it have up to 6\b"):
        matched_direction(h, unit, 1e4, np.ones(D) / np.sqrt(D))


# --- from the store -----------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path) -> tuple[str, dict[str, Array], Direction]:
    """A store of 40 rows, what is in it by row key [layer, d_model], and a direction at its layers."""
    manifest = {"fingerprint": MODEL, "dtype": "float32", "n_layers": 4, "d_model": D}
    model = ActivationStore.open(str(tmp_path)).add_model(manifest)
    rows = tuple(Row(MODEL, f"{i}", (i, 1), Spans(2, 2)) for i in range(40))
    values = np.stack([rows_like_activations(40, D, layer) for layer in LAYERS], axis=1).astype(np.float32)
    request = CaptureRequest(rows, ("resid_post",), LAYERS, ("prompt_end",), "float32")
    _, blocks = model.assign([request])
    truth = {row.key: value.astype(np.float64) for row, value in zip(rows, values, strict=True)}
    for block in blocks:
        generation = Generation(model.location / block.generation)
        start, stop = generation.plan.block_range(block.block)
        stored = np.stack([truth[row.key] for row in generation.rows[start:stop]]).astype(np.float32)
        assert generation.write_block(block.block, {"resid_post": stored[:, :, None]})
    vectors = (3 * random_directions(LAYERS, D, 5)).astype(np.float32)
    parent = Direction("persona", "k", MODEL, "difference_of_means", "resid_post", "prompt_end", LAYERS, vectors)
    return str(tmp_path), truth, parent


def test_a_direction_is_matched_at_every_layer_over_the_named_rows(
    held: tuple[str, dict[str, Array], Direction],
) -> None:
    url, truth, parent = held
    keys = tuple(truth)[:30]
    found = energy_matched("matched", 7, parent, EnergyRows(url, keys, "prompt_end"))
    assert found.layers == parent.layers
    np.testing.assert_allclose(found.norms, parent.norms, rtol=1e-6)
    for i, layer in enumerate(LAYERS):
        h = np.stack([truth[key][i] for key in keys])
        assert energy(h, found.unit(layer)) == pytest.approx(energy(h, parent.unit(layer)), rel=1e-5)
        assert abs(found.unit(layer) @ parent.unit(layer)) < 1e-6
    again = energy_matched("other name", 7, parent, EnergyRows(url, keys[::-1], "prompt_end"))
    assert (again.key, again.digest) == (found.key, found.digest)
    assert energy_matched("matched", 8, parent, EnergyRows(url, keys, "prompt_end")).key != found.key


def test_rows_that_are_not_captured_are_missing(held: tuple[str, dict[str, Array], Direction]) -> None:
    url, truth, parent = held
    with pytest.raises(MissingDataError):
        energy_matched("matched", 7, parent, EnergyRows(url, (*truth, "0" * 64), "prompt_end"))


def test_a_direction_that_holds_nearly_all_energy_has_no_match(
    held: tuple[str, dict[str, Array], Direction],
) -> None:
    url, truth, _ = held
    h = np.stack([value[0] for value in truth.values()])
    first = np.linalg.svd(h, full_matrices=False)[2][0].astype(np.float32)
    strongest = Direction("x", "k", MODEL, "random", "resid_post", "prompt_end", (0,), first[None])
    with pytest.raises(ResidError, match=r"direction 'm' at resid_post\.0: .*\n  remedy: "):
        energy_matched("m", 1, strongest, EnergyRows(url, tuple(truth), "prompt_end"))
