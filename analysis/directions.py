"""Directions from cached activations: difference of means, and directions that are derived from others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from analysis.components import RESOLUTION, components_of_directions, stacked, without_duplicates
from analysis.means import group_means, matched_halves
from store.activations import ActivationStore
from store.conditions import orthonormal_basis
from store.directions import Direction, require_layers, undefined_record
from store.errors import MismatchError, ResidError, UndefinedError
from store.fingerprint import fingerprint
from store.location import Location
from store.sites import Component
from store.study_directions import Derived, Difference, Orthogonalised, PrincipalDirections

# Part of every key: raised when the arithmetic changes, so that results of two versions never pass as one.
METHOD_VERSION = 2
HALVES_SEED = 0


@dataclass(frozen=True)
class MeansTask:
    """A difference of means to compute, small enough to send to a worker."""

    name: str
    store: str
    model: str
    component: str
    position: str
    positive: tuple[str, ...]  # row keys
    negative: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    matched: tuple[tuple[str, str], ...] = ()  # (row key, what it has in common with rows of the other side)
    kept: str | None = None  # JSON: of which answers the rows are those that count, for the provenance

    @property
    def keys(self) -> dict[str, str]:
        """The key by the direction's name, as every task of directions has it."""
        return {self.name: self.key}

    @property
    def key(self) -> str:
        """Identify the result by its inputs; the order of rows does not matter."""
        return fingerprint(
            {
                "method": "difference_of_means",
                "version": METHOD_VERSION,
                "model": self.model,
                "component": self.component,
                "position": self.position,
                "positive": sorted(self.positive),
                "negative": sorted(self.negative),
                "layers": self.layers,
                "halves_seed": HALVES_SEED,
                "matched": sorted(self.matched),
                **({} if self.kept is None else {"kept": self.kept}),
            }
        )


def difference_of_means(task: MeansTask) -> Direction:
    """Return mean(positive) - mean(negative) at every captured layer, with its raw norm.

    Method: Marks & Tegmark 2023 (arXiv:2310.06824, section 4); for refusal Arditi et al. 2024 (arXiv:2406.11717,
    section 2.3). Stability is the cosine, per layer, of the directions of two random halves of both sides (None where
    a side has fewer than four rows). Rows that are matched across the sides, such as two personas' answers to one
    question, are dealt together: apart, the questions would not cancel within a half, and as the halves complement
    each other their remainders point in opposite directions.

    Raises:
        MissingDataError: if a row is not captured.
        MismatchError: if a row is on both sides.
        UndefinedError: if the direction is zero, or nothing but rounding, at every layer. A single such layer is left
            out, and named in the provenance under "undefined".
        ResidError: if a side has no rows.
    """
    both = set(task.positive) & set(task.negative)
    if both:
        raise MismatchError(
            f"direction {task.name!r}: {len(both)} rows are positive and negative at once\n"
            "  remedy: make the two prompt sets disjoint"
        )
    store = ActivationStore.open(Location.of(task.store)).model(task.model)
    # One order for the same rows, whoever asks: sums then agree to the last bit.
    keys = (*sorted(task.positive), *sorted(task.negative))
    selection = store.select(keys, task.component, task.position, task.layers)
    n_positive = len(task.positive)
    side = np.array([0] * n_positive + [1] * len(task.negative), dtype=np.int64)
    halves = matched_halves(keys, n_positive, dict(task.matched), HALVES_SEED)
    split = min(np.bincount(2 * side + halves, minlength=4)) >= 2
    if split:
        result = group_means(selection, 2 * side + halves, 4)
        counts = result.counts[:, None, None]
        sums = result.means * counts
        means = (sums[[0, 2]] + sums[[1, 3]]) / (counts[[0, 2]] + counts[[1, 3]])
        of_half = result.means[:2] - result.means[2:]  # [half, layer, d_model]
    else:
        means = group_means(selection, side, 2).means
    vectors = means[0] - means[1]
    scale = np.linalg.norm(means, axis=2).max(axis=0)
    undefined = undefined_layers(task.name, task.component, task.position, selection.layers, vectors, scale)
    there = [i for i, layer in enumerate(selection.layers) if layer not in undefined]
    split = split and bool(np.linalg.norm(of_half[:, there], axis=2).all())
    stability = tuple(cosine(of_half[0, i], of_half[1, i]) for i in there) if split else None
    return Direction(
        name=task.name,
        key=task.key,
        model=task.model,
        method="difference_of_means",
        component=cast(Component, task.component),
        position=task.position,
        layers=tuple(selection.layers[i] for i in there),
        vectors=vectors[there].astype(np.float32),
        n_positive=n_positive,
        n_negative=len(task.negative),
        split_half_cosine=stability,
        provenance={
            "method_version": METHOD_VERSION,
            "halves_seed": HALVES_SEED,
            **({} if task.kept is None else {"kept": json.loads(task.kept)}),
            **undefined_record(undefined),
        },
    )


def undefined_layers(
    name: str,
    component: str,
    position: str,
    layers: Sequence[int],
    vectors: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
) -> dict[int, str]:
    """Return at which layers a difference is nothing but rounding, or not finite, and why, as messages.

    Args:
        name: the direction, for the messages; likewise component and position.
        layers: those of the vectors.
        vectors: [layer, d_model].
        scale: norm of the larger of the two means, [layer].

    Raises:
        UndefinedError: if that is so at every layer.
    """
    undefined: dict[int, str] = {}
    for layer, norm, size in zip(layers, np.linalg.norm(vectors, axis=1), scale, strict=True):
        where = f"{component}.{layer} ({position})"
        if not np.isfinite(norm):
            undefined[layer] = (
                f"direction {name!r} is not finite at {where}\n  remedy: find the rows with NaN or infinity there"
            )
        elif norm <= RESOLUTION * size:
            undefined[layer] = (
                f"direction {name!r} is zero, up to rounding, at {where}\n"
                "  remedy: its two sides are the same there; check the prompt sets, or choose another position"
            )
    if len(undefined) == len(layers):
        require_layers((), undefined)
    return undefined


def cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Return the cosine of two vectors, computed in float64.

    Raises:
        ResidError: if one of them is zero: it has no direction.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms == 0:
        raise ResidError("the cosine with a zero vector is undefined")
    return float(np.clip(a @ b / norms, -1.0, 1.0))


def derived_key(spec: Derived, parents: Mapping[str, Direction]) -> str:
    """Identify a derived direction by its rule and its parents' vectors and sites; no name counts."""

    def identity(name: str) -> str:
        parent = parents[name]
        return fingerprint([parent.digest, parent.layers, parent.model, parent.component, parent.position])

    record = spec.model_dump(exclude_none=True)
    if record.get("draw") == "layer":
        del record["draw"]  # omitted when default so that existing keys do not change
    for field, value in record.items():
        if field in ("minuend", "subtrahend", "direction", "match_norm"):
            record[field] = identity(value)
        elif field == "orthogonal_to":
            record[field] = sorted(identity(item) for item in value)
        elif field == "directions":
            record[field] = [identity(item) for item in value]  # of duplicates the first is kept
    return fingerprint({"version": METHOD_VERSION, **record})


def derive(name: str, spec: Derived, parents: Mapping[str, Direction]) -> Direction:
    """Compute a direction from others, layer by layer, on the layers that all of them have.

    Raises:
        MismatchError: if parents are of different models or components, or have no layer in common.
        UndefinedError: if the result does not exist at any layer. A single such layer is left out, and named in the
            provenance under "undefined", as are those at which a parent does not exist.
    """
    undefined: dict[int, str] = {}
    for parent in parents.values():
        undefined |= parent.undefined
    more: dict[str, object] = {}
    if isinstance(spec, Difference):
        first, second = parents[spec.minuend], parents[spec.subtrahend]
        layers = _common(name, (first, second))
        vectors = np.stack([first.at(layer) - second.at(layer) for layer in layers])
        scale = np.maximum(*(np.array([float(np.linalg.norm(one.at(n))) for n in layers]) for one in (first, second)))
        undefined |= undefined_layers(name, first.component, first.position, layers, vectors, scale)
    elif isinstance(spec, Orthogonalised):
        # One order of the same set: the result then agrees to the last bit.
        others = sorted((parents[item] for item in spec.orthogonal_to), key=lambda other: other.digest)
        first = parents[spec.direction]
        layers = _common(name, (first, *others))
        vectors = np.zeros((len(layers), first.vectors.shape[1]))
        for i, layer in enumerate(layers):
            try:
                vectors[i] = orthogonalise(first.at(layer), [other.unit(layer) for other in others])
            except UndefinedError as error:
                undefined[layer] = (
                    f"direction {name!r} at {first.component}.{layer}: {error}\n"
                    "  remedy: make it orthogonal to fewer directions, or to others"
                )
    elif isinstance(spec, PrincipalDirections):
        first = parents[spec.directions[0]]
        layers, vectors, more, lacking = _component(name, spec, [parents[item] for item in spec.directions])
        undefined |= lacking
    else:
        assert spec.seed is not None
        first = parents[spec.match_norm]
        layers = first.layers
        units = random_directions([0] if spec.draw == "shared" else layers, first.vectors.shape[1], spec.seed)
        vectors = units * first.norms[:, None]
    there = [i for i, layer in enumerate(layers) if layer not in undefined]
    require_layers(there, undefined)
    return Direction(
        name=name,
        key=derived_key(spec, parents),
        model=first.model,
        method=spec.method,
        component=first.component,
        position=first.position,
        layers=tuple(layers[i] for i in there),
        vectors=vectors[there].astype(np.float32),
        provenance={
            "method_version": METHOD_VERSION,
            "spec": spec.model_dump(exclude_none=True),
            "parents": {parent.name: parent.key for parent in parents.values()},
            **more,
            **undefined_record(undefined),
        },
    )


def _component(
    name: str, spec: PrincipalDirections, parents: Sequence[Direction]
) -> tuple[tuple[int, ...], npt.NDArray[np.float64], dict[str, object], dict[int, str]]:
    """Return layers, the component with the spec's index at each, its share and the number of directions there.

    Last comes why it does not exist at the common layers that are left out.
    """
    assert spec.index is not None
    layers = _common(name, parents)
    vectors, shares, kept_counts = [], [], []
    lacking: dict[int, str] = {}
    for layer in layers:
        stack = stacked(parents, layer, spec.scale)
        kept, _ = without_duplicates(stack, spec.duplicate_cosine)
        what = f"direction {name!r} at {parents[0].component}.{layer}"
        try:
            found, share = components_of_directions(stack[kept], spec.centred, spec.index, what)
        except UndefinedError as error:
            lacking[layer] = f"{error}\n  remedy: lower k, or give it more directions"
            continue
        vectors.append(found[-1])
        shares.append(float(share[spec.index - 1]))
        kept_counts.append(len(kept))
    there = tuple(layer for layer in layers if layer not in lacking)
    require_layers(there, lacking)
    return there, np.stack(vectors), {"share": shares, "n_directions": kept_counts}, lacking


def orthogonalise(vector: npt.NDArray[np.float64], units: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Return a vector without its component in the span of others, [d_model].

    Raises:
        UndefinedError: if nothing but rounding is left, so that its direction would be noise.
    """
    basis = orthonormal_basis(units)
    rest = vector - (vector @ basis.T) @ basis
    if np.linalg.norm(rest) <= RESOLUTION * np.linalg.norm(vector):
        raise UndefinedError("the vector lies in the span that it is to be orthogonal to: nothing is left of it")
    # Once more: one pass leaves rounding along the basis when little of the vector remains.
    return rest - (rest @ basis.T) @ basis


def random_directions(layers: Sequence[int], d_model: int, seed: int) -> npt.NDArray[np.float64]:
    """Return isotropic unit vectors [layer, d_model]; a layer's draw depends on seed and layer number alone."""
    draws = np.stack([np.random.default_rng((seed, layer)).standard_normal(d_model) for layer in layers])
    units: npt.NDArray[np.float64] = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    return units


def _common(name: str, parents: Sequence[Direction]) -> tuple[int, ...]:
    if len({parent.model for parent in parents}) > 1:
        raise MismatchError(f"direction {name!r}: its parents are of different models; run resid directions again")
    components = {parent.component for parent in parents}
    if len(components) > 1:
        raise MismatchError(
            f"direction {name!r} mixes {' and '.join(sorted(components))}\n  remedy: read its parents at one component"
        )
    layers = set.intersection(*(set(parent.layers) for parent in parents))
    if not layers:
        undefined = {layer: why for parent in parents for layer, why in parent.undefined.items()}
        require_layers((), undefined)
        raise MismatchError(f"direction {name!r}: its parents have no layer in common")
    return tuple(sorted(layers))
