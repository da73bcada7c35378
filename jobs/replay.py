"""Stage 3, replay: generate text for every prompt under every condition, and commit what is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jobs.choices import Chooser
from jobs.context import Context, StageReport, block_id, table_of, versions
from jobs.directions import known_directions
from jobs.progress import Progress
from jobs.stage import main_for
from pipeline.cluster import Cluster
from store.conditions import (
    Condition,
    MonitorPlan,
    check_token_ranges,
    decoding_key,
    decoding_of,
    generation_key,
    interventions_text,
    resolve_conditions,
    resolve_monitor,
    seeds_of,
)
from store.directions import Direction
from store.errors import MissingDataError, StudyError
from store.fingerprint import canonical_json
from store.rows import Row
from store.study import Decoding
from store.study_choices import with_choices
from store.yaml_file import where

if TYPE_CHECKING:
    from jobs.capture import CaptureInputs
    from pipeline.workers import ReplayBlock, ReplayItem


@dataclass(frozen=True)
class Wanted:
    """One text that the study asks for."""

    prompt_set: str
    prompt_id: str
    row: Row
    condition: Condition
    seed: int
    key: str


class ReplayPlan:
    """What a study's replay section asks for, with the directions that are there."""

    def __init__(self, context: Context, inputs: CaptureInputs | None = None):
        from jobs.capture import CaptureInputs

        study = context.study
        assert study.replay is not None
        self.context, self.replay = context, study.replay
        self.inputs = inputs if inputs is not None else CaptureInputs(context)
        try:
            self.directions: dict[str, Direction] = known_directions(context)
        except MissingDataError:
            self.directions = {}
        identity = context.identity
        monitor = self.replay.monitor
        self.monitor: MonitorPlan | None = resolve_monitor(monitor, self.directions, identity.n_layers)
        # A condition without interventions may be what directions are made from: it cannot wait for what is monitored.
        self.monitor_waits = monitor is not None and self.monitor is None
        self.chooser = Chooser(context, self.texts)
        self._resolve()
        while not self.monitor_waits and self.chooser.advance(self.conditions):
            self._resolve()

    def _resolve(self) -> None:
        """Resolve the conditions that can be, with the choices made so far; say what the others wait for."""
        identity = self.context.identity
        ready, open_ = with_choices(self.replay, self.chooser.values)
        self.conditions, later = resolve_conditions(
            ready, self.directions, identity.n_layers, identity.fingerprint, self.context.study.file
        )
        self.waiting = [f"condition {name!r}: its directions are not computed yet" for name in later]
        for name, choices in open_.items():
            self.waiting.append(f"condition {name!r}: {', '.join(map(repr, sorted(choices)))} is not chosen yet")

    def monitor_of(self, condition: Condition) -> MonitorPlan | None:
        """Return what is recorded under a condition: nothing where its texts feed the capture of responses."""
        monitor = self.replay.monitor
        only = None if monitor is None else monitor.conditions
        unwatched = only is not None and not {condition.name, condition.name.partition("[")[0]} & set(only)
        return None if condition.name in self.feeds or unwatched else self.monitor

    @cached_property
    def feeds(self) -> set[str | None]:
        """The conditions whose texts are captured, or are user personas' turns."""
        study = self.context.study
        return {entry.responses for entry in study.capture} | {trait.answers for trait in study.traits.values()}

    def decoding_key(self, condition: Condition) -> str:
        decoding = decoding_of(self.replay, condition.spec)
        return decoding_key(decoding, self.monitor_of(condition), self.replay.engine)

    @cached_property
    def wanted(self) -> list[Wanted]:
        """Every text of every condition whose inputs are there, in the study's order."""
        found: list[Wanted] = []
        for condition in self.conditions:
            if self.monitor_waits and condition.name not in self.feeds:
                self.waiting.append(f"condition {condition.name!r}: the monitored directions are not computed yet")
                continue
            for name in condition.prompts:
                if name in self.context.pending_sets:
                    why = f"the prompt set {name!r}: {self.context.pending_sets[name]}"
                    self.waiting.append(f"condition {condition.name!r}: {why}")
            found.extend(self.texts(condition))
        return found

    def texts(self, condition: Condition) -> Iterator[Wanted]:
        """Yield every text of one condition whose prompt set can be made now."""
        how = self.decoding_key(condition)
        for name, prompt in self.context.prompts_of(condition.prompts):
            row = self.inputs.prompt_row(prompt.id, with_response=False)
            self._check_ranges(condition, row)
            for seed in seeds_of(self.replay, condition.spec):
                key = generation_key(row.model, row.key, condition.key, how, seed)
                yield Wanted(name, prompt.id, row, condition, seed, key)

    def _check_ranges(self, condition: Condition, row: Row) -> None:
        """Refuse ranges of tokens that a prompt does not have, before a model is loaded."""
        try:
            check_token_ranges(condition, row)
        except ValueError as error:
            key = f"replay.conditions.{condition.base}.interventions"
            remedy = "choose a range that every prompt has, or replay other `prompts` under this condition"
            file = where(self.context.study.file, key)
            raise StudyError(str(error), file=file, key=key, remedy=remedy) from None

    def write_tables(self) -> None:
        """Write the study's conditions and the texts that it asks for, replacing what it wrote before."""
        study, model = self.context.study.name, self.context.identity.fingerprint
        conditions = [
            {
                "study": study,
                "model": model,
                "condition": condition.name,
                "base_condition": condition.base,
                "condition_key": condition.key,
                "control_of": condition.control_of,
                "interventions": interventions_text(condition.spec),
                "coefficient": condition.coefficient,
                "decoding_key": self.decoding_key(condition),
                "decoding": canonical_json(decoding_of(self.replay, condition.spec)),
            }
            for condition in self.conditions
        ]
        asked = [
            {
                "study": study,
                "condition": item.condition.name,
                "condition_key": item.condition.key,
                "decoding_key": self.decoding_key(item.condition),
                "model": model,
                "row_key": item.row.key,
                "prompt_set": item.prompt_set,
                "prompt_id": item.prompt_id,
                "seed": item.seed,
            }
            for item in self.wanted
        ]
        results = self.context.results
        self.chooser.write()
        results.replace("conditions", study, table_of("conditions", conditions))
        results.replace("replay_rows", study, table_of("replay_rows", asked))

    @cached_property
    def done(self) -> set[str]:
        """The generations that are committed."""
        table = self.context.results.read("generations", columns=["generation_key"])
        return set(table.column("generation_key").to_pylist())

    def blocks(self) -> tuple[list[tuple[MonitorPlan | None, Decoding, list[ReplayBlock]]], int]:
        """Return the blocks of texts that are not committed yet, by what is monitored and how they are decoded, and how
        many texts are there."""
        from pipeline.workers import ReplayBlock, ReplayItem

        done = self.done
        todo: dict[str, ReplayItem] = {}
        kinds: dict[str, tuple[MonitorPlan | None, Decoding, set[str]]] = {}
        asked = set()
        for item in self.wanted:
            asked.add(item.key)
            if item.key not in done:
                todo[item.key] = ReplayItem(item.row, item.condition.key, item.seed, item.key)
                how = (self.monitor_of(item.condition), decoding_of(self.replay, item.condition.spec))
                kinds.setdefault(self.decoding_key(item.condition), (*how, set()))[2].add(item.key)
        groups = []
        for monitor, decoding, keys in sorted(kinds.values(), key=lambda kind: kind[0] is not None):
            # Conditions of a prompt stay together: they share its prefill shape, and a block holds comparable rows.
            chosen = sorted((todo[key] for key in keys), key=lambda i: (len(i.row.token_ids), i.row.key, i.key))
            size = self.replay.block_rows
            cut = [tuple(chosen[start : start + size]) for start in range(0, len(chosen), size)]
            if cut:
                groups.append(
                    (monitor, decoding, [ReplayBlock(block_id(i.key for i in items), items) for items in cut])
                )
        return groups, len(asked) - len(todo)


def generated_responses(context: Context, condition: str, inputs: CaptureInputs) -> dict[str, list[Row]]:
    """Return prompt id -> rows of prompt and generated response, one per seed, for prompts with all of them there."""
    from pipeline.chat import response_row

    plan = ReplayPlan(context, inputs)
    found: dict[str, list[Row]] = {}
    chosen = next((item for item in plan.conditions if item.name == condition), None)
    if chosen is None:
        return found
    texts = list(plan.texts(chosen))
    wanted = {item.key for item in texts}
    table = context.results.read(
        "generations", columns=["generation_key", "token_ids"], filters=[("condition_key", "=", chosen.key)]
    )
    tokens = {record["generation_key"]: record["token_ids"] for record in table.to_pylist()}
    tokens = {key: value for key, value in tokens.items() if key in wanted}
    incomplete = {item.prompt_id for item in texts if item.key not in tokens}
    for item in texts:
        if item.prompt_id not in incomplete:
            row = response_row(item.row, tokens[item.key], item.key)
            rows = found.setdefault(item.prompt_id, [])
            if row.key not in {other.key for other in rows}:
                rows.append(row)
    return found


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Generate what is missing."""
    report = StageReport("replay", unit="generations")
    if context.study.replay is None:
        return report
    context.remember_model()
    plan = ReplayPlan(context)
    plan.write_tables()
    groups, report.cached = plan.blocks()
    report.waiting = [*plan.waiting, *plan.chooser.waiting.values()]
    from pipeline.workers import ReplayWorker, release_engine

    for monitor, decoding, blocks in groups:
        kwargs = {
            "results": str(context.results.location),
            "ref": context.study.model,
            "fingerprint": context.identity.fingerprint,
            "conditions": {condition.key: condition for condition in plan.conditions},
            "decoding": decoding,
            "monitor": monitor,
            "batch_rows": plan.replay.batch_rows,
            "study": context.study.name,
            "decoding_key": decoding_key(decoding, monitor, plan.replay.engine),
            "provenance": {"study": context.study.name, "versions": versions()},
            "engine": plan.replay.engine,
        }
        total = sum(len(block.items) for block in blocks)
        with progress.task("replay", total, "generations") as advance:
            outcome = cluster.run_blocks(ReplayWorker, kwargs, blocks, on_done=_advancing(advance))
        failed = {failure.block_id for failure in outcome.failed}
        report.done += sum(len(block.items) for block in blocks if block.id not in failed)
        report.failed += [f"block {failure.block_id}: {failure.cause}" for failure in outcome.failed]
    release_engine(plan.replay.engine)
    return report


def _advancing(advance: Callable[[int], None]) -> Callable[[Any, Any], None]:
    return lambda block, result: advance(result["rows"])


if __name__ == "__main__":
    main_for("replay")
