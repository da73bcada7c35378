"""What has to be computed of cached rows for a study's directions: one task per family, small enough for a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from analysis.assistant_axis import AxisTask, assistant_axis
from analysis.components import ComponentsTask, principal_components
from analysis.directions import MeansTask, difference_of_means
from jobs.context import Context
from store.directions import Direction
from store.errors import StudyError
from store.fingerprint import canonical_json, fingerprint
from store.study_directions import (
    AssistantAxis,
    DifferenceOfMeans,
    DirectionSpec,
    PrincipalComponents,
    Reading,
    reads,
)
from store.study_layers import direction_layers
from store.yaml_file import where

Task = MeansTask | ComponentsTask | AxisTask


def task_groups(specs: Mapping[str, DirectionSpec]) -> list[list[str]]:
    """Return the directions that are computed from rows alone, those together that differ in their index only."""
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if not isinstance(spec, Reading):
            continue
        alike = name
        if isinstance(spec, PrincipalComponents):
            alike = fingerprint(spec.model_dump(exclude={"index", "k"}))
        groups.setdefault(alike, []).append(name)
    return list(groups.values())


def task_rows(task: Task) -> tuple[str, ...]:
    """Return the keys of all rows that a task reads, each once."""
    if isinstance(task, AxisTask):
        return tuple(dict.fromkeys(row for _, rows in (*task.default, *task.roles) for row in rows))
    return tuple(dict.fromkeys((*task.positive, *task.negative)))


def only(task: Task, names: Sequence[str]) -> Task:
    """Return the task for some of its directions."""
    if isinstance(task, ComponentsTask):
        return replace(task, wanted=tuple(pair for pair in task.wanted if pair[1] in names))
    return task


def compute_task(task: Task) -> dict[str, Direction]:
    """Compute the directions of a task, by name; see the functions called for what they raise."""
    if isinstance(task, MeansTask):
        return {task.name: difference_of_means(task)}
    if isinstance(task, ComponentsTask):
        return principal_components(task)
    return assistant_axis(task)


def make_task(context: Context, names: Sequence[str]) -> Task:
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
    if isinstance(spec, AssistantAxis):
        return _axis_task(context, name, spec, layers)
    assert isinstance(spec, (DifferenceOfMeans, PrincipalComponents))
    sides = (spec.positive, spec.negative)
    positive, negative = (context.row_texts(side, spec.responses, spec.keep) for side in sides)
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
            kept=_kept(context, spec),
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
        kept=_kept(context, spec),
    )


def _matched(*sides: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (row key, text) of the rows whose prompt's text occurs on both sides."""
    shared = set(sides[0].values()) & set(sides[1].values())
    return tuple((key, text) for side in sides for key, text in side.items() if text in shared)


def _kept(context: Context, spec: Reading) -> str | None:
    """Return what was kept of each side and by which rule, as JSON; None where every row counts."""
    found = {
        side: kept
        for side, names in reads(spec)
        if (kept := context.answers.provenance(names, spec.responses, spec.keep)) is not None
    }
    return canonical_json(found) if found else None


def _axis_task(context: Context, name: str, spec: AssistantAxis, layers: tuple[int, ...]) -> AxisTask:
    default = tuple((set_name, context.row_keys([set_name], spec.responses, spec.keep)) for set_name in spec.default)
    roles: dict[str, list[str]] = {}
    for set_name in spec.roles:
        for prompt, rows in context.prompt_rows(set_name, spec.responses, spec.keep):
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
    texts = [context.row_texts(sets, spec.responses, spec.keep) for sets in (spec.default, spec.roles)]
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
        kept=_kept(context, spec),
    )
