"""Check a study's layers against a model: each that is named exists, and directions are captured where they act."""

from __future__ import annotations

from collections.abc import Iterator

from store.conditions import source_layer
from store.errors import StudyError
from store.layers import LayersValue, LayerValue, resolve_layer, resolve_layers
from store.study import ConditionSpec, Study
from store.study_choices import possible
from store.study_directions import RandomMatched, Reading, reads, references
from store.study_expand import BadConditionError, is_layer
from store.study_file import captures_of, component_of
from store.study_geometry import CosineNullsSpec, ExplainedVarianceSpec, SeparabilitySpec
from store.study_interventions import Add, MatchNorm, directions_of
from store.yaml_file import where


def check_layers(study: Study, n_layers: int) -> None:
    """Check every layer that a study names, before anything is captured.

    Raises:
        StudyError: for a layer that the model does not have, or at which the study does not capture what a direction
            is computed from; names file, line, key and the valid layers.
    """
    for index, entry in enumerate(study.capture):
        _resolve(study, entry.layers, n_layers, f"capture[{index}].layers")
    computed = {name: direction_layers(study, name, n_layers) for name in study.directions}
    _check_geometry(study, computed, n_layers)
    if study.replay is None:
        return
    for name, spec in _possible(study, n_layers):
        for index, item in enumerate(spec.interventions):
            key = f"replay.conditions.{name}.interventions[{index}]"
            layers = _resolve(study, item.layers, n_layers, f"{key}.layers")
            key = f"{key}.layers"
            if item.from_layer is not None:
                key = key.removesuffix("layers") + "from_layer"
                _resolve_one(study, item.from_layer, n_layers, key)
            read = [source_layer(item, layer, n_layers) for layer in layers]
            used = directions_of(item)
            if isinstance(item, Add) and isinstance(item.norm, MatchNorm):
                used.append(item.norm.match)
            _require(study, used, read, computed, key)
    monitor = study.replay.monitor
    if monitor is not None:
        layers = _resolve(study, monitor.layers, n_layers, "replay.monitor.layers")
        _require(study, monitor.directions, layers, computed, "replay.monitor.layers")


def _possible(study: Study, n_layers: int) -> Iterator[tuple[str, ConditionSpec]]:
    """Yield every condition under every value that it may get, with errors that name the file."""
    try:
        for choice, selection in study.select.items():
            for key, values in (("given", selection.given), ("otherwise", selection.otherwise)):
                layers = {name: value for name, value in (values or {}).items() if is_layer(name)}
                for name, layer in layers.items():
                    _resolve_one(study, layer, n_layers, f"select.{choice}.{key}.{name}")
        yield from possible(study, n_layers)
    except BadConditionError as error:
        key = f"replay.conditions.{'.'.join(error.path)}"
        raise StudyError(error.problem, file=where(study.file, key), key=key, remedy=error.remedy) from None
    except ValueError as error:
        raise _no_such_layer(study, error, "replay.conditions") from None


def direction_layers(study: Study, name: str, n_layers: int) -> set[int]:
    """Return the absolute layers of a direction: those at which the study captures all that it is computed from.

    Raises:
        StudyError: if there is none.
    """
    spec = study.directions[name]
    each = [direction_layers(study, other, n_layers) for _, other in references(spec)]
    if isinstance(spec, Reading | RandomMatched):
        component = component_of(study, name)
        for prompts in [prompts for _, sets in reads(spec) for prompts in sets]:
            entries = captures_of(study, prompts, component, spec.position, spec.responses, spec.keep)
            each.append({layer for entry in entries for layer in resolve_layers(entry.layers, n_layers)})
    layers = set.intersection(*each)
    if not layers:
        raise StudyError(
            f"no layer is captured of all that {name!r} is computed from",
            file=where(study.file, f"directions.{name}"),
            key=f"directions.{name}",
            remedy="capture its prompt sets at the same layers",
        )
    return layers


def _check_geometry(study: Study, computed: dict[str, set[int]], n_layers: int) -> None:
    geometry = study.geometry
    asked: list[tuple[str, CosineNullsSpec | ExplainedVarianceSpec | SeparabilitySpec]] = []
    if geometry.cosine_nulls is not None:
        asked.append(("cosine_nulls", geometry.cosine_nulls))
    asked += [(f"explained_variance.{name}", spec) for name, spec in geometry.explained_variance.items()]
    asked += [(f"separability.{name}", spec) for name, spec in geometry.separability.items()]
    for name, spec in asked:
        key = f"geometry.{name}.layers"
        layers = _resolve(study, spec.layers, n_layers, key)
        if spec.layers != "all":
            _require(study, list(computed) if spec.directions == "all" else spec.directions, layers, computed, key)


def _require(study: Study, names: list[str], layers: list[int], computed: dict[str, set[int]], key: str) -> None:
    for name in names:
        missing = sorted(set(layers) - computed[name])
        if missing:
            raise StudyError(
                f"the study does not capture the direction {name!r} at layer {', '.join(map(str, missing))}",
                file=where(study.file, key),
                key=key,
                remedy=f"add the layer to `capture:`, or choose of {', '.join(map(str, sorted(computed[name])))}",
            )


def _resolve(study: Study, layers: LayersValue, n_layers: int, key: str) -> list[int]:
    try:
        return resolve_layers(layers, n_layers)
    except ValueError as error:
        raise _no_such_layer(study, error, key) from None


def _resolve_one(study: Study, layer: LayerValue, n_layers: int, key: str) -> int:
    try:
        return resolve_layer(layer, n_layers)
    except ValueError as error:
        raise _no_such_layer(study, error, key) from None


def _no_such_layer(study: Study, error: ValueError, key: str) -> StudyError:
    return StudyError(
        str(error),
        file=where(study.file, key),
        key=key,
        remedy="choose a layer that the model has, or a fraction of depth",
    )
