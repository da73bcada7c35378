"""Stage 3, replay: generate text for every prompt under every condition, and commit what is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.asked import AskedTexts, Wanted
from jobs.context import Context, StageReport, block_id, table_of, versions
from jobs.failures import Failure, write_failures
from jobs.model_checks import check_length
from jobs.progress import Progress
from jobs.stage import main_for
from pipeline.cluster import Cluster
from store.conditions import (
    Condition,
    MonitorPlan,
    check_token_ranges,
    decoding_key,
    decoding_of,
    interventions_text,
    needs_parts,
)
from store.errors import StudyError
from store.fingerprint import canonical_json
from store.prompts import Prompt
from store.rows import Row
from store.study import Decoding
from store.yaml_file import where

if TYPE_CHECKING:
    from jobs.capture import CaptureInputs
    from pipeline.workers import ReplayBlock, ReplayItem


class ReplayPlan(AskedTexts):
    """What a study's replay section asks for, with the directions that are there, and its rows rendered."""

    def __init__(self, context: Context, inputs: CaptureInputs | None = None, predict: bool = False):
        from jobs.capture import CaptureInputs

        self.inputs = inputs if inputs is not None else CaptureInputs(context)
        super().__init__(context, predict=predict)

    def row(self, item: Wanted) -> Row:
        """Return the rendered prompt of a text."""
        return self._row(item.condition, self.context.prompts_by_id[item.prompt_id])

    def _row(self, condition: Condition, prompt: Prompt) -> Row:
        """Return a rendered prompt; where the condition names parts of it, with where they lie."""
        row = self.inputs.render(prompt, with_response=False)
        if not needs_parts(condition):
            return row
        from pipeline.parts import parts_of

        return replace(row, parts=parts_of(prompt, self.context.tokenizer, self.context.chat_model))

    def row_key(self, condition: Condition, prompt: Prompt) -> str:
        row = self._row(condition, prompt)
        self._check_ranges(condition, row)
        new_tokens = decoding_of(self.replay, condition.spec).max_new_tokens
        key = f"replay.conditions.{condition.base}"
        check_length(self.context, row, prompt.text, self.inputs.limit, new_tokens, key)
        return row.key

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
                "row_key": item.row_key,
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
                todo[item.key] = ReplayItem(self.row(item), item.condition.key, item.seed, item.key)
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

    feed = context.feed(condition)
    found: dict[str, list[Row]] = {}
    chosen = feed.condition
    if chosen is None:
        return found
    texts = list(feed.texts(chosen))
    wanted = {item.key for item in texts}
    table = context.results.read(
        "generations", columns=["generation_key", "token_ids"], filters=[("condition_key", "=", chosen.key)]
    )
    tokens = {record["generation_key"]: record["token_ids"] for record in table.to_pylist()}
    tokens = {key: value for key, value in tokens.items() if key in wanted}
    incomplete = {item.prompt_id for item in texts if item.key not in tokens}
    for item in texts:
        if item.prompt_id not in incomplete:
            row = response_row(inputs.prompt_row(item.prompt_id, False), tokens[item.key], item.key)
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
    failures = [Failure.of("condition", name, None, why) for name, why in plan.set_aside.items()]
    write_failures(context, "replay", failures)
    report.set_aside = [str(failure) for failure in failures]
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
