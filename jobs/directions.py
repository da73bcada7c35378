"""Stage 2a, directions: vectors from cached activations. Never imports torch: the cache is all that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from analysis.directions import derive, derived_key
from jobs.context import Context, StageReport
from jobs.direction_states import DirectionStates, block_of, failed_parent
from jobs.direction_tasks import Task, compute_task, only
from jobs.failures import Failure, set_aside, undefined_of, write_failures
from jobs.progress import Progress
from jobs.stage import cpu_map, main_for
from pipeline.cluster import Cluster
from store.directions import Direction
from store.errors import MissingDataError, ResidError
from store.schemas import TABLES
from store.study_directions import RandomMatched, Reading


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Compute the directions that are not there yet, and make the table `directions` the current ones.

    What was computed before, also by an older version of the study, is found again by its key.
    """
    specs = context.study.directions
    report = StageReport("directions", unit="directions")
    states = context.directions
    before = states.stored
    if not specs and not before:
        return report
    context.recalled_model()  # nothing can be told without a capture of this very model
    every = states.all()
    current = states.current()
    report.cached = len(current)
    waiting = {name: state.why for name, state in every.items() if state.status == "waits"}
    lost = {name: state.why for name, state in every.items() if state.status == "failed"}
    tasks = _tasks(states)
    with progress.task("directions", len(tasks), "directions") if tasks else progress.nothing() as advance:
        for task, result in zip(tasks, cpu_map(cluster, compute, tasks), strict=True):
            if isinstance(result, CannotBe):
                lost.update(dict.fromkeys(task.keys, result.why))
            elif isinstance(result, str):
                waiting.update(dict.fromkeys(task.keys, result))
            else:
                lost.update(
                    {name: f"direction {name!r} exists at no layer" for name in task.keys if name not in result}
                )
                result = {name: _noted(states, direction, current) for name, direction in result.items()}
                keep(context, result.values())
                current.update(result)
            advance(1)
    report.cached += _derive(context, current, waiting, lost)
    for name in specs:
        if name not in current and name not in waiting and name not in lost:
            waiting[name] = "it waits for the directions that it is computed from"
    report.done = len(current) - report.cached
    report.waiting = [f"direction {name!r}: {why}" for name, why in waiting.items() if name not in current]
    _note_failures(context, current, lost, report)
    if _listing(before.values()) != _listing(current[name] for name in specs if name in current):
        keep(context, before.values())  # results of older versions of resid have them in this table alone
        write(context, current)
    return report


def _note_failures(
    context: Context, current: Mapping[str, Direction], lost: Mapping[str, str], report: StageReport
) -> None:
    """Write and report the directions, and single layers of directions, that do not exist."""
    failures = undefined_of(current)
    for name, why in lost.items():
        failures.append(Failure.of("direction", name, None, why, context.directions.of(name).key))
    write_failures(context, "directions", failures)
    report.set_aside = [str(failure) for failure in failures]


def _tasks(states: DirectionStates) -> list[Task]:
    """Return what computes the directions that are ready to be computed from rows, family by family."""
    tasks: dict[int, tuple[Task, list[str]]] = {}
    for name, state in states.all().items():
        if state.status == "ready" and state.task is not None:
            tasks.setdefault(id(state.task), (state.task, []))[1].append(name)
    return [only(task, names) for task, names in tasks.values()]


def _derive(context: Context, current: dict[str, Direction], waiting: dict[str, str], lost: dict[str, str]) -> int:
    """Add every direction that is computed from others and whose parents are current; note what lacks rows.

    Returns:
        How many of those added were computed before.
    """
    states = context.directions
    stored = 0
    progressed = True
    while progressed:
        progressed = False
        for name, spec in context.study.directions.items():
            if name in current or name in lost or isinstance(spec, Reading):
                continue
            gone = sorted(states.parents(name) & set(lost))
            if gone:
                lost[name] = failed_parent(name, gone[0])
                progressed = True
            if gone or not states.parents(name) <= set(current):
                continue
            parents = {other: current[other] for other in states.parents(name)}
            try:
                if isinstance(spec, RandomMatched):
                    found = states.matched(name, spec, parents[spec.match_energy])
                else:
                    found = states.by_key(derived_key(spec, parents)) or derive(name, spec, parents)
            except MissingDataError as error:
                waiting[name] = str(error).splitlines()[0]
                continue
            except ResidError as error:
                lost[name] = set_aside(error)
                progressed = True
                continue
            if "made_from" not in (found.provenance or {}):
                found = _noted(states, found, current)
            current[name] = replace(found, name=name)
            stored += states.by_key(found.key) is not None
            keep(context, [current[name]])
            progressed = True
    return stored


def _listing(directions: Iterable[Direction]) -> list[tuple[str, str]]:
    return [(direction.name, direction.key) for direction in directions]


def keep(context: Context, directions: Iterable[Direction]) -> None:
    """Keep vectors under their keys, for good; those that are kept already stay as they are."""
    for direction in directions:
        table = direction.to_table(context.study.name)
        context.results.write_block("computed_directions", block_of(direction.key), table)


def _noted(states: DirectionStates, direction: Direction, current: Mapping[str, Direction]) -> Direction:
    """Return a direction with what it was computed from in its provenance, for a later edit to say what changed."""
    made_from = states.made_from(direction.name, current)
    return replace(direction, provenance={**(direction.provenance or {}), "made_from": made_from})


@dataclass(frozen=True)
class CannotBe:
    """Why directions of a task cannot be computed from their rows."""

    why: str


def compute(task: Task) -> dict[str, Direction] | str | CannotBe:
    """Compute directions on a worker; say what is missing, or why they do not exist, instead of failing the others."""
    try:
        return compute_task(task)
    except MissingDataError as error:
        return str(error).splitlines()[0]
    except ResidError as error:
        return CannotBe(set_aside(error))


def write(context: Context, directions: Mapping[str, Direction]) -> None:
    """Replace the study's directions, in the study's order."""
    tables = [directions[name].to_table(context.study.name) for name in context.study.directions if name in directions]
    context.results.replace(
        "directions", context.study.name, pa.concat_tables([TABLES["directions"].empty_table(), *tables])
    )


if __name__ == "__main__":
    main_for("directions")
