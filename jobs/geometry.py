"""Stage 2b, geometry: cosines, alignments, projections and analyses of directions, as Parquet. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import pyarrow as pa

from analysis.geometry import ProjectionBlock, alignments_table, cosines_table, projection_blocks, projections
from jobs.context import Context, StageReport, table_of
from jobs.geometry_units import GeometryUnit, wanted_units
from jobs.progress import Progress
from jobs.stage import cpu_map, main_for
from pipeline.cluster import Cluster
from store.directions import Direction
from store.errors import MissingDataError
from store.model_store import ModelStore


def pending_projections(
    context: Context, directions: dict[str, Direction], store: ModelStore | None = None
) -> tuple[list[list[ProjectionBlock]], int, list[str]]:
    """Return projection blocks to compute, grouped by the store block they read; how many are there; what waits.

    `store` is where the rows are looked up: the model's store as it is, or as it will be.
    """
    committed = context.results.committed("projections")
    blocks: dict[str, ProjectionBlock] = {}
    waiting: list[str] = []
    model = context.recalled_model().fingerprint
    for index, spec in enumerate(context.study.geometry.projections):
        named = list(context.study.directions) if spec.directions == "all" else spec.directions
        ready = [directions[name] for name in named if name in directions]
        missing = ", ".join(_missing(context, named, directions))
        if missing:
            waiting.append(f"geometry.projections[{index}]: no directions {missing} yet")
        for component in sorted({direction.component for direction in ready}):
            mine = [direction for direction in ready if direction.component == component]
            try:
                keys = context.row_keys(spec.prompts, spec.responses, spec.keep)
                selection = (store or context.store.model(model)).select(keys, component, spec.position)
            except MissingDataError as error:
                waiting.append(f"geometry.projections[{index}]: {str(error).splitlines()[0]}")
                continue
            blocks.update({block.id: block for block in projection_blocks(selection, mine)})
    todo = [block for block in blocks.values() if block.id not in committed]
    groups = [list(group) for _, group in groupby(todo, key=lambda block: id(block.part))]
    return groups, len(blocks) - len(todo), waiting


def _missing(context: Context, names: Iterable[str], directions: Mapping[str, Direction]) -> list[str]:
    """Return the directions that are not there yet, without those that cannot be computed."""
    lacking = [name for name in dict.fromkeys(names) if name not in directions]
    failed = context.directions.failed(lacking)
    return [name for name in lacking if name not in failed]


def compute(group: Sequence[ProjectionBlock]) -> dict[str, pa.Table]:
    """Project one store block on a worker."""
    return dict(projections(group))


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Compute cosines anew (they take no time) and the projections that are missing."""
    report = StageReport("geometry", unit="blocks")
    if not context.study.directions and not context.directions.stored:
        return report
    context.recalled_model()
    directions = context.directions.current()
    chosen = context.study.geometry.cosines
    named = [directions[name] for name in (directions if chosen == "all" else chosen) if name in directions]
    context.results.replace("cosines", context.study.name, cosines_table(context.study.name, named))
    pairs = [item.pair for item in context.study.geometry.alignment]
    ready = [(directions[a], directions[b]) for a, b in pairs if a in directions and b in directions]
    context.results.replace("alignments", context.study.name, alignments_table(context.study.name, ready))
    groups, report.cached, report.waiting = pending_projections(context, directions)
    for pair in pairs:
        if missing := _missing(context, pair, directions):
            report.waiting.append(f"geometry.alignment: no directions {', '.join(missing)} yet")
    _run_units(context, directions, cluster, progress, report)
    if not groups:
        return report
    with progress.task("projections", len(groups), "store blocks") as advance:
        for tables in cpu_map(cluster, compute, groups):
            for block_id, table in tables.items():
                context.results.write_block("projections", block_id, table)
                report.done += 1
            advance(1)
    return report


def _run_units(
    context: Context, directions: dict[str, Direction], cluster: Cluster, progress: Progress, report: StageReport
) -> None:
    """Compute what analyses lack, then say which blocks the study asks for now."""
    units, waiting = wanted_units(context, directions)
    report.waiting += waiting
    committed = {table: context.results.committed(table) for table in sorted({unit.table for _, unit in units})}
    todo = [unit for _, unit in units if unit.id not in committed[unit.table]]
    report.cached += len(units) - len(todo)
    lacking: set[str] = set()
    with progress.task("analyses", len(todo), "layers") if todo else progress.nothing() as advance:
        for unit, table in zip(todo, cpu_map(cluster, compute_unit, todo), strict=True):
            if isinstance(table, str):
                report.waiting.append(f"geometry.{unit.table}: {table}")
                lacking.add(unit.id)
            else:
                context.results.write_block(unit.table, unit.id, table)
                report.done += 1
            advance(1)
    model = context.recalled_model().fingerprint
    asked = [
        {"study": context.study.name, "model": model, "kind": unit.table, "analysis": name, "block_key": unit.id}
        for name, unit in units
        if unit.id not in lacking
    ]
    context.results.replace("analyses", context.study.name, table_of("analyses", asked))


def compute_unit(unit: GeometryUnit) -> pa.Table | str:
    """Compute one layer of an analysis on a worker; say what is missing instead of failing the others."""
    try:
        return unit.compute()
    except MissingDataError as error:
        return str(error).splitlines()[0]


if __name__ == "__main__":
    main_for("geometry")
