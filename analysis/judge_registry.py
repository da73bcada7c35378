"""Judges by name, as a study asks for them; a mistake in one is heard before a model runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from analysis.endpoint_judge import EndpointJudge
from analysis.judges import Degenerate, Judge, RefusalPhrases
from analysis.trait_judges import CoherenceRules, TraitRules
from store.errors import StudyError

AnyJudge = Judge | TraitRules | EndpointJudge

# Kind to factory. Every factory is a dataclass whose fields are the judge's options.
KINDS: dict[str, type[Any]] = {
    judge.name: judge for judge in (RefusalPhrases, Degenerate, TraitRules, CoherenceRules, EndpointJudge)
}
# Options of every judge, which are the study's business: what the judge is, and what it judges.
COMMON = ("kind", "prompts", "traits")


def make_judge(
    name: str, options: Mapping[str, Any] | None = None, *, file: str | None = None, key: str | None = None
) -> AnyJudge:
    """Make a judge of a study by name.

    Args:
        name: the judge's name in the study; one of `KINDS`, unless the option ``kind`` is given.
        options: the judge's options; what is left out has its default. Those of `COMMON` are not the judge's.
        file, key: where the study names it, for the error message.

    Raises:
        StudyError: for an unknown judge or option (naming the nearest known one) or a bad value.
    """
    options = options or {}
    kind = options.get("kind", name)
    if kind not in KINDS:
        what = "judge" if "kind" not in options else "kind of judge"
        raise StudyError(f"unknown {what} {kind!r}", file=file, key=key, remedy=_nearest(str(kind), list(KINDS)))
    factory = KINDS[kind]
    known = [field.name for field in fields(factory) if field.init and field.metadata.get("option", True)]
    for option in options:
        if option not in (*known, *COMMON):
            raise StudyError(
                f"judge {name} has no option {option!r}", file=file, key=key, remedy=_nearest(option, known)
            )
    needed = [f.name for f in fields(factory) if f.default is MISSING and f.default_factory is MISSING and f.init]
    missing = [option for option in needed if option not in options]
    if missing:
        problem = f"judge {name}: it needs {', '.join(missing)}"
        raise StudyError(problem, file=file, key=key, remedy="add the option")
    try:
        judge: AnyJudge = factory(**{option: value for option, value in options.items() if option not in COMMON})
    except ValueError as error:
        raise StudyError(f"judge {name}: {error}", file=file, key=key, remedy="correct this value") from error
    return judge


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"
