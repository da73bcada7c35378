"""A random control that removes as much as the direction that it stands in for.

Projecting out a direction v takes the energy E[(h . v_hat)^2] out of the stream. An isotropic random direction has
about E[|h|^2] / d_model of it, often far less: it is too lenient a control. Here the control u is

- random: an isotropic draw g (that of `random` with the same seed) without its component along v, coloured by
  ``(1 + S / s)^(beta / 2)``, where S is the second moment E[h h^T] of named cached rows in the complement of v, and s
  its mean eigenvalue. beta = 0 leaves the draw isotropic; with beta it moves towards where the rows lie (or, below 0,
  away). The energy of u grows strictly with beta, so just one beta gives a wanted energy: the least colouring that
  does (found by bisection);
- orthogonal to v at every layer;
- matched: E[(h . u_hat)^2] equals E[(h . v_hat)^2] over those rows, within `tolerance` (relative), as measured once
  more on the rows with the float32 vector that is kept;
- of the norm of v at each layer, so that it can be added as well.

The second moment is not centred: projecting out removes the whole component, mean included. The energy is matched on
the rows and at the position named, and nowhere else: name what the intervention will act on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.directions import random_directions
from analysis.layerwise import Floats, layer_chunks, over_layers, spectrum
from store.activations import ActivationStore
from store.directions import Direction
from store.errors import ResidError
from store.fingerprint import fingerprint
from store.location import Location

MATCHED_VERSION = 1
STEEPEST = 2.0**20  # of beta: beyond it the energy is as near to its bound as it gets


class UnmatchedError(ResidError):
    """No direction has the energy that is asked for."""


@dataclass(frozen=True)
class EnergyTask:
    """Energy-matched random directions to compute, one per seed."""

    name: str
    wanted: tuple[tuple[int, str], ...]  # (seed, name of its direction)
    parent: Direction
    store: str
    position: str
    rows: tuple[str, ...]
    tolerance: float
    layers: tuple[int, ...]

    @property
    def keys(self) -> dict[str, str]:
        """Identify each direction by its inputs; how many seeds are computed beside it does not matter."""
        record = {
            "method": "random_matched",
            "version": MATCHED_VERSION,
            "parent": [self.parent.digest, self.parent.layers, self.parent.model, self.parent.component],
            "position": self.position,
            "rows": sorted(self.rows),
            "tolerance": self.tolerance,
            "layers": self.layers,
        }
        return {name: fingerprint({**record, "seed": seed}) for seed, name in self.wanted}


def random_matched(task: EnergyTask) -> dict[str, Direction]:
    """Return a matched direction for every seed, by name; provenance holds target, achieved and isotropic energy.

    Raises:
        MissingDataError: if a row is not captured.
        ResidError: if no orthogonal direction has that energy at a layer.
    """
    parent = task.parent
    layers = [layer for layer in task.layers if layer in parent.layers]
    if not layers:
        raise ResidError(f"direction {task.name!r} and {parent.name!r} have no layer in common")
    store = ActivationStore.open(Location.of(task.store)).model(parent.model)
    selection = store.select(tuple(sorted(task.rows)), parent.component, task.position, layers)
    d_model = selection.d_model

    def of_layer(layer: int) -> list[tuple[Floats, dict[str, float]]] | str:
        try:
            return matched(layer)
        except UnmatchedError as error:
            return f"{parent.component}.{layer}: {error}"

    def matched(layer: int) -> list[tuple[Floats, dict[str, float]]]:
        unit = parent.unit(layer)
        n, energy = len(selection), 0.0

        def rest() -> Any:
            nonlocal energy
            for _, values in layer_chunks(selection, layer):
                along = values @ unit
                energy += float(along @ along) / n
                yield values - np.outer(along, unit)

        values, vectors = spectrum(rest(), n, d_model)
        found = []
        for seed, _ in task.wanted:
            draw = random_directions([layer], d_model, seed)[0]
            draw -= (draw @ unit) * unit
            vector, beta = coloured(draw, values, vectors, energy)
            vector -= (vector @ unit) * unit
            kept = (vector / np.linalg.norm(vector) * np.linalg.norm(parent.at(layer))).astype(np.float32)
            facts = {"beta": beta, "target": energy, "isotropic": quadratic(draw, values, vectors)}
            found.append((kept.astype(np.float64), facts))
        units = np.stack([kept / np.linalg.norm(kept) for kept, _ in found], axis=1)  # [d_model, seed]
        achieved = np.zeros(units.shape[1])
        for _, chunk in layer_chunks(selection, layer):
            achieved += np.sum((chunk @ units) ** 2, axis=0) / n
        for (_, facts), value in zip(found, achieved, strict=True):
            facts["achieved"] = float(value)
            if abs(value - energy) > task.tolerance * energy:
                raise UnmatchedError(f"rounding leaves the energy {value:.6g} for {energy:.6g}; raise tolerance")
        return found

    tried = over_layers(of_layer, selection.layers)
    failed = [one for one in tried if isinstance(one, str)]
    if failed:
        lines = [
            f"direction {task.name!r}: the energy of {parent.name!r} cannot be matched at {len(failed)} of "
            f"{len(tried)} layers",
            *failed,
            "remedy: restrict its layers: to the others, or name rows with less energy along the direction",
        ]
        raise ResidError("\n  ".join(lines))
    by_layer = [one for one in tried if not isinstance(one, str)]
    result = {}
    for i, (seed, name) in enumerate(task.wanted):
        facts = [of_one[i][1] for of_one in by_layer]
        result[name] = Direction(
            name=name,
            key=task.keys[name],
            model=parent.model,
            method="random_matched",
            component=parent.component,
            position=task.position,
            layers=selection.layers,
            vectors=np.stack([of_one[i][0] for of_one in by_layer]).astype(np.float32),
            provenance={
                "method_version": MATCHED_VERSION,
                "seed": seed,
                "parents": {parent.name: parent.key},
                "n_rows": len(selection.row_keys),
                "tolerance": task.tolerance,
                **{f"energy_{key}" if key != "beta" else key: [one[key] for one in facts] for key in facts[0]},
            },
        )
    return result


def quadratic(vector: Floats, values: Floats, vectors: Floats) -> float:
    """Return u^T S u of the unit vector u along ``vector``, S being given by its spectrum."""
    return float(np.sum(values * (vectors @ vector) ** 2) / (vector @ vector))


def coloured(draw: Floats, values: Floats, vectors: Floats, target: float) -> tuple[Floats, float]:
    """Return (1 + S / s)^(beta / 2) g, scaled to norm 1, with u^T S u = target, and beta.

    Args:
        draw: g, [d_model].
        values, vectors: spectrum of S, [rank] and [rank, d_model]; s is the mean of all d_model - 1 eigenvalues but the
            one along the direction that S is without.

    Raises:
        UnmatchedError: if the target is not strictly between the energies that beta can reach.
    """
    scale = values.sum() / (len(draw) - 1)
    if not scale > 0:
        raise UnmatchedError("the rows have nothing but the direction itself, so nothing can match its energy")
    along = vectors @ draw
    outside = draw - along @ vectors
    steps = np.log1p(values / scale)

    def mixture(beta: float) -> tuple[Floats, float, float]:
        logs = beta / 2 * steps
        shift = max(0.0, float(logs.max()))  # of what is outside the logarithm is 0
        weighted = along * np.exp(logs - shift)
        rest = float(np.exp(-shift))
        total = float(weighted @ weighted) + rest**2 * float(outside @ outside)
        return weighted, rest, float(values @ weighted**2) / total if total > 0 else 0.0

    low, high = -1.0, 1.0
    while mixture(high)[2] < target and high < STEEPEST:
        low, high = high, 2 * high
    while mixture(low)[2] > target and -low < STEEPEST:
        low, high = 2 * low, low
    least, most = mixture(low)[2], mixture(high)[2]
    if not least <= target <= most:
        bound = f"at most {most:.6g}" if target > most else f"at least {least:.6g}"
        raise UnmatchedError(f"no orthogonal direction has the mean squared projection {target:.6g}; they have {bound}")
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if mixture(middle)[2] < target else (low, middle)
    weighted, rest, _ = mixture(high)
    vector = weighted @ vectors + rest * outside
    found: Floats = vector / np.linalg.norm(vector)
    return found, high
