"""Names of directions in a study: families that one spec defines, and the short forms that lists may use.

A spec with ``k`` or ``seeds`` is written once and stands for directions of its own name with a suffix: ``refusal_pc``
with ``k: 3`` for ``refusal_pc.1`` to ``refusal_pc.3``, ``random`` with ``seeds: [7, 13]`` for ``random.7`` and
``random.13``. A list of directions may name them one by one, the whole family (``refusal_pc``), its first ones
(``refusal_pc.1-3``) or a pattern (``trait_*``). After `with_plain_names` a study holds plain names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from store.study import Study
from store.study_directions import (
    DirectionSpec,
    Orthogonalised,
    PrincipalComponents,
    PrincipalDirections,
    Random,
    RandomMatched,
)
from store.study_interventions import ProjectOut


def members(name: str, spec: DirectionSpec) -> dict[str, DirectionSpec]:
    """Return the directions that a spec stands for, by name: itself, unless it defines a family."""
    if isinstance(spec, (PrincipalComponents, PrincipalDirections)) and spec.index is None:
        return {f"{name}.{i}": spec.model_copy(update={"index": i, "k": 1}) for i in range(1, spec.k + 1)}
    if isinstance(spec, (Random, RandomMatched)) and spec.seeds is not None:
        return {f"{name}.{seed}": spec.model_copy(update={"seed": seed, "seeds": None}) for seed in spec.seeds}
    return {name: spec}


def families(specs: Mapping[str, DirectionSpec]) -> dict[str, list[str]]:
    """Return the names of the members of every spec that defines a family."""
    return {name: found for name, spec in specs.items() if (found := list(members(name, spec))) != [name]}


def spelt_out(names: Iterable[str], known: Sequence[str], of_family: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the directions that a list names, short forms spelt out, each once.

    A name or short form that fits nothing stays as it is, for the check of names to complain about.
    """
    found: dict[str, None] = {}
    for name in names:
        found.update(dict.fromkeys(_spelt_out(name, known, of_family) or [name]))
    return list(found)


def _spelt_out(name: str, known: Sequence[str], of_family: Mapping[str, Sequence[str]]) -> list[str]:
    if name in known:
        return [name]
    if name in of_family:
        return list(of_family[name])
    span = re.fullmatch(r"(.+)\.(\d+)-(\d+)", name)
    if span is not None:
        numbers = range(int(span[2]), int(span[3]) + 1)
        named = [f"{span[1]}.{number}" for number in numbers]
        return named if set(named) <= set(of_family.get(span[1], ())) else []
    return [other for other in known if fnmatchcase(other, name)] if "*" in name or "?" in name else []


def expand_directions(specs: Mapping[str, DirectionSpec]) -> dict[str, DirectionSpec]:
    """Return every direction with its spec; families and short forms are spelt out.

    A pattern in a spec never fits the spec's own family.

    Raises:
        ValueError: naming the direction that two specs define.
    """
    expanded: dict[str, DirectionSpec] = {}
    for name, spec in specs.items():
        for member, its in members(name, spec).items():
            if member in expanded:
                raise ValueError(member)
            expanded[member] = its
    of_family = families(specs)
    for name, spec in specs.items():
        own = list(members(name, spec))
        others = [other for other in expanded if other not in own]
        for key in ("directions", "orthogonal_to"):
            if isinstance(spec, (PrincipalDirections, Orthogonalised)) and hasattr(spec, key):
                plain = spelt_out(getattr(spec, key), others, of_family)
                for member in own:
                    expanded[member] = expanded[member].model_copy(update={key: plain})
    return expanded


def with_plain_names(study: Study) -> Study:
    """Spell out families of directions and short forms of their names, in every list that may hold them.

    Raises:
        ValueError: naming a direction that two specs define.
    """
    of_family = families(study.directions)
    specs = expand_directions(study.directions)

    def plain(record: Any, key: str) -> Any:
        named = getattr(record, key)
        return record if named == "all" else record.model_copy(update={key: spelt_out(named, list(specs), of_family)})

    old = study.geometry
    geometry = plain(old, "cosines").model_copy(
        update={
            "projections": [plain(item, "directions") for item in old.projections],
            "explained_variance": {name: plain(item, "directions") for name, item in old.explained_variance.items()},
            "cosine_nulls": None if old.cosine_nulls is None else plain(old.cosine_nulls, "directions"),
            "separability": {name: plain(item, "directions") for name, item in old.separability.items()},
        }
    )
    replay = study.replay
    if replay is not None:
        conditions = {
            name: spec.model_copy(
                update={
                    "interventions": [
                        plain(item, "project_out") if isinstance(item, ProjectOut) else item
                        for item in spec.interventions
                    ]
                }
            )
            for name, spec in replay.conditions.items()
        }
        monitor = None if replay.monitor is None else plain(replay.monitor, "directions")
        replay = replay.model_copy(update={"conditions": conditions, "monitor": monitor})
    return study.model_copy(update={"directions": specs, "geometry": geometry, "replay": replay})
