"""Stage 2a, directions: vectors from cached activations. Never imports torch: the cache is all that it reads."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from analysis.directions import derive, derived_key
from jobs.context import Context, StageReport
from jobs.direction_tasks import Task, compute_task, is_ready, make_task, only, task_groups
from jobs.progress import Progress
from jobs.stage import cpu_map, main_for
from pipeline.cluster import Cluster
from store.directions import Direction, directions_from_table
from store.errors import MissingDataError
from store.schemas import TABLES
from store.study_directions import Derived, DirectionSpec, references


def known_directions(context: Context) -> dict[str, Direction]:
    """Return the directions that this study has computed for its present model, by name."""
    table = context.results.read("directions", filters=[("study", "=", context.study.name)])
    model = context.recalled_model().fingerprint
    found = directions_from_table(table)
    return {name: direction for name, direction in found.items() if direction.model == model}


def current_directions(
    context: Context, known: Mapping[str, Direction] | None = None
) -> tuple[dict[str, Direction], list[Task], dict[str, str]]:
    """Compare the study's directions with those computed before (`known`; by default what is written down).

    Returns:
        Those that are up to date, what to compute from cached rows, and what others wait for, by name. A derived
        direction is computed at once when its parents are there.
    """
    known = known_directions(context) if known is None else known
    specs = context.study.directions
    current: dict[str, Direction] = {}
    waiting: dict[str, str] = {}
    tasks: list[Task] = []
    seen: set[str] = set()
    while True:
        _derive(specs, known, current)
        ready = [group for group in task_groups(specs) if group[0] not in seen and is_ready(specs[group[0]], current)]
        if not ready:
            return current, tasks, waiting
        for names in ready:
            seen.update(names)
            try:
                task = make_task(context, names, current)
            except MissingDataError as error:
                waiting.update(dict.fromkeys(names, str(error).splitlines()[0]))
                continue
            same = [name for name in names if name in known and known[name].key == task.keys[name]]
            current.update({name: known[name] for name in same})
            if len(same) < len(names):
                tasks.append(only(task, [name for name in names if name not in same]))


def _derive(specs: Mapping[str, DirectionSpec], known: Mapping[str, Direction], current: dict[str, Direction]) -> None:
    """Add every derived direction whose parents are current; one with the same key as before is taken as it is."""
    progressed = True
    while progressed:
        progressed = False
        for name, spec in specs.items():
            if name in current or not isinstance(spec, Derived):
                continue
            needed = {other for _, other in references(spec)}
            if needed <= set(current):
                parents = {other: current[other] for other in needed}
                same = name in known and known[name].key == derived_key(spec, parents)
                current[name] = known[name] if same else derive(name, spec, parents)
                progressed = True


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Compute the directions that are new or whose inputs changed."""
    specs = context.study.directions
    report = StageReport("directions", unit="directions")
    if not specs:
        return report
    before = known_directions(context)
    known = dict(before)
    current, tasks, waiting = current_directions(context, known)
    missing: dict[str, str] = {}
    while tasks:  # some become ready with what others compute
        with progress.task("directions", len(tasks), "directions") as advance:
            for task, result in zip(tasks, cpu_map(cluster, compute, tasks), strict=True):
                if isinstance(result, str):
                    missing.update(dict.fromkeys(task.keys, result))
                else:
                    known.update(result)
                advance(1)
        current, tasks, waiting = current_directions(context, known)
        tasks = [task for task in tasks if set(task.keys).isdisjoint(missing)]
    waiting = {**waiting, **{name: why for name, why in missing.items() if name not in current}}
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
