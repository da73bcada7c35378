"""What cosines chance gives: those of random directions, and those of directions from permuted labels.

``random``: the cosine of independent isotropic directions in d_model dimensions, drawn from its exact law (2 B - 1 with
B from Beta((d - 1) / 2, (d - 1) / 2)). Residual streams are far from isotropic, so this null is lenient.

``permuted_labels``: both directions are computed anew from the same cached rows after one joint permutation of the
roles of the union of their rows (`analysis.permutations` says what is exchanged with what). Directions that are
computed from others (difference, orthogonalised, principal directions) are computed from the permuted ones. A direction
without labels (random, imported) stays as it is; a pair of two such has no such null. Where no permutation is exact,
there is a row without a p-value, and its note says why.

p-values are two-sided: twice the smaller tail, as two directions that share rows have a null that is not about 0. They
are adjusted for the pairs of a layer (Holm; Benjamini and Hochberg). ``low`` and ``high`` are a 95% interval of the
cosine from a bootstrap of the same units within their roles: percentiles, moved so that the bootstrap's median is at
the cosine, as noise pulls the cosines of resampled means towards 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import ClassVar

import numpy as np
import pyarrow as pa

from analysis.assistant_axis import AxisTask
from analysis.components import ComponentsTask, components_of_directions, without_duplicates
from analysis.directions import MeansTask, orthogonalise
from analysis.layerwise import Floats, layer_values
from analysis.permutations import (
    Contrast,
    NotExchangeableError,
    design,
    mean_weights,
    resampled_counts,
    two_sided,
    vectors,
)
from analysis.statistics import benjamini_hochberg, holm
from store.activations import ActivationStore
from store.directions import Direction
from store.errors import MismatchError, MissingDataError
from store.fingerprint import fingerprint
from store.location import Location
from store.schemas import TABLES
from store.study_directions import Derived, Difference, Orthogonalised, PrincipalDirections, Random, references

VERSION = 2
ROUNDING = 1e-9  # cosines this near count as equal: vectors are kept as float32, and sums have an order
AGREES = 1e-3  # a direction computed anew has at least 1 minus this cosine with the one that is kept

ReadTask = MeansTask | ComponentsTask | AxisTask
Recipe = ReadTask | Derived  # how a direction is computed: from rows, or from other directions


@dataclass(frozen=True)
class CosineNullsUnit:
    """All pairs of directions at one layer of one component."""

    table: ClassVar[str] = "cosine_nulls"
    directions: tuple[Direction, ...]
    recipes: tuple[tuple[str, Recipe], ...]  # of the directions and of those that they are computed from
    groups: tuple[tuple[str, str], ...] | None  # (row key, group): exchanged together
    layer: int
    resamples: int
    seed: int
    ancestors: tuple[Direction, ...] = ()  # other directions that some are computed from

    @cached_property
    def id(self) -> str:
        """Identify the unit by all that its table says."""
        items = [[item.name, item.key, item.digest] for item in self.directions]
        recipes = [
            [name, *(sorted(r.keys.items()) if isinstance(r, ReadTask) else [r.model_dump(mode="json")])]
            for name, r in self.recipes
        ]
        record = {"directions": items, "recipes": recipes, "groups": self.groups, "layer": self.layer}
        draws = [self.resamples, self.seed, VERSION]
        return fingerprint({"table": self.table, "draws": draws, **record})[:32]

    def compute(self) -> pa.Table:
        """Return a row per pair and null: cosine, quantiles of the null, p-values.

        Raises:
            MissingDataError: if a row of a direction is not captured any more.
        """
        units = [item.unit(self.layer) for item in self.directions]
        isotropic = random_cosines(len(units[0]), self.resamples, (self.seed, self.layer))
        records: dict[str, list[dict[str, object]]] = {"random": [], "permuted_labels": []}
        for i, j in combinations(range(len(units)), 2):
            cosine = float(np.clip(units[i] @ units[j], -1, 1))
            records["random"].append(self._record(i, j, "random", cosine, isotropic))
            permuted = self.permuted(i, j, cosine)
            if permuted is not None:
                records["permuted_labels"].append(permuted)
        for group in records.values():
            tested = [record for record in group if record["p_value"] is not None]
            p = [float(str(record["p_value"])) for record in tested]
            if tested:
                for record, by_holm, by_bh in zip(tested, holm(p), benjamini_hochberg(p), strict=True):
                    record.update(p_holm=float(by_holm), p_bh=float(by_bh))
        return pa.Table.from_pylist([*records["random"], *records["permuted_labels"]], schema=TABLES[self.table])

    def permuted(self, i: int, j: int, cosine: float) -> dict[str, object] | None:
        """Return the record of a pair under permuted labels; None if neither direction has labels."""
        recipes, pair = dict(self.recipes), (self.directions[i], self.directions[j])
        tasks = {name: task for one in pair for name, task in _tasks(one.name, recipes).items()}
        if not tasks:
            return None
        names = sorted(tasks)
        contrasts = [contrast_of(tasks[name], name) for name in names]
        groups = None if self.groups is None else dict(self.groups)
        changed = json.dumps([one.name for one in pair if _tasks(one.name, recipes)])
        try:
            plan = design(contrasts, groups)
            values = [self._values(tasks[name], plan.keys, contrasts, k) for k, name in enumerate(names)]
            seed = (self.seed, self.layer, int(fingerprint(plan.keys)[:12], 16))
            observed, drawn = (
                self._cosines(
                    pair,
                    recipes,
                    {name: vectors(contrasts[k], plan.keys, roles[:, k], values[k]) for k, name in enumerate(names)},
                )
                for roles in (plan.roles[None], plan.shuffled(self.resamples, seed))
            )
            if abs(observed[0] - cosine) > AGREES:
                raise NotExchangeableError(f"computed anew the cosine is {observed[0]:.3f}, not {cosine:.3f}")
        except NotExchangeableError as error:
            return self._record(i, j, "permuted_labels", cosine, None, permuted=changed, note=str(error))
        more: dict[str, object] = {"level": plan.level, "permuted": changed}
        if all(contrast.pca is None for contrast in contrasts):
            texts = {key: text for contrast in contrasts for key, text in contrast.texts.items()}
            counts = resampled_counts(plan, texts, self.resamples, seed)
            sampled = self._cosines(
                pair,
                recipes,
                {
                    name: mean_weights(np.broadcast_to(plan.roles[k], counts.shape), contrasts[k].coefficients, counts)
                    @ values[k]
                    for k, name in enumerate(names)
                },
            )
            low, middle, high = np.quantile(sampled, [0.025, 0.5, 0.975])
            more |= {"low": max(-1.0, cosine + low - middle), "high": min(1.0, cosine + high - middle)}
        return self._record(i, j, "permuted_labels", cosine, drawn, **more)

    def _values(self, task: ReadTask, keys: Sequence[str], contrasts: Sequence[Contrast], k: int) -> Floats:
        """Return the design's rows as the task reads them, [row, d_model]; rows that it cannot get stay 0."""
        linked = set(contrasts[k].roles)
        while True:
            more = linked.union(*(other.roles for other in contrasts if linked & set(other.roles)))
            if more == linked:
                break
            linked = more
        wanted = [i for i, key in enumerate(keys) if key in linked]
        store = ActivationStore.open(Location.of(task.store)).model(task.model)
        try:
            rows = store.select(tuple(keys[i] for i in wanted), task.component, task.position, [self.layer])
            found = np.zeros((len(keys), rows.d_model))
            found[wanted] = layer_values(rows, self.layer)
        except MissingDataError:
            if linked == set(contrasts[k].roles):
                raise
            raise NotExchangeableError(
                f"the rows that it shares a design with are not captured at {task.position}"
            ) from None
        return found

    def _cosines(
        self, pair: tuple[Direction, Direction], recipes: Mapping[str, Recipe], read: Mapping[str, Floats]
    ) -> Floats:
        made = [self._made(one.name, recipes, read) for one in pair]
        products = np.sum(made[0] * made[1], axis=1)
        norms = np.linalg.norm(made[0], axis=1) * np.linalg.norm(made[1], axis=1)
        cosines: Floats = np.clip(products / norms, -1, 1)
        return cosines

    def _made(self, name: str, recipes: Mapping[str, Recipe], read: Mapping[str, Floats]) -> Floats:
        """Return a direction under every draw, [draw, d_model] (or [1, d_model] where it stays as it is)."""
        if name in read:
            return read[name]
        recipe = recipes.get(name)
        known = {item.name: item for item in (*self.directions, *self.ancestors)}
        if recipe is None or isinstance(recipe, ReadTask | Random):
            return known[name].at(self.layer)[None]
        names = [other for _, other in references(recipe)]
        parents = [self._made(other, recipes, read) for other in names]
        count = max(len(parent) for parent in parents)
        parents = [np.broadcast_to(parent, (count, parent.shape[1])) for parent in parents]
        return np.stack([_derived(recipe, [parent[draw] for parent in parents]) for draw in range(count)])

    def _record(
        self, i: int, j: int, null: str, cosine: float, drawn: Floats | None, **more: object
    ) -> dict[str, object]:
        a, b = self.directions[i], self.directions[j]
        record: dict[str, object] = {
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
            "p_value": None,
            "draws": 0 if drawn is None else len(drawn),
            "seed": self.seed,
            **more,
        }
        if drawn is not None:
            quantiles = np.quantile(drawn, [0.025, 0.5, 0.975])
            record |= {f"q{name}": float(value) for name, value in zip(("025", "500", "975"), quantiles, strict=True)}
            record["p_value"] = two_sided(cosine, drawn, ROUNDING)
        return record


def _tasks(name: str, recipes: Mapping[str, Recipe]) -> dict[str, ReadTask]:
    """Return the tasks that a direction is computed from, by the name of what each gives."""
    recipe = recipes.get(name)
    if recipe is None or isinstance(recipe, Random):
        return {}
    if isinstance(recipe, ReadTask):
        return {name: recipe}
    return {key: task for _, other in references(recipe) for key, task in _tasks(other, recipes).items()}


def _derived(spec: Derived, parents: Sequence[Floats]) -> Floats:
    if isinstance(spec, Difference):
        return parents[0] - parents[1]
    if isinstance(spec, Orthogonalised):
        rest: Floats = orthogonalise(parents[0], [other / np.linalg.norm(other) for other in parents[1:]])
        return rest
    assert isinstance(spec, PrincipalDirections)
    assert spec.index is not None
    stack = np.stack([v / np.linalg.norm(v) if spec.scale == "unit" else v for v in parents])
    kept, _ = without_duplicates(stack, spec.duplicate_cosine)
    component: Floats = components_of_directions(stack[kept], spec.centred, spec.index, "permuted directions")[0][-1]
    return component


def contrast_of(task: ReadTask, name: str) -> Contrast:
    """Return what a task contrasts, as roles of rows."""
    texts = dict(task.matched)
    if isinstance(task, AxisTask):
        roles: dict[str, int] = {}
        coefficients: list[float] = []
        for sign, sides, equal in ((1, task.default, task.equal_default), (-1, task.roles, task.equal_roles)):
            merged = [rows for _, rows in sides] if equal else [tuple(row for _, rows in sides for row in rows)]
            for rows in merged:
                roles |= dict.fromkeys(rows, len(coefficients))
                coefficients.append(sign / len(merged))
        return Contrast(roles, tuple(coefficients), texts)
    roles = dict.fromkeys(task.positive, 0) | dict.fromkeys(task.negative, 1)
    if isinstance(task, MeansTask):
        return Contrast(roles, (1, -1), texts)
    index = {wanted: number for number, wanted in task.wanted}[name]
    return Contrast(roles, (1, -1), texts, pca=index, paired=task.contrast == "paired", centred=task.centred)


def random_cosines(d_model: int, count: int, seed: int | Sequence[int]) -> Floats:
    """Return cosines of independent isotropic directions, [draw]."""
    half = (d_model - 1) / 2
    cosines: Floats = 2 * np.random.default_rng(seed).beta(half, half, count) - 1
    return cosines


def cosine_nulls_units(
    directions: Mapping[str, Direction],
    recipes: Mapping[str, Recipe],
    layers: Sequence[int],
    resamples: int,
    seed: int,
    groups: Mapping[str, str] | None = None,
    ancestors: Sequence[Direction] = (),
) -> list[CosineNullsUnit]:
    """Return a unit per component and layer at which at least two directions are.

    Raises:
        MismatchError: if directions are of different models.
    """
    if len({item.model for item in directions.values()}) > 1:
        raise MismatchError("directions of different models have no cosine")
    grouped = None if groups is None else tuple(sorted(groups.items()))
    units = []
    for component in sorted({item.component for item in directions.values()}):
        for layer in sorted(layers):
            here = [item for item in directions.values() if item.component == component and layer in item.layers]
            if len(here) > 1:
                mine = tuple(sorted(recipes.items()))
                units.append(CosineNullsUnit(tuple(here), mine, grouped, layer, resamples, seed, tuple(ancestors)))
    return units
