"""Stage 1, capture: run the model over the study's prompts and commit the activations that the store lacks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from jobs.context import Context, StageReport, table_of, versions
from jobs.model_checks import check_length, check_template_variables, context_length, model_notes
from jobs.progress import Progress
from jobs.prompt_notes import changed_sets, short_parts
from jobs.stage import main_for
from pipeline.cluster import Cluster
from store.activations import CaptureRequest, ModelStore
from store.dtypes import DTypeName
from store.errors import MissingDataError, StudyError
from store.fingerprint import canonical, canonical_json, short
from store.layers import resolve_layers
from store.prompts import Prompt
from store.rows import Row
from store.study import CaptureEntry
from store.study_layers import check_layers
from store.study_traits import parse_trait_set
from store.yaml_file import where


class CaptureInputs:
    """The rows that a study's capture entries ask for, as far as they can be made now."""

    def __init__(self, context: Context):
        self.context = context
        self.requests: list[CaptureRequest] = []
        self.memberships: dict[tuple[str, str, str, str | None], None] = {}  # set, prompt id, row key, responses
        self.rows: dict[str, Row] = {}
        self.waiting: list[str] = []
        self.pending: list[CaptureEntry] = []  # entries that wait
        self.notes: list[str] = []
        self._rendered: dict[tuple[str, bool], Row] = {}
        self._generated: dict[str, dict[str, list[Row]]] = {}  # condition -> prompt id -> rows
        self._generation_of: dict[str, str] = {}  # row key -> the generation that its response came from
        context.render(self)
        check_layers(context.study, context.identity.n_layers)
        check_template_variables(context)
        self.limit = context_length(context)
        for index, entry in enumerate(context.study.capture):
            before = len(self.waiting)
            self._add(index, entry)
            if len(self.waiting) > before:
                self.pending.append(entry)

    def prompt_row(self, prompt_id: str, with_response: bool) -> Row:
        """Render a prompt of the study, once."""
        return self.render(self.context.prompts_by_id[prompt_id], with_response)

    def render(self, prompt: Prompt, with_response: bool) -> Row:
        """Render a prompt, once."""
        from pipeline.chat import prompt_row

        key = (prompt.id, with_response)
        if key not in self._rendered:
            context = self.context
            self._rendered[key] = prompt_row(
                prompt,
                context.tokenizer,
                context.chat_model,
                context.identity.fingerprint,
                with_response=with_response,
            )
        return self._rendered[key]

    def rows_of(self, name: str, responses: str | None) -> dict[str, list[str]]:
        """Return prompt id -> row keys of one prompt set, "" for a response without tokens, where they can be made."""
        prompts = [prompt for _, prompt in self.context.prompts_of([name])]
        if responses is None:
            return {prompt.id: [self.render(prompt, with_response=True).key] for prompt in prompts}
        generated = self._responses(responses)
        return {
            prompt.id: [row.key for row in generated[prompt.id] if row.spans.has_response] or [""]
            for prompt in prompts
            if prompt.id in generated
        }

    def generation_of(self, row_key: str) -> str | None:
        """Return the generation that a row's response came from."""
        return self._generation_of.get(row_key)

    def _add(self, index: int, entry: CaptureEntry) -> None:
        context, key = self.context, f"capture[{index}]"
        layers = resolve_layers(entry.layers, context.identity.n_layers)
        rows: dict[str, Row] = {}
        names = self._with_parts(entry.prompts)
        empty = 0
        for name in names:
            if name in context.pending_sets:
                self.waiting.append(f"{key}: the prompt set {name!r}: {context.pending_sets[name]}")
                return
        try:
            chosen = self._chosen(entry)
        except MissingDataError as error:
            self.waiting.append(f"{key}: {str(error).splitlines()[0]}")
            return
        for name, prompt in context.prompts_of(names):
            if entry.responses is None:
                found = [self.prompt_row(prompt.id, with_response=True)]
            else:
                responses = self._responses(entry.responses).get(prompt.id)
                if responses is None:
                    self.waiting.append(f"{key}: responses of {entry.responses!r} to {name!r} are not generated yet")
                    return
                found = [row for row in responses if row.spans.has_response]
                empty += len(responses) - len(found)
                if name in chosen:
                    found = [row for row in found if row.generation_key in chosen[name]]
                if not found:
                    self.memberships[(name, prompt.id, "", entry.responses)] = None
            for row in found:
                self._check_positions(row, entry.positions, key, prompt.text)
                check_length(context, row, prompt.text, self.limit, 0, f"{key}.prompts")
                rows[row.key] = row
                self.memberships[(name, prompt.id, row.key, entry.responses)] = None
        if empty:
            self.notes.append(f"{key}: {empty} generated responses are empty and have no activations")
        self.rows.update(rows)
        dtype = context.identity.dtype if entry.dtype == "model" else entry.dtype
        if rows:
            request = CaptureRequest(
                tuple(rows.values()),
                tuple(dict.fromkeys(entry.components)),
                tuple(sorted(layers)),
                tuple(entry.positions),
                cast(DTypeName, dtype),
            )
            self.requests.append(request)

    def _chosen(self, entry: CaptureEntry) -> dict[str, frozenset[str]]:
        """Return the generations to capture of the sets of which an entry keeps some.

        Raises:
            MissingDataError: if answers are not generated or not judged yet.
        """
        if entry.keep is None or entry.responses is None:
            return {}
        parsed = {name: parse_trait_set(name) for name in entry.prompts}
        return {
            name: self.context.answers.kept(part.trait, part.side, entry.responses).keys
            for name, part in parsed.items()
            if part is not None and part.family == "model"
        }

    def _with_parts(self, names: Iterable[str]) -> list[str]:
        """Capturing a whole set also fills its parts: they are the same rows."""
        sets = self.context.prompt_sets
        return [*names, *(part for name in names for part in sets if part.startswith(f"{name}@"))]

    def _check_positions(self, row: Row, positions: Iterable[str], key: str, text: str) -> None:
        for position in positions:
            try:
                row.spans.token_range(position)
            except ValueError as error:
                remedy = "choose a position that every row has, or capture these prompts in an entry of their own"
                raise StudyError(
                    f"{error} (prompt {text[:60]!r})",
                    file=where(self.context.study.file, f"{key}.positions"),
                    key=f"{key}.positions",
                    remedy=remedy,
                ) from None

    def _responses(self, condition: str) -> dict[str, list[Row]]:
        """Return prompt id -> rows with a condition's responses, one per seed, where all of them are there."""
        from jobs.replay import generated_responses

        if condition not in self._generated:
            rows = generated_responses(self.context, condition, self)
            self._generated[condition] = rows
            every = [row for group in rows.values() for row in group]
            self._generation_of |= {row.key: row.generation_key for row in every if row.generation_key}
        return self._generated[condition]

    def remember_sets(self, store: ModelStore) -> None:
        """Note in the store which rows the study's prompt sets are, for whoever reads it without the study."""
        context = self.context
        records = [
            {
                "prompt_set": name,
                "responses": source,
                "prompt_id": prompt,
                "row_key": row,
                "text": context.prompts_by_id[prompt].text,
            }
            for name, prompt, row, source in self.memberships
        ]
        file = None if context.study.file is None else str(context.study.file)
        store.memberships.write(context.study.name, file, records)

    def write_tables(self) -> None:
        """Write prompts, rows, memberships and the model of this study, replacing what it wrote before."""
        context = self.context
        study, model = context.study.name, context.identity.fingerprint
        ref = context.study.model
        used = dict.fromkeys(prompt_id for _, prompt_id, _, _ in self.memberships)
        if context.study.replay is not None:  # what is replayed is a prompt of the study as well, captured or not
            replay = context.study.replay
            names = dict.fromkeys([*replay.prompts, *(n for c in replay.conditions.values() for n in c.prompts or [])])
            used |= dict.fromkeys(prompt.id for _, prompt in context.prompts_of(names))
        prompts = [
            {
                "prompt_id": prompt.id,
                "messages": json.dumps([{"role": m.role, "content": m.content} for m in prompt.messages]),
                "text": prompt.text,
                "response": prompt.response,
                "tags": canonical_json(dict(prompt.tags)),
            }
            for prompt in (context.prompts_by_id[prompt_id] for prompt_id in used)
        ]
        rows = [
            {
                "row_key": row.key,
                "model": row.model,
                "prompt_id": row.prompt_id,
                "n_tokens": len(row.token_ids),
                "prompt_length": row.spans.prompt_length,
                "response_end": row.spans.response_end,
                "source": row.source,
                "generation_key": row.generation_key,
            }
            for row in self.rows.values()
        ]
        members = [
            {
                "study": study,
                "prompt_set": name,
                "prompt_id": prompt,
                "model": model,
                "row_key": row,
                "responses": source,
            }
            for name, prompt, row, source in self.memberships
        ]
        record = {
            "model": model,
            "source": ref.source,
            "revision": ref.revision,
            "adapter": ref.adapter,
            "dtype": context.identity.dtype,
            "n_layers": context.identity.n_layers,
            "d_model": context.identity.d_model,
            "family": context.identity.family,
            "receipt": context.receipt(),
        }
        pairs = sorted({(name, source) for name, _, _, source in self.memberships if source is not None})
        stamps = [[name, source, context.feed(source).stamp(name)] for name, source in pairs]
        for table, records in (("prompts", prompts), ("rows", rows), ("memberships", members)):
            read = {"responses": stamps} if table == "memberships" else None
            context.results.replace(table, study, table_of(table, records), provenance=read)
        context.results.replace("models", short(model), table_of("models", [record]))
        context.remember_model()
        context.forget_memberships()


def manifest(context: Context) -> dict[str, Any]:
    """Return what the store is to know of the study's model."""
    return {**context.identity.__dict__, "ref": canonical(context.study.model), "versions": versions()}


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Capture what is missing.

    Raises:
        BlocksFailedError: is left to the caller: failed blocks are in the report, all others are committed.
    """
    inputs = CaptureInputs(context)
    clock = context.clock_line()
    notes = [
        *([clock] if clock else []),
        *inputs.notes,
        *short_parts(context),
        *changed_sets(context),
        *model_notes(context),
    ]
    report = StageReport("capture", unit="rows", waiting=inputs.waiting, notes=notes)
    inputs.write_tables()
    if not inputs.requests:
        return report
    model_store = context.store.add_model(manifest(context))
    inputs.remember_sets(model_store)
    work, blocks = model_store.assign(inputs.requests, context.study.block_rows, context.study.compression)
    report.cached = work.cached_rows
    if not blocks:
        return report
    from pipeline.workers import CaptureWorker

    kwargs = {
        "store": str(context.store.location),
        "ref": context.study.model,
        "fingerprint": context.identity.fingerprint,
        "token_budget": context.study.token_budget,
        "provenance": {"study": context.study.name, "versions": versions()},
    }
    with progress.task("capture", sum(block.n_rows for block in blocks), "rows") as advance:
        outcome = cluster.run_blocks(
            CaptureWorker, kwargs, blocks, on_done=lambda block, result: advance(result["rows"])
        )
    report.done = sum(block.n_rows for block in blocks) - sum(
        block.n_rows for block in blocks if block.id in {failure.block_id for failure in outcome.failed}
    )
    report.failed = [f"block {failure.block_id}: {failure.cause}" for failure in outcome.failed]
    inputs.write_tables()  # again, now with the self-test's receipt
    return report


if __name__ == "__main__":
    main_for("capture")
