"""What the study's judges say of its texts, as outcomes: refusal, degenerate, other. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from jobs.context import Context
from jobs.judging import study_judges
from store.errors import StudyError
from store.study_select import Outcome
from store.yaml_file import where


class Outcomes:
    """The committed scores of the study's present judges, by generation."""

    def __init__(self, context: Context):
        self.context = context
        judges = [one for one in study_judges(context.study) if one.measures in ("refusal", "degenerate")]
        self.judges = {judge.name: judge.version for judge in judges}
        self.measures = {judge.name: judge.measures for judge in judges}
        columns = ["generation_key", "judge", "judge_version", "label", "error"]
        table = context.results.read("scores", columns=columns, filters=[("judge", "in", [*self.judges])])
        self._labels: dict[tuple[str, str], str] = {
            (record["generation_key"], record["judge"]): record["label"]
            for record in table.to_pylist()
            if record["error"] is None and self.judges[record["judge"]] == record["judge_version"]
        }

    def refusal_judge(self, named: str | None, key: str) -> str:
        """Return the judge of refusals that a part of the study means; `key` is that part, for the message.

        Raises:
            StudyError: if it names none of the study's, or none where the study has several or no judge of refusals.
        """
        known = [name for name, measures in self.measures.items() if measures == "refusal"]
        if named in known:
            return named
        if named is None and len(known) == 1:
            return known[0]
        file = self.context.study.file
        problem = f"{named!r} is no judge of refusals" if named else f"the study has {len(known)} judges of refusals"
        remedy = f"judge: {' or '.join(known)}" if known else "add refusal_phrases to `judges:`"
        raise StudyError(problem, file=where(file, key), key=key, remedy=remedy)

    def of(self, generation: str, outcome: Outcome, judge: str) -> bool | None:
        """Return whether a text has an outcome; None where a score that decides it is missing.

        Args:
            generation: its key.
            outcome: what is asked.
            judge: the judge of refusals that counts. Degenerate is what any judge of that says.
        """
        if outcome == "refusal":
            return self._is(generation, judge, "refusal")
        degenerate = self._any_degenerate(generation)
        if outcome == "degenerate":
            return degenerate
        refusal = self._is(generation, judge, "refusal")
        return None if refusal is None or degenerate is None else not refusal and not degenerate

    def share(self, generations: Iterable[str], outcome: Outcome, judge: str) -> float | None:
        """Return the share of a prompt's texts with an outcome; None if one of them is not scored, or there is none."""
        found = [self.of(key, outcome, judge) for key in generations]
        if not found or None in found:
            return None
        return sum(bool(value) for value in found) / len(found)

    def _is(self, generation: str, judge: str, label: str) -> bool | None:
        found = self._labels.get((generation, judge))
        return None if found is None else found == label

    def _any_degenerate(self, generation: str) -> bool | None:
        names = [name for name, measures in self.measures.items() if measures == "degenerate"]
        found = [self._is(generation, name, "degenerate") for name in names]
        return None if not found or None in found else any(found)
