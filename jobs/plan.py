"""``resid plan``: what each stage of a study would do, without loading weights or starting Ray."""

from __future__ import annotations

import argparse

from jobs.capture import CaptureInputs, manifest
from jobs.context import Context
from jobs.directions import current_directions
from jobs.geometry import pending_projections
from jobs.geometry_units import wanted_units
from jobs.judging import StudyJudge, study_judges
from jobs.prompt_notes import set_lines
from jobs.replay import ReplayPlan
from jobs.score import unscored
from jobs.stage import study_from
from store.conditions import decoding_of, seeds_of
from store.errors import MissingDataError
from store.sizes import spell_bytes
from store.study_expand import expand_conditions
from store.study_traits import parse_trait_set


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of a study."""
    study = study_from(arguments)
    context = Context(study, only_planning=True)
    for line in plan_lines(context):
        print(line)
    return 0


def plan_lines(context: Context) -> list[str]:
    """Return the plan, a line per fact; nothing is written."""
    study, identity = context.study, context.identity
    study_judges(study)
    lines = [
        f"study {study.name}: {study.model.source}, {identity.n_layers} layers, d_model {identity.d_model}, "
        f"{identity.dtype}, fingerprint {identity.fingerprint[:16]}",
        *([] if identity.weights_here else ["the weights are not on this machine: everything counts as new"]),
        f"store {context.store.location}; results {context.results.location}",
        *([clock] if (clock := context.clock_line()) else []),
    ]
    lines += [f"  {line}" for line in set_lines(context)]
    lines += _kept(context)
    inputs = CaptureInputs(context)
    work = context.store.preview(manifest(context)).work(inputs.requests, study.block_rows, study.compression)
    lines.append(
        f"capture: {work.rows_to_capture} rows to capture ({spell_bytes(work.bytes_to_write)} new), "
        f"{work.cached_rows} of {work.requested_rows} cached"
    )
    lines += [f"  waits: {line}" for line in inputs.waiting]
    lines += _directions(context)
    lines += _replay(context, inputs)
    return lines


def _kept(context: Context) -> list[str]:
    """Return a line per side of which only the answers that count are captured."""
    pairs = {
        (name, entry.responses)
        for entry in context.study.capture
        if entry.keep and entry.responses
        for name in entry.prompts
    }
    lines = []
    for name, condition in sorted(pairs):
        part = parse_trait_set(name)
        if part is None or part.family == "user":
            continue
        try:
            counts = context.answers.kept(part.trait, part.side, condition).counts
            what = f"{counts.kept} of {counts.distinct} count ({counts.by_trait} fail by trait score, "
            what += f"{counts.by_coherence} by coherence, {counts.empty} empty, {counts.failed} unscored)"
        except MissingDataError as error:
            what = f"waits: {str(error).splitlines()[0]}"
        lines.append(f"  answers to {name} under {condition}: {what}")
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
    todo = sum(len(block.items) for _, _, blocks in groups for block in blocks)
    total = 0
    lines = []
    for item in expand_conditions(replay):
        prompts = {prompt.id for _, prompt in context.prompts_of(item.spec.prompts or replay.prompts)}
        seeds = len(seeds_of(replay, item.spec))
        total += len(prompts) * seeds
        lines.append(f"  condition {item.name}: {len(prompts)} prompts x {seeds} seed(s)")
    later = total - todo - found
    head = f"replay: {todo} generations to make now, {found} found"
    if later > 0:
        head += f", {later} once what they use is computed or chosen"
    most = max(decoding_of(replay, spec).max_new_tokens for spec in replay.conditions.values())
    lines.insert(0, f"{head}; at most {most} tokens each")
    for choice in plan.chooser.made.values():
        values = ", ".join(f"${key} = {value}" for key, value in choice.values.items())
        lines.append(f"  choice {choice.name} ({choice.status}): {values}")
    lines += [f"  waits: {line}" for line in (*plan.waiting, *plan.chooser.waiting.values())]
    judges = study_judges(context.study)
    asked, scored = unscored(context, judges)
    pending = sum(len(texts) for _, texts in asked) + sum(_later_scores(plan, judge) for judge in judges)
    lines.append(f"score: {pending} scores to make, {scored} found")
    return lines


def _later_scores(plan: ReplayPlan, judge: StudyJudge) -> int:
    """Return how many texts a judge will score that are not generated yet."""

    def sees(name: str) -> bool:
        return judge.sets is None or name in judge.sets

    context, replay = plan.context, plan.replay
    every = sum(
        len(context.prompts_of([name])) * len(seeds_of(replay, item.spec))
        for item in expand_conditions(replay)
        for name in item.spec.prompts or replay.prompts
        if sees(name)
    )
    wanted = [item.key for item in plan.wanted if sees(item.prompt_set)]
    return every - len(wanted) + len(set(wanted) - plan.done)
