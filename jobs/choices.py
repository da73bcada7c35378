"""The study's choices: made from committed scores as soon as all of them are there, and written down in full.

A choice is a pure function of the study and the scores, computed anew each time. What it was made from (the rule, the
candidates' fingerprints, prompts, judges) is its key: another candidate list or other prompts make another choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.choices import TIES, Measured, Ranking, choose
from jobs.context import Context, ModelIdentity, table_of
from jobs.outcomes import Outcomes
from store.conditions import Condition
from store.fingerprint import canonical_json, fingerprint
from store.references import Value
from store.study import Replay
from store.study_choices import choices_of, settled
from store.study_expand import expand
from store.study_select import Outcome, Selection

if TYPE_CHECKING:
    from jobs.asked import Wanted


@dataclass(frozen=True)
class Choice:
    """A choice that was made, or stated (`given`)."""

    name: str
    key: str  # fingerprint of all that it was made from
    selection: Selection
    status: str  # chosen, otherwise (no candidate passed), given
    condition: str | None  # the winner
    variables: Mapping[str, Value]  # as the candidate spells them
    values: Mapping[str, Value]  # persona.layer: 20; layers as numbers
    ranking: Ranking | None
    n_prompts: int
    judges: Mapping[str, str]


class Chooser:
    """Makes a study's choices, one after the other where one depends on another."""

    def __init__(
        self, context: Context, texts: Callable[[Condition], Iterable[Wanted]], model: ModelIdentity | None = None
    ):
        """`model` is that of the study; None where nothing is known of it yet, and nothing can be chosen."""
        self.context, self._texts, self.model = context, texts, model
        self.made: dict[str, Choice] = {}
        self.waiting: dict[str, str] = {}  # choice -> what it waits for
        for name, selection in context.study.select.items():
            if selection.given is not None and model is not None:
                values = settled(name, selection.given, model.n_layers)
                key = fingerprint({"given": values})
                self.made[name] = Choice(name, key, selection, "given", None, selection.given, values, None, 0, {})

    @property
    def values(self) -> dict[str, Value]:
        return {key: value for choice in self.made.values() for key, value in choice.values.items()}

    def advance(self, conditions: Iterable[Condition]) -> bool:
        """Make every choice whose candidates are among the conditions and scored; return whether there was one."""
        by_name = {condition.name: condition for condition in conditions}
        before = len(self.made)
        outcomes: Outcomes | None = None
        for name, selection in self.context.study.select.items():
            if name not in self.made:
                outcomes = outcomes or Outcomes(self.context)
                self._make(name, selection, by_name, outcomes)
        return len(self.made) > before

    def _make(self, name: str, selection: Selection, conditions: Mapping[str, Condition], outcomes: Outcomes) -> None:
        replay = self.context.study.replay
        assert replay is not None
        assert self.model is not None
        assert selection.of is not None
        candidates = {item.name: item.variables for item in expand(selection.of, replay.conditions[selection.of])}
        absent = [one for one in (*candidates, selection.against) if one not in conditions]
        if absent:
            self.waiting[name] = f"choice {name!r}: condition {absent[0]!r} cannot be replayed yet"
            return
        judge = outcomes.refusal_judge(selection.judge, f"select.{name}")
        wanted: set[tuple[Outcome, str]] = {(selection.outcome, one) for one in selection.prompts}
        wanted |= {(keep.outcome, one) for keep in selection.keep for one in keep.prompts}
        measured: list[Measured] = []
        asked: list[str] = []
        missing = 0
        for one in (*candidates, selection.against):
            rates, lacking, keys = self._rates(conditions[one], wanted, outcomes, judge)
            missing += lacking
            asked += keys
            measured.append(Measured(one, conditions[one].key, candidates.get(one, {}), rates))
        if missing:
            self.waiting[name] = f"choice {name!r}: {missing} texts of its candidates are not generated and scored yet"
            return
        self.waiting.pop(name, None)
        ranking = choose(selection, measured[:-1], measured[-1])
        winner = ranking.chosen
        status = "otherwise" if winner is None else "chosen"
        variables: Mapping[str, Value] | None = selection.otherwise if winner is None else winner.variables
        if variables is None:
            best = min(ranking.verdicts, key=lambda verdict: verdict.rank)
            self.waiting[name] = (
                f"choice {name!r}: no candidate passes; the best, {best.candidate.condition}: "
                f"{'; '.join(best.faults)}. Remedy: other candidates, or select.{name}.otherwise"
            )
            return
        prompts = {one: self.context.prompt_sets[one].ids for one in selection.sets}
        made_from = {
            "rule": canonical_json(selection.rule()),
            "candidates": {one.condition: one.condition_key for one in measured},
            "generations": sorted(asked),
            "prompts": {one: list(ids) for one, ids in prompts.items()},
            "judges": outcomes.judges,
        }
        self.made[name] = Choice(
            name=name,
            key=fingerprint(made_from),
            selection=selection,
            status=status,
            condition=None if winner is None else winner.condition,
            variables=variables,
            values=settled(name, variables, self.model.n_layers),
            ranking=ranking,
            n_prompts=len({item for one in selection.prompts for item in prompts[one]}),
            judges=outcomes.judges,
        )

    def _rates(
        self, condition: Condition, wanted: set[tuple[Outcome, str]], outcomes: Outcomes, judge: str
    ) -> tuple[dict[tuple[Outcome, str], dict[str, float]], int, list[str]]:
        """Return shares by prompt, how many texts lack a score, and all keys that were looked at."""
        keys: dict[str, dict[str, list[str]]] = {}
        for item in self._texts(condition):
            keys.setdefault(item.prompt_set, {}).setdefault(item.prompt_id, []).append(item.key)
        rates: dict[tuple[Outcome, str], dict[str, float]] = {}
        lacking: set[str] = set()
        for outcome, name in wanted:
            for prompt, generations in keys[name].items():
                share = outcomes.share(generations, outcome, judge)
                if share is None:
                    lacking.update(key for key in generations if outcomes.of(key, outcome, judge) is None)
                else:
                    rates.setdefault((outcome, name), {})[prompt] = share
        used = [key for _, name in wanted for generations in keys[name].values() for key in generations]
        return rates, len(lacking), list(dict.fromkeys(used))

    def write(self) -> None:
        """Write the study's choices and all their candidates, replacing what it wrote before."""
        study, results = self.context.study, self.context.results
        if not study.select:
            return
        choices = [
            _choice_record(study.name, self.context.recalled_model().fingerprint, study.replay, choice)
            for choice in self.made.values()
        ]
        candidates = [record for choice in self.made.values() for record in _candidate_records(study.name, choice)]
        results.replace("choices", study.name, table_of("choices", choices))
        results.replace("choice_candidates", study.name, table_of("choice_candidates", candidates))


def _choice_record(study: str, model: str, replay: Replay | None, choice: Choice) -> dict[str, Any]:
    users = [name for name, spec in (replay.conditions.items() if replay else ()) if choice.name in choices_of(spec)]
    return {
        "study": study,
        "model": model,
        "choice": choice.name,
        "choice_key": choice.key,
        "status": choice.status,
        "condition": choice.condition,
        "chosen": json.dumps({key.partition(".")[2]: value for key, value in choice.values.items()}),
        "rule": canonical_json(choice.selection.rule()),
        "ties": TIES,
        "n_tied": 0 if choice.ranking is None else choice.ranking.tied,
        "prompt_sets": json.dumps(list(choice.selection.sets) if choice.ranking else []),
        "n_prompts": choice.n_prompts,
        "against_rate": None if choice.ranking is None else choice.ranking.against,
        "against_low": None if choice.ranking is None else choice.ranking.against_interval.low,
        "against_high": None if choice.ranking is None else choice.ranking.against_interval.high,
        "judges": canonical_json(choice.judges),
        "used_by": json.dumps(users),
    }


def _candidate_records(study: str, choice: Choice) -> Iterable[dict[str, Any]]:
    if choice.ranking is None:
        return
    for verdict in choice.ranking.verdicts:
        candidate = verdict.candidate
        yield {
            "study": study,
            "choice": choice.name,
            "choice_key": choice.key,
            "condition": candidate.condition,
            "condition_key": candidate.condition_key,
            "variables": json.dumps(candidate.variables),
            "outcome": choice.selection.outcome,
            "rate": verdict.rate,
            "low": verdict.interval.low,
            "high": verdict.interval.high,
            "change": verdict.change,
            "change_low": verdict.change_interval.low,
            "change_high": verdict.change_interval.high,
            "faults": json.dumps(verdict.faults),
            "rank": verdict.rank,
            "is_chosen": candidate.condition == choice.condition,
            "is_tied": choice.ranking.is_tied(verdict),
        }
