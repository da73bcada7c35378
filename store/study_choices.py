"""From choices to conditions: what refers to a choice, and which values it may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from store.layers import LayerValue, resolve_layer
from store.references import Value, Values
from store.study import ConditionSpec, Replay, Study
from store.study_expand import expand, fill, is_layer, refers_to


def choices_of(spec: ConditionSpec) -> set[str]:
    """Return the names of the choices that a condition depends on: `persona` of ``$persona.layer``."""
    return {name.partition(".")[0] for name in refers_to(spec) if "." in name}


def without_idle_candidates(study: Study) -> Study:
    """Return the study without conditions that are only candidates of choices whose values are given."""
    if study.replay is None:
        return study
    idle = {choice.of for choice in study.select.values() if choice.given is not None}
    idle -= {choice.of for choice in study.select.values() if choice.given is None}
    kept = {name: spec for name, spec in study.replay.conditions.items() if name not in idle}
    return study.model_copy(update={"replay": study.replay.model_copy(update={"conditions": kept})})


def settled(choice: str, variables: Mapping[str, Value], n_layers: int) -> dict[str, Value]:
    """Return a choice's variables by reference name, layers as numbers: ``{"persona.layer": 20}``.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    found: dict[str, Value] = {}
    for name, value in variables.items():
        layer: LayerValue = value
        found[f"{choice}.{name}"] = resolve_layer(layer, n_layers) if is_layer(name) else value
    return found


def with_choices(replay: Replay, values: Values) -> tuple[Replay, dict[str, set[str]]]:
    """Return a replay section with choices put in, and the conditions that wait: name -> choices that are not made.

    Raises:
        BadConditionError: if a value makes no condition.
    """
    ready: dict[str, ConditionSpec] = {}
    waiting: dict[str, set[str]] = {}
    for name, spec in replay.conditions.items():
        one = fill(name, spec, values)
        if missing := choices_of(one):
            waiting[name] = missing
        else:
            ready[name] = one
    return replay.model_copy(update={"conditions": ready}), waiting


def possible(study: Study, n_layers: int) -> Iterator[tuple[str, ConditionSpec]]:
    """Yield (name in the file, condition) for every condition under every value that its choices may take.

    Raises:
        BadConditionError: if some candidate makes no condition of one that depends on the choice.
        ValueError: for a candidate's layer that the model does not have.
    """
    assert study.replay is not None
    for name, spec in study.replay.conditions.items():
        outcomes = [list(_outcomes(study, choice, n_layers)) for choice in sorted(choices_of(spec))]
        for combination in product(*outcomes):
            values = {key: value for part in combination for key, value in part.items()}
            for item in expand(name, fill(name, spec, values)):
                yield name, item.spec


def _outcomes(study: Study, choice: str, n_layers: int) -> Iterator[dict[str, Value]]:
    selection = study.select[choice]
    if selection.given is not None:
        yield settled(choice, selection.given, n_layers)
        return
    assert study.replay is not None
    assert selection.of is not None
    # What candidates do may itself depend on a choice; which values they try does not.
    for item in expand(selection.of, study.replay.conditions[selection.of]):
        yield settled(choice, item.variables, n_layers)
    if selection.otherwise is not None:
        yield settled(choice, selection.otherwise, n_layers)
