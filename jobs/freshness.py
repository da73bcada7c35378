"""What a study's results hold of older versions of it, and which command makes it new.

A stage that is asked alone refuses while something that it reads is stale and an earlier stage can make it now. Where
the stale thing itself waits for this very stage or a later one, the stage does what it can. `resid run` needs no such
check: its rounds go through all stages.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from jobs.asked import AskedTexts
from jobs.compare import comparison_key, known_keys, planned, texts_of
from jobs.context import Context
from jobs.judging import study_judges
from jobs.outcomes import Outcomes
from store.errors import MissingDataError, ResidError, StaleError
from store.study import Study

ORDER = ("capture", "directions", "geometry", "replay", "score", "compare")


@dataclass(frozen=True)
class Stale:
    """Something in the results that an older version of the study made."""

    what: str
    why: str
    stage: str | None  # the stage that has to run next for it; None if no stage can help now

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


def require_fresh(stage: str, context: Context) -> None:
    """Refuse to run a stage alone on what an older version of the study left.

    Raises:
        StaleError: naming each stale input, why it is stale, and the commands that make it new.
    """
    if stage == "capture":  # it reads prompts and texts by their keys: others are not there for it
        return
    if stage == "replay" and context.study.replay is not None:
        from jobs.capture import CaptureInputs

        CaptureInputs(context)  # replay renders its rows anew, so it knows more than the last capture wrote
    before = ORDER[: ORDER.index(stage)]
    stale = [one for one in _inputs(stage, context) if one.stage in before]
    if not stale:
        return
    lines = [f"{one} (resid {one.stage})" for one in stale]
    first = min((one.stage for one in stale if one.stage), key=ORDER.index)
    raise StaleError(
        f"resid {stage}: {len(stale)} input(s) come from an older version of the study; nothing was written\n  "
        + "\n  ".join(lines)
        + f"\n  {context.remedy(first)}, then resid {stage} again; or resid run, which does all that is needed"
    )


def stale_results(context: Context) -> list[Stale]:
    """Return what the results show of older versions of the study."""
    return [
        *_directions(context),
        *_geometry(context),
        *_asked(context),
        *_choices(context),
        *_judges(context),
        *_comparisons(context),
    ]


def notice(context: Context) -> list[str]:
    """Return what to tell a person who is shown the study's results: nothing where all of them are of its present self.

    A study whose files cannot be read any more is said to be so.
    """
    try:
        stale = stale_results(context)
    except ResidError as error:
        return [
            f"whether these results are of the study's present version cannot be told: {str(error).splitlines()[0]}"
        ]
    if not stale:
        return []
    head = f"{len(stale)} part(s) of these results are of an older version of the study"
    return [head, *(f"  {one}" for one in stale), f"  {context.remedy('run')}"]


def tell_stale(study: Study, results: str | None = None) -> list[str]:
    """Say on standard error which results of a study are of an older version of it, and return what was said.

    Args:
        study: the study whose results are shown.
        results: the place of the results, where it is not the study's own.
    """
    lines = notice(Context(study if results is None else study.model_copy(update={"results": results})))
    for number, line in enumerate(lines):
        print(line if number else f"note: {line}", file=sys.stderr)
    return lines


def _inputs(stage: str, context: Context) -> list[Stale]:
    """Return what a stage reads that is stale. Directions are read by key: only those that must be made anew count."""
    if stage in ("score", "compare"):
        return _asked(context) + (_judges(context) if stage == "compare" else [])
    names = set(context.study.directions)
    if stage == "replay":
        names = set() if context.study.replay is None else set(AskedTexts(context).directions_needed)
    states = context.directions.all().values()
    return [
        Stale(f"direction {state.name!r}", state.why, state.stage)
        for state in states
        if state.stale and state.name in names
    ]


def _directions(context: Context) -> list[Stale]:
    """Compare the table `directions` with the current ones."""
    states = context.directions
    stale = []
    for name, before in states.stored.items():
        if name not in context.study.directions:
            stale.append(Stale(f"direction {name!r}", "the study has no such direction any more", "directions"))
        elif (state := states.of(name)).direction is None:
            stale.append(Stale(f"direction {name!r}", state.why, state.stage))
        elif state.direction.key != before.key:
            stale.append(Stale(f"direction {name!r}", "the table holds older vectors", "directions"))
    return stale


def _asked(context: Context) -> list[Stale]:
    """Compare the texts that the last replay asked for with those that the study asks for now."""
    study, results = context.study, context.results
    columns = ["condition", "condition_key", "decoding_key", "model"]
    wanted = [*columns, "prompt_set", "prompt_id", "seed", "row_key"]
    table = results.read("replay_rows", columns=wanted, filters=[("study", "=", study.name)])
    before: dict[str, set[tuple[Any, ...]]] = {}
    for record in table.to_pylist():
        before.setdefault(record["condition"], set()).add(tuple(record[name] for name in wanted[1:]))
    if not before:
        return []
    if study.replay is None:
        return [Stale(f"condition {name!r}", "the study has no such condition any more", "replay") for name in before]
    asked = AskedTexts(context)
    now: dict[str, set[tuple[Any, ...]]] = {}
    names = {condition.name: condition for condition in asked.conditions}
    for item in asked.wanted:
        one = item.condition
        key = (one.key, asked.decoding_key(one), asked.model.fingerprint, item.prompt_set, item.prompt_id, item.seed)
        now.setdefault(one.name, set()).add((*key, item.row_key))
    stale = []
    for name, rows in before.items():
        left = rows - now.get(name, set())
        if not left:
            continue
        if name in names and len(left) < len(rows):
            why = f"{len(left)} of its {len(rows)} texts are to prompts or seeds that the study does not ask for now"
        elif name in names:
            why = "what it does, how it decodes or what it is asked has changed"
        else:
            why = next((line for line in asked.waiting if f"{name!r}" in line), "the study has no such condition now")
        stale.append(Stale(f"condition {name!r}", why, _stage_of(context, asked, name)))
    return stale


def _stage_of(context: Context, asked: AskedTexts, name: str) -> str | None:
    """Return the stage that makes a condition's texts new: the first one that something that it uses waits for."""
    stages = [context.directions.of(one).stage for one in asked.needed_by(name)]
    before = [stage for stage in stages if stage is not None]
    return min(before, key=ORDER.index) if before else "replay"


def _judges(context: Context) -> list[Stale]:
    table = context.results.read("judges", filters=[("study", "=", context.study.name)])
    before = {(record["judge"], record["judge_version"]) for record in table.to_pylist()}
    now = {(judge.name, judge.version) for judge in study_judges(context.study)}
    return [
        Stale(f"judge {name!r}", "its version or options have changed, or the study names it no more", "score")
        for name, version in sorted(before - now)
    ]


def _geometry(context: Context) -> list[Stale]:
    """Compare the directions that cosines and alignments were computed from with the current ones."""
    current = {(name, one.key) for name, one in context.directions.current().items()}
    stale = []
    for table in ("cosines", "alignments"):
        columns = ["direction_a", "direction_key_a", "direction_b", "direction_key_b"]
        found = context.results.read(table, columns=columns, filters=[("study", "=", context.study.name)])
        used = {(r[f"direction_{s}"], r[f"direction_key_{s}"]) for r in found.to_pylist() for s in "ab"}
        names = sorted({name for name, _ in used - current})
        if names:
            stale.append(Stale(table, f"they use older vectors of {', '.join(names)}", "geometry"))
    return stale


def _choices(context: Context) -> list[Stale]:
    """Compare the choices that the last replay made with those that the scores give now."""
    study = context.study
    columns = ["choice", "choice_key"]
    table = context.results.read("choices", columns=columns, filters=[("study", "=", study.name)])
    if not table.num_rows:
        return []
    made = {} if study.replay is None else AskedTexts(context).chooser.made
    return [
        Stale(f"choice {record['choice']!r}", "what it is made from has changed", "replay")
        for record in table.to_pylist()
        if record["choice"] not in made or made[record["choice"]].key != record["choice_key"]
    ]


def _comparisons(context: Context) -> list[Stale]:
    known = known_keys(context)
    if not known:
        return []
    try:
        outcomes, texts = Outcomes(context), texts_of(context, context.recalled_model().fingerprint)
    except MissingDataError:
        return []
    now = set()
    for one in planned(context):
        judge = outcomes.refusal_judge(one.spec.judge, f"comparisons.{one.name}")
        now.add(comparison_key(one, judge, outcomes, texts))
    left = len(known - now)
    return (
        [Stale("comparisons", f"{left} of {len(known)} were made of other texts or scores", "compare")] if left else []
    )
