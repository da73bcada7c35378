"""The assistant axis: mean of default answers minus the centroid of role-play answers.

Method: Lu et al. 2026 (arXiv:2601.10387). The centroid is the mean over *roles* of each role's mean, so a role with
more rows counts no more than another; ``role_weighting: rows`` pools the rows instead. The default side is the mean
over its rows, or, with ``default_weighting: sets``, over its prompt sets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

import numpy as np

from analysis.components import HALVES_SEED
from analysis.directions import undefined_layers
from analysis.layerwise import Floats
from analysis.means import group_means, matched_halves
from store.activations import ActivationStore
from store.directions import Direction, undefined_record
from store.errors import MismatchError, ResidError
from store.fingerprint import fingerprint
from store.location import Location
from store.sites import Component

AXIS_VERSION = 1
Group = tuple[str, tuple[str, ...]]  # name, row keys


@dataclass(frozen=True)
class AxisTask:
    """An assistant axis to compute."""

    name: str
    store: str
    model: str
    component: str
    position: str
    default: tuple[Group, ...]
    roles: tuple[Group, ...]
    equal_default: bool  # whether the groups of the default side count alike, whatever their size
    equal_roles: bool
    layers: tuple[int, ...]
    matched: tuple[tuple[str, str], ...] = ()
    kept: str | None = None  # JSON: of which answers the rows are those that count, for the provenance

    @property
    def keys(self) -> dict[str, str]:
        """Identify the direction by its inputs; neither names nor order of groups and rows count."""
        record = {
            "method": "assistant_axis",
            "version": AXIS_VERSION,
            "model": self.model,
            "component": self.component,
            "position": self.position,
            "default": sorted(sorted(rows) for _, rows in self.default),
            "roles": sorted(sorted(rows) for _, rows in self.roles),
            "equal": [self.equal_default, self.equal_roles],
            "layers": self.layers,
            "matched": sorted(self.matched),
            **({} if self.kept is None else {"kept": self.kept}),
        }
        return {self.name: fingerprint(record)}


def assistant_axis(task: AxisTask) -> dict[str, Direction]:
    """Return default minus centroid of roles at every layer, raw norm kept; stability is that of halves of all groups.

    Raises:
        MissingDataError: if a row is not captured.
        MismatchError: if a row is in two groups.
        UndefinedError: if the axis is zero up to rounding at every layer; a single such layer is left out.
        ResidError: if a group is empty.
    """
    groups = sorted(task.default, key=lambda group: sorted(group[1])) + sorted(task.roles, key=lambda g: sorted(g[1]))
    n_default = len(task.default)
    for name, rows in groups:
        if not rows:
            raise ResidError(f"direction {task.name!r}: {name!r} has no rows")
    keys = [key for _, rows in groups for key in sorted(rows)]
    if len(set(keys)) < len(keys):
        raise MismatchError(
            f"direction {task.name!r}: {len(keys) - len(set(keys))} rows are in two roles, or a role and the default\n"
            "  remedy: make the prompt sets disjoint"
        )
    index = np.repeat(np.arange(len(groups)), [len(rows) for _, rows in groups])
    n_rows = int(np.sum(index < n_default))
    store = ActivationStore.open(Location.of(task.store)).model(task.model)
    selection = store.select(tuple(keys), task.component, task.position, task.layers)
    halves = matched_halves(keys, n_rows, dict(task.matched), HALVES_SEED)
    cells = np.bincount(2 * index + halves, minlength=2 * len(groups)).reshape(-1, 2)
    split = bool(cells.min() >= 1)
    if split:
        found = group_means(selection, 2 * index + halves, 2 * len(groups))
        of_half = found.means.reshape(len(groups), 2, *found.means.shape[1:])  # [group, half, layer, d_model]
        means = np.sum(of_half * cells[:, :, None, None], axis=1) / cells.sum(axis=1)[:, None, None]
    else:
        means = group_means(selection, index, len(groups)).means

    def axis(values: Floats, sizes: Floats) -> tuple[Floats, Floats]:
        sides = []
        for part, equal in ((slice(n_default), task.equal_default), (slice(n_default, None), task.equal_roles)):
            weights = np.ones_like(sizes[part]) if equal else sizes[part]
            sides.append(np.tensordot(weights / weights.sum(), values[part], axes=1))
        return sides[0] - sides[1], np.maximum(*(np.linalg.norm(each, axis=1) for each in sides))

    vectors, sizes = axis(means, cells.sum(axis=1).astype(np.float64))
    undefined = undefined_layers(task.name, task.component, task.position, selection.layers, vectors, sizes)
    there = [i for i, layer in enumerate(selection.layers) if layer not in undefined]
    stability = None
    if split:
        one, other = (axis(of_half[:, half], cells[:, half].astype(np.float64))[0][there] for half in (0, 1))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        if lengths.all():
            stability = tuple(float(value) for value in np.clip(np.sum(one * other, axis=1) / lengths, -1, 1))
    return {
        task.name: Direction(
            name=task.name,
            key=task.keys[task.name],
            model=task.model,
            method="assistant_axis",
            component=cast(Component, task.component),
            position=task.position,
            layers=tuple(selection.layers[i] for i in there),
            vectors=vectors[there].astype(np.float32),
            n_positive=n_rows,
            n_negative=len(keys) - n_rows,
            split_half_cosine=stability,
            provenance={
                "method_version": AXIS_VERSION,
                "roles": {name: len(rows) for name, rows in task.roles},
                "role_weighting": "roles" if task.equal_roles else "rows",
                "default_weighting": "sets" if task.equal_default else "rows",
                **({} if task.kept is None else {"kept": json.loads(task.kept)}),
                **undefined_record(undefined),
            },
        )
    }
