"""Prompts that sets share: what is refused (train with test, choices with what they report), and what a plan lists.

Prompts count as shared if they have the same `Prompt.likeness`: the same messages but for space at the ends of texts,
which most chat templates strip, and whatever their response. `overlaps` also takes what a chat template makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from store.conditions import directions_used
from store.errors import StudyError
from store.prompts import Prompt, PromptSet
from store.study import Study
from store.study_choices import choices_of
from store.study_directions import ancestors, reads
from store.study_expand import expand, expand_conditions
from store.study_interventions import statistic_of
from store.study_traits import parse_trait_set, trait_set_name
from store.yaml_file import where


def refuse_leaks(study: Study, sets: Mapping[str, PromptSet]) -> None:
    """Refuse parts of different name that share prompts, and choices that look at prompts which others use.

    Raises:
        StudyError: naming both sets and one prompt.
    """
    _refuse_parts(study, sets)
    _refuse_choices(study, sets)


def _refuse_parts(study: Study, sets: Mapping[str, PromptSet]) -> None:
    """Parts of different name (train, test) must not share prompts, also across sets or with another response."""
    owner: dict[str, str] = {}
    for name, prompts in sets.items():
        if "@" not in name:
            continue
        whole, _, part = name.partition("@")
        for prompt in prompts.prompts:
            other = owner.setdefault(prompt.likeness, name)
            if other.partition("@")[2] != part:
                key = f"prompts.{whole}.split"
                raise StudyError(
                    f"{name!r} and {other!r} share a prompt ({prompt.text[:60]!r})",
                    file=where(study.file, key),
                    key=key,
                    remedy=f"write prompts.{whole}.exclude: [{other.partition('@')[0]}], give both sets the same seed "
                    "and sizes, or set allow_overlap: true",
                )


def _refuse_choices(study: Study, sets: Mapping[str, PromptSet]) -> None:
    """Refuse a choice that looks at prompts on which its effect is reported, or from which directions are computed."""
    if study.replay is None:
        return
    read: dict[str, str] = {}
    for direction in study.directions:
        read = {**dict.fromkeys(_sets_read(study, direction), direction), **read}  # the first that reads a set is named
    taken = {
        name: f"which the condition {base!r} takes a number from"
        for base, condition in study.replay.conditions.items()
        for what in filter(None, map(statistic_of, condition.interventions))
        for name in what.sets
    }
    for choice, selection in study.select.items():
        if selection.given is not None:
            continue
        used = {name: "on which its effect is reported" for name in _reported(study, choice)}
        used |= taken | {name: f"which the direction {direction!r} reads" for name, direction in read.items()}
        for name in selection.sets:
            for other, why in used.items():
                # Turns of user personas are the model's own words: their sets may not be made yet.
                shared = name == other or (name in sets and other in sets and _shared(sets[name], sets[other]) > 0)
                if shared:
                    key = f"select.{choice}.prompts"
                    same = "" if name == other else f", which shares a prompt with {other!r}"
                    raise StudyError(
                        f"the choice is measured on {name!r}{same}, {why}",
                        file=where(study.file, key),
                        key=key,
                        remedy="choose on a part of its own, such as @val",
                    )


def _sets_read(study: Study, direction: str) -> set[str]:
    """Return the prompt sets from whose rows a direction and those that it is derived from are computed.

    Turns of a user persona are answers to the trait's own prompts, which then count as read too.
    """
    named = {name for spec in ancestors(study.directions, direction) for _, names in reads(spec) for name in names}
    asked = [part for name in named if (part := parse_trait_set(name)) is not None and part.family == "user"]
    return named | {trait_set_name(part.trait, "model", part.side) for part in asked}


def _reported(study: Study, choice: str) -> set[str]:
    """Return the prompt sets on which the effect of a choice is reported."""
    assert study.replay is not None
    names = {name for comparison in study.comparisons.values() for name in comparison.prompts}
    candidates = {selection.of for selection in study.select.values()}
    for name, spec in study.replay.conditions.items():
        if name not in candidates and choice in choices_of(spec):
            names |= {prompts for item in expand(name, spec) for prompts in item.spec.prompts or study.replay.prompts}
    return names


def _shared(one: PromptSet, other: PromptSet, rendered: Callable[[Prompt], str] = lambda prompt: prompt.id) -> int:
    """Return how many prompts of `one` are in `other` as well: with the same likeness, or rendered to the same text."""
    known = {key for prompt in other.prompts for key in (prompt.likeness, rendered(prompt))}
    return sum(prompt.likeness in known or rendered(prompt) in known for prompt in one.prompts)


@dataclass(frozen=True)
class Overlap:
    """Two prompt sets that something uses together and that share prompts."""

    first: str
    second: str
    shared: int  # prompts of the second that the first has as well
    users: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.users) - 3} more" if len(self.users) > 3 else ""
        text = f"{self.first} and {self.second} share {self.shared} prompts ({', '.join(self.users[:3])}{more})"
        names = [name.partition("@")[0] for name in (self.first, self.second)]
        if names[0] != names[1] and parse_trait_set(self.second) is None:
            text += f"; prompts.{names[1]}.exclude: [{self.first}] removes them"
        return text


def overlaps(
    study: Study, sets: Mapping[str, PromptSet], rendered: Callable[[Prompt], str] = lambda prompt: prompt.id
) -> list[Overlap]:
    """Return every pair of prompt sets that one direction, choice or replay uses together and that share prompts.

    A replay uses the prompts that it replays and those that the directions of its interventions are computed from.

    Args:
        rendered: what a prompt is to the model; prompts for which it is equal are shared, whatever their likeness.
    """
    users: dict[tuple[str, str], dict[str, None]] = {}
    order = {name: place for place, name in enumerate(sets)}
    for user, names in _together(study):
        known = sorted({name for name in names if name in sets}, key=lambda name: order[name])
        for pair in combinations(known, 2):
            users.setdefault(pair, {})[user] = None
    counted = {pair: _shared(sets[pair[1]], sets[pair[0]], rendered) for pair in users}
    return [Overlap(*pair, counted[pair], tuple(by)) for pair, by in users.items() if counted[pair]]


def _together(study: Study) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield (what uses them, prompt sets) for all that are used together."""
    for direction in study.directions:
        yield f"direction {direction}", _sets_read(study, direction)
    if study.replay is None:
        return
    for choice, selection in study.select.items():
        yield f"choice {choice}", {*selection.sets, *_reported(study, choice)} if selection.given is None else ()
    # Conditions whose choices are not made yet use the same directions, whatever is chosen.
    for item in expand_conditions(study.replay):
        used = {name for name in directions_used(item.spec) if name in study.directions}
        read = {name for direction in used for name in _sets_read(study, direction)}
        read |= {name for one in item.spec.interventions if (what := statistic_of(one)) for name in what.sets}
        yield "replay", {*(item.spec.prompts or study.replay.prompts), *read}
