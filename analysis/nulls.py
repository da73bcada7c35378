"""What cosines chance gives: those of random directions, and those of directions from permuted labels.

``random``: the cosine of independent isotropic directions in d_model dimensions, drawn from its exact law (2 B - 1 with
B from Beta((d - 1) / 2, (d - 1) / 2)). Residual streams are far from isotropic, so this null is lenient.

``permuted_labels``: differences of means are computed anew after their rows' labels are permuted, from the same cached
rows; the null keeps how these rows vary. Labels are exchanged among rows of one prompt text where both sides share
texts, else among all rows. Two directions of the same rows (read at two positions, say) have their labels permuted
alike: what they share through those rows is chance, too. A direction that is no difference of means is kept as it is;
a pair of two such has no such null.

p-values are two-sided, (1 + number of null cosines at least as far from 0) / (1 + number drawn), and Holm's adjustment
is over the pairs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.directions import MeansTask
from analysis.layerwise import Floats, layer_chunks
from analysis.statistics import holm
from store.activations import ActivationStore
from store.directions import Direction
from store.errors import MismatchError
from store.fingerprint import fingerprint
from store.location import Location
from store.schemas import TABLES

VERSION = 1
ROUNDING = 1e-9  # cosines this near count as equal: vectors are kept as float32, and sums have an order


@dataclass(frozen=True)
class CosineNullsUnit:
    """All pairs of directions at one layer of one component."""

    table: ClassVar[str] = "cosine_nulls"
    directions: tuple[Direction, ...]
    tasks: tuple[MeansTask | None, ...]  # how each is computed from rows, where it is a difference of means
    layer: int
    resamples: int
    seed: int

    @cached_property
    def id(self) -> str:
        """Identify the unit by all that its table says."""
        items = [[item.name, item.key, item.digest] for item in self.directions]
        tasks = [None if task is None else task.key for task in self.tasks]
        record = {"directions": items, "tasks": tasks, "layer": self.layer, "version": VERSION}
        return fingerprint({"table": self.table, "draws": [self.resamples, self.seed], **record})[:32]

    def compute(self) -> pa.Table:
        """Return a row per pair and null: cosine, quantiles of the null, p-values.

        Raises:
            MissingDataError: if a row of a difference of means is not captured any more.
        """
        units = [item.unit(self.layer) for item in self.directions]
        permuted = [
            None if task is None else permuted_differences(task, self.layer, self.resamples, self.seed)
            for task in self.tasks
        ]
        isotropic = random_cosines(len(units[0]), self.resamples, (self.seed, self.layer))
        records: dict[str, list[dict[str, object]]] = {"random": [], "permuted_labels": []}
        for i, j in combinations(range(len(units)), 2):
            cosine = float(np.clip(units[i] @ units[j], -1, 1))
            records["random"].append(self._record(i, j, "random", cosine, isotropic))
            first, second = permuted[i], permuted[j]
            if first is not None or second is not None:
                one = units[i][None] if first is None else first
                other = units[j][None] if second is None else second
                null = np.sum(one * other, axis=1)
                records["permuted_labels"].append(self._record(i, j, "permuted_labels", cosine, null))
        for group in records.values():
            if group:
                adjusted = holm([float(str(record["p_value"])) for record in group])
                for record, value in zip(group, adjusted, strict=True):
                    record["p_holm"] = float(value)
        return pa.Table.from_pylist([*records["random"], *records["permuted_labels"]], schema=TABLES[self.table])

    def _record(self, i: int, j: int, null: str, cosine: float, drawn: Floats) -> dict[str, object]:
        a, b = self.directions[i], self.directions[j]
        quantiles = np.quantile(drawn, [0.025, 0.5, 0.975])
        return {
            "block_key": self.id,
            "model": a.model,
            "component": a.component,
            "layer": self.layer,
            "direction_a": a.name,
            "direction_b": b.name,
            "direction_key_a": a.key,
            "direction_key_b": b.key,
            "null": null,
            "cosine": cosine,
            "q025": float(quantiles[0]),
            "q500": float(quantiles[1]),
            "q975": float(quantiles[2]),
            "p_value": float(1 + np.sum(np.abs(drawn) >= abs(cosine) - ROUNDING)) / (1 + len(drawn)),
            "draws": len(drawn),
            "seed": self.seed,
        }


def random_cosines(d_model: int, count: int, seed: int | Sequence[int]) -> Floats:
    """Return cosines of independent isotropic directions, [draw]."""
    half = (d_model - 1) / 2
    return 2 * np.random.default_rng(seed).beta(half, half, count) - 1


def permuted_labels(
    labels: npt.NDArray[np.bool_], strata: npt.NDArray[np.int64], count: int, seed: int | Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Return labels [draw, row], permuted within each stratum of rows."""
    keys = np.random.default_rng(seed).random((count, len(labels)))
    order = np.argsort(strata, kind="stable")
    shuffled = np.argsort(strata + keys, axis=1)  # by stratum, and at random within it
    found = np.empty((count, len(labels)), dtype=np.bool_)
    found[:, order] = labels[shuffled]
    return found


def permuted_differences(task: MeansTask, layer: int, count: int, seed: int) -> Floats:
    """Return unit differences of means after permutations of their labels, [draw, d_model]."""
    positive, negative = tuple(sorted(task.positive)), tuple(sorted(task.negative))
    keys = (*positive, *negative)
    texts = dict(task.matched)
    numbers = {text: i for i, text in enumerate(sorted(set(texts.values())), start=1)}
    strata = np.array([numbers[texts[key]] if key in texts else 0 for key in keys], dtype=np.int64)
    labels = np.arange(len(keys)) < len(positive)
    rows = int(fingerprint(keys)[:12], 16)  # the same rows are permuted alike
    drawn = permuted_labels(labels, strata, count, (seed, rows))
    weights = np.where(drawn, 1 / len(positive), -1 / len(negative))
    store = ActivationStore.open(Location.of(task.store)).model(task.model)
    selection = store.select(keys, task.component, task.position, [layer])
    total = np.zeros((count, selection.d_model))
    for into, values in layer_chunks(selection, layer):
        total += weights[:, into] @ values
    units: Floats = total / np.linalg.norm(total, axis=1, keepdims=True)
    return units


def cosine_nulls_units(
    directions: Mapping[str, Direction],
    tasks: Mapping[str, MeansTask],
    layers: Sequence[int],
    resamples: int,
    seed: int,
) -> list[CosineNullsUnit]:
    """Return a unit per component and layer at which at least two directions are.

    Raises:
        MismatchError: if directions are of different models.
    """
    if len({item.model for item in directions.values()}) > 1:
        raise MismatchError("directions of different models have no cosine")
    units = []
    for component in sorted({item.component for item in directions.values()}):
        for layer in sorted(layers):
            here = [item for item in directions.values() if item.component == component and layer in item.layers]
            if len(here) > 1:
                mine = tuple(tasks.get(item.name) for item in here)
                units.append(CosineNullsUnit(tuple(here), mine, layer, resamples, seed))
    return units
