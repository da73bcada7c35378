"""What has to be computed of cached rows for a study's directions: one task per family, small enough for a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from analysis.assistant_axis import AxisTask, assistant_axis
from analysis.components import ComponentsTask, principal_components
from analysis.directions import MeansTask, difference_of_means
from analysis.matched_random import EnergyTask, random_matched
from jobs.context import Context
from store.directions import Direction
from store.errors import StudyError
from store.fingerprint import fingerprint
from store.study_directions import (
    AssistantAxis,
    Derived,
    DifferenceOfMeans,
    DirectionSpec,
    PrincipalComponents,
    RandomMatched,
    references,
)
from store.study_layers import direction_layers
from store.yaml_file import where

Task = MeansTask | ComponentsTask | AxisTask | EnergyTask


def task_groups(specs: Mapping[str, DirectionSpec]) -> list[list[str]]:
    """Return the directions that are computed from rows, those together that differ in index or seed alone."""
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if isinstance(spec, Derived):
            continue
        alike = name
        if isinstance(spec, (PrincipalComponents, RandomMatched)):
            alike = fingerprint(spec.model_dump(exclude={"index", "seed", "seeds", "k"}, by_alias=True))
        groups.setdefault(alike, []).append(name)
    return list(groups.values())


def is_ready(spec: DirectionSpec, current: Mapping[str, Direction]) -> bool:
    """Whether the directions that a spec refers to are there."""
    return {name for _, name in references(spec)} <= set(current)


def only(task: Task, names: Sequence[str]) -> Task:
    """Return the task for some of its directions."""
    if isinstance(task, (ComponentsTask, EnergyTask)):
        return replace(task, wanted=tuple(pair for pair in task.wanted if pair[1] in names))
    return task


def compute_task(task: Task) -> dict[str, Direction]:
    """Compute the directions of a task, by name; see the functions called for what they raise."""
    if isinstance(task, MeansTask):
        return {task.name: difference_of_means(task)}
    if isinstance(task, ComponentsTask):
        return principal_components(task)
    if isinstance(task, AxisTask):
        return assistant_axis(task)
    return random_matched(task)


def make_task(context: Context, names: Sequence[str], current: Mapping[str, Direction]) -> Task:
    """Return what computes directions of one group.

    Raises:
        MissingDataError: if a row is not known yet.
        StudyError: if a prompt of `roles` lacks the tag that `by` names.
    """
    name = names[0]
    specs = [context.study.directions[member] for member in names]
    spec = specs[0]
    model = context.recalled_model()
    store = str(context.store.location)
    layers = tuple(sorted(direction_layers(context.study, name, model.n_layers)))
    if isinstance(spec, RandomMatched):
        wanted = [(item.seed, n) for item, n in zip(specs, names, strict=True) if isinstance(item, RandomMatched)]
        return EnergyTask(
            name=name,
            wanted=tuple((seed, n) for seed, n in wanted if seed is not None),
            parent=current[spec.match_energy],
            store=store,
            position=spec.position,
            rows=context.row_keys(spec.prompts, spec.responses),
            tolerance=spec.tolerance,
            layers=layers,
        )
    if isinstance(spec, AssistantAxis):
        return _axis_task(context, name, spec, layers)
    assert isinstance(spec, (DifferenceOfMeans, PrincipalComponents))
    positive, negative = (context.row_texts(side, spec.responses) for side in (spec.positive, spec.negative))
    matched = _matched(positive, negative)
    if isinstance(spec, DifferenceOfMeans):
        return MeansTask(
            name=name,
            store=store,
            model=model.fingerprint,
            component=spec.component,
            position=spec.position,
            positive=tuple(positive),
            negative=tuple(negative),
            layers=layers,
            matched=matched,
        )
    numbered = [(item.index, n) for item, n in zip(specs, names, strict=True) if isinstance(item, PrincipalComponents)]
    return ComponentsTask(
        name=name,
        wanted=tuple((index, n) for index, n in numbered if index is not None),
        store=store,
        model=model.fingerprint,
        component=spec.component,
        position=spec.position,
        positive=tuple(positive),
        negative=tuple(negative),
        contrast=spec.contrast,
        centred=spec.centred,
        layers=layers,
        matched=matched,
    )


def _matched(*sides: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (row key, text) of the rows whose prompt's text occurs on both sides."""
    shared = set(sides[0].values()) & set(sides[1].values())
    return tuple((key, text) for side in sides for key, text in side.items() if text in shared)


def _axis_task(context: Context, name: str, spec: AssistantAxis, layers: tuple[int, ...]) -> AxisTask:
    default = tuple((set_name, context.row_keys([set_name], spec.responses)) for set_name in spec.default)
    roles: dict[str, list[str]] = {}
    for set_name in spec.roles:
        for prompt, rows in context.prompt_rows(set_name, spec.responses):
            role = set_name
            if spec.by is not None:
                if spec.by not in prompt.tags:
                    key = f"directions.{name}.by"
                    raise StudyError(
                        f"the prompt {prompt.text[:60]!r} of {set_name!r} has no tag {spec.by!r}",
                        file=where(context.study.file, key),
                        key=key,
                        remedy="name a column of the roles' prompt sets under columns: tags, or delete by",
                    )
                role = prompt.tags[spec.by]
            roles.setdefault(role, []).extend(rows)
    model = context.recalled_model()
    texts = [context.row_texts(sets, spec.responses) for sets in (spec.default, spec.roles)]
    return AxisTask(
        name=name,
        store=str(context.store.location),
        model=model.fingerprint,
        component=spec.component,
        position=spec.position,
        default=default,
        roles=tuple((role, tuple(dict.fromkeys(rows))) for role, rows in roles.items()),
        equal_default=spec.default_weighting == "sets",
        equal_roles=spec.role_weighting == "roles",
        layers=layers,
        matched=_matched(*texts),
    )
