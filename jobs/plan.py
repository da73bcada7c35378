"""``resid plan``: what each stage of a study would do, without loading weights or starting Ray."""

from __future__ import annotations

import argparse

from jobs.capture import CaptureInputs, manifest
from jobs.context import Context
from jobs.directions import current_directions
from jobs.geometry import pending_projections
from jobs.geometry_units import wanted_units
from jobs.replay import ReplayPlan
from jobs.score import study_judges, unscored
from jobs.stage import study_from
from store.conditions import expand_sweeps
from store.errors import MissingDataError


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of a study."""
    study = study_from(arguments)
    context = Context(study)
    for line in plan_lines(context):
        print(line)
    return 0


def plan_lines(context: Context) -> list[str]:
    """Return the plan, a line per fact; nothing is written."""
    study, identity = context.study, context.identity
    study_judges(context)
    lines = [
        f"study {study.name}: {study.model.source}, {identity.n_layers} layers, d_model {identity.d_model}, "
        f"{identity.dtype}, fingerprint {identity.fingerprint[:16]}",
        f"store {context.store.location}; results {context.results.location}",
    ]
    for name, prompts in context.prompt_sets.items():
        repeated = f" ({prompts.duplicates} repeated rows dropped)" if prompts.duplicates else ""
        lines.append(f"  prompts {name}: {len(prompts.prompts)}{repeated}")
    inputs = CaptureInputs(context)
    work = context.store.preview(manifest(context)).work(inputs.requests, study.block_rows, study.compression)
    lines.append(
        f"capture: {work.rows_to_capture} rows to capture ({_bytes(work.bytes_to_write)} new), "
        f"{work.cached_rows} of {work.requested_rows} cached"
    )
    lines += [f"  waits: {line}" for line in inputs.waiting]
    lines += _directions(context)
    lines += _replay(context, inputs)
    return lines


def _directions(context: Context) -> list[str]:
    total = len(context.study.directions)
    try:
        current, _, waiting = current_directions(context)
    except MissingDataError:
        return [f"directions: {total} to compute once the capture is done", "geometry: after the directions"]
    lines = [f"directions: {total - len(current) - len(waiting)} to compute, {len(current)} found"]
    lines += [f"  waits: direction {name!r}: {why}" for name, why in waiting.items()]
    try:
        groups, found, later = pending_projections(context, current)
    except MissingDataError as error:
        return [*lines, f"geometry: waits: {str(error).splitlines()[0]}"]
    units, blocked = wanted_units(context, current)
    committed = {table: context.results.committed(table) for table in {unit.table for _, unit in units}}
    done = sum(unit.id in committed[unit.table] for _, unit in units)
    todo = sum(map(len, groups)) + len(units) - done
    lines.append(f"geometry: {todo} blocks to compute, {found + done} found")
    later += blocked
    return lines + [f"  waits: {line}" for line in later]


def _replay(context: Context, inputs: CaptureInputs) -> list[str]:
    replay = context.study.replay
    if replay is None:
        return ["replay: nothing is asked for"]
    plan = ReplayPlan(context, inputs)
    groups, found = plan.blocks()
    todo = sum(len(block.items) for _, blocks in groups for block in blocks)
    total = 0
    lines = []
    for name, _, _, spec in expand_sweeps(replay):
        prompts = {prompt.id for _, prompt in context.prompts_of(spec.prompts or replay.prompts)}
        total += len(prompts) * len(replay.seeds)
        lines.append(f"  condition {name}: {len(prompts)} prompts x {len(replay.seeds)} seed(s)")
    later = total - todo - found
    head = f"replay: {todo} generations to make now, {found} found"
    if later > 0:
        head += f", {later} once their directions are computed"
    lines.insert(0, f"{head}; at most {replay.decoding.max_new_tokens} tokens each")
    lines += [f"  waits: {line}" for line in plan.waiting]
    asked, scored = unscored(context, study_judges(context))
    pending = sum(map(len, asked.values())) + (total - found) * len(context.study.judges)
    lines.append(f"score: {pending} scores to make, {scored} found")
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
