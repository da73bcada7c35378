"""Stage 2a, directions: vectors from cached activations. Never imports torch: the cache is all that it reads."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from analysis.directions import MeansTask, derive, derived_key, difference_of_means
from analysis.energy import EnergyRows, energy_matched, energy_matched_key
from jobs.context import Context, StageReport
from jobs.progress import Progress
from jobs.stage import cpu_map, main_for
from pipeline.cluster import Cluster
from store.directions import Direction, directions_from_table
from store.errors import MissingDataError
from store.fingerprint import canonical_json
from store.schemas import TABLES
from store.study import DifferenceOfMeans, RandomMatched
from store.study_directions import references
from store.study_layers import direction_layers


def known_directions(context: Context) -> dict[str, Direction]:
    """Return the directions that this study has computed for its present model, by name."""
    table = context.results.read("directions", filters=[("study", "=", context.study.name)])
    model = context.recalled_model().fingerprint
    found = directions_from_table(table)
    return {name: direction for name, direction in found.items() if direction.model == model}


def means_task(context: Context, name: str, spec: DifferenceOfMeans) -> MeansTask:
    """Return what has to be computed for a difference of means.

    Raises:
        MissingDataError: if a row is not known yet.
    """
    model = context.recalled_model()
    sides = [context.row_texts(names, spec.responses, spec.keep) for names in (spec.positive, spec.negative)]
    shared = set(sides[0].values()) & set(sides[1].values())
    return MeansTask(
        name=name,
        store=str(context.store.location),
        model=model.fingerprint,
        component=spec.component,
        position=spec.position,
        positive=tuple(sides[0]),
        negative=tuple(sides[1]),
        layers=tuple(sorted(direction_layers(context.study, name, model.n_layers))),
        matched=tuple((key, text) for side in sides for key, text in side.items() if text in shared),
        kept=_kept(context, spec),
    )


def _kept(context: Context, spec: DifferenceOfMeans) -> str | None:
    """Return what was kept of each side and by which rule, as JSON; None where every row counts."""
    found = {
        side: kept
        for side, names in (("positive", spec.positive), ("negative", spec.negative))
        if (kept := context.answers.provenance(names, spec.responses, spec.keep)) is not None
    }
    return canonical_json(found) if found else None


def current_directions(context: Context) -> tuple[dict[str, Direction], dict[str, MeansTask], dict[str, str]]:
    """Compare the study's directions with those computed before.

    Returns:
        Those that are up to date, the differences of means to compute, and what the others wait for, all by name.
        A derived direction is computed at once when its parents are there.
    """
    known = known_directions(context)
    current: dict[str, Direction] = {}
    tasks: dict[str, MeansTask] = {}
    waiting: dict[str, str] = {}
    for name, spec in context.study.directions.items():
        if isinstance(spec, DifferenceOfMeans):
            try:
                task = means_task(context, name, spec)
            except MissingDataError as error:
                waiting[name] = str(error).splitlines()[0]
                continue
            if name in known and known[name].key == task.key:
                current[name] = known[name]
            else:
                tasks[name] = task
    waiting |= _derive(context, known, current)
    return current, tasks, waiting


def _derive(context: Context, known: Mapping[str, Direction], current: dict[str, Direction]) -> dict[str, str]:
    """Add every derived direction whose parents are current; one with the same key as before is taken as it is.

    Returns:
        What those wait for that need rows which are not captured yet, by name.
    """
    waiting: dict[str, str] = {}
    progressed = True
    while progressed:
        progressed = False
        for name, spec in context.study.directions.items():
            if name in current or name in waiting or isinstance(spec, DifferenceOfMeans):
                continue
            needed = {other for _, other in references(spec)}
            if not needed <= set(current):
                continue
            progressed = True
            parents = {other: current[other] for other in needed}
            if not isinstance(spec, RandomMatched):
                same = name in known and known[name].key == derived_key(spec, parents)
                current[name] = known[name] if same else derive(name, spec, parents)
                continue
            parent = parents[spec.match_energy]
            try:
                keys = tuple(context.row_texts(spec.prompts, spec.responses, spec.keep))
                rows = EnergyRows(str(context.store.location), keys, spec.position)
                same = name in known and known[name].key == energy_matched_key(spec.seed, parent, rows)
                current[name] = known[name] if same else energy_matched(name, spec.seed, parent, rows)
            except MissingDataError as error:
                waiting[name] = str(error).splitlines()[0]
    return waiting


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Compute the directions that are new or whose inputs changed."""
    specs = context.study.directions
    report = StageReport("directions", unit="directions")
    if not specs:
        return report
    before = known_directions(context)
    current, tasks, waiting = current_directions(context)
    with progress.task("directions", len(tasks), "directions") if tasks else progress.nothing() as advance:
        for name, result in zip(tasks, cpu_map(cluster, compute, list(tasks.values())), strict=True):
            if isinstance(result, Direction):
                current[name] = result
            else:
                waiting[name] = result
            advance(1)
    waiting |= _derive(context, before, current)
    for name in specs:
        if name not in current and name not in waiting:
            waiting[name] = "it waits for the directions that it is computed from"
    report.done = sum(name not in before or before[name].key != item.key for name, item in current.items())
    report.cached = len(current) - report.done
    report.waiting = [f"direction {name!r}: {why}" for name, why in waiting.items()]
    if report.done or set(before) - set(current):
        write(context, current)
    return report


def compute(task: MeansTask) -> Direction | str:
    """Compute one direction on a worker; say what is missing instead of failing the others."""
    try:
        return difference_of_means(task)
    except MissingDataError as error:
        return str(error).splitlines()[0]


def write(context: Context, directions: Mapping[str, Direction]) -> None:
    """Replace the study's directions, in the study's order."""
    tables = [directions[name].to_table(context.study.name) for name in context.study.directions if name in directions]
    context.results.replace(
        "directions", context.study.name, pa.concat_tables([TABLES["directions"].empty_table(), *tables])
    )


if __name__ == "__main__":
    main_for("directions")
