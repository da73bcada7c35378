"""Which answers of a trait count: those that show the trait (or do not), and are coherent, by the study's judges.

Works from what replay and score have committed, so that the stages that never load a model can ask as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jobs.judging import StudyJudge, judges_of_trait, study_judges, trait_of
from store.errors import MissingDataError, StudyError
from store.prompts import PromptSet
from store.sql import connect
from store.study_traits import SIDES, Side, parse_trait_set, trait_set_name
from store.traits import Answer, user_prompt_set
from store.yaml_file import where

if TYPE_CHECKING:
    from jobs.context import Context

# generation key, judge, judge version -> value (None: it failed)
Scores = Mapping[tuple[str, str, str], float | None]


@dataclass(frozen=True)
class Counts:
    """What became of the answers to one side of a trait.

    `answers` were generated, `distinct` are different texts to their prompt; of these some are `kept`, and the others
    have no tokens (`empty`), a trait score on the wrong side of the threshold (`by_trait`), a coherence score below it
    (`by_coherence`), or a judge that failed (`failed`: only where the trait says ``unscored: drop``).
    """

    answers: int = 0
    distinct: int = 0
    kept: int = 0
    empty: int = 0
    by_trait: int = 0
    by_coherence: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Kept:
    """The answers of one side of a trait, under one condition, that count."""

    answers: tuple[Answer, ...]  # in the order of prompts and seeds; a text that repeats to its prompt once
    known: frozenset[str]  # generation keys of all answers
    counts: Counts
    rule: Mapping[str, Any]  # thresholds and judges

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(answer.key for answer in self.answers)


class Answers:
    """The answers to the traits of a study, as committed when this was made."""

    def __init__(self, context: Context):
        self.context = context
        self._kept: dict[tuple[str, Side, str], Kept] = {}
        self._text_of: dict[str, dict[str, str]] = {}

    @cached_property
    def judges(self) -> list[StudyJudge]:
        return study_judges(self.context.study)

    def _texts(self, condition: str) -> dict[str, str]:
        """Generation key -> text, of those that are committed of a condition as the study states it now."""
        if condition not in self._text_of:
            now = self.context.feed(condition).condition
            table = self.context.results.read(
                "generations",
                columns=["generation_key", "text"],
                filters=[("condition_key", "=", "" if now is None else now.key)],
            )
            self._text_of[condition] = dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
        return self._text_of[condition]

    @cached_property
    def _scores(self) -> Scores:
        connection = connect(self.context.results.location)
        names = sorted({judge.name for judge in self.judges if judge.measures in ("trait", "coherence")})
        try:
            rows = connection.execute(
                "SELECT generation_key, judge, judge_version, value, error FROM stored.unique_scores "
                "WHERE judge IN (SELECT unnest($names))",
                {"names": names},
            ).fetchall()
        finally:
            connection.close()
        return {(key, judge, version): None if error else value for key, judge, version, value, error in rows}

    def given(self, trait: str, side: Side, condition: str) -> list[Answer]:
        """Return every answer of one side under a condition, in the order of prompts and seeds.

        Raises:
            MissingDataError: if one is not generated yet.
        """
        context = self.context
        name = trait_set_name(trait, "model", side)
        left, stage = context.feed(condition).lacking(name)
        if not left:
            asked = context.feed(condition)
            assert asked.condition is not None
            texts = self._texts(condition)
            prompts = {prompt.id: prompt for prompt in context.fixed_sets[name].prompts}
            return [
                Answer(prompts[item.prompt_id], item.seed, item.key, texts[item.key])
                for item in asked.texts(asked.condition, name)
            ]
        raise MissingDataError(
            f"{left} answers of {condition!r} to {name!r} are not generated yet\n  {context.remedy('replay')}", stage
        )

    def kept(self, trait: str, side: Side, condition: str) -> Kept:
        """Return the answers of one side that count.

        Positive ones have a trait score of at least the trait threshold, negative ones one below it, and both a
        coherence score of at least the coherence threshold. Of answers that repeat a text to the same prompt the first
        seed's counts.

        Raises:
            MissingDataError: if an answer is not generated, or not judged yet.
            StudyError: if none is kept on a side, both sides being judged; names thresholds and remedy.
        """
        if (trait, side, condition) not in self._kept:
            chosen = {other: self._side(trait, other, condition) for other in SIDES}
            self._refuse_empty(trait, condition, chosen)
            self._kept.update({(trait, other, condition): kept for other, kept in chosen.items()})
        return self._kept[(trait, side, condition)]

    def _side(self, trait: str, side: Side, condition: str) -> Kept:
        study = self.context.study
        source, scoring = study.traits[trait], trait_of(study, trait).scoring
        by_trait, by_coherence = judges_of_trait(study, trait, self.judges)
        least = scoring.trait_threshold if source.trait_threshold is None else source.trait_threshold
        coherent = scoring.coherence_threshold if source.coherence_threshold is None else source.coherence_threshold
        answers = self.given(trait, side, condition)
        distinct = list({(answer.prompt.id, answer.text): answer for answer in reversed(answers)}.values())[::-1]
        number = dict.fromkeys(("kept", "empty", "by_trait", "by_coherence", "failed"), 0)
        kept, unjudged, failures = [], 0, 0
        for answer in distinct:
            keys = [(answer.key, judge.name, judge.version) for judge in (by_trait, by_coherence)]
            values = [self._scores.get(key) for key in keys]
            if not answer.text:
                fate = "empty"
            elif any(key not in self._scores for key in keys):
                unjudged += 1
                continue
            elif values[0] is None or values[1] is None:
                failures += 1
                fate = "failed"
            elif (values[0] >= least) != (side == "positive"):
                fate = "by_trait"
            else:
                fate = "kept" if values[1] >= coherent else "by_coherence"
            number[fate] += 1
            kept += [answer] if fate == "kept" else []
        name = trait_set_name(trait, "model", side)
        waits = unjudged + (failures if source.unscored == "wait" else 0)
        if waits:
            why = f" (a judge failed on {failures}: traits.{trait}.unscored: drop leaves them out)" if failures else ""
            raise MissingDataError(
                f"{waits} answers of {condition!r} to {name!r} are not judged yet{why}\n  "
                f"{self.context.remedy('score')}",
                "score",
            )
        rule = {
            "keep": "trait",
            "trait_threshold": least,
            "coherence_threshold": coherent,
            "judges": {judge.measures: [judge.name, judge.version] for judge in (by_trait, by_coherence)},
        }
        counts = Counts(len(answers), len(distinct), **number)
        return Kept(tuple(kept), frozenset(answer.key for answer in answers), counts, rule)

    def _refuse_empty(self, trait: str, condition: str, sides: Mapping[Side, Kept]) -> None:
        empty = [(side, kept) for side, kept in sides.items() if not kept.answers]
        if not empty:
            return
        problems = []
        for side, kept in empty:
            c, rule = kept.counts, kept.rule
            sign = ">=" if side == "positive" else "<"
            problems.append(
                f"no {side} answer of {c.distinct} under {condition!r} has a trait score {sign} "
                f"{rule['trait_threshold']:g} and a coherence score >= {rule['coherence_threshold']:g} "
                f"({c.by_trait} fail by trait, {c.by_coherence} by coherence, {c.empty} are empty, {c.failed} unscored)"
            )
        key = f"traits.{trait}"
        raise StudyError(
            "; ".join(problems),
            file=where(self.context.study.file, key),
            key=key,
            remedy=f"change {key}.trait_threshold or coherence_threshold, sample more seeds, or use another "
            "judge; if the model does not take the persona on, there is no direction of it to find",
        )

    def user_sets(self) -> tuple[dict[str, PromptSet], dict[str, MissingDataError]]:
        """Return the prompt sets of user personas, and why those that cannot be made yet wait, by name."""
        sets: dict[str, PromptSet] = {}
        pending: dict[str, MissingDataError] = {}
        for trait, source in self.context.study.traits.items():
            if "user" not in source.families:
                continue
            names = {side: trait_set_name(trait, "user", side) for side in SIDES}
            try:
                chosen = {side: self._turns(trait, side) for side in SIDES}
            except MissingDataError as error:
                pending |= dict.fromkeys(names.values(), error)
                continue
            texts = [{answer.text for answer in answers} for answers in chosen.values()]
            both = sorted(texts[0] & texts[1])
            for side, answers in chosen.items():
                sets[names[side]] = user_prompt_set(names[side], answers, both)
                if not sets[names[side]].prompts:
                    key = f"traits.{trait}"
                    raise StudyError(
                        f"no {side} answer is left for the user persona: {len(both)} texts were given on both sides",
                        file=where(self.context.study.file, key),
                        key=key,
                        remedy="sample more seeds, or judge the answers (keep: trait)",
                    )
        return sets, pending

    def _turns(self, trait: str, side: Side) -> Sequence[Answer]:
        source = self.context.study.traits[trait]
        assert source.answers is not None
        if source.keep == "all":
            return self.given(trait, side, source.answers)
        return self.kept(trait, side, source.answers).answers

    def provenance(self, names: Sequence[str], responses: str | None, keep: str | None) -> dict[str, Any] | None:
        """Return rule and counts of what was kept of some prompt sets; None where nothing was chosen.

        Raises:
            MissingDataError: see `kept`.
        """
        found: dict[str, Any] = {}
        for name in names:
            parsed = parse_trait_set(name)
            if parsed is None:
                continue
            source = self.context.study.traits[parsed.trait]
            condition = source.answers if parsed.family == "user" else responses
            selects = source.keep == "trait" if parsed.family == "user" else keep is not None
            if selects and condition is not None:
                kept = self.kept(parsed.trait, parsed.side, condition)
                found[name] = {**kept.rule, "condition": condition, **kept.counts.__dict__}
                if parsed.family == "user":
                    found[name]["prompts"] = len(self.context.prompt_set(name).prompts)
        return found or None
