"""Read a study file: YAML with line numbers, types, then everything that can be checked without a model."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from store.conditions import directions_used, expand_sweeps
from store.errors import StudyError
from store.model_ref import is_local
from store.sites import RESPONSE_POSITIONS
from store.study import Add, CaptureEntry, MatchNorm, ProjectOut, Study
from store.study_directions import RandomMatched, Reading, component_in, reads
from store.study_directions import references as references
from store.study_names import expand_directions, families, spelt_out
from store.yaml_file import KeyPath, dotted, line_of, nearest, read_yaml, validation_error

DOCUMENTATION = "studies/demo.yaml"


class _Checker:
    """Cross-references of a study; every complaint carries file, line and key path."""

    def __init__(self, study: Study, node: yaml.Node, family_of: Mapping[str, str]):
        self.study, self.node, self.family_of = study, node, family_of
        traits = {f"{name}.{side}" for name in study.traits for side in ("positive", "negative")}
        parts = {f"{n}@{p}" for n, source in study.prompts.items() if source.split for p in source.split.parts}
        self.prompt_sets = set(study.prompts) | parts | traits
        # Sweeps expanded, with the prompt sets that each condition replays.
        self.conditions = (
            {name: spec.prompts or study.replay.prompts for name, _, _, spec in expand_sweeps(study.replay)}
            if study.replay
            else {}
        )

    def fail(self, problem: str, path: KeyPath, remedy: str) -> typing.NoReturn:
        # The file has the family, not its members.
        if len(path) > 1 and path[0] == "directions" and path[1] in self.family_of:
            path = (path[0], self.family_of[str(path[1])], *path[2:])
        file = f"{self.study.file}:{line_of(self.node, path)}"
        raise StudyError(problem, file=file, key=dotted(path), remedy=remedy)

    def known(self, what: str, name: str, known: Iterable[str], path: KeyPath) -> None:
        if name not in known:
            self.fail(f"no {what} is named {name!r}", path, nearest(name, known))

    def prompts(self, names: Iterable[str], path: KeyPath) -> None:
        for name in names:
            self.known("prompt set", name, self.prompt_sets, path)

    def responses(self, condition: str | None, path: KeyPath) -> None:
        """Check that `responses` names what generates them: one condition, and no whole sweep."""
        if condition is None or condition in self.conditions:
            return
        here = (*path, "responses")
        steps = [name for name in self.conditions if name.startswith(f"{condition}[")]
        if steps:
            self.fail(f"the condition {condition!r} is a sweep", here, f"name one of {', '.join(steps)}")
        self.known("replay condition", condition, self.conditions, here)

    def files(self) -> None:
        """Check that what the study names by path is there; the paths are absolute by now."""
        folder = self.study.file.absolute().parent
        sources: list[tuple[KeyPath, str | None]] = [
            *((("prompts", name, "path"), source.path) for name, source in self.study.prompts.items()),
            *((("traits", name, "path"), source.path) for name, source in self.study.traits.items()),
        ]
        for path, text in sources:
            if text is not None and not Path(text).is_file():
                what = "is a folder" if Path(text).is_dir() else "does not exist"
                self.fail(f"the file {text} {what}", path, f"check it; relative paths start at {folder}")
        for key in ("source", "adapter"):
            text = getattr(self.study.model, key)
            if text is not None and is_local(text) and not Path(text).exists():
                remedy = f"check it; paths that start with . are relative to {folder}"
                self.fail(f"there is no file or folder {text}", ("model", key), remedy)

    def capture(self) -> None:
        for index, entry in enumerate(self.study.capture):
            path: KeyPath = ("capture", index)
            self.prompts(entry.prompts, (*path, "prompts"))
            self.responses(entry.responses, path)
            if entry.responses is not None:
                self.replayed(entry.responses, entry.prompts, path)
                continue
            needing = [position for position in entry.positions if position in RESPONSE_POSITIONS]
            for name in entry.prompts if needing else []:
                source = self.study.prompts.get(name.partition("@")[0])
                if source is None or not (source.columns.response or source.columns.messages):
                    self.fail(
                        f"position {needing[0]} needs responses, and the prompt set {name!r} has none",
                        (*path, "positions"),
                        "set `responses:` to a replay condition, or name a response column of the prompt file",
                    )

    def replayed(self, condition: str, prompts: Iterable[str], path: KeyPath) -> None:
        """Check that a condition generates responses to those prompts."""
        replayed = self.conditions[condition]
        for name in prompts:
            if name not in replayed and name.partition("@")[0] not in replayed:
                self.fail(
                    f"condition {condition!r} does not replay the prompt set {name!r}",
                    (*path, "responses"),
                    f"add it to replay.conditions.{condition.partition('[')[0]}.prompts",
                )

    def captured(
        self, names: Iterable[str], component: str, position: str, responses: str | None, path: KeyPath
    ) -> None:
        """Check that some capture entry holds what a direction or projection reads."""
        for name in names:
            if not any(captures_of(self.study, name, component, position, responses)):
                suffix = f" with responses {responses!r}" if responses else ""
                self.fail(
                    f"nothing captures {component} at {position} of {name!r}{suffix}",
                    path,
                    "add it to an entry of `capture:`",
                )

    def directions(self) -> None:
        specs = self.study.directions
        for name, spec in specs.items():
            path: KeyPath = ("directions", name)
            named = references(spec)
            for key, other in named:
                self.known("direction", other, specs, (*path, key))
            for i, (key, other) in enumerate(named):
                if other in [earlier for _, earlier in named[:i]]:
                    self.fail(f"{other!r} is taken from itself: nothing is left", (*path, key), "name another one")
            if isinstance(spec, Reading | RandomMatched):
                self.responses(spec.responses, path)
            sides = reads(spec)
            for side, names in sides:
                self.prompts(names, (*path, side))
            for side, names in sides[1:]:
                for shared in [other for other in names if other in sides[0][1]]:
                    self.fail(f"{shared!r} is on both sides", (*path, side), "name it on one side")
        for name in specs:
            self.acyclic(name, ())
        for name, spec in specs.items():
            if isinstance(spec, Reading | RandomMatched):
                for side, names in reads(spec):
                    where_read = (component_of(self.study, name), spec.position, spec.responses)
                    self.captured(names, *where_read, ("directions", name, side))
        for name, spec in specs.items():
            components = {component_of(self.study, other): key for key, other in references(spec)}
            if len(components) > 1:
                problem = f"it mixes directions at {' and '.join(sorted(components))}"
                self.fail(problem, ("directions", name, max(components.values())), "read them at one component")

    def acyclic(self, name: str, trail: tuple[str, ...]) -> None:
        """Follow what a direction is computed from: others, or texts generated under conditions that use others."""
        if name in trail:
            loop = " -> ".join((*trail[trail.index(name) :], name))
            self.fail(f"directions depend on each other: {loop}", ("directions", name), "break the loop")
        spec = self.study.directions[name]
        needed = [other for _, other in references(spec)]
        if isinstance(spec, Reading | RandomMatched) and spec.responses is not None:
            assert self.study.replay is not None
            interventions = self.study.replay.conditions[spec.responses.partition("[")[0]]
            needed += sorted(directions_used(interventions) & set(self.study.directions))
        for other in needed:
            self.acyclic(other, (*trail, name))

    def geometry(self) -> None:
        geometry, specs = self.study.geometry, self.study.directions
        named: list[tuple[KeyPath, Iterable[str]]] = [
            (("cosines",), [] if geometry.cosines == "all" else geometry.cosines),
            *((("alignment", i, "pair"), item.pair) for i, item in enumerate(geometry.alignment)),
            *((("explained_variance", n, "directions"), s.directions) for n, s in geometry.explained_variance.items()),
        ]
        if geometry.cosine_nulls is not None:
            named.append((("cosine_nulls", "directions"), geometry.cosine_nulls.directions))
        for here, names in named:
            for name in [] if names == "all" else names:
                self.known("direction", name, specs, ("geometry", *here))
        for name, separability in geometry.separability.items():
            path: KeyPath = ("geometry", "separability", name)
            self.responses(separability.responses, path)
            for side, names in (("positive", separability.positive), ("negative", separability.negative)):
                self.prompts(names, (*path, side))
            for direction in list(specs) if separability.directions == "all" else separability.directions:
                self.known("direction", direction, specs, (*path, "directions"))
                read = (component_of(self.study, direction), separability.position, separability.responses)
                for side, names in (("positive", separability.positive), ("negative", separability.negative)):
                    self.captured(names, *read, (*path, side))
        for index, projection in enumerate(geometry.projections):
            path = ("geometry", "projections", index)
            self.prompts(projection.prompts, (*path, "prompts"))
            self.responses(projection.responses, path)
            for name in list(specs) if projection.directions == "all" else projection.directions:
                self.known("direction", name, specs, (*path, "directions"))
                component = component_of(self.study, name)
                at = (*path, "prompts")
                self.captured(projection.prompts, component, projection.position, projection.responses, at)

    def replay(self) -> None:
        if self.study.replay is None:
            return
        replay, specs = self.study.replay, self.study.directions
        self.prompts(replay.prompts, ("replay", "prompts"))
        for name, condition in replay.conditions.items():
            path: KeyPath = ("replay", "conditions", name)
            self.prompts(condition.prompts or [], (*path, "prompts"))
            if condition.control_of is not None:
                known = [*replay.conditions, *self.conditions]
                self.known("condition", condition.control_of, known, (*path, "control_of"))
                if condition.control_of.partition("[")[0] == name:
                    self.fail("a condition is no control of itself", (*path, "control_of"), "name another condition")
            sweeps = 0
            for index, intervention in enumerate(condition.interventions):
                here: KeyPath = (*path, "interventions", index)
                if isinstance(intervention, Add):
                    self.known("direction", intervention.add, specs, (*here, "add"))
                    sweeps += isinstance(intervention.coefficient, list)
                    if isinstance(intervention.norm, MatchNorm):
                        self.known("direction", intervention.norm.match, specs, (*here, "norm", "match"))
                else:
                    for direction in intervention.project_out:
                        self.known("direction", direction, specs, (*here, "project_out"))
            if sweeps > 1:
                self.fail(
                    "two interventions sweep their coefficient",
                    (*path, "interventions"),
                    "write one condition per combination",
                )
        if replay.monitor is not None:
            for direction in replay.monitor.directions:
                self.known("direction", direction, specs, ("replay", "monitor", "directions"))


def component_of(study: Study, direction: str) -> str:
    """Return the site component at which a direction is read."""
    return component_in(study.directions, direction)


def captures_of(
    study: Study, prompt_set: str, component: str, position: str, responses: str | None
) -> Iterator[CaptureEntry]:
    """Yield the capture entries that read a component and position of a prompt set."""
    for entry in study.capture:
        named = prompt_set in entry.prompts or prompt_set.partition("@")[0] in entry.prompts
        if named and component in entry.components and position in entry.positions and entry.responses == responses:
            yield entry


def load_study(path: str | Path) -> Study:
    """Read and check a study file; paths of inputs come back absolute.

    Raises:
        StudyError: for the first fault found, with file, line, key path and remedy.
    """
    file = Path(path)
    data, node = read_yaml(file, "study file")
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, Study, file, node, DOCUMENTATION) from None
    study = _with_absolute_paths(study.read_from(file), file)
    family_of = {member: name for name, its in families(study.directions).items() for member in its}
    try:
        study = _with_plain_names(study)
    except ValueError as error:
        here: KeyPath = ("directions", family_of.get(str(error), str(error)))
        _Checker(study, node, family_of).fail(f"two specs define the direction {str(error)!r}", here, "rename one")
    checker = _Checker(study, node, family_of)
    checker.files()
    checker.capture()
    checker.replay()
    checker.directions()
    checker.geometry()
    return study


def _with_plain_names(study: Study) -> Study:
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


def _absolute(file: Path, path: str) -> Path:
    return file.absolute().parent / os.path.expanduser(path)


def _with_absolute_paths(study: Study, file: Path) -> Study:
    """Resolve the paths of inputs against the study file's folder."""

    def moved(source: Any) -> Any:
        if source.path is None:
            return source
        return source.model_copy(update={"path": str(_absolute(file, source.path).resolve())})

    model = study.model
    local = {
        key: str(_absolute(file, value).resolve())
        for key in ("source", "adapter")
        if (value := getattr(model, key)) is not None and value.startswith(("./", "../", "~"))
    }
    return study.model_copy(
        update={
            "prompts": {name: moved(source) for name, source in study.prompts.items()},
            "traits": {name: moved(source) for name, source in study.traits.items()},
            "model": model.model_copy(update=local),
        }
    )
