"""What a study's analyses of directions consist of: units of one layer each, that workers compute and blocks keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.directions import MeansTask
from analysis.explained_variance import ExplainedVarianceUnit, explained_variance_units
from analysis.nulls import CosineNullsUnit, cosine_nulls_units
from analysis.separability import SeparabilityUnit, separability_units
from jobs.context import Context
from jobs.direction_tasks import make_task
from store.directions import Direction
from store.errors import MissingDataError
from store.layers import resolve_layers
from store.study_directions import DifferenceOfMeans, RandomMatched, Reading, ancestors, reads

GeometryUnit = ExplainedVarianceUnit | CosineNullsUnit | SeparabilityUnit


def wanted_units(
    context: Context, directions: Mapping[str, Direction]
) -> tuple[list[tuple[str, GeometryUnit]], list[str]]:
    """Return (name of the analysis, unit) of all that the study asks for, and what waits."""
    geometry = context.study.geometry
    n_layers = context.recalled_model().n_layers
    units: list[tuple[str, GeometryUnit]] = []
    waiting: list[str] = []

    def named(key: str, names: Sequence[str] | str) -> dict[str, Direction]:
        wanted = list(context.study.directions) if isinstance(names, str) else names
        missing = [name for name in wanted if name not in directions]
        if missing:
            waiting.append(f"geometry.{key}: no directions {', '.join(missing)} yet")
        return {name: directions[name] for name in wanted if name in directions}

    for name, spec in geometry.explained_variance.items():
        key = f"explained_variance.{name}"
        before = len(waiting)
        mine = named(key, spec.directions)
        if len(waiting) == before:  # a PCA of some of them would be another one
            found = explained_variance_units(name, spec, mine, resolve_layers(spec.layers, n_layers))
            units += [(name, unit) for unit in found]
    if geometry.cosine_nulls is not None:
        nulls = geometry.cosine_nulls
        mine = named("cosine_nulls", nulls.directions)
        tasks = _means_tasks(context, mine)
        layers = resolve_layers(nulls.layers, n_layers)
        units += [("", unit) for unit in cosine_nulls_units(mine, tasks, layers, nulls.resamples, nulls.seed)]
    for name, separability in geometry.separability.items():
        key = f"separability.{name}"
        mine = named(key, separability.directions)
        try:
            one, other = (
                context.row_texts(side, separability.responses, separability.keep)
                for side in (separability.positive, separability.negative)
            )
            sides = [*separability.positive, *separability.negative]
            evaluated = _prompts(context, sides, separability.responses, separability.keep)
            seen = {direction: len(evaluated & training_prompts(context, direction)) for direction in mine}
        except MissingDataError as error:
            waiting.append(f"geometry.{key}: {str(error).splitlines()[0]}")
            continue
        found_units = separability_units(
            name,
            str(context.store.location),
            mine,
            seen,
            resolve_layers(separability.layers, n_layers),
            separability.position,
            (one, other),
            separability.resamples,
            separability.seed,
        )
        units += [(name, unit) for unit in found_units]
    return units, waiting


def training_prompts(context: Context, direction: str) -> set[str]:
    """Return the conversations that a direction, or any that it is computed from, was computed from.

    Raises:
        MissingDataError: if a prompt of it has no row any more, or its answers are not judged.
    """
    found: set[str] = set()
    for spec in ancestors(context.study.directions, direction):
        if isinstance(spec, Reading | RandomMatched):
            names = [name for _, sets in reads(spec) for name in sets]
            found |= _prompts(context, names, spec.responses, spec.keep)
    return found


def _prompts(context: Context, sets: Sequence[str], responses: str | None, keep: str | None) -> set[str]:
    """Return the conversations of which rows count: with `keep`, those with an answer that does."""
    return {
        prompt.conversation for name in set(sets) for prompt, rows in context.prompt_rows(name, responses, keep) if rows
    }


def _means_tasks(context: Context, directions: Mapping[str, Direction]) -> dict[str, MeansTask]:
    """Return how those of the directions are computed that are differences of means of cached rows, as they are now."""
    tasks = {}
    for name, direction in directions.items():
        if isinstance(context.study.directions[name], DifferenceOfMeans):
            try:
                task = make_task(context, [name])
            except MissingDataError:
                continue
            if isinstance(task, MeansTask) and task.key == direction.key:
                tasks[name] = task
    return tasks
