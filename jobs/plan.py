"""``resid plan``: what each stage of a study would do, without loading weights or starting Ray.

What is planned is what `resid run` then does, to the row. Only what depends on texts or choices that do not exist yet
cannot be known: it is counted apart, as "later".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field

from jobs.asked import Wanted
from jobs.capture import CaptureInputs, manifest
from jobs.compare import comparison_key, known_keys, planned
from jobs.context import Context
from jobs.failures import Failure
from jobs.geometry import pending_projections
from jobs.geometry_units import wanted_units
from jobs.judging import study_judges
from jobs.model_checks import model_notes
from jobs.outcomes import Outcomes
from jobs.prompt_notes import set_lines
from jobs.replay import ReplayPlan
from jobs.stage import STAGES, study_from
from store.conditions import decoding_of, directions_used, seeds_of
from store.errors import MissingDataError
from store.model_store import CaptureWork
from store.planned import PlannedStore
from store.sizes import spell_bytes
from store.study_expand import expand_conditions
from store.study_traits import parse_trait_set


@dataclass
class StagePlan:
    """What one stage will do in a run."""

    stage: str
    make: int = 0  # what is certain to be made
    cached: int = 0  # what is there
    later: int = 0  # what may follow at most, once what it depends on is known
    open: bool = False  # whether still more may follow, and it cannot be said how much
    lines: list[str] = field(default_factory=list)

    def more(self) -> str:
        """Say what may follow."""
        parts = [f", up to {self.later} more once what they depend on is there"] if self.later else []
        parts += [", and more that cannot be counted yet" if parts else ", more that cannot be counted yet"] * self.open
        return "".join(parts)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of a study."""
    study = study_from(arguments)
    context = Context(study, only_planning=True)
    for line in plan_lines(context):
        print(line)
    return 0


def plan_lines(context: Context) -> list[str]:
    """Return the plan, a line per fact; nothing is written."""
    return Planner(context).lines()


def plan_stages(context: Context) -> dict[str, StagePlan]:
    """Return the plan in numbers, by stage; nothing is written."""
    return Planner(context).stages


class Planner:
    """Works out what every stage will do: what it makes next, and what that makes possible."""

    def __init__(self, context: Context):
        self.context = context
        self.judges = study_judges(context.study)
        self.inputs = CaptureInputs(context)
        self.stages = {stage: StagePlan(stage) for stage in STAGES}
        self.store = context.store.preview(manifest(context))
        self.work: CaptureWork = self.store.work(
            self.inputs.requests, context.study.block_rows, context.study.compression
        )
        self._capture()
        self._directions()
        self._geometry()
        if context.study.replay is not None:
            self.plan = ReplayPlan(context, self.inputs, predict=True)
            self._replay()
            self._score()
            self._compare()

    def lines(self) -> list[str]:
        """Return the plan as text."""
        context, stages = self.context, self.stages
        study, identity = context.study, context.identity
        lines = [
            f"study {study.name}: {study.model.source}, {identity.n_layers} layers, d_model {identity.d_model}, "
            f"{identity.dtype}, fingerprint {identity.fingerprint[:16]}",
            *([] if identity.weights_here else ["the weights are not on this machine: everything counts as new"]),
            f"store {context.store.location}; results {context.results.location}",
            *([clock] if (clock := context.clock_line()) else []),
        ]
        lines += [f"  {line}" for line in (*set_lines(context), *model_notes(context))]
        lines += _kept(context)
        heads = {
            "capture": f"{self.work.rows_to_capture} rows to capture ({spell_bytes(self.work.bytes_to_write)} new), "
            f"{self.work.cached_rows} of {self.work.requested_rows} cached",
            "directions": f"{stages['directions'].make} to compute, {stages['directions'].cached} found",
            "geometry": f"{stages['geometry'].make} blocks to compute, {stages['geometry'].cached} found",
            "replay": f"{stages['replay'].make} generations to make, {stages['replay'].cached} found",
            "score": f"{stages['score'].make} scores to make, {stages['score'].cached} found",
            "compare": f"{stages['compare'].make} comparisons to make, {stages['compare'].cached} found",
        }
        for stage, plan in stages.items():
            head = f"{stage}: {heads[stage]}{plan.more()}"
            if stage in ("replay", "score", "compare") and study.replay is None:
                if stage == "replay":
                    lines.append("replay: nothing is asked for")
                continue
            if stage == "replay":
                assert study.replay is not None
                most = max(decoding_of(study.replay, spec).max_new_tokens for spec in study.replay.conditions.values())
                head += f"; at most {most} tokens each"
            if stage == "compare" and not study.comparisons:
                continue
            lines += [head, *plan.lines]
        return lines

    def _capture(self) -> None:
        plan = self.stages["capture"]
        plan.make, plan.cached = self.work.rows_to_capture, self.work.cached_rows
        plan.lines = [f"  waits: {line}" for line in self.inputs.waiting]
        for entry in self.inputs.pending:
            if any(name in self.context.pending_sets for name in entry.prompts) or entry.responses is None:
                plan.open = True
                continue
            feed = self.context.feed(entry.responses)
            seeds = 1 if feed.spec is None else len(seeds_of(feed.replay, feed.spec))
            plan.later += seeds * len({prompt.id for _, prompt in self.context.prompts_of(entry.prompts)})

    def _directions(self) -> None:
        plan, states = self.stages["directions"], self.context.directions
        for name, state in states.all().items():
            predicted = states.predicted([name]).get(name)
            if predicted is None:
                plan.lines.append(f"  set aside: {Failure.of('direction', name, None, state.why)}")
                plan.make += state.status == "ready"
            elif state.status == "done" or states.by_key(predicted.key) is not None:
                plan.cached += 1
            elif states.uncertain(name):
                plan.later += 1
            else:
                plan.make += 1
            if state.status == "waits" or state.stale:
                how = "waits" if state.status == "waits" else "again"
                plan.lines.append(f"  {how}: direction {name!r}: {state.why}")

    def _geometry(self) -> None:
        context, plan, states = self.context, self.stages["geometry"], self.context.directions
        if not context.study.directions:
            return
        directions = states.predicted()
        certain = {name: one for name, one in directions.items() if not states.uncertain(name)}
        groups, plan.cached, _waiting = pending_projections(context, certain, PlannedStore(self.store, self.work))
        plan.make = sum(map(len, groups))
        more, _, blocked = pending_projections(context, directions, PlannedStore(self.store, self.work))
        plan.later = sum(map(len, more)) - plan.make
        units, unknown = wanted_units(context, directions)
        committed = {table: context.results.committed(table) for table in {unit.table for _, unit in units}}
        done = sum(unit.id in committed[unit.table] for _, unit in units)
        plan.cached += done
        if len(certain) == len(directions):
            plan.make += len(units) - done
        else:
            plan.later += len(units) - done
        plan.open = bool(blocked or unknown)
        plan.lines = [f"  waits: {line}" for line in dict.fromkeys([*blocked, *unknown])]

    def _uncertain(self, wanted: Wanted) -> bool:
        """Whether a text's key may turn out to be one that is stored: it depends on what is not known yet."""
        states = self.context.directions
        names = directions_used(wanted.condition.spec)
        monitor = self.plan.monitor_of(wanted.condition)
        names |= set(() if monitor is None else monitor.names)
        return any(states.uncertain(name) for name in names)

    def _replay(self) -> None:
        context, plan, asked = self.context, self.stages["replay"], self.plan
        replay = asked.replay
        self.wanted = asked.wanted
        todo = {item.key: item for item in self.wanted if item.key not in asked.done}
        self.certain = {key for key, item in todo.items() if not self._uncertain(item)}
        plan.make, plan.later = len(self.certain), len(todo) - len(self.certain)
        plan.cached = len({item.key for item in self.wanted}) - len(todo)
        resolved = {condition.name for condition in asked.conditions}
        for item in expand_conditions(replay):
            sets = item.spec.prompts or replay.prompts
            prompts = {prompt.id for _, prompt in context.prompts_of(sets)}
            seeds = len(seeds_of(replay, item.spec))
            plan.lines.append(f"  condition {item.name}: {len(prompts)} prompts x {seeds} seed(s)")
            plan.open |= any(name in context.pending_sets for name in sets)
            if item.name not in resolved:
                plan.later += len(prompts) * seeds
        for choice in asked.chooser.made.values():
            values = ", ".join(f"${key} = {value}" for key, value in choice.values.items())
            plan.lines.append(f"  choice {choice.name} ({choice.status}): {values}")
        current = {condition.name for condition in ReplayPlan(context, self.inputs).conditions}
        waiting = [f"condition {name!r}: its directions are not computed yet" for name in sorted(resolved - current)]
        plan.lines += [f"  waits: {line}" for line in (*waiting, *asked.waiting, *asked.chooser.waiting.values())]

    def _score(self) -> None:
        context, plan = self.context, self.stages["score"]
        scores = context.results.read("scores", columns=["generation_key", "judge", "judge_version", "error"])
        done = {
            (record["generation_key"], record["judge"], record["judge_version"])
            for record in scores.to_pylist()
            if record["error"] is None
        }
        replay = self.plan.replay
        resolved = {condition.name for condition in self.plan.conditions}
        for judge in self.judges:
            sees = [item for item in self.wanted if judge.sets is None or item.prompt_set in judge.sets]
            for key in {item.key for item in sees}:
                if (key, judge.name, judge.version) in done:
                    plan.cached += 1
                elif key in self.certain or key in self.plan.done:
                    plan.make += 1
                else:
                    plan.later += 1
            for item in expand_conditions(replay):
                if item.name not in resolved:
                    sets = [
                        one for one in item.spec.prompts or replay.prompts if judge.sets is None or one in judge.sets
                    ]
                    n = len({prompt.id for _, prompt in context.prompts_of(sets)})
                    plan.later += n * len(seeds_of(replay, item.spec))
        plan.open = self.stages["replay"].open

    def _compare(self) -> None:
        context, plan = self.context, self.stages["compare"]
        known, outcomes = known_keys(context), Outcomes(context)
        texts: dict[tuple[str, str], dict[str, list[str | None]]] = {}
        before = context.results.read("comparisons", columns=["study"], filters=[("study", "=", context.study.name)])
        older = before.num_rows > 0 and not known  # written before comparisons had keys
        unsure = {item.condition.name for item in self.wanted if self._uncertain(item)}
        for item in self.wanted:
            texts.setdefault((item.condition.name, item.prompt_set), {}).setdefault(item.prompt_id, []).append(item.key)
        for one in planned(context):
            members = (*one.first.members, *one.second.members, *one.among)
            judge = outcomes.refusal_judge(one.spec.judge, f"comparisons.{one.name}")
            if any((name, one.prompt_set) not in texts or name in unsure for name in members):
                plan.later += 1
            elif comparison_key(one, judge, outcomes, texts, predicted=True) in known or (older and not self.certain):
                plan.cached += 1
            else:
                plan.make += 1


def _kept(context: Context) -> Iterable[str]:
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
