"""Stage 2a, directions: vectors from cached activations. Never imports torch: the cache is all that it reads."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from analysis.directions import derive, derived_key
from analysis.energy import EnergyRows, energy_matched, energy_matched_key
from jobs.context import Context, StageReport
from jobs.direction_tasks import Task, compute_task, make_task, only, task_groups
from jobs.progress import Progress
from jobs.stage import cpu_map, main_for
from pipeline.cluster import Cluster
from store.directions import Direction, directions_from_table
from store.errors import MissingDataError
from store.schemas import TABLES
from store.study_directions import RandomMatched, Reading, references


def known_directions(context: Context) -> dict[str, Direction]:
    """Return the directions that this study has computed for its present model, by name."""
    table = context.results.read("directions", filters=[("study", "=", context.study.name)])
    model = context.recalled_model().fingerprint
    found = directions_from_table(table)
    return {name: direction for name, direction in found.items() if direction.model == model}


def current_directions(context: Context) -> tuple[dict[str, Direction], list[Task], dict[str, str]]:
    """Compare the study's directions with those computed before.

    Returns:
        Those that are up to date, what to compute from cached rows, and what others wait for, by name. A derived
        direction is computed at once when its parents are there.
    """
    known = known_directions(context)
    current: dict[str, Direction] = {}
    tasks: list[Task] = []
    waiting: dict[str, str] = {}
    for names in task_groups(context.study.directions):
        try:
            task = make_task(context, names)
        except MissingDataError as error:
            waiting.update(dict.fromkeys(names, str(error).splitlines()[0]))
            continue
        same = [name for name in names if name in known and known[name].key == task.keys[name]]
        current.update({name: known[name] for name in same})
        if len(same) < len(names):
            tasks.append(only(task, [name for name in names if name not in same]))
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
            if name in current or name in waiting or isinstance(spec, Reading):
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
            assert spec.seed is not None
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
        for task, result in zip(tasks, cpu_map(cluster, compute, tasks), strict=True):
            if isinstance(result, str):
                waiting.update(dict.fromkeys(task.keys, result))
            else:
                current.update(result)
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


def compute(task: Task) -> dict[str, Direction] | str:
    """Compute directions on a worker; say what is missing instead of failing the others."""
    try:
        return compute_task(task)
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
