"""Conditions written once and meant several times: ``each`` and lists of coefficients, as single conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from pydantic import ValidationError

from store.references import Value, Values, filled, names_in, spelt
from store.study import ConditionSpec, Replay
from store.study_interventions import Add


@dataclass(frozen=True)
class Expanded:
    """One condition of a study, without lists; references to choices are still in it."""

    name: str  # unique in the study: base[layer=12,coefficient=2]
    base: str  # as the study names it
    series: str  # what it is a step of: the name without its coefficient where `each` varies more than that
    coefficient: float | None  # the swept one
    spec: ConditionSpec
    variables: Mapping[str, Value]  # what `each` put in, and a swept coefficient


def expand_conditions(replay: Replay) -> list[Expanded]:
    """Return every condition of a replay section, in the study's order.

    Raises:
        BadConditionError: if what `each` puts in makes no condition.
    """
    return [item for base, spec in replay.conditions.items() for item in expand(base, spec)]


def expand(base: str, spec: ConditionSpec) -> Iterator[Expanded]:
    """Yield the conditions that one entry stands for: every combination of `each`, times its swept coefficient."""
    for values in combinations(spec.each):
        one = fill(base, spec.model_copy(update={"each": {}}), values)
        swept = [i for i, item in enumerate(one.interventions) if isinstance(item, Add) and _is_swept(item)]
        if len(swept) > 1:
            remedy = "write one condition per combination, or give `each` a coefficient"
            raise BadConditionError(base, "two interventions sweep their coefficient", remedy, "interventions")
        if not swept:
            yield Expanded(_named(base, values), base, _series(base, values), _coefficient(values), one, values)
            continue
        item = one.interventions[swept[0]]
        assert isinstance(item, Add)
        assert isinstance(item.coefficient, list)
        for value in item.coefficient:
            interventions = list(one.interventions)
            interventions[swept[0]] = item.model_copy(update={"coefficient": value})
            variables = {**values, "coefficient": value}
            copy = one.model_copy(update={"interventions": interventions})
            yield Expanded(_named(base, variables), base, _series(base, variables), value, copy, variables)


def combinations(each: Mapping[str, list[Value]]) -> list[dict[str, Value]]:
    """Return every combination of the values of `each`; the last name changes fastest."""
    return [dict(zip(each, values, strict=True)) for values in product(*each.values())]


def fill(base: str, spec: ConditionSpec, values: Values) -> ConditionSpec:
    """Put values in place of the references to them; others stay.

    Raises:
        BadConditionError: if the result is no condition.
    """
    if not values or not refers_to(spec) & set(values):
        return spec
    try:
        return ConditionSpec.model_validate(filled(spec.model_dump(by_alias=True), values))
    except ValidationError as error:
        first = error.errors()[0]
        context = first.get("ctx", {})
        raise BadConditionError(base, context.get("problem", first["msg"]), context.get("remedy", "")) from None
    except ValueError as error:
        raise BadConditionError(base, str(error), "") from None


def refers_to(spec: ConditionSpec) -> set[str]:
    """Return the names that a condition refers to."""
    return names_in(spec.model_dump(by_alias=True))


class BadConditionError(ValueError):
    """Values that make no condition; who knows the file turns it into a StudyError."""

    def __init__(self, base: str, problem: str, remedy: str, *path: str):
        super().__init__(f"condition {base!r}: {problem}")
        self.path, self.problem = (base, *path), problem
        self.remedy = remedy or "correct the values of `each`, of the candidates, or what refers to them"


def is_layer(variable: str) -> bool:
    """Whether a variable holds a layer: it is called `layer`, or something that ends in `_layer`."""
    return variable == "layer" or variable.endswith("_layer")


def _named(base: str, variables: Values) -> str:
    # Of layers 1.0 (the last) is not 1.
    spellings = {name: str(value) if is_layer(name) else spelt(value) for name, value in variables.items()}
    inside = ",".join(f"{name}={spelling}" for name, spelling in spellings.items())
    return f"{base}[{inside}]" if inside else base


def _series(base: str, variables: Values) -> str:
    others = {name: value for name, value in variables.items() if name != "coefficient"}
    return _named(base, others) if "coefficient" in variables else base


def _coefficient(values: Values) -> float | None:
    value = values.get("coefficient")
    return None if value is None or isinstance(value, str) else float(value)


def _is_swept(item: Add) -> bool:
    return isinstance(item.coefficient, list)
