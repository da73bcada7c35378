"""What every stage of a study shares: its prompt sets, its store and results, and what is known of its model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.keeping import Answers
from store.activations import ActivationStore
from store.code_version import code_version
from store.errors import MissingDataError, StudyError
from store.fingerprint import canonical, canonical_json, fingerprint, short
from store.leaks import refuse_leaks
from store.location import Location, is_url
from store.model_ref import ModelRef
from store.prompts import Prompt, PromptSet, load_prompt_sets
from store.results import ResultStore
from store.schemas import TABLES
from store.study import Study
from store.study_traits import parse_trait_set
from store.traits import trait_prompt_sets
from store.yaml_file import where

if TYPE_CHECKING:
    from jobs.asked import AskedTexts
    from jobs.capture import CaptureInputs
    from jobs.direction_states import DirectionStates
    from jobs.known_rows import KnownRows


@dataclass
class StageReport:
    """What a stage did; `failed`: blocks; `set_aside`: what does not exist, such as one layer of a direction."""

    stage: str
    done: int = 0
    cached: int = 0
    unit: str = "blocks"
    waiting: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def data_location(url: str, key: str, file: Path | None = None) -> Location:
    """Return where a stage writes. `file` is the study file that names the place, for the message.

    Raises:
        StudyError: for a relative path inside `ray job submit`, where it would be lost with the uploaded copy.
    """
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "RAY_JOB_SUBMISSION_ID" in os.environ
    if inside_job and not is_url(url) and not os.path.isabs(os.path.expanduser(url)):
        raise StudyError(
            f"{url} is relative, and a submitted job runs in a copy that is thrown away",
            file=where(file, key),
            key=key,
            remedy=f"give an absolute path or URL, for example --{key} /data/resid/{key}",
        )
    return Location.of(url)


class Context:
    """One study opened for work. Nothing of the model is loaded until a stage asks for it."""

    def __init__(self, study: Study, only_planning: bool = False):
        """Open a study; `only_planning` makes do without the model's weights where they are not here."""
        self.study, self.only_planning = study, only_planning
        # (generation key, judge, version) -> why a judge gave no score since this was opened: it is not asked again
        self.asked_in_vain: dict[tuple[str, str, str], str] = {}
        self.inputs: CaptureInputs | None = None  # where the rows come from; None: from what the last capture wrote
        self.store = ActivationStore.open(data_location(study.store, "store", study.file))
        self.results = ResultStore(data_location(study.results, "results", study.file))

    # -- prompts -----------------------------------------------------------------------------------------------

    @cached_property
    def fixed_sets(self) -> dict[str, PromptSet]:
        """The prompt sets that the study's files hold, by name: whole sets, their parts, and both sides of each trait.

        Raises:
            StudyError: for a file that cannot be read, an empty set, or parts of different name that share prompts.
        """
        sets = load_prompt_sets(self.study.prompts, self.study.file)
        for name, trait in self.study.traits.items():
            sets.update(trait_prompt_sets(name, trait))
        if not self.study.allow_overlap:
            refuse_leaks(self.study, sets)
        return sets

    @cached_property
    def answers(self) -> Answers:
        """The answers to the study's traits, as committed now; see `forget_answers`."""
        return Answers(self)

    @cached_property
    def _user_sets(self) -> tuple[dict[str, PromptSet], dict[str, MissingDataError]]:
        return self.answers.user_sets()

    @property
    def pending_sets(self) -> dict[str, str]:
        """Prompt sets that cannot be made yet, and why: those of user personas wait for answers and their scores."""
        return {name: str(error).splitlines()[0] for name, error in self._user_sets[1].items()}

    @cached_property
    def prompt_sets(self) -> dict[str, PromptSet]:
        """Every prompt set that can be made now, by name: `fixed_sets`, and those of user personas."""
        return {**self.fixed_sets, **self._user_sets[0]}

    def prompt_set(self, name: str) -> PromptSet:
        """Return one prompt set.

        Raises:
            MissingDataError: if it cannot be made yet.
        """
        if name in self.pending_sets:
            stage = self._user_sets[1][name].stage
            raise MissingDataError(f"the prompt set {name!r} waits: {self.pending_sets[name]}", stage)
        return self.prompt_sets[name]

    def forget_answers(self) -> None:
        """Read answers, scores and the states of directions anew: another stage may have written some."""
        self.inputs = None
        self._forget()
        self.forget_memberships()

    def render(self, inputs: CaptureInputs) -> None:
        """Take the study's rows from what `inputs` renders now, instead of from what the last capture wrote."""
        self.inputs = inputs
        self._forget()

    def _forget(self) -> None:
        for name in ("answers", "_user_sets", "prompt_sets", "prompts_by_id", "directions", "_feeds", "_row_of"):
            self.__dict__.pop(name, None)

    # -- what depends on more than one stage -------------------------------------------------------------------

    @cached_property
    def directions(self) -> DirectionStates:
        """The state of each direction of the study, as of now; see `forget_answers`."""
        from jobs.direction_states import DirectionStates

        return DirectionStates(self)

    @cached_property
    def _feeds(self) -> dict[str, AskedTexts]:
        return {}

    def feed(self, condition: str) -> AskedTexts:
        """Return what the study asks for now under one condition whose texts are captured."""
        from jobs.asked import AskedTexts

        if condition not in self._feeds:
            self._feeds[condition] = AskedTexts(self, only=condition)
        return self._feeds[condition]

    @cached_property
    def _row_of(self) -> dict[str, str]:
        """Prompt id -> its row without a response, as the last replay of this study and model wrote it."""
        filters = [("study", "=", self.study.name), ("model", "=", self.recalled_model().fingerprint)]
        table = self.results.read("replay_rows", columns=["prompt_id", "row_key"], filters=filters)
        return dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))

    def row_key(self, prompt: Prompt) -> str:
        """Return the key of a prompt's row without a response; "" where no replay has rendered it yet."""
        if self.inputs is not None:
            return self.inputs.render(prompt, with_response=False).key
        return self._row_of.get(prompt.id, "")

    @cached_property
    def prompts_by_id(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompts in self.prompt_sets.values() for prompt in prompts.prompts}

    def prompts_of(self, names: Iterable[str]) -> list[tuple[str, Prompt]]:
        """Return (prompt set, prompt) for every prompt of the named sets that can be made now, repetitions included."""
        return [
            (name, prompt) for name in names if name in self.prompt_sets for prompt in self.prompt_sets[name].prompts
        ]

    # -- model, without weights --------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> ModelIdentity:
        """Fingerprint and sizes of the study's model, from its files; imports transformers, loads no weights."""
        from pipeline.models import compute_dtype, has_weights, load_config, model_fingerprint

        ref = self.study.model
        here = not self.only_planning or has_weights(ref)
        config = load_config(ref).get_text_config()
        return ModelIdentity(
            fingerprint=model_fingerprint(ref, weights=here),
            n_layers=int(config.num_hidden_layers),
            d_model=int(config.hidden_size),
            dtype=compute_dtype(ref),
            family=str(config.model_type),
            weights_here=here,
        )

    @cached_property
    def tokenizer(self) -> Any:
        from pipeline.models import load_tokenizer

        return load_tokenizer(self.study.model)

    @cached_property
    def clock(self) -> tuple[str, str] | None:
        """The date and time that the chat template is told, and where it comes from; None if it does not ask.

        The study states it (`model.date`), or else the store keeps the moment at which this model's prompts were first
        rendered for it: first writer wins. Only planning writes nothing. Workers get token ids and never ask.
        """
        from pipeline.chat import reads_clock

        if not reads_clock(self.tokenizer, self.study.model):
            return None
        if self.study.model.date is not None:
            return self.study.model.date, "from model.date"
        place = self.store.location / short(self.identity.fingerprint) / "clock.json"
        now = datetime.now().isoformat(timespec="seconds")
        if not self.only_planning:
            place.create(json.dumps({"date": now}).encode())
        try:
            return str(json.loads(place.read_bytes())["date"]), "of the first capture, kept in the store"
        except FileNotFoundError:
            return now, "now; the first capture keeps its moment in the store"

    @cached_property
    def chat_model(self) -> ModelRef:
        """The study's model with the date that its chat template is told, for rendering prompts."""
        return self.study.model if self.clock is None else self.study.model.model_copy(update={"date": self.clock[0]})

    def rendered(self, prompt: Prompt) -> str:
        """Return a prompt as the study's model reads it, generation prompt included.

        Raises:
            ModelError: if the chat template refuses it.
        """
        from pipeline.chat import render

        return render(prompt, self.tokenizer, self.chat_model)

    def clock_line(self) -> str | None:
        """Return what a plan says about the date in the chat template."""
        if self.clock is not None:
            date, origin = self.clock
            return f"the chat template reads the clock: it is told {date} ({origin}; model.date states another)"
        if self.study.model.date is not None:
            return "model.date has no effect: the chat template does not read the clock"
        return None

    def receipt(self) -> str | None:
        """Return the site self-test's receipt as JSON, from the store or the results, if a worker has left one."""
        short_key = short(self.identity.fingerprint)
        for place in (self.store.location / short_key, self.results.location / "receipts" / short_key):
            if (place / "self_test.json").exists():
                return canonical_json(json.loads((place / "self_test.json").read_bytes()))
        return None

    def remember_model(self) -> None:
        """Note the study's model beside its results, for the stages that work without transformers."""
        record = {"ref": canonical(self.study.model), "identity": self.identity.__dict__}
        self._note.write(json.dumps(record, indent=1, sort_keys=True).encode())

    def recalled_model(self) -> ModelIdentity:
        """Return what `remember_model` noted.

        Raises:
            MissingDataError: if nothing was captured yet, or the study names another model since.
        """
        if self.inputs is not None:
            return self.identity
        try:
            record = json.loads(self._note.read_bytes())
        except FileNotFoundError:
            raise MissingDataError(
                f"study {self.study.name!r} has captured nothing yet\n  {self.remedy('capture')}", "capture"
            ) from None
        if record["ref"] != canonical(self.study.model):
            raise MissingDataError(
                f"the model section of {self.study.file} has changed since the capture\n  {self.remedy('capture')}",
                "capture",
            )
        return ModelIdentity(**record["identity"])

    @property
    def _note(self) -> Location:
        return self.results.location / "studies" / f"{self.study.name}.json"

    def remedy(self, stage: str) -> str:
        return f"remedy: resid {stage} --study {self.study.file}"

    # -- memberships -------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> KnownRows:
        """Which rows the study's prompt sets are; see `forget_memberships`."""
        from jobs.known_rows import KnownRows

        return KnownRows(self)

    def forget_memberships(self) -> None:
        """Read memberships anew: a capture has written them."""
        self.__dict__.pop("rows", None)

    def row_keys(self, names: Iterable[str], responses: str | None, keep: str | None = None) -> tuple[str, ...]:
        """Return the distinct row keys of prompt sets, in prompt order; see `row_texts`."""
        return tuple(self.row_texts(names, responses, keep))

    def row_texts(self, names: Iterable[str], responses: str | None, keep: str | None = None) -> dict[str, str]:
        """Return the distinct row keys of prompt sets, in prompt order, with what each row's prompt asks.

        That is the last turn; of a user persona's prompts, the question that the turn was the answer to. With `keep`,
        of a trait's answers only those that count (the prompts of a user persona are chosen already).

        Raises:
            MissingDataError: if a prompt has no row: it was not captured, or the prompt files changed since; or if the
                answers are not judged, or one that counts is not captured.
        """
        keys: dict[str, str] = {}
        for name in names:
            parsed = parse_trait_set(name)
            user = parsed is not None and parsed.family == "user"
            for prompt, rows in self.prompt_rows(name, responses, keep):
                keys.update(dict.fromkeys(rows, prompt.tags["asked"] if user else prompt.text))
        return keys

    def prompt_rows(
        self, name: str, responses: str | None, keep: str | None = None
    ) -> Iterator[tuple[Prompt, list[str]]]:
        """Yield every prompt of a prompt set with the keys of its rows; `row_texts` says what `keep` leaves out.

        Raises:
            MissingDataError: as `row_texts`.
        """
        prompts = self.prompt_set(name).prompts
        if responses is not None:
            self.rows.require_texts(name, responses)
        rows = self.rows.of(name, responses)
        for prompt in prompts:
            if prompt.id not in rows:
                what = f"responses of {responses!r} to " if responses else ""
                raise MissingDataError(
                    f"no row of {what}prompt {prompt.id[:16]} of {name!r} is known\n  {self.remedy('capture')}",
                    "capture",
                )
        parsed = parse_trait_set(name)
        user = parsed is not None and parsed.family == "user"
        chosen: frozenset[str] | None = None
        if keep is not None and parsed is not None and not user and responses is not None:
            chosen = self.answers.kept(parsed.trait, parsed.side, responses).keys
            known = {self.rows.generation(key) for prompt in prompts for key in rows[prompt.id]}
            if not chosen <= known:
                raise MissingDataError(
                    f"{len(chosen - known)} answers of {responses!r} to {name!r} that count are not captured\n  "
                    f"{self.remedy('capture')}",
                    "capture",
                )
        for prompt in prompts:
            # An empty key stands for a generated response without tokens: there is nothing to read of it.
            yield prompt, [k for k in rows[prompt.id] if k and (chosen is None or self.rows.generation(k) in chosen)]


@dataclass(frozen=True)
class ModelIdentity:
    """What the files of a model say, before any weight is loaded."""

    fingerprint: str
    n_layers: int
    d_model: int
    dtype: str
    family: str
    weights_here: bool = True  # else the fingerprint is no model's, and nothing is found under it


def table_of(name: str, records: Iterable[dict[str, Any]]) -> pa.Table:
    """Build a result table from records, in the table's schema."""
    return pa.Table.from_pylist(list(records), schema=TABLES[name])


def block_id(parts: Iterable[str]) -> str:
    """Name a block of results by what it holds."""
    return fingerprint(list(parts))[:32]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on; resid's with the commit of a checkout (`store.code_version`)."""
    found = {"resid": code_version()}
    for package in ("torch", "transformers", "numpy", "zarr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
