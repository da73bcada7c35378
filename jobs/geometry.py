"""Stage 2b, geometry: cosines of directions and projections of cached rows, as Parquet. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pyarrow as pa

from analysis.geometry import ProjectionBlock, cosines_table, projection_blocks, projections
from jobs.context import Context, StageReport
from jobs.directions import known_directions
from jobs.progress import Progress
from jobs.stage import cpu_map, main_for
from pipeline.cluster import Cluster
from store.directions import Direction
from store.errors import MissingDataError


def pending_projections(
    context: Context, directions: dict[str, Direction]
) -> tuple[list[list[ProjectionBlock]], int, list[str]]:
    """Return projection blocks to compute, grouped by the store block they read; how many are there; what waits."""
    committed = context.results.committed("projections")
    blocks: dict[str, ProjectionBlock] = {}
    waiting: list[str] = []
    model = context.recalled_model().fingerprint
    for index, spec in enumerate(context.study.geometry.projections):
        named = list(context.study.directions) if spec.directions == "all" else spec.directions
        ready = [directions[name] for name in named if name in directions]
        if len(ready) < len(named):
            missing = ", ".join(name for name in named if name not in directions)
            waiting.append(f"geometry.projections[{index}]: no directions {missing} yet")
        for component in sorted({direction.component for direction in ready}):
            mine = [direction for direction in ready if direction.component == component]
            try:
                keys = context.row_keys(spec.prompts, spec.responses, spec.keep)
                selection = context.store.model(model).select(keys, component, spec.position)
            except MissingDataError as error:
                waiting.append(f"geometry.projections[{index}]: {str(error).splitlines()[0]}")
                continue
            blocks.update({block.id: block for block in projection_blocks(selection, mine)})
    todo = [block for block in blocks.values() if block.id not in committed]
    groups = [list(group) for _, group in groupby(todo, key=lambda block: id(block.part))]
    return groups, len(blocks) - len(todo), waiting


def compute(group: Sequence[ProjectionBlock]) -> dict[str, pa.Table]:
    """Project one store block on a worker."""
    return dict(projections(group))


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Compute cosines anew (they take no time) and the projections that are missing."""
    report = StageReport("geometry", unit="projection blocks")
    directions = known_directions(context)
    if not directions:
        return report
    chosen = context.study.geometry.cosines
    named = [directions[name] for name in (directions if chosen == "all" else chosen) if name in directions]
    context.results.replace("cosines", context.study.name, cosines_table(context.study.name, named))
    groups, report.cached, report.waiting = pending_projections(context, directions)
    if not groups:
        return report
    with progress.task("projections", len(groups), "store blocks") as advance:
        for tables in cpu_map(cluster, compute, groups):
            for block_id, table in tables.items():
                context.results.write_block("projections", block_id, table)
                report.done += 1
            advance(1)
    return report


if __name__ == "__main__":
    main_for("geometry")
