"""Principal components: of the contrast of two sides of cached rows, and of a list of directions.

**Contrast of rows.** ``to_mean`` takes every positive row minus the mean of the negative ones; ``paired`` takes, for
every prompt text that both sides share, the mean of its positive rows minus that of its negative ones. Not centred
(the default), the first component is the direction along which the contrast is largest, close to the difference of
means, and the others are what remains of it, orthogonal to those before: the literature's top-k subspace (PCA of
paired differences: Zou et al. 2023, arXiv:2310.01405, section 3.1; SVD of harmful minus harmless activations:
arXiv:2512.18901). Centred, the mean contrast is taken out, so the components say how the contrast *varies*. A singular
vector of positive rows alone would be the mean activation, which both sides share: that is no contrast.

**Sign.** A component points to the side of the mean contrast (of directions: of their mean). Where it is orthogonal to
that, up to rounding, its entry of largest magnitude is positive.

**Norm.** Components are orthonormal at each layer. So a subspace of several can be projected out in one step; removing
directions that are not orthogonal one after the other leaves some of the first ones behind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from analysis.layerwise import Floats, layer_chunks, over_layers, spectrum
from analysis.means import group_means, matched_halves, random_halves
from store.activations import ActivationStore
from store.directions import Direction, require_layers, undefined_record
from store.errors import MismatchError, ResidError, UndefinedError
from store.fingerprint import fingerprint
from store.location import Location
from store.selection import Selection
from store.sites import Component

COMPONENTS_VERSION = 1
HALVES_SEED = 0
# Activations are float32 at best, and batches change their last bits: what is this small beside the vectors that it is
# the difference of is rounding, and its direction noise.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class ComponentsTask:
    """Principal components of a contrast to compute, small enough to send to a worker."""

    name: str
    wanted: tuple[tuple[int, str], ...]  # (component from 1, name of its direction)
    store: str
    model: str
    component: str
    position: str
    positive: tuple[str, ...]  # row keys
    negative: tuple[str, ...]
    contrast: str
    centred: bool
    layers: tuple[int, ...]
    matched: tuple[tuple[str, str], ...] = ()  # (row key, what it has in common with rows of the other side)
    kept: str | None = None  # JSON: of which answers the rows are those that count, for the provenance

    @property
    def keys(self) -> dict[str, str]:
        """Identify each direction by its inputs; how many others are computed beside it does not matter."""
        record = {
            "method": "principal_components",
            "version": COMPONENTS_VERSION,
            "model": self.model,
            "component": self.component,
            "position": self.position,
            "positive": sorted(self.positive),
            "negative": sorted(self.negative),
            "contrast": self.contrast,
            "centred": self.centred,
            "layers": self.layers,
            "halves_seed": HALVES_SEED,
            "matched": sorted(self.matched),
            **({} if self.kept is None else {"kept": self.kept}),
        }
        return {name: fingerprint({**record, "index": index}) for index, name in self.wanted}


@dataclass(frozen=True)
class Components:
    """Components of one layer: orthonormal vectors [k, d_model] and each one's share [k] of the mean square.

    There are fewer than were asked for where the contrast has no more.
    """

    vectors: Floats
    shares: Floats


def principal_components(task: ComponentsTask) -> dict[str, Direction]:
    """Return the wanted components of a contrast by name; see the module's text for contrast, sign and norm.

    Stability is the cosine, per layer, of the same component of two random halves (None where a half would have fewer
    rows than components). Near -1 the axis is stable and its sign is not: the contrast varies along it about zero.
    Provenance holds per layer the component's share of the mean squared contrast (centred: of its variance), and how
    much of the subspace of the first ones up to this two halves share: the mean squared cosine of the principal angles,
    1 for the same subspace.

    Raises:
        MissingDataError: if a row is not captured.
        MismatchError: if a row is on both sides, or the sides share no prompt text to be paired by.
        UndefinedError: if no layer has any of the components. A layer without a component is left out of that one,
            and a component that no layer has out of the answer.
    """
    both = set(task.positive) & set(task.negative)
    if both:
        raise MismatchError(
            f"direction {task.name!r}: {len(both)} rows are positive and negative at once\n"
            "  remedy: make the two prompt sets disjoint"
        )
    if not task.positive or not task.negative:
        raise ResidError(f"direction {task.name!r}: a side has no rows")
    positive, negative = tuple(sorted(task.positive)), tuple(sorted(task.negative))
    keys, n_positive = (*positive, *negative), len(positive)
    store = ActivationStore.open(Location.of(task.store)).model(task.model)
    selection = store.select(keys, task.component, task.position, task.layers)
    side = np.array([0] * n_positive + [1] * len(negative), dtype=np.int64)
    count = max(index for index, _ in task.wanted)
    matched = dict(task.matched)
    if task.contrast == "paired":
        texts = sorted({matched[key] for key in positive if key in matched})
        if not texts:
            raise MismatchError(
                f"direction {task.name!r}: no prompt of the two sides has the same text, so nothing is paired\n"
                "  remedy: contrast: to_mean"
            )
        pair = np.array([texts.index(matched[key]) if key in matched else -1 for key in keys], dtype=np.int64)
        halves, n_rows = random_halves(texts, HALVES_SEED), len(texts)
        measure = partial(_paired, selection, side, pair, halves, task, count)
    else:
        halves = matched_halves(keys, n_positive, matched, HALVES_SEED)
        n_rows = n_positive
        split = bool(np.bincount(2 * side + halves, minlength=4).min() >= 1)
        means = group_means(selection, 2 * side + halves if split else side, 4 if split else 2)
        measure = partial(_to_mean, selection, side, halves, means.means, means.counts, task, count)
    measured = list(zip(selection.layers, over_layers(measure, selection.layers), strict=True))
    found = {}
    reasons: dict[int, str] = {}
    for index, name in task.wanted:
        undefined = {
            layer: f"direction {name!r} has {len(three[0].vectors)} principal components at {task.component}.{layer}, "
            f"and {index} are asked for\n  remedy: lower k, or give it more prompts"
            for layer, three in measured
            if len(three[0].vectors) < index
        }
        there = [(layer, three) for layer, three in measured if layer not in undefined]
        if not there:
            reasons |= undefined
            continue
        whole, first, second = zip(*(three for _, three in there), strict=True)
        split = not any(half is None or len(half.vectors) < index for half in (*first, *second))
        shares = [float(layer.shares[index - 1]) for layer in whole]
        provenance: dict[str, Any] = {
            "method_version": COMPONENTS_VERSION,
            "contrast": task.contrast,
            "centred": task.centred,
            "index": index,
            "n_contrasts": n_rows,
            "share": shares,
            "halves_seed": HALVES_SEED,
            **({} if task.kept is None else {"kept": json.loads(task.kept)}),
            **undefined_record(undefined),
        }
        if split:
            overlaps = [_overlap(a.vectors[:index], b.vectors[:index]) for a, b in zip(first, second, strict=True)]
            provenance["split_half_overlap"] = overlaps
        found[name] = Direction(
            name=name,
            key=task.keys[name],
            model=task.model,
            method="principal_components",
            component=cast(Component, task.component),
            position=task.position,
            layers=tuple(layer for layer, _ in there),
            vectors=np.stack([layer.vectors[index - 1] for layer in whole]).astype(np.float32),
            n_positive=n_positive,
            n_negative=len(negative),
            split_half_cosine=tuple(
                float(np.clip(a.vectors[index - 1] @ b.vectors[index - 1], -1, 1))
                for a, b in zip(first, second, strict=True)
            )
            if split
            else None,
            provenance=provenance,
        )
    require_layers([index for index, name in task.wanted if name in found], reasons)
    return found


Three = tuple[Components, Components | None, Components | None]  # of all rows, and of each half


def _to_mean(
    selection: Selection,
    side: npt.NDArray[np.int64],
    halves: npt.NDArray[np.int64],
    means: Floats,
    counts: npt.NDArray[np.int64],
    task: ComponentsTask,
    count: int,
    layer: int,
) -> Three:
    at = selection.layers.index(layer)
    of_half = means[:, at].reshape(2, -1, means.shape[2])  # [side, half, d_model]
    weights = counts.reshape(2, -1, 1)
    total = (of_half * weights).sum(axis=1) / weights.sum(axis=1)  # [side, d_model]

    def components(half: int | None) -> Components:
        pair = total if half is None else of_half[:, half]
        chosen = (side == 0) if half is None else (side == 0) & (halves == half)
        offset = pair[0] if task.centred else pair[1]
        chunks = (values[chosen[into]] - offset for into, values in layer_chunks(selection, layer))
        return _components(chunks, int(chosen.sum()), pair[0] - pair[1], count, pair)

    sizes = [int(((side == 0) & (halves == half)).sum()) for half in (0, 1)]
    split = of_half.shape[1] == 2 and min(sizes) > count
    return components(None), *((components(0), components(1)) if split else (None, None))


def _paired(
    selection: Selection,
    side: npt.NDArray[np.int64],
    pair: npt.NDArray[np.int64],
    halves: npt.NDArray[np.int64],
    task: ComponentsTask,
    count: int,
    layer: int,
) -> Three:
    sums = np.zeros((2, len(halves), selection.d_model))
    counts = np.zeros((2, len(halves), 1))
    for into, values in layer_chunks(selection, layer):
        mine = pair[into] >= 0
        np.add.at(sums, (side[into][mine], pair[into][mine]), values[mine])
        np.add.at(counts, (side[into][mine], pair[into][mine]), 1)
    both = sums / counts
    contrasts = both[0] - both[1]  # [text, d_model]

    def components(rows: Floats) -> Components:
        mean = rows.mean(axis=0)
        centred = rows - mean if task.centred else rows
        return _components([centred], len(rows), mean, count, both.mean(axis=1))

    split = min(np.bincount(halves, minlength=2)) > count
    parts = [components(contrasts[halves == half]) for half in (0, 1)] if split else [None, None]
    return components(contrasts), parts[0], parts[1]


def _components(chunks: Any, n: int, mean: Floats, count: int, scale: npt.NDArray[np.float64]) -> Components:
    values, vectors = spectrum(chunks, n, len(mean))
    size = np.linalg.norm(scale, axis=-1).max()
    rank = min(count, int(np.sum(np.sqrt(values) > RESOLUTION * size)))
    if rank == 0:
        return Components(vectors[:0], values[:0])
    return Components(signed(vectors[:rank], mean), values[:rank] / values.sum())


def signed(vectors: Floats, mean: Floats) -> Floats:
    """Return unit vectors [k, d_model] with their signs fixed; see the module's text for the convention."""
    along = vectors @ mean
    largest = np.take_along_axis(vectors, np.argmax(np.abs(vectors), axis=1)[:, None], axis=1)[:, 0]
    signs = np.where(np.abs(along) > RESOLUTION * np.linalg.norm(mean), np.sign(along), np.sign(largest))
    found: Floats = vectors * signs[:, None]
    return found


def _overlap(a: Floats, b: Floats) -> float:
    return float(np.sum((a @ b.T) ** 2) / len(a))


# -- components of directions --------------------------------------------------------------------------------------


def stacked(directions: Sequence[Direction], layer: int, scale: str) -> Floats:
    """Return directions at one layer, [direction, d_model]: their raw vectors, or with scale "unit" unit vectors."""
    return np.stack([item.unit(layer) if scale == "unit" else item.at(layer) for item in directions])


def without_duplicates(vectors: Floats, threshold: float | None) -> tuple[list[int], list[int]]:
    """Return which vectors are kept, and for every vector the kept one of its cluster.

    Two vectors are near-duplicates if their signed cosine reaches the threshold; clusters are what such pairs connect
    (single linkage), and of each the first in order is kept. None keeps all.
    """
    n = len(vectors)
    if threshold is None:
        return list(range(n)), list(range(n))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = units @ units.T >= threshold - 1e-12
    keeper = [-1] * n
    for first in range(n):
        reached = [first] if keeper[first] < 0 else []
        while reached:
            i = reached.pop()
            if keeper[i] < 0:
                keeper[i] = first
                reached += [j for j in range(n) if near[i, j] and keeper[j] < 0]
    return sorted(set(keeper)), keeper


def components_of_directions(vectors: Floats, centred: bool, count: int, what: str) -> tuple[Floats, Floats]:
    """Return the first principal components [count, d_model] of vectors [item, d_model], and all shares of variance.

    Raises:
        UndefinedError: if there are fewer components than asked for.
    """
    mean = vectors.mean(axis=0)
    _, singular, found = np.linalg.svd(vectors - mean if centred else vectors, full_matrices=False)
    size = np.linalg.norm(vectors, axis=1).max()
    rank = int(np.sum(singular > RESOLUTION * size))
    if rank < count:
        raise UndefinedError(f"{what}: {len(vectors)} directions have {rank} principal components, not {count}")
    return signed(found[:count], mean), singular**2 / np.sum(singular**2)
