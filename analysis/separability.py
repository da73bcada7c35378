"""How well the projection on a direction tells two sides of rows apart: AUC and d', with bootstrap intervals.

AUC is the share of pairs (one positive, one negative row) in which the positive row projects further along the
direction, ties counting half: 0.5 is chance. d' is the difference of the means over the root of the mean of the two
variances (n - 1 in the denominator). Intervals are percentiles of a bootstrap that draws each side apart, and whole
prompt texts at a time: rows of one text (an answer under each instruction, say) are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.layerwise import Floats, layer_chunks
from store.activations import ActivationStore
from store.directions import Direction
from store.errors import MismatchError, ResidError
from store.fingerprint import fingerprint
from store.location import Location
from store.schemas import TABLES

CONFIDENCE = 0.95
VERSION = 1
AT_ONCE = 2_000_000  # weights in memory


@dataclass(frozen=True)
class SeparabilityUnit:
    """Two sides of rows along directions of one component at one layer."""

    table: ClassVar[str] = "separability"
    name: str  # of the analysis in the study
    store: str
    directions: tuple[Direction, ...]
    n_training: tuple[int, ...]  # of each direction: evaluated prompts that it was computed from
    layer: int
    position: str
    positive: tuple[tuple[str, str], ...]  # (row key, prompt text)
    negative: tuple[tuple[str, str], ...]
    resamples: int
    seed: int

    @cached_property
    def id(self) -> str:
        """Identify the unit by all that its table says."""
        items = [[d.name, d.key, d.digest, n] for d, n in zip(self.directions, self.n_training, strict=True)]
        sides = [sorted(self.positive), sorted(self.negative)]
        record = {"directions": items, "sides": sides, "layer": self.layer, "position": self.position}
        return fingerprint({"table": self.table, "draws": [self.resamples, self.seed], "v": VERSION, **record})[:32]

    def compute(self) -> pa.Table:
        """Return a row per direction.

        Raises:
            MissingDataError: if a row is not captured.
            MismatchError: if a row is on both sides.
            ResidError: if a side has fewer than two rows.
        """
        positive, negative = sorted(self.positive), sorted(self.negative)
        keys = [key for key, _ in (*positive, *negative)]
        where = f"geometry.separability.{self.name}"
        if len(set(keys)) < len(keys):
            raise MismatchError(f"{where}: a row is on both sides\n  remedy: make the prompt sets disjoint")
        if min(len(positive), len(negative)) < 2:
            raise ResidError(f"{where}: a side has fewer than two rows\n  remedy: name more prompts")
        first = self.directions[0]
        store = ActivationStore.open(Location.of(self.store)).model(first.model)
        selection = store.select(tuple(keys), first.component, self.position, [self.layer])
        units = np.stack([direction.unit(self.layer) for direction in self.directions], axis=1)
        projected = np.empty((len(keys), len(self.directions)))
        for into, values in layer_chunks(selection, self.layer):
            projected[into] = values @ units
        rng = np.random.default_rng((self.seed, self.layer))
        weights = [resampled([text for _, text in side], self.resamples, rng) for side in (positive, negative)]
        records = []
        tail = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        for i, direction in enumerate(self.directions):
            sides = projected[: len(positive), i], projected[len(positive) :, i]
            auc, d_prime = separability(*sides)
            aucs, d_primes = separability_of_samples(*sides, *weights)
            d_primes = d_primes[np.isfinite(d_primes)]
            d_low, d_high = np.quantile(d_primes, tail) if len(d_primes) and d_prime is not None else (None, None)
            auc_low, auc_high = np.quantile(aucs, tail)
            records.append(
                {
                    "block_key": self.id,
                    "model": direction.model,
                    "component": direction.component,
                    "layer": self.layer,
                    "direction": direction.name,
                    "direction_key": direction.key,
                    "position": self.position,
                    "n_positive": len(positive),
                    "n_negative": len(negative),
                    "n_training": self.n_training[i],
                    "auc": auc,
                    "auc_low": auc_low,
                    "auc_high": auc_high,
                    "d_prime": d_prime,
                    "d_prime_low": d_low,
                    "d_prime_high": d_high,
                    "resamples": self.resamples,
                    "seed": self.seed,
                    "confidence": CONFIDENCE,
                }
            )
        return pa.Table.from_pylist(records, schema=TABLES[self.table])


def resampled(texts: Sequence[str], count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return how often each row occurs in bootstrap samples of whole texts, [sample, row]."""
    _, group = np.unique(np.asarray(texts, dtype=str), return_inverse=True)
    n = int(group.max()) + 1
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=count)
    weights: npt.NDArray[np.float64] = drawn[:, group].astype(np.float64)
    return weights


def separability(positive: Floats, negative: Floats) -> tuple[float, float | None]:
    """Return AUC and d' of two sides of projections; d' is None where nothing varies."""
    one = np.ones((1, len(positive))), np.ones((1, len(negative)))
    aucs, d_primes = separability_of_samples(positive, negative, *one)
    return float(aucs[0]), float(d_primes[0]) if np.isfinite(d_primes[0]) else None


def separability_of_samples(
    positive: Floats, negative: Floats, positive_weights: Floats, negative_weights: Floats
) -> tuple[Floats, Floats]:
    """Return AUC and d' of weighted samples, [sample] each; d' is NaN where nothing varies.

    Args:
        positive, negative: projections, [row].
        positive_weights, negative_weights: how often each row occurs, [sample, row].
    """
    values, at = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    count = len(positive_weights)
    aucs, step = np.empty(count), max(1, AT_ONCE // len(at))
    for start in range(0, count, step):
        part = slice(start, start + step)
        above, below = (
            _at_values(weights[part], places, len(values))
            for weights, places in ((positive_weights, at[: len(positive)]), (negative_weights, at[len(positive) :]))
        )
        lower = np.cumsum(below, axis=1) - below
        aucs[part] = np.sum(above * (lower + below / 2), axis=1) / above.sum(axis=1) / below.sum(axis=1)
    moments = []
    for side, weights in ((positive, positive_weights), (negative, negative_weights)):
        total = weights.sum(axis=1)
        mean = weights @ side / total
        spread = np.sum(weights * (side[None] - mean[:, None]) ** 2, axis=1) / (total - 1)
        moments.append((mean, spread))
    (m1, v1), (m0, v0) = moments
    pooled = np.sqrt((v1 + v0) / 2)
    varies = pooled > 1e-12 * np.abs(np.concatenate([positive, negative])).max()
    d_primes = np.divide(m1 - m0, pooled, out=np.full(count, np.nan), where=varies)
    return aucs, d_primes


def _at_values(weights: Floats, places: npt.NDArray[np.int64], n: int) -> Floats:
    """Sum the weights of rows that have the same value: [sample, value]."""
    order = np.argsort(places, kind="stable")
    found = np.zeros((len(weights), n))
    starts = np.flatnonzero(np.r_[True, np.diff(places[order]) > 0])
    found[:, places[order][starts]] = np.add.reduceat(weights[:, order], starts, axis=1)
    return found


def separability_units(
    name: str,
    store: str,
    directions: Mapping[str, Direction],
    n_training: Mapping[str, int],
    layers: Sequence[int],
    position: str,
    sides: tuple[Mapping[str, str], Mapping[str, str]],
    resamples: int,
    seed: int,
) -> list[SeparabilityUnit]:
    """Return a unit per component and layer; sides are row key -> prompt text."""
    units = []
    for component in sorted({item.component for item in directions.values()}):
        for layer in sorted(layers):
            here = [item for item in directions.values() if item.component == component and layer in item.layers]
            if here:
                seen = tuple(n_training[item.name] for item in here)
                one, other = (tuple(side.items()) for side in sides)
                units.append(
                    SeparabilityUnit(name, store, tuple(here), seen, layer, position, one, other, resamples, seed)
                )
    return units
