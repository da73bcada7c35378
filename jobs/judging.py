"""The judges of a study: each bound to the traits that it scores, and to the prompt sets that it looks at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from analysis.endpoint_judge import EndpointJudge
from analysis.judge_registry import make_judge
from analysis.judges import Judge
from analysis.trait_judges import TraitRules
from store.errors import StudyError
from store.fingerprint import canonical_json
from store.study import Study
from store.study_traits import SIDES, trait_set_name
from store.traits import Trait, load_trait
from store.yaml_file import nearest, where


@dataclass(frozen=True)
class StudyJudge:
    """One judge of a study. A judge of traits is one for each trait: its version says which."""

    name: str
    judge: Judge | EndpointJudge
    sets: frozenset[str] | None  # the prompt sets whose texts it scores; None: all
    trait: str | None  # the study's name of the trait that it scores
    options: str  # JSON

    @property
    def version(self) -> str:
        return self.judge.version

    @property
    def measures(self) -> str:
        return self.judge.measures


def study_judges(study: Study) -> list[StudyJudge]:
    """Make the study's judges.

    Raises:
        StudyError: for an unknown judge, option, prompt set or trait, or a trait for which a judge has no rule.
    """
    return [judge for name in study.judges for judge in _bound(study, name)]


def _bound(study: Study, name: str) -> Iterator[StudyJudge]:
    options, key = study.judges[name], f"judges.{name}"
    judge = make_judge(name, options, file=where(study.file, key), key=key)
    known = [*study.prompts, *(f"{n}@{p}" for n, s in study.prompts.items() if s.split for p in s.split.parts)]
    known += [each for trait, source in study.traits.items() for each in source.set_names(trait)]
    sets = _names(study, name, "prompts", known)
    chosen = _names(study, name, "traits", list(study.traits))
    given = canonical_json(options)
    if not (isinstance(judge, TraitRules) or (isinstance(judge, EndpointJudge) and judge.of_a_trait)):
        scope = None if sets is None and chosen is None else frozenset(sets or ()) | _of_traits(chosen or ())
        yield StudyJudge(name, judge, scope, None, given)
        return
    for trait in study.traits if chosen is None else chosen:
        scope = _of_traits([trait])
        scope = scope if sets is None else scope & sets
        try:
            bound = judge.bind(trait_of(study, trait))
        except ValueError as error:
            file = where(study.file, key)
            raise StudyError(str(error), file=file, key=key, remedy="or name other traits under `traits:`") from None
        yield StudyJudge(name, bound, scope, trait, given)


def _names(study: Study, name: str, option: str, known: list[str]) -> frozenset[str] | None:
    given = study.judges[name].get(option)
    if given is None:
        return None
    for item in given if isinstance(given, list) else [given]:
        if item not in known:
            key = f"judges.{name}.{option}"
            what = "prompt set" if option == "prompts" else "trait"
            problem = f"no {what} is named {item!r}"
            raise StudyError(problem, file=where(study.file, key), key=key, remedy=nearest(str(item), known))
    return frozenset(str(item) for item in (given if isinstance(given, list) else [given]))


def _of_traits(traits: frozenset[str] | list[str] | tuple[()]) -> frozenset[str]:
    return frozenset(trait_set_name(trait, "model", side) for trait in traits for side in SIDES)


@lru_cache(maxsize=1024)
def _trait_file(path: str, changed: int) -> Trait:
    return load_trait(path)


def trait_of(study: Study, name: str) -> Trait:
    """Return what a trait's file says.

    Raises:
        StudyError: if it is broken.
    """
    path = study.traits[name].path
    return _trait_file(path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)


def judges_of_trait(study: Study, trait: str, judges: Sequence[StudyJudge]) -> tuple[StudyJudge, StudyJudge]:
    """Return the judges whose trait and coherence scores decide which answers of a trait count.

    Args:
        judges: those of the study.

    Raises:
        StudyError: if there is none, or several and the study does not choose.
    """
    wanted = _of_traits([trait])
    found = []
    for measures in ("trait", "coherence"):
        fitting = [
            judge
            for judge in judges
            if judge.measures == measures
            and judge.trait in (None, trait)
            and (judge.sets is None or wanted <= judge.sets)
        ]
        chosen: str | None = getattr(study.traits[trait].judges, measures)
        names = [judge.name for judge in fitting]
        key = f"traits.{trait}" + (f".judges.{measures}" if chosen else "")
        if chosen is not None and chosen not in names:
            problem = f"no judge of {measures} that scores this trait is named {chosen!r}"
            raise StudyError(problem, file=where(study.file, key), key=key, remedy=nearest(chosen, names))
        if chosen is None and len(names) != 1:
            many = f"{len(names)} judges of {measures} score it ({', '.join(names)})" if names else ""
            problem = many or f"its answers are to be kept by their scores, and no judge of {measures} scores them"
            remedy = (
                f"choose one: traits.{trait}.judges.{measures}" if names else f"add one: judges: {{{measures}: {{}}}}"
            )
            raise StudyError(problem, file=where(study.file, key), key=key, remedy=remedy)
        found.append(next(judge for judge in fitting if chosen in (None, judge.name)))
    return found[0], found[1]


def check_judges(study: Study) -> None:
    """Check the study's judges, and that every trait whose answers are selected has what selects them."""
    judges = study_judges(study)
    for trait in selected_traits(study):
        judges_of_trait(study, trait, judges)


def selected_traits(study: Study) -> list[str]:
    """Return the traits of which only the answers that count are used somewhere."""
    named: set[str] = {n for n, s in study.traits.items() if "user" in s.families and s.keep == "trait"}
    for entry in study.capture:
        if entry.keep:
            named |= {name.partition(".")[0] for name in entry.prompts}
    return [trait for trait in study.traits if trait in named]


def missing_keys(judges: Sequence[StudyJudge]) -> list[str]:
    """Return the environment variables that judges name and that are not set."""
    found = [
        judge.judge.api_key_env
        for judge in judges
        if isinstance(judge.judge, EndpointJudge) and judge.judge.api_key_env and not key_of(judge.judge)
    ]
    return list(dict.fromkeys(found))


def key_of(judge: EndpointJudge) -> str | None:
    """Return the key that the judge's environment variable holds."""
    return os.environ.get(judge.api_key_env, "").strip() or None if judge.api_key_env else None
