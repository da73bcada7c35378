"""Replay conditions: sweeps expanded, layers made absolute, directions turned into the vectors that are applied."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from store.directions import Direction
from store.errors import MismatchError, MissingDataError, StudyError, UndefinedError
from store.fingerprint import fingerprint
from store.layers import resolve_layer, resolve_layers
from store.rows import Row
from store.sites import Site
from store.study import ConditionSpec, Decoding, Monitor, Replay
from store.study_expand import expand_conditions
from store.study_interventions import (
    Add,
    Clamp,
    MatchNorm,
    ProjectOut,
    Region,
    RowsStatistic,
    Side,
    Tokens,
    directions_of,
    region_of,
    statistic_of,
)
from store.study_types import EngineName
from store.yaml_file import where


@dataclass(frozen=True)
class Operation:
    """One intervention at one site, with the numbers that it applies.

    kind "add": ``h + vectors[0]`` (coefficient and norm rule are already in the vector). kind "project_out":
    ``h - fraction * (h @ vectors.T - to) @ vectors`` with orthonormal rows. kind "clamp":
    ``h + (value - h @ v) * v`` with the unit vector ``v = vectors[0]``; with a `side` only where ``h @ v`` is larger
    (at_most) or smaller (at_least).
    """

    kind: Literal["add", "project_out", "clamp"]
    site: Site
    vectors: npt.NDArray[np.float32]  # [1 or rank, d_model]
    tokens: Tokens | Region
    value: float = 0.0  # the projection that a clamp sets
    to: tuple[float, ...] = ()  # [rank] what project_out leaves along each vector; (): nothing
    fraction: float = 1.0
    side: Side = "both"

    @cached_property
    def region(self) -> Region:
        """What `tokens` means."""
        return region_of(self.tokens)

    @cached_property
    def digest(self) -> bytes:
        """Hash of what the operation does where: equal for operations of several conditions that do the same."""
        affine = f"{self.value!r}|{self.to!r}|{self.fraction!r}|{self.side}"
        what = f"{self.kind}|{self.site}|{self.region!r}|{affine}|{self.vectors.shape}|".encode()
        return hashlib.sha256(what + np.ascontiguousarray(self.vectors).tobytes()).digest()


@dataclass(frozen=True)
class Condition:
    """One condition of a study after expansion of its sweep; `key` identifies what it does to the model."""

    name: str
    base: str
    control_of: str | None
    coefficient: float | None  # the swept one
    prompts: tuple[str, ...]
    spec: ConditionSpec
    key: str
    operations: tuple[Operation, ...]  # in the order in which the study states them


def directions_used(spec: ConditionSpec) -> set[str]:
    """Return the names of the directions that a condition needs."""
    used: set[str] = set()
    for intervention in spec.interventions:
        used.update(directions_of(intervention))
        if isinstance(intervention, Add) and isinstance(intervention.norm, MatchNorm):
            used.add(intervention.norm.match)
    return used


def decoding_of(replay: Replay, spec: ConditionSpec) -> Decoding:
    """Return how a condition's texts are generated."""
    return replay.decoding if spec.decoding is None else spec.decoding


def seeds_of(replay: Replay, spec: ConditionSpec) -> list[int]:
    """Return the seeds of a condition's texts; one where it decodes greedily and only others sample."""
    if spec.seeds is not None:
        return spec.seeds
    return replay.seeds[:1] if decoding_of(replay, spec).greedy else replay.seeds


def interventions_text(spec: ConditionSpec) -> str:
    """Spell a condition's interventions as the table `conditions` keeps them."""
    # Not canonical JSON, which spells the fraction 1.0 like the layer 1.
    new = {"to": None, "fraction": 1.0, "side": "both"}  # omitted when default so that existing texts do not change
    records = [item.model_dump(mode="json", by_alias=True) for item in spec.interventions]
    return json.dumps([{k: v for k, v in record.items() if k not in new or v != new[k]} for record in records])


class Summarise(Protocol):
    """What sums up captured rows for interventions."""

    def __call__(self, what: RowsStatistic, site: Site, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the statistic of h . v over rows for each of `vectors` [rank, d_model]: [rank].

        Raises:
            MissingDataError: if a row is not captured at the site.
        """
        ...


def resolve_conditions(
    replay: Replay,
    directions: Mapping[str, Direction],
    n_layers: int,
    model: str,
    file: Path | None = None,
    *,
    failed: Mapping[str, str] | None = None,
    set_aside: dict[str, str] | None = None,
    summarise: Summarise | None = None,
    reasons: dict[str, str] | None = None,
) -> tuple[list[Condition], list[str]]:
    """Return the conditions whose directions are there, and the names of those that still wait for some.

    Layers are resolved as they are: `store.study_layers.check_layers` has checked them, and names lines. `file` is the
    study file, for the error message. `summarise` gives what interventions take from captured rows; `reasons` is filled
    with why a condition waits where that is not for its directions.

    A condition that needs a direction where it does not exist is put into `set_aside` with the cause, and so is one
    whose subspace is linearly dependent; ``layers: all`` needs every layer. `failed` says of directions that do not
    exist at all why.

    Raises:
        StudyError: if a subspace's directions are linearly dependent, without `set_aside`.
        UndefinedError: if a direction does not exist at a layer, without `set_aside`.
        MismatchError: if a direction belongs to another model.
    """
    conditions, waiting = [], []
    for one in expand_conditions(replay):
        name, spec = one.name, one.spec
        needed = directions_used(spec)
        lost = sorted(needed & set(failed or {}) - set(directions))
        if lost and set_aside is not None and failed is not None:
            set_aside[name] = failed[lost[0]]
            continue
        if not needed <= set(directions):
            waiting.append(name)
            continue
        for direction in needed:
            if directions[direction].model != model:
                raise MismatchError(f"direction {direction!r} belongs to another model; run resid directions again")
        try:
            made = [_operations(item, directions, n_layers) for item in spec.interventions]
        except MissingDataError:  # computed before the study captured these layers
            waiting.append(name)
            continue
        except UndefinedError as error:
            if set_aside is None:
                raise
            cause, _, remedy = str(error).partition("\n  remedy: ")
            set_aside[name] = f"{cause}\n  remedy: leave that layer out of its interventions, or: {remedy}"
            continue
        except _DependentError as error:
            if set_aside is not None:
                set_aside[name] = f"{error}\n  remedy: name each direction once, and only independent ones"
                continue
            key = f"replay.conditions.{one.base}.interventions"
            remedy = "name each direction once, and only independent ones"
            raise StudyError(str(error), file=where(file, key), key=key, remedy=remedy) from None
        try:
            made = [_affine(item, part, summarise) for item, part in zip(spec.interventions, made, strict=True)]
        except MissingDataError as error:
            waiting.append(name)
            if reasons is not None:
                reasons[name] = str(error).partition("\n")[0]
            continue
        operations = tuple(operation for part in made for operation in part)
        prompts = tuple(spec.prompts or replay.prompts)
        key = _key(spec, made, directions, n_layers, model)
        conditions.append(Condition(name, one.series, spec.control_of, one.coefficient, prompts, spec, key, operations))
    return conditions, waiting


def _affine(
    item: Add | ProjectOut | Clamp, operations: list[Operation], summarise: Summarise | None
) -> list[Operation]:
    """Put the numbers that come from captured rows into an intervention's operations."""
    what = statistic_of(item)
    if what is None:
        return operations
    if summarise is None:
        raise MissingDataError("what it takes from captured rows is not there")
    found = []
    for operation in operations:
        values = tuple(float(np.float32(v)) for v in summarise(what, operation.site, operation.vectors.astype(float)))
        how: dict[str, Any] = {"to": values} if isinstance(item, ProjectOut) else {"value": values[0]}
        found.append(replace(operation, **how))
    return found


def _key(
    spec: ConditionSpec,
    made: Sequence[Sequence[Operation]],
    directions: Mapping[str, Direction],
    n_layers: int,
    model: str,
) -> str:
    """Hash what the condition does: spellings of the same layers agree, other vectors of the same name do not."""
    items = []
    for item, operations in zip(spec.interventions, made, strict=True):
        named = directions_of(item)
        record: dict[str, object] = {
            "kind": _kind(item),
            "directions": [directions[name].digest for name in named],
            "read": [directions[name].component for name in named],
            "component": item.component,
            "layers": resolve_layers(item.layers, n_layers),
            "from_layer": None if item.from_layer is None else resolve_layer(item.from_layer, n_layers),
            "tokens": region_of(item.tokens).identity,
        }
        if item.from_offset:  # left out where it is 0: keys of before stay
            record["from_offset"] = item.from_offset
        if isinstance(item, Add):
            norm = item.norm
            record["coefficient"] = item.coefficient
            record["norm"] = {"match": directions[norm.match].digest} if isinstance(norm, MatchNorm) else norm
        if isinstance(item, Clamp):
            measured = [operation.value for operation in operations]
            record["projection"] = measured if isinstance(item.projection, RowsStatistic) else item.projection
            if item.side != "both":  # omitted when default so that existing keys do not change
                record["side"] = item.side
        if isinstance(item, ProjectOut) and item.to is not None:
            record["to"] = [operation.to for operation in operations]
        if isinstance(item, ProjectOut) and item.fraction != 1:
            record["fraction"] = item.fraction
        items.append(record)
    return fingerprint({"model": model, "interventions": items})


def source_layer(item: Add | ProjectOut | Clamp, layer: int, n_layers: int) -> int:
    """Return the layer whose vector an intervention uses at a layer; it may be none of the model's."""
    return (layer if item.from_layer is None else resolve_layer(item.from_layer, n_layers)) + item.from_offset


def _kind(item: Add | ProjectOut | Clamp) -> Literal["add", "project_out", "clamp"]:
    if isinstance(item, Add):
        return "add"
    return "clamp" if isinstance(item, Clamp) else "project_out"


class _DependentError(ValueError):
    """Directions to project out together span less than their number."""


def _operations(item: Add | ProjectOut | Clamp, directions: Mapping[str, Direction], n_layers: int) -> list[Operation]:
    operations: list[Operation] = []
    for layer in resolve_layers(item.layers, n_layers):
        source = source_layer(item, layer, n_layers)
        site = Site(item.component, layer)
        if isinstance(item, Add):
            assert isinstance(item.coefficient, float | int)
            vector = _normed(item, directions, source) * float(item.coefficient)
            operations.append(Operation("add", site, vector[None].astype(np.float32), item.tokens))
        elif isinstance(item, Clamp):
            unit = directions[item.clamp].unit(source)
            value = 0.0 if isinstance(item.projection, RowsStatistic) else float(item.projection)
            clamped = unit[None].astype(np.float32)
            operations.append(Operation("clamp", site, clamped, item.tokens, value, side=item.side))
        else:
            units = [directions[name].unit(source) for name in item.project_out]
            basis = orthonormal_basis(units)
            if len(basis) < len(units):
                raise _DependentError(
                    f"the directions {', '.join(item.project_out)} are linearly dependent at layer {source}"
                )
            rows = basis.astype(np.float32)
            operations.append(Operation("project_out", site, rows, item.tokens, fraction=float(item.fraction)))
    return operations


def _normed(item: Add, directions: Mapping[str, Direction], layer: int) -> npt.NDArray[np.float64]:
    direction = directions[item.add]
    if item.norm == "natural":
        return direction.at(layer)
    unit = direction.unit(layer)
    if isinstance(item.norm, MatchNorm):
        return unit * np.linalg.norm(directions[item.norm.match].at(layer))
    return unit


def orthonormal_basis(vectors: Sequence[npt.NDArray[np.float64]], tolerance: float = 1e-6) -> npt.NDArray[np.float64]:
    """Return an orthonormal basis [rank, d_model] of the span of unit vectors, by singular value decomposition.

    The rank counts singular values above `tolerance` times the largest. One vector is returned as it is, sign kept.
    """
    matrix = np.stack([np.asarray(vector, dtype=np.float64) for vector in vectors])
    if len(matrix) == 1:
        return matrix / np.linalg.norm(matrix)
    _, singular, basis = np.linalg.svd(matrix, full_matrices=False)
    kept: npt.NDArray[np.float64] = basis[singular > tolerance * singular[0]]
    return kept


def check_token_ranges(condition: Condition, row: Row) -> None:
    """Check that a row's prompt has the tokens that a condition's ranges and parts name.

    Raises:
        ValueError: otherwise, naming condition, range and prompt.
    """
    try:
        operations_for(condition, row)
    except ValueError as error:
        raise ValueError(f"condition {condition.name!r}: {error} (prompt {row.prompt_id[:16]})") from None


def operations_for(condition: Condition, row: Row) -> tuple[Operation, ...]:
    """Return a condition's operations as they act on one row: parts of the prompt become positions.

    Raises:
        ValueError: if the prompt lacks tokens that are named, or the row does not say where its parts lie.
    """
    if not any(operation.region.counted for operation in condition.operations):
        return condition.operations
    found = []
    for operation in condition.operations:
        region = operation.region
        if region.counted:
            first, end = region.in_prompt(row.spans.prompt_length)
            if region.parts:
                named = ", ".join(region.parts)
                if row.parts is None:
                    raise ValueError(f"where {named} tokens lie in the prompt is not known")
                spans = [(max(a, first), min(b, end)) for part, a, b in row.parts if part in region.parts]
                inside = tuple((a, b) for a, b in spans if a < b)
                if not inside:
                    raise ValueError(f"the prompt has no {named} tokens from {first} to {end}")
                operation = replace(operation, tokens=replace(region, spans_in_prompt=inside))
        found.append(operation)
    return tuple(found)


def needs_parts(condition: Condition) -> bool:
    """Tell whether a condition's scopes name turns of the prompt, or the template's tokens."""
    return any(operation.region.parts for operation in condition.operations)


@dataclass(frozen=True)
class MonitorPlan:
    """Which projections are recorded while generating: unit vectors [direction, d_model] per site."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    units: Mapping[Site, npt.NDArray[np.float32]]

    @property
    def key(self) -> str:
        return fingerprint({"names": self.names, "keys": self.keys, "sites": [str(site) for site in self.units]})


def resolve_monitor(monitor: Monitor | None, directions: Mapping[str, Direction], n_layers: int) -> MonitorPlan | None:
    """Return what to record, or None if the study monitors nothing or its directions are not there yet.

    Units are float32, [direction, d_model] at each site, in the order of the monitor's directions. A site at which one
    of them does not exist is left out.
    """
    if monitor is None or not set(monitor.directions) <= set(directions):
        return None
    names = tuple(dict.fromkeys(monitor.directions))
    sites = [Site(monitor.component, layer) for layer in resolve_layers(monitor.layers, n_layers)]
    sites = [site for site in sites if not any(site.layer in directions[name].undefined for name in names)]
    if not sites or any(site.layer not in directions[name].layers for name in names for site in sites):
        return None
    units = {site: np.stack([directions[n].unit(site.layer) for n in names]).astype(np.float32) for site in sites}
    return MonitorPlan(names, tuple(directions[name].key for name in names), units)


_SPECIAL = re.compile(r"<\S+>|\[[A-Z_]+\]")  # what special tokens look like


def decoding_key(decoding: Decoding, monitor: MonitorPlan | None, engine: EngineName = "resid") -> str:
    """Identify how text is generated and what is recorded on the way.

    Engines agree but for near ties, and those are enough to keep their texts apart.
    """
    how = decoding.model_dump()
    if not how["stop"]:
        del how["stop"]  # texts that were generated before there were stop strings keep their key
    what: dict[str, object] = {"decoding": how, "monitor": None if monitor is None else monitor.key}
    if any(_SPECIAL.fullmatch(stop) for stop in decoding.stop):
        what["stop"] = "special tokens too"  # such strings ended no text before
    if engine != "resid":  # left out for the built-in engine: keys of before stay
        what["engine"] = engine
    return fingerprint(what)


def generation_key(model: str, row_key: str, condition_key: str, decoding: str, seed: int) -> str:
    """Identify one generation: nothing that could change its text or records is left out."""
    return fingerprint({"model": model, "row": row_key, "condition": condition_key, "decoding": decoding, "seed": seed})
