"""Checks of what a study chooses and compares, and of references: before anything runs, with file, line and key."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping

import yaml

from store.errors import StudyError
from store.references import names_in
from store.study import ConditionSpec, Study
from store.study_choices import choices_of
from store.study_expand import BadConditionError, Expanded, expand, expand_conditions, refers_to
from store.study_select import Comparison, Selection
from store.yaml_file import KeyPath, dotted, nearest, place_of

FEWEST_CONTROLS = 20  # random conditions that an effect is ranked among


class Complaints:
    """How a study is found wrong: every complaint carries file, line and key path."""

    def __init__(self, study: Study, node: yaml.Node):
        self.study, self.node = study, node

    def fail(self, problem: str, path: KeyPath, remedy: str) -> typing.NoReturn:
        raise StudyError(problem, file=place_of(self.node, path), key=dotted(path), remedy=remedy)

    def known(self, what: str, name: str, known: Iterable[str], path: KeyPath) -> None:
        if name not in known:
            self.fail(f"no {what} is named {name!r}", path, nearest(name, known))

    def expanded(self) -> list[Expanded]:
        """Return the study's conditions without lists."""
        if self.study.replay is None:
            return []
        try:
            self._references()
            return expand_conditions(self.study.replay)
        except BadConditionError as error:
            self.fail(error.problem, ("replay", "conditions", *error.path), error.remedy)

    def _references(self) -> None:
        """Check that every reference has a value, and every value a reference."""
        assert self.study.replay is not None
        elsewhere = self.study.model_dump(exclude={"replay": {"conditions"}, "select": True, "judges": True})
        for section, content in elsewhere.items():
            # A dollar in a description, or in the name of a file, is no reference.
            if section in ("capture", "geometry", "replay") and names_in(content):
                problem = f"${min(names_in(content))} refers to a value, which only conditions can"
                self.fail(problem, (section,), "write the value")
        for name, spec in self.study.replay.conditions.items():
            self._condition(name, spec)

    def _condition(self, name: str, spec: ConditionSpec) -> None:
        path: KeyPath = ("replay", "conditions", name)
        used = refers_to(spec.model_copy(update={"each": {}}))
        for variable, values in spec.each.items():
            here: KeyPath = (*path, "each", variable)
            if variable not in used:
                self.fail(f"nothing refers to ${variable}", here, "use it in an intervention, or delete it")
            if names_in(values):
                self.fail("a value of `each` refers to another", here, "write the value")
            if len({repr(value) for value in values}) < len(values):  # 1 is a layer, 1.0 the last one
                self.fail("a value is named twice", here, "name each one once")
        for reference in sorted(used):
            choice, dot, variable = reference.partition(".")
            if not dot:
                self.known("value", reference, spec.each, path)
                continue
            self.known("choice", choice, self.study.select, path)
            self.known(f"variable of the choice {choice!r}", variable, self.variables(choice), path)

    def variables(self, choice: str) -> set[str]:
        """Return the names of the values that a choice gives."""
        selection = self.study.select[choice]
        if selection.given is not None:
            return set(selection.given)
        assert self.study.replay is not None
        assert selection.of is not None
        self.known("condition", selection.of, self.study.replay.conditions, ("select", choice, "of"))
        spec = self.study.replay.conditions[selection.of]
        swept = any(isinstance(getattr(item, "coefficient", None), list) for item in spec.interventions)
        found = {*spec.each, *(["coefficient"] if swept else [])}
        if not found:
            self.fail(
                f"{selection.of!r} is one condition: nothing to choose", ("select", choice, "of"), "give it `each`"
            )
        return found


def check_choices(complaints: Complaints, replayed: Mapping[str, list[str]]) -> None:
    """Check `select:`; `replayed` says which prompt sets every single condition replays.

    Raises:
        StudyError: for the first fault.
    """
    study = complaints.study
    for name, selection in study.select.items():
        path: KeyPath = ("select", name)
        if study.replay is None:
            complaints.fail("a choice is among conditions, and the study replays none", path, "add `replay:`")
        if selection.given is not None:
            continue
        assert selection.of is not None
        complaints.known("condition", selection.of, study.replay.conditions, (*path, "of"))
        candidates = [item.name for item in expand(selection.of, study.replay.conditions[selection.of])]
        complaints.variables(name)
        _against(complaints, name, selection, replayed)
        for prompts in selection.sets:
            for condition in (*candidates, selection.against):
                _replays(complaints, condition, prompts, replayed, (*path, "prompts"))
        if selection.otherwise is not None and set(selection.otherwise) != complaints.variables(name):
            wanted = ", ".join(sorted(complaints.variables(name)))
            complaints.fail("it must state the same variables as the candidates", (*path, "otherwise"), wanted)
        _acyclic(complaints, name, ())


def _against(complaints: Complaints, choice: str, selection: Selection, replayed: Mapping[str, list[str]]) -> None:
    path: KeyPath = ("select", choice, "against")
    complaints.known("condition", selection.against, replayed, path)
    assert complaints.study.replay is not None
    if choices_of(complaints.study.replay.conditions[selection.against.partition("[")[0]]):
        complaints.fail("it depends on a choice itself", path, "compare with a condition that does not")


def _acyclic(complaints: Complaints, choice: str, trail: tuple[str, ...]) -> None:
    if choice in trail:
        loop = " -> ".join((*trail[trail.index(choice) :], choice))
        complaints.fail(f"choices depend on each other: {loop}", ("select", choice), "break the loop")
    selection = complaints.study.select[choice]
    assert complaints.study.replay is not None
    if selection.given is None and selection.of in complaints.study.replay.conditions:
        for other in sorted(choices_of(complaints.study.replay.conditions[selection.of])):
            _acyclic(complaints, other, (*trail, choice))


def check_comparisons(complaints: Complaints, replayed: Mapping[str, list[str]]) -> None:
    """Check `comparisons:`: its conditions are there, pair up, and replay the prompts.

    Raises:
        StudyError: for the first fault.
    """
    study = complaints.study
    for name, comparison in study.comparisons.items():
        path: KeyPath = ("comparisons", name)
        if study.replay is None:
            complaints.fail("it compares conditions, and the study replays none", path, "add `replay:`")
        conditions = expand_conditions(study.replay)
        for key, named in (("first", comparison.first), ("second", [comparison.second])):
            for one in named:
                complaints.known("condition", one, [*study.replay.conditions, *replayed], (*path, key))
        try:
            found = pairs(comparison, conditions)
        except ValueError as error:
            complaints.fail(str(error), path, "name a single condition, or add the variable to `pool`")
        for first, second in found:
            controls = _controls(complaints, comparison, first, conditions, (*path, "among"))
            for condition in (*first.members, *second.members, *controls):
                for prompts in comparison.prompts:
                    _replays(complaints, condition, prompts, replayed, (*path, "prompts"))


def check_claims(complaints: Complaints) -> None:
    """Check that claims rest on comparisons that the study makes.

    Raises:
        StudyError: for the first that does not.
    """
    for name, claim in complaints.study.claims.items():
        for comparison in claim.comparisons or []:
            complaints.known("comparison", comparison, complaints.study.comparisons, ("claims", name, "comparisons"))


def _controls(
    complaints: Complaints, comparison: Comparison, first: Side, conditions: list[Expanded], path: KeyPath
) -> tuple[str, ...]:
    if comparison.among is None:
        return ()
    assert complaints.study.replay is not None
    complaints.known("condition", comparison.among, complaints.study.replay.conditions, path)
    controls = controls_of(comparison, first, conditions)
    if len(first.members) > 1:
        complaints.fail(
            f"{first.name!r} pools {len(first.members)} conditions; a mean of several is not ranked among single ones",
            path,
            "name one condition as `first`, or leave its variable out of `pool`",
        )
    if set(controls) & set(first.members):
        complaints.fail(f"{first.name!r} is ranked among itself", path, "name other conditions")
    if len(controls) < FEWEST_CONTROLS:
        complaints.fail(
            f"{first.name!r} is ranked among {len(controls)} conditions: p cannot be below 1/{len(controls) + 1}",
            path,
            f"give {comparison.among!r} at least {FEWEST_CONTROLS} seeds under `each`",
        )
    return controls


def controls_of(comparison: Comparison, first: Side, conditions: Iterable[Expanded]) -> tuple[str, ...]:
    """Return the conditions of `among` that agree with the first side in the variables that both have."""
    return tuple(
        item.name
        for item in conditions
        if comparison.among in (item.base, item.name)
        and all(first.variables.get(key, value) == value for key, value in item.variables.items())
    )


class Side(typing.NamedTuple):
    """One side of a comparison: conditions that count as repetitions of each prompt."""

    name: str
    members: tuple[str, ...]
    variables: Mapping[str, object]


def pairs(comparison: Comparison, conditions: Iterable[Expanded]) -> list[tuple[Side, Side]]:
    """Return the single comparisons that one entry stands for.

    Raises:
        ValueError: if a first side has no partner, or several, or is its own.
    """
    conditions = list(conditions)
    seconds = _sides(comparison.second, comparison.pool, conditions)
    found = []
    for name in comparison.first:
        for first in _sides(name, comparison.pool, conditions):
            partners = [
                second
                for second in seconds
                if all(first.variables.get(key, value) == value for key, value in second.variables.items())
            ]
            if len(partners) != 1:
                what = "several partners: " + ", ".join(p.name for p in partners) if partners else "no partner"
                raise ValueError(f"{first.name!r} has {what} in {comparison.second!r}")
            if set(first.members) & set(partners[0].members):
                raise ValueError(f"{first.name!r} is compared with itself")
            found.append((first, partners[0]))
    return found


def _sides(name: str, pool: Iterable[str], conditions: list[Expanded]) -> list[Side]:
    """Group the conditions that a name stands for by their variables but those of `pool`."""
    groups: dict[tuple[tuple[str, object], ...], list[str]] = {}
    for item in conditions:
        if item.name == name:
            return [Side(name, (name,), item.variables)]
        if item.base == name:
            kept = tuple((key, value) for key, value in item.variables.items() if key not in pool)
            groups.setdefault(kept, []).append(item.name)
    return [
        Side(members[0] if len(members) == 1 else _spelt(name, kept), tuple(members), dict(kept))
        for kept, members in groups.items()
    ]


def _spelt(name: str, variables: tuple[tuple[str, object], ...]) -> str:
    inside = ",".join(f"{key}={value}" for key, value in variables)
    return f"{name}[{inside}]" if inside else name


def _replays(
    complaints: Complaints, condition: str, prompts: str, replayed: Mapping[str, list[str]], path: KeyPath
) -> None:
    known = {name for names in replayed.values() for name in names}
    complaints.known("replayed prompt set", prompts, known, path)
    if prompts not in replayed[condition]:
        remedy = f"add it to replay.conditions.{condition.partition('[')[0]}.prompts"
        complaints.fail(f"condition {condition!r} does not replay the prompt set {prompts!r}", path, remedy)
