"""Random directions that carry as much of the activations as another one: a control for projecting that one out.

An isotropic unit direction in d dimensions takes about 1/d of a vector's energy, while a direction that was found in
the activations takes far more, so projecting a random one out is too lenient a control: it hardly changes anything.
Here the draw is random and yet E[(h . u)^2] over given rows is that of the direction that it is to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.directions import METHOD_VERSION, random_directions
from store.activations import ActivationStore
from store.directions import Direction, require_layers, undefined_record
from store.fingerprint import fingerprint
from store.location import Location

TOLERANCE = 1e-6  # of the energy, relative
# Second moments below this part of the largest are taken for it: what fewer rows than dimensions leave open is zero.
FLOOR = 1e-12
POWERS = 64.0  # of the second moment, either way: at the ends the draw is its first or last axis


@dataclass(frozen=True)
class EnergyRows:
    """Over which rows of a store the energies are to agree, and at which of their positions."""

    store: str
    row_keys: tuple[str, ...]
    position: str


def energy_matched_key(seed: int, parent: Direction, rows: EnergyRows) -> str:
    """Identify the result by its inputs; the order of rows does not matter."""
    return fingerprint(
        {
            "method": "random_matched",
            "version": METHOD_VERSION,
            "seed": seed,
            "parent": [parent.digest, parent.layers, parent.model, parent.component],
            "rows": sorted(rows.row_keys),
            "position": rows.position,
        }
    )


def energy_matched(name: str, seed: int, parent: Direction, rows: EnergyRows) -> Direction:
    """Return a random direction that is orthogonal to `parent` and as strong in the rows, at each layer of the parent.

    u . v = 0, mean((h . u_hat)^2) = mean((h . v_hat)^2) over the rows, ||u|| = ||v||. The draw is that of the method
    `random` with the same seed, moved towards axes on which the rows have more energy (or less).

    Raises:
        MissingDataError: if a row is not captured at the parent's component and layers.
        UndefinedError: if no direction orthogonal to the parent has that energy at any layer. A single such layer is
            left out, and named in the provenance under "undefined".
    """
    store = ActivationStore.open(Location.of(rows.store)).model(parent.model)
    keys = sorted(rows.row_keys)  # one order for the same rows: sums then agree to the last bit
    draws = random_directions(parent.layers, parent.vectors.shape[1], seed)
    vectors, energies, layers = [], [], []
    undefined = parent.undefined
    for number, layer in enumerate(parent.layers):
        values = store.select(keys, parent.component, rows.position, [layer]).to_numpy()
        h = values.reshape(len(keys), -1).astype(np.float64)  # [row, d_model]
        unit = parent.unit(layer)
        wanted = float(np.mean((h @ unit) ** 2))
        try:
            found = matched_direction(h, unit, wanted, draws[number])
        except ValueError as error:
            undefined[layer] = (
                f"direction {name!r} at {parent.component}.{layer}: {error}\n"
                f"  remedy: other prompts or another position, or method: random in place of random_matched"
            )
            continue
        layers.append(layer)
        vectors.append(found * parent.norms[number])
        energies.append({"layer": layer, "wanted": wanted, "isotropic": isotropic_energy(h)})
    require_layers(layers, undefined)
    return Direction(
        name=name,
        key=energy_matched_key(seed, parent, rows),
        model=parent.model,
        method="random_matched",
        component=parent.component,
        position=parent.position,
        layers=tuple(layers),
        vectors=np.stack(vectors).astype(np.float32),
        provenance={
            "method_version": METHOD_VERSION,
            "seed": seed,
            "parents": {parent.name: parent.key},
            "rows": len(rows.row_keys),
            "position": rows.position,
            "energies": energies,
            **undefined_record(undefined),
        },
    )


def isotropic_energy(h: npt.NDArray[np.float64]) -> float:
    """Return the energy that an isotropic unit direction has on average: mean(||h||^2) / d_model."""
    return float(np.mean(np.sum(h**2, axis=1)) / h.shape[1])


def matched_direction(
    h: npt.NDArray[np.float64], unit: npt.NDArray[np.float64], wanted: float, draw: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the unit vector u = normalised M^p draw, [d_model], with u . unit = 0 and mean((h . u)^2) = wanted.

    M is the rows' second moment in the space orthogonal to `unit`; p = 0 leaves the isotropic draw, p = 1/2 is a draw
    from a normal distribution with the rows' second moment. The energy never falls as p grows, which fixes p.

    Args:
        h: [row, d_model].
        unit: [d_model], of norm 1.
        wanted: the energy, in squared units of h.
        draw: an isotropic draw, [d_model].

    Raises:
        ValueError: if `wanted` lies outside what directions orthogonal to `unit` reach.
    """
    rest = h - np.outer(h @ unit, unit)
    start = draw - (draw @ unit) * unit
    if np.linalg.norm(start) < 1e-6:
        raise ValueError("the draw is this very direction; take another seed")
    # Axes of the rows with their energies; all that is orthogonal to them has none and stays as it was drawn.
    _, singular, axes = np.linalg.svd(rest, full_matrices=False)
    energies = singular**2 / len(h)
    inside = axes @ start
    outside = start - inside @ axes
    parts = np.append(inside, np.linalg.norm(outside))
    levels = np.append(energies, 0.0)
    if energies[0] <= 0 or not levels[parts != 0].min() < wanted < energies[0]:
        raise ValueError(f"its energy is {wanted:.6g}, and directions orthogonal to it have up to {energies[0]:.6g}")
    logs = np.log(np.maximum(levels / energies[0], FLOOR))

    def weighted(power: float) -> npt.NDArray[np.float64]:
        # The largest weight becomes 1: high powers would overflow.
        exponents = power * logs
        scaled: npt.NDArray[np.float64] = parts * np.exp(exponents - exponents[parts != 0].max())
        return scaled / np.linalg.norm(scaled)

    low, high = -POWERS, POWERS
    for _ in range(200):
        middle = (low + high) / 2
        if float(np.sum(weighted(middle) ** 2 * levels)) < wanted:
            low = middle
        else:
            high = middle
    weights = weighted(high)
    length = np.linalg.norm(outside)
    found: npt.NDArray[np.float64] = weights[:-1] @ axes + (weights[-1] / length * outside if length else 0.0)
    found -= (found @ unit) * unit
    found /= np.linalg.norm(found)
    reached = float(np.mean((h @ found) ** 2))
    if abs(reached - wanted) > TOLERANCE * wanted:
        raise ValueError(f"its energy, {wanted:.6g}, is not reached: the nearest draw has {reached:.6g}")
    return found
