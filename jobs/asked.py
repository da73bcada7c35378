"""Which texts the study asks for now, condition by condition and key by key. Needs no tokenizer and no model.

Every stage that reads texts asks here, so that none takes those of an older version of the study for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jobs.choices import Chooser
from jobs.context import Context
from jobs.row_statistics import RowStatistics
from store.conditions import (
    Condition,
    MonitorPlan,
    decoding_key,
    decoding_of,
    directions_used,
    generation_key,
    resolve_conditions,
    resolve_monitor,
    seeds_of,
)
from store.directions import Direction
from store.errors import MissingDataError
from store.fingerprint import fingerprint
from store.prompts import Prompt
from store.study import ConditionSpec, Monitor
from store.study_choices import choices_of, with_choices
from store.study_expand import expand_conditions


@dataclass(frozen=True)
class Wanted:
    """One text that the study asks for."""

    prompt_set: str
    prompt_id: str
    row_key: str  # of the prompt without a response; "" where it was never rendered
    condition: Condition
    seed: int
    key: str  # of the generation; "" where it is not known yet


class AskedTexts:
    """What a study's replay section asks for, with the directions that are current.

    Args:
        context: the study.
        only: a condition whose texts are captured (a feed): nothing else is looked at.
        predict: count with the stand-ins of directions that are not computed yet, for planning.
    """

    def __init__(self, context: Context, only: str | None = None, predict: bool = False):
        study = context.study
        assert study.replay is not None
        self.context, self.replay, self.only, self.predict = context, study.replay, only, predict
        self.failed: dict[str, str] = {}  # directions that cannot be computed -> why
        self.set_aside: dict[str, str] = {}  # conditions that need them, or layers at which they do not exist -> why
        names = self.directions_needed = self._needed(only)
        try:
            self.model = context.recalled_model()
        except MissingDataError as error:  # nothing was done with this model yet
            self.directions: dict[str, Direction] = {}
            self.conditions: list[Condition] = []
            self.waiting = [str(error).splitlines()[0]]
            self.monitor: MonitorPlan | None = None
            self.monitor_waits = study.replay.monitor is not None
            self.chooser = Chooser(context, self.texts)
            return
        states = context.directions
        self.directions = states.predicted(names) if predict else states.current(names)
        self.failed = states.failed(names)
        monitor = self._monitored() if only is None else None
        self.monitor = resolve_monitor(monitor, self.directions, self.model.n_layers)
        # A condition without interventions may be what directions are made from: it cannot wait for what is monitored.
        self.monitor_waits = monitor is not None and self.monitor is None
        self.chooser = Chooser(context, self.texts, self.model)
        self._resolve()
        while not self.monitor_waits and self.chooser.advance(self.conditions):
            self._resolve()

    def _monitored(self) -> Monitor | None:
        """Return what is to be recorded, without directions that have failed."""
        monitor = self.replay.monitor
        if monitor is None or not set(monitor.directions) & set(self.failed):
            return monitor
        rest = [name for name in monitor.directions if name not in self.failed]
        return monitor.model_copy(update={"directions": rest}) if rest else None

    def _needed(self, only: str | None) -> set[str]:
        """Return the directions that are looked at; narrow the section down to one condition if only that counts."""
        replay = self.replay
        if only is not None:
            base = next((one.base for one in expand_conditions(replay) if one.name == only), only)
            spec = replay.conditions.get(base)
            if spec is not None and not choices_of(spec):
                self.replay = replay.model_copy(update={"conditions": {base: spec}})
        if any(choices_of(spec) for spec in self.replay.conditions.values()):
            return set(self.context.study.directions)
        names = {name for one in expand_conditions(self.replay) for name in directions_used(one.spec)}
        if only is None and replay.monitor is not None:
            names |= set(replay.monitor.directions)
        return names

    @cached_property
    def statistics(self) -> RowStatistics:
        """What interventions take from captured rows."""
        return RowStatistics(self.context, predict=self.predict)

    def _resolve(self) -> None:
        """Resolve the conditions that can be, with the choices made so far; say what the others wait for."""
        ready, open_ = with_choices(self.replay, self.chooser.values)
        reasons: dict[str, str] = {}
        self.conditions, later = resolve_conditions(
            ready,
            self.directions,
            self.model.n_layers,
            self.model.fingerprint,
            self.context.study.file,
            failed=self.failed,
            set_aside=self.set_aside,
            summarise=self.statistics,
            reasons=reasons,
        )
        why = "its directions are not computed yet"
        self.waiting = [f"condition {name!r}: {reasons.get(name, why)}" for name in later]
        for name, choices in open_.items():
            self.waiting.append(f"condition {name!r}: {', '.join(map(repr, sorted(choices)))} is not chosen yet")

    def needed_by(self, name: str) -> list[str]:
        """Return the directions that a condition uses, or whose projections are recorded under it, by name."""
        used: set[str] = set()
        for one in expand_conditions(self.replay):
            if one.name == name:
                used |= directions_used(one.spec)
                if self.replay.monitor is not None and name not in self.feeds:
                    used |= set(self.replay.monitor.directions)
        return [one for one in self.context.study.directions if one in used]

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
        every: list[Wanted] = []
        for condition in self.conditions:
            if self.monitor_waits and condition.name not in self.feeds:
                self.waiting.append(f"condition {condition.name!r}: the monitored directions are not computed yet")
                continue
            for name in condition.prompts:
                if name in self.context.pending_sets:
                    why = f"the prompt set {name!r}: {self.context.pending_sets[name]}"
                    self.waiting.append(f"condition {condition.name!r}: {why}")
            every.extend(self.texts(condition))
        return every

    def texts(self, condition: Condition, only: str | None = None) -> Iterator[Wanted]:
        """Yield every text of one condition whose prompt set can be made now; `only` those to one prompt set."""
        how = self.decoding_key(condition)
        seeds = seeds_of(self.replay, condition.spec)
        for name in condition.prompts:
            if only not in (None, name):
                continue
            for prompt in self._prompts(name):
                row_key = self.row_key(condition, prompt)
                for seed in seeds:
                    key = ""
                    if row_key:
                        key = generation_key(self.model.fingerprint, row_key, condition.key, how, seed)
                    yield Wanted(name, prompt.id, row_key, condition, seed, key)

    def row_key(self, condition: Condition, prompt: Prompt) -> str:
        """Return the key of a prompt's row without a response; "" where it is not known."""
        return self.context.row_key(prompt)

    def _prompts(self, name: str) -> tuple[Prompt, ...]:
        # Those of user personas are made from texts themselves; all others are there without asking for any.
        fixed = self.context.fixed_sets
        sets = fixed if name in fixed else self.context.prompt_sets
        return tuple(sets[name].prompts) if name in sets else ()

    @cached_property
    def done(self) -> set[str]:
        """The generations that are committed."""
        table = self.context.results.read("generations", columns=["generation_key"])
        return set(table.column("generation_key").to_pylist())

    # -- of one feed -----------------------------------------------------------------------------------------------

    @cached_property
    def condition(self) -> Condition | None:
        """The condition `only`; None while it waits."""
        return next((one for one in self.conditions if one.name == self.only), None)

    @cached_property
    def spec(self) -> ConditionSpec | None:
        """The spec of the condition `only`; None if the study has none of that name."""
        return next((one.spec for one in expand_conditions(self.replay) if one.name == self.only), None)

    def lacking(self, prompt_set: str) -> tuple[int, str]:
        """Return how many texts to a prompt set are not there yet, and which stage has to run next for them."""
        if self.condition is None:
            return self._blocked()
        keys = [item.key for item in self.texts(self.condition, prompt_set)]
        return sum(key not in self.done for key in keys), "replay"

    def _blocked(self) -> tuple[int, str]:
        states = [self.context.directions.of(name) for name in self._needed(self.only)]
        stages = [state.stage for state in states if state.status != "done" and state.stage is not None]
        return 1 if self.spec is None else len(seeds_of(self.replay, self.spec)), stages[0] if stages else "replay"

    def stamp(self, prompt_set: str) -> str:
        """Return what tells the responses to a prompt set apart from any others."""
        if self.condition is None:
            return ""
        return fingerprint(sorted(f"{item.prompt_id} {item.key}" for item in self.texts(self.condition, prompt_set)))
