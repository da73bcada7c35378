"""PCA over many directions at one layer: how much of their variance few components explain, and how surely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa

from analysis.components import stacked, without_duplicates
from analysis.layerwise import Floats
from store.directions import Direction
from store.errors import ResidError
from store.fingerprint import fingerprint
from store.schemas import TABLES
from store.study_geometry import ExplainedVarianceSpec

CONFIDENCE = 0.95
VERSION = 1


@dataclass(frozen=True)
class ExplainedVarianceUnit:
    """One layer of one PCA over directions."""

    table: ClassVar[str] = "explained_variance"
    name: str  # of the analysis in the study
    directions: tuple[Direction, ...]
    layer: int
    spec: ExplainedVarianceSpec

    @cached_property
    def id(self) -> str:
        """Identify the unit by all that its table says."""
        options = self.spec.model_dump(exclude={"directions", "layers"})
        items = [[item.name, item.key, item.digest] for item in self.directions]
        record = {"directions": items, "layer": self.layer, "options": options, "version": VERSION}
        return fingerprint({"table": self.table, **record})[:32]

    def compute(self) -> pa.Table:
        """Return a row per component: its share of variance, alone and with those before it, with bootstrap intervals.

        Directions that are near-duplicates are dropped first (`analysis.components.without_duplicates`). The bootstrap
        draws directions with replacement. A sample with repetitions spans fewer dimensions, so the first shares come
        out larger in it than in the estimate (`bootstrap_mean` shows by how much), and plain percentiles would lie
        beside the estimate. The intervals are the percentiles moved by that bias, within [0, 1].

        Raises:
            ResidError: if fewer than three directions are left.
        """
        spec, first = self.spec, self.directions[0]
        vectors = stacked(self.directions, self.layer, spec.scale)
        kept, keeper = without_duplicates(vectors, spec.duplicate_cosine)
        if len(kept) < 3:
            raise ResidError(
                f"geometry.explained_variance.{self.name}: {len(kept)} directions are left at layer {self.layer}\n"
                "  remedy: name at least three, or raise duplicate_cosine"
            )
        gram = vectors[kept] @ vectors[kept].T
        shares = explained(gram, spec.centred)
        rng = np.random.default_rng((spec.seed, self.layer))
        drawn = np.zeros((spec.resamples, len(kept)))
        for i in range(spec.resamples):
            index = rng.integers(0, len(kept), len(kept))
            # A sample of one direction only has no variance to explain; it is vanishingly rare.
            while spec.centred and len(set(index.tolist())) == 1:
                index = rng.integers(0, len(kept), len(kept))
            drawn[i] = explained(gram[np.ix_(index, index)], spec.centred)
        tail = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        low, high = _interval(drawn, shares, tail)
        cumulative_low, cumulative_high = _interval(np.cumsum(drawn, axis=1), np.cumsum(shares), tail)
        names = [item.name for item in self.directions]
        duplicates = {names[i]: names[at] for i, at in enumerate(keeper) if i != at}
        most = min(spec.k, len(kept) - spec.centred, first.vectors.shape[1])
        records = [
            {
                "block_key": self.id,
                "model": first.model,
                "component": first.component,
                "layer": self.layer,
                "rank": i + 1,
                "share": shares[i],
                "low": low[i],
                "high": high[i],
                "bootstrap_mean": drawn[:, i].mean(),
                "cumulative": shares[: i + 1].sum(),
                "cumulative_low": cumulative_low[i],
                "cumulative_high": cumulative_high[i],
                "n_directions": len(names),
                "n_kept": len(kept),
                "duplicates": json.dumps(duplicates, sort_keys=True),
                "resamples": spec.resamples,
                "seed": spec.seed,
                "confidence": CONFIDENCE,
            }
            for i in range(most)
        ]
        return pa.Table.from_pylist(records, schema=TABLES[self.table])


def _interval(drawn: Floats, estimate: Floats, tail: list[float]) -> Floats:
    """Return percentiles of samples [sample, item], moved so that their mean is the estimate: [bound, item]."""
    moved: Floats = np.clip(np.quantile(drawn, tail, axis=0) - drawn.mean(axis=0) + estimate, 0.0, 1.0)
    return moved


def explained(gram: Floats, centred: bool) -> Floats:
    """Return every component's share of the variance (not centred: of the mean square), largest first, [item].

    Args:
        gram: inner products of the vectors, [item, item]. Their PCA needs no more: the nonzero eigenvalues of X X^T
            are those of X^T X.
    """
    if centred:
        rows = gram.mean(axis=0)
        gram = gram - rows[None, :] - rows[:, None] + rows.mean()
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    shares: Floats = values / values.sum()
    return shares


def explained_variance_units(
    name: str, spec: ExplainedVarianceSpec, directions: Mapping[str, Direction], layers: list[int]
) -> list[ExplainedVarianceUnit]:
    """Return a unit per component and layer that all of its directions have."""
    units = []
    for component in sorted({item.component for item in directions.values()}):
        mine = tuple(item for item in directions.values() if item.component == component)
        common = set.intersection(*(set(item.layers) for item in mine)) & set(layers)
        units += [ExplainedVarianceUnit(name, mine, layer, spec) for layer in sorted(common)]
    return units
