"""What a study's analyses of directions consist of: units of one layer each, that workers compute and blocks keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.directions import derived_key
from analysis.explained_variance import ExplainedVarianceUnit, explained_variance_units
from analysis.nulls import CosineNullsUnit, Recipe, cosine_nulls_units
from analysis.separability import SeparabilityUnit, separability_units
from jobs.context import Context
from jobs.direction_tasks import make_task
from store.directions import Direction
from store.errors import MissingDataError, StudyError
from store.layers import resolve_layers
from store.study_directions import Derived, RandomMatched, Reading, ancestors, reads, references
from store.yaml_file import where

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
        failed = context.directions.failed(missing)
        missing = [name for name in missing if name not in failed]
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
        recipes = _recipes(context, mine, directions)
        others = [directions[name] for name in recipes if name not in mine]
        layers = resolve_layers(nulls.layers, n_layers)
        groups = None if nulls.groups is None else _groups(context, nulls.groups, list(mine))
        found_nulls = cosine_nulls_units(mine, recipes, layers, nulls.resamples, nulls.seed, groups, others)
        units += [("", unit) for unit in found_nulls]
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


def _recipes(
    context: Context, wanted: Mapping[str, Direction], directions: Mapping[str, Direction]
) -> dict[str, Recipe]:
    """Return how the wanted directions, and those that they are computed from, are computed now.

    A direction that is not computed in this way any more has no recipe: its vector stays as it is.
    """
    recipes: dict[str, Recipe] = {}

    def add(name: str) -> bool:
        if name in recipes:
            return True
        spec, direction = context.study.directions[name], directions.get(name)
        if direction is None:
            return False
        if isinstance(spec, Reading):
            try:
                task = make_task(context, [name])
            except MissingDataError:
                return False
            if task.keys[name] == direction.key:
                recipes[name] = task
        elif isinstance(spec, Derived):
            parents = [other for _, other in references(spec)]
            known = [add(other) or other in directions for other in parents]
            if all(known) and derived_key(spec, {other: directions[other] for other in parents}) == direction.key:
                recipes[name] = spec
        return name in recipes

    for name in wanted:
        add(name)
    return recipes


def _groups(context: Context, tag: str, names: Sequence[str]) -> dict[str, str]:
    """Return the group of each row that the directions are computed from.

    Raises:
        StudyError: if no prompt has the tag.
    """
    groups: dict[str, str] = {}
    for name in names:
        for spec in ancestors(context.study.directions, name):
            if isinstance(spec, Reading):
                for prompts in {item for _, sets in reads(spec) for item in sets}:
                    for prompt, rows in context.prompt_rows(prompts, spec.responses, spec.keep):
                        if tag in prompt.tags:
                            groups |= dict.fromkeys(rows, prompt.tags[tag])
    if not groups:
        key = "geometry.cosine_nulls.groups"
        raise StudyError(
            f"no prompt of the directions has the tag {tag!r}",
            file=where(context.study.file, key),
            key=key,
            remedy="name a column of the prompt sets under columns: tags",
        )
    return groups
